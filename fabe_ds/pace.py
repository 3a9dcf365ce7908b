"""The rate at which a run answers, over the last minute, and the time that it has left."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from fabe_ds.request import Stats
from fabe_ds.text import clock

WINDOW_SECONDS = 60.0
STEP_SECONDS = 1.0


class _Point(NamedTuple):
    moment: float
    asked: int
    """Records that a model has answered, or failed to."""
    cached: int
    tokens: int


@dataclass(slots=True)
class Pace:
    """Counts of the last minute, a point a second. What the cache answers takes no time, so rates
    are those of records that a model is asked about. `now` is a moment on the monotonic clock, by
    default this one."""

    _points: deque[_Point] = field(default_factory=deque)

    def note(self, stats: Stats, now: float | None = None) -> None:
        """Takes the counts of this moment; more than one a second is ignored."""
        point, points = _point(stats, now), self._points
        if points and point.moment - points[-1].moment < STEP_SECONDS:
            return
        points.append(point)
        while len(points) > 2 and points[1].moment <= point.moment - WINDOW_SECONDS:
            points.popleft()

    def forget(self) -> None:
        """Begins anew: what took time was nothing that answers take."""
        self._points.clear()

    def rates(self, stats: Stats, seconds: float, now: float | None = None) -> tuple[float, float]:
        """Records and tokens a second: of the last minute, or, where nothing was answered in it, of
        all the `seconds` so far."""
        last = _point(stats, now)
        if self._points:
            first = self._points[0]
            span = last.moment - first.moment
            if span >= STEP_SECONDS and last.asked > first.asked:
                return (last.asked - first.asked) / span, (last.tokens - first.tokens) / span
        seconds = max(seconds, 1e-9)
        is_waiting = not last.asked and (stats.requests or stats.in_flight)
        counted = 0 if is_waiting else last.asked or last.cached
        return counted / seconds, last.tokens / seconds

    def share_asked(self, stats: Stats, now: float | None = None) -> float:
        """Share of the records, from 0 to 1, that a model is asked about: the mean over the steps
        of the last minute. Thousands of records that were in the cache together, at the beginning
        of a run that goes on, so weigh no more than the moment that they took."""
        points = [*self._points, _point(stats, now)]
        shares = [
            (b.asked - a.asked) / settled
            for a, b in pairwise(points)
            if (settled := b.asked + b.cached - a.asked - a.cached) > 0
        ]
        share = sum(shares) / len(shares) if shares else 0.0
        return share or 1.0

    def left(
        self, remaining: int, stats: Stats, seconds: float, now: float | None = None
    ) -> float | None:
        """Seconds that so many more records take; None where nothing tells."""
        rate, _ = self.rates(stats, seconds, now)
        if not rate:
            return None
        is_asking = bool(stats.done + stats.failed)
        return remaining * (self.share_asked(stats, now) if is_asking else 1.0) / rate


def counts_told(stats: Stats, pace: Pace, total: int, seconds: float, brief: bool = False) -> str:
    """How many records are done, cached, failed and skipped, the rates, and, of `total` that are
    known, the time that the others take. `seconds` are those in which there could be answers;
    `brief`: only what failed, the rate of records, and the time."""
    seconds = max(seconds, 1e-9)
    rate, token_rate = pace.rates(stats, seconds)
    parts = [] if brief else [f"{stats.done} done"]
    for name in ("failed",) if brief else ("cached", "failed", "skipped"):
        if count := getattr(stats, name):
            parts.append(f"{count} {name}")
    if rate or not stats.cached:
        parts.append(f"{rate:.1f} records/s")
    if token_rate and not brief:
        parts.append(f"{token_rate:.0f} tokens/s")
    left = pace.left(total - stats.settled, stats, seconds)
    if left is not None and stats.settled < total:
        parts.append(f"{clock(left)} left")
    return ", ".join(parts)


def _point(stats: Stats, now: float | None) -> _Point:
    tokens = stats.prompt_tokens + stats.completion_tokens
    moment = time.monotonic() if now is None else now
    return _Point(moment, stats.done + stats.failed, stats.cached, tokens)
