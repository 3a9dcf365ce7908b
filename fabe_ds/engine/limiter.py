"""How many requests may be on their way to an endpoint at once."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Mapping

AUTO_START, AUTO_MOST = 4, 512
_DECREASE = 0.7
_SLOWER = 2.0
_LATENCIES = 200
_LATE, _LATE_LEAST = 3.0, 2.0
_REST = 15.0  # round trips at a level whose neighbour was refused


class Bucket:
    """A token bucket: `rate` a minute, of which a tenth may come at once.

    `sharers` tells how many processes share the rate just now. They begin with nothing in the
    bucket, since the first of them does not know yet how many are coming.
    """

    def __init__(
        self, rate: float, clock: Callable[[], float], sharers: Callable[[], int] | None = None
    ) -> None:
        self._whole, self._clock, self._sharers = rate, clock, sharers
        self._share()
        self._level, self._at = self._most if sharers is None else 0.0, clock()

    def _share(self) -> None:
        part = self._whole / (self._sharers() if self._sharers else 1)
        self._rate, self._most = part / 60.0, max(1.0, part / 10.0)

    def take(self, amount: float) -> None:
        self._refill()
        self._level = min(self._most, self._level - amount)

    def wait(self) -> float:
        """Seconds until the level is positive."""
        self._refill()
        return 0.0 if self._level > 0 else -self._level / self._rate + 0.001

    def _refill(self) -> None:
        now = self._clock()
        self._share()
        self._level = min(self._most, self._level + (now - self._at) * self._rate)
        self._at = now


_duration_part = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float:
    """Seconds in a duration as Go writes it: 6m0s, 1.5s, 20ms. 0 where it is none."""
    return sum(float(count) * _SECONDS[unit] for count, unit in _duration_part.findall(text))


class Limiter:
    """A limit on requests in flight, and a cool-down that all of them share.

    The limit is searched for, up to `concurrency` (None: no bound but AUTO_MOST, and the search
    begins low). A level at which a round of answers came without a refusal is good; from there the
    search goes up by 1, 2, 4, ... each round. A refusal while searching goes back to the good level
    and rests there; a refusal at the good level says that the server takes less than it did, and
    cuts the level by a part. Answers that come much slower than the quickest did stop the search.
    """

    def __init__(
        self,
        concurrency: int | None,
        clock: Callable[[], float] = time.monotonic,
        rpm: float | None = None,
        tpm: float | None = None,
        sharers: Callable[[], int] | None = None,
    ) -> None:
        self._requests = Bucket(rpm, clock, sharers) if rpm else None
        self._tokens = Bucket(tpm, clock, sharers) if tpm else None
        self._most = concurrency or AUTO_MOST
        self._limit = self._good = concurrency or AUTO_START
        self._step = self._limit
        self._answers = 0  # at this level
        self._clock = clock
        self._paused_until = self._rest_until = 0.0
        self._cut_at = -1.0
        self._fastest: float | None = None
        self._recent: float | None = None
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)

    def late(self) -> float | None:
        """Seconds after which an answer is suspiciously late: three times the 99th percentile of
        the latest ones. None while too few are known."""
        if len(self._latencies) < _LATENCIES // 2:
            return None
        return max(_LATE_LEAST, _LATE * sorted(self._latencies)[int(len(self._latencies) * 0.99)])

    @property
    def limit(self) -> int:
        return self._limit

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
        self._latencies.append(seconds)
        self._recent = seconds if self._recent is None else 0.9 * self._recent + 0.1 * seconds
        self._fastest = self._recent if self._fastest is None else min(self._fastest, self._recent)
        if self._limit >= self._most or in_flight < self._limit - 1:
            return  # nothing to search for, or the limit was not what held us
        self._answers += 1
        if self._answers < self._limit or self._clock() < self._rest_until:
            return
        if self._recent > _SLOWER * max(self._fastest, 0.001):
            return  # more at once would only wait longer
        self._good = self._limit
        self._set(self._limit + self._step)
        self._step *= 2

    def refused(self, sent_at: float, floor: float | None) -> None:
        """The server had too much to do for a request that was sent at `sent_at`."""
        now = self._clock()
        if floor:
            self._paused_until = max(self._paused_until, now + floor)
        if sent_at <= self._cut_at:
            return  # it was on its way when the limit was cut already
        self._cut_at = now
        round_trip = self._recent or 0.1
        if floor:  # after a cool-down that was asked for, begin low
            self._good, rest = 1, 0.0
        elif self._limit > self._good:
            # The last step was too far; a step of one found the edge, so look again later.
            rest = (_REST if self._limit == self._good + 1 else 1.0) * round_trip
        else:
            self._good, rest = max(1, int(self._limit * _DECREASE)), round_trip
        self._set(self._good)
        self._step = 1
        self._rest_until = now + rest

    def _set(self, limit: int) -> None:
        self._limit = min(self._most, limit)
        self._answers = 0
