"""How many requests may be on their way to an endpoint at once."""

from __future__ import annotations

import time
from collections.abc import Callable

AUTO_START, AUTO_MOST = 4, 512
_DECREASE = 0.7
_SLOWER = 2.0


class Limiter:
    """A limit on requests in flight, and a cool-down that all of them share.

    A fixed `concurrency` stays but for slow start after a cool-down. None finds the limit out:
    additive increase while answers come and are not slow, multiplicative decrease where the
    server refuses (the AIMD rule of TCP congestion avoidance, RFC 5681), once per round trip.
    """

    def __init__(
        self, concurrency: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
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
        return max(0.0, self._paused_until - self._clock())

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
