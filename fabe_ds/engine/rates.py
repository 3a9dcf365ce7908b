"""Requests and tokens a minute, and the waits that a server asks for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime

_duration_part = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|h|m|s|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_EPOCH, _EPOCH_MILLISECONDS = 1e9, 1e12


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
        self._level, self._at = self._capacity if sharers is None else 0.0, clock()

    def _share(self) -> None:
        part = self._whole / (self._sharers() if self._sharers else 1)
        self._rate, self._capacity = part / 60.0, max(1.0, part / 10.0)

    def take(self, amount: float) -> None:
        self._refill()
        self._level = min(self._capacity, self._level - amount)

    def wait(self) -> float:
        """Seconds until the level is positive."""
        self._refill()
        return 0.0 if self._level > 0 else -self._level / self._rate + 0.001

    def _refill(self) -> None:
        now = self._clock()
        self._share()
        self._level = min(self._capacity, self._level + (now - self._at) * self._rate)
        self._at = now


def duration(text: str, now: Callable[[], float] = time.time) -> float:
    """Seconds that a server's text for a wait means; 0 where it means none.

    A duration as Go writes it (6m0s, 1.5s, 20ms), a plain number of seconds, a moment as seconds
    or milliseconds since 1970, or a date and time as RFC 3339 writes it.
    """
    text = text.strip()
    if (parts := _duration_part.findall(text)) and "T" not in text:
        return sum(float(count) * _SECONDS[unit] for count, unit in parts)
    try:
        number = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
        except ValueError:
            return 0.0
        return max(0.0, moment.timestamp() - now()) if moment.tzinfo else 0.0
    if number >= _EPOCH_MILLISECONDS:
        return max(0.0, number / 1000 - now())
    if number >= _EPOCH:
        return max(0.0, number - now())
    return number if number > 0 else 0.0


class Rates:
    """When the next request may go: rates a minute, and pauses that all requests share."""

    def __init__(
        self,
        rpm: float | None = None,
        tpm: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sharers: Callable[[], int] | None = None,
    ) -> None:
        self._requests = Bucket(rpm, clock, sharers) if rpm else None
        self._tokens = Bucket(tpm, clock, sharers) if tpm else None
        self._clock = clock
        self._paused_until = 0.0
        self.reason = ""
        """Why the last pause was made."""

    def pause(self) -> float:
        """Seconds until anything may be sent; 0 for now."""
        waits = [bucket.wait() for bucket in (self._requests, self._tokens) if bucket]
        return max(0.0, self.asked_for, *waits)

    @property
    def asked_for(self) -> float:
        """Seconds that the server's own words leave to wait."""
        return max(0.0, self._paused_until - self._clock())

    def hold(self, seconds: float, reason: str) -> None:
        """Nothing is to be sent for so long."""
        until = self._clock() + seconds
        if until > self._paused_until:
            self._paused_until, self.reason = until, reason

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

    def read(self, headers: Mapping[str, str]) -> None:
        """Waits for what the server says is used up: x-ratelimit-remaining-* and -reset-*.

        Sources: OpenAI's guide to rate limits, "Rate limits in headers"; Anthropic API reference,
        "Rate limits".
        """
        for name in ("requests", "tokens", "input-tokens", "output-tokens"):
            theirs = f"anthropic-ratelimit-{name}"
            left = headers.get(f"x-ratelimit-remaining-{name}", headers.get(f"{theirs}-remaining"))
            if left is not None and left.lstrip("-").isdecimal() and int(left) <= 0:
                reset = headers.get(f"x-ratelimit-reset-{name}", headers.get(f"{theirs}-reset"))
                seconds = duration(reset or "")
                self.hold(seconds, f"its limit of {name} is used up")
