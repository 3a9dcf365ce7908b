"""How many requests may be on their way to an endpoint at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

AUTO_START, AUTO_MOST = 4, 512
_DECREASE = 0.7
_SLOWER = 2.0


class Bucket:
    """A token bucket: `rate` a minute, of which a tenth may come at once."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate, self._clock = rate / 60.0, clock
        self._most = max(1.0, rate / 10.0)
        self._level, self._at = self._most, clock()

    def take(self, amount: float) -> None:
        self._refill()
        self._level = min(self._most, self._level - amount)

    def wait(self) -> float:
        """Seconds until the level is positive."""
        self._refill()
        return 0.0 if self._level > 0 else -self._level / self._rate + 0.001

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now


_duration_part = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float:
    """Seconds in a duration as Go writes it: 6m0s, 1.5s, 20ms. 0 where it is none."""
    return sum(float(count) * _SECONDS[unit] for count, unit in _duration_part.findall(text))


class Limiter:
    """A limit on requests in flight, and a cool-down that all of them share.

    A fixed `concurrency` stays but for slow start after a cool-down. None finds the limit out:
    additive increase while answers come and are not slow, multiplicative decrease where the
    server refuses (the AIMD rule of TCP congestion avoidance, RFC 5681), once per round trip.
    """

    def __init__(
        self,
        concurrency: int | None,
        clock: Callable[[], float] = time.monotonic,
        rpm: float | None = None,
        tpm: float | None = None,
    ) -> None:
        self._requests = Bucket(rpm, clock) if rpm else None
        self._tokens = Bucket(tpm, clock) if tpm else None
        self._most = float(concurrency or AUTO_MOST)
        self._auto = concurrency is None
        self._limit = float(concurrency or AUTO_START)
        self._threshold = self._most  # below it the limit grows as in slow start
        self._clock = clock
        self._paused_until = 0.0
        self._cut_at = -1.0
        self._fastest: float | None = None
        self._recent: float | None = None

    @property
    def limit(self) -> int:
        return max(1, int(self._limit))

    def pause(self) -> float:
        """Seconds until anything may be sent; 0 for now."""
        waits = [self._paused_until - self._clock()]
        waits += [bucket.wait() for bucket in (self._requests, self._tokens) if bucket]
        return max(0.0, *waits)

    def sent(self, tokens: int) -> None:
        """A request is going out that may take so many tokens, its answer's included."""
        if self._requests:
            self._requests.take(1)
        if self._tokens:
            self._tokens.take(tokens)

    def corrected(self, tokens: int) -> None:
        """So many tokens more (or, negative, fewer) were used than `sent` said."""
        if self._tokens:
            self._tokens.take(tokens)

    def told(self, headers: Mapping[str, str]) -> None:
        """Waits for what the server says is used up: x-ratelimit-remaining-* and -reset-*.

        Source: OpenAI's guide to rate limits, "Rate limits in headers".
        """
        for name in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{name}") == "0":
                seconds = duration(headers.get(f"x-ratelimit-reset-{name}", ""))
                self._paused_until = max(self._paused_until, self._clock() + seconds)

    def answered(self, seconds: float, in_flight: int) -> None:
        """An answer came after `seconds`, with `in_flight` requests on their way."""
        self._recent = seconds if self._recent is None else 0.9 * self._recent + 0.1 * seconds
        self._fastest = self._recent if self._fastest is None else min(self._fastest, self._recent)
        if in_flight < self.limit - 1:  # the limit was not what held us, so it says nothing
            return
        if self._auto and self._recent > _SLOWER * max(self._fastest, 0.001):
            return  # more at once would only wait longer
        step = 1.0 if self._limit < self._threshold else 1.0 / self._limit
        self._limit = min(self._most, self._limit + step)

    def refused(self, sent_at: float, floor: float | None) -> None:
        """The server had too much to do for a request that was sent at `sent_at`."""
        now = self._clock()
        if floor:
            self._paused_until = max(self._paused_until, now + floor)
        if sent_at <= self._cut_at:
            return  # it was on its way when the limit was cut already
        self._cut_at = now
        self._threshold = max(1.0, self._limit * _DECREASE)
        self._limit = self._threshold if self._auto or not floor else 1.0
        if not self._auto:
            self._threshold = self._most
