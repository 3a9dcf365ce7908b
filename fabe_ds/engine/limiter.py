"""How many requests may be in flight to an endpoint at once: a decision without a socket.

What comes in are events (a request was sent, answered, refused) with a clock that is handed in;
what comes out is `limit`. tests/support/weather.py simulates servers around it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

AUTO_START, AUTO_MAX = 4, 512
_LATENCIES = 200
_LATE, _LATE_LEAST = 3.0, 2.0

WINDOW = 32  # requests that are judged together, at least
TOLERATED = 0.15  # share of refusals that is weather, and no sign of too much at once
FEWEST = 3  # refusals that say anything
STORM = 0.5  # share of refusals above which the server admits a part and refuses the rest
STORM_FEWEST = 8
CUT = 0.8
RECOVERY_TRIPS = 10.0  # round trips from a cut back to the level that was cut
AUTO_CAUTION = 1.5  # and so many times more where no number of the user's stands behind it
LEAST_TRIP, LONGEST_TRIP = 0.02, 2.0  # seconds

SURE = 32  # up to here the search doubles without looking: small cohorts say little
COHORT, CAREFUL_COHORT = 32, 96  # answers whose median stands for a level
# Where latency grows with this power of the level, the level is past the knee. Stopping too early
# costs more than too late, so small cohorts have to be clearer.
SLOWER, MUCH_SLOWER = 0.5, 0.75
HOLD_TRIPS, HOLD_SECONDS = 20.0, 2.0
DRIFTED = 1.5


@dataclass(slots=True)
class _Window:
    """Requests that were sent together, since the moment `since` or since the window before.

    A share is one of what was sent, not of what has come back: refusals come sooner than answers.
    """

    since: float
    sent: int = 0
    refusals: int = 0

    @property
    def share(self) -> float:
        return self.refusals / max(1, self.sent)


@dataclass(slots=True)
class _Recovery:
    """The way back from a cut: a cubic curve that is flat around the level that was cut.

    Source: RFC 9438 (CUBIC), section 4.2, with the time counted in round trips.
    """

    at: float
    low: float
    edge: float

    def level(self, trips: float) -> float:
        gap = max(1.0, self.edge - self.low)
        return self.edge + gap * (trips / RECOVERY_TRIPS - 1.0) ** 3


class Limiter:
    """The limit on requests in flight: `concurrency`, or (None) searched for.

    Refusals are judged over windows of answers, never one by one. A share that is small, or that
    a lower limit does not change, is the server's weather: it costs its own records a try and the
    limit nothing. A larger share cuts the limit once, and the limit comes back within
    RECOVERY_TRIPS round trips, slowly past the level at which it was cut.
    """

    def __init__(
        self, concurrency: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self.ceiling = concurrency or AUTO_MAX
        self._level = float(concurrency or AUTO_START)
        self._search = None if concurrency else _Search(self.ceiling)
        self._window = _Window(-math.inf)
        self._recovery: _Recovery | None = None
        self._on_trial = False  # the last cut, whose effect is not known yet
        self._before = _Window(-math.inf)  # what it was made for
        self._unharmed = 0.0  # the level before the first of such cuts
        self._weather = 0.0  # share of refusals that comes whatever the limit
        self._trip: float | None = None
        self._latencies: deque[float] = deque(maxlen=_LATENCIES)
        self.share = 0.0
        """Refusals in the last window, as a share of its requests."""

    @property
    def limit(self) -> int:
        """Requests that may be in flight now; at least 1."""
        return max(1, min(self.ceiling, int(self._level + 1e-9)))

    @property
    def held_back(self) -> bool:
        """Whether refusals keep the limit below what it was or may be."""
        return self._recovery is not None and self.limit < min(self.ceiling, self._recovery.edge)

    def late(self) -> float | None:
        """Seconds after which an answer is suspiciously late: three times the 99th percentile of
        the latest ones. None while too few are known."""
        if len(self._latencies) < _LATENCIES // 2:
            return None
        return max(_LATE_LEAST, _LATE * sorted(self._latencies)[int(len(self._latencies) * 0.99)])

    def sent(self) -> None:
        """A request is going out now."""
        self._window.sent += 1
        if self._search is not None and self._recovery is None:
            self._search.sent(self._clock())

    def answered(self, sent_at: float, in_flight: int) -> None:
        """An answer has come to a request of the moment `sent_at` (by this limiter's clock);
        `in_flight` requests, that one included, were on their way."""
        now = self._clock()
        seconds = now - sent_at
        self._latencies.append(seconds)
        self._trip = seconds if self._trip is None else 0.95 * self._trip + 0.05 * seconds
        self._close_window()
        if self._recovery is not None:
            self._recover(now)
        elif self._search is not None:
            reached = in_flight >= self.limit - 1
            self._level = self._search.answered(now, sent_at, seconds, self._level, reached)

    def refused(self, sent_at: float, in_flight: int) -> None:
        """The server had too much to do for a request of the moment `sent_at`; `in_flight` others
        are still on their way."""
        window = self._window
        if sent_at < window.since:  # it was on its way when the limit was cut
            self._before.refusals += 1
            if self._storm and self._recovery is not None:
                self._level = self._recovery.low = max(1.0, min(self._level, in_flight))
            return
        window.refusals += 1
        enough = self._tolerance * max(window.sent, self.limit, WINDOW // 2)
        if window.refusals >= FEWEST and window.refusals > enough:
            self._cut(self._clock())
        else:
            self._close_window()

    @property
    def _tolerance(self) -> float:
        """The share of refusals above which the limit is cut."""
        if self._on_trial and not self._storm:
            return STORM  # first see what the last cut has changed
        return min(STORM, TOLERATED + 1.5 * self._weather)

    @property
    def _storm(self) -> bool:
        """Whether the server refuses most: it admits a part, and that part is its limit."""
        return self._before.refusals >= STORM_FEWEST and self._before.share > STORM

    def _cut(self, now: float) -> None:
        level = float(self.limit)
        self.share = self._window.share
        self._unharmed = max(self._unharmed, level)
        self._on_trial = True
        self._level = max(1.0, math.floor(level * CUT))
        self._recovery = _Recovery(now, self._level, max(self._level, level - 1))
        self._before, self._window = self._window, _Window(now)
        if self._search is not None:
            self._search.interrupted()

    def _close_window(self) -> None:
        window = self._window
        fewest = min(WINDOW, 4 * self.limit) if self._on_trial else WINDOW
        if window.sent < max(fewest, 2 * self.limit):
            return
        self.share = window.share
        if self._on_trial:
            self._see_effect(window.share)
        elif self._weather:
            # It fades, so that a limit that was taken for weather is tried out again.
            self._weather = 0.89 * self._weather + 0.1 * window.share
        self._window = _Window(window.since)

    def _see_effect(self, share: float) -> None:
        """After the first window since a cut: was it too much at once that had been refused?"""
        now, before, recovery = self._clock(), self._before.share, self._recovery
        self._on_trial = False
        if recovery is None or self._storm:
            return
        recovery.at = now
        # A server that takes so much and no more would refuse this share of the smaller rest.
        fewer = max(0.0, 1.0 - (1.0 - before) / CUT)
        if share > 0.6 * fewer + 0.4 * before:
            self._weather = max(self._weather, share)
            recovery.low = recovery.edge = self._level = self._unharmed
            self._recover(now)
        self._unharmed = 0.0

    def _recover(self, now: float) -> None:
        recovery = self._recovery
        assert recovery is not None
        if self._on_trial and not self._storm:
            return
        trip = min(LONGEST_TRIP, max(LEAST_TRIP, self._trip or LEAST_TRIP))
        if self._search is not None:
            trip *= AUTO_CAUTION
        self._level = max(recovery.low, recovery.level((now - recovery.at) / trip))
        if self._level >= self.ceiling:
            self._level, self._recovery = float(self.ceiling), None
        elif self._search is not None and self._level > 1.25 * recovery.edge + 1:
            self._recovery = None


class _Search:
    """Looks for the knee: the level from which on more requests at once only wait longer.

    Medians of whole cohorts are compared, each of requests that were sent at one level, a round
    trip after it was reached: never the first answers, which are the quickest ones.
    """

    def __init__(self, ceiling: int) -> None:
        self._ceiling = ceiling
        self._factor = 2.0
        self._known: tuple[float, float] | None = None  # a good level, and its median in seconds
        self._hold_until = -math.inf
        self._rest()

    def _rest(self, begins: float | None = None) -> None:
        """Forgets the cohort; the next one begins at the moment `begins`, or at the next answer."""
        self._begins, self._last_sent, self._sent = begins, -math.inf, 0
        self._latencies: list[float] = []

    def interrupted(self) -> None:
        """Refusals have taken over; look more carefully afterwards."""
        self._factor, self._known = 1.5, None
        self._rest()

    def sent(self, now: float) -> None:
        if self._begins is not None and now >= self._begins and self._sent < self._size:
            self._sent += 1
            self._last_sent = now

    def answered(
        self, now: float, sent_at: float, seconds: float, level: float, reached: bool
    ) -> float:
        """The level after an answer. `reached`: it was the level that held requests back."""
        if not reached or now < self._hold_until:
            return level
        if self._begins is None:
            least = COHORT if self._factor == 2.0 else CAREFUL_COHORT
            self._begins, self._size = now + seconds, max(least, int(1.5 * level))
            return level
        if not self._begins <= sent_at <= self._last_sent:
            return level
        self._latencies.append(seconds)
        if self._sent < self._size or len(self._latencies) < 0.75 * self._size:
            return level
        # The slowest are missing, so the middle of all that were sent stands further up.
        median = sorted(self._latencies)[self._size // 2]
        self._rest()
        return min(float(self._ceiling), max(AUTO_START, self._next(now, level, median)))

    def _next(self, now: float, level: float, median: float) -> float:
        known, self._known = self._known, (level, median)
        if known is None or (self._factor == 2.0 and level < SURE):
            return level * self._factor
        good, before = known
        if level == good:  # seen again after a while
            return level / self._factor if median > DRIFTED * before else level * self._factor
        lower, upper = ((good, before), (level, median))[:: 1 if level > good else -1]
        power = math.log(upper[1] / lower[1]) / math.log(upper[0] / lower[0])
        if level > good and power < (MUCH_SLOWER if self._factor == 2.0 else SLOWER):
            if level < self._ceiling:
                return level * self._factor
            self._hold_until = now + max(HOLD_SECONDS, HOLD_TRIPS * median)
            return level
        if level < good and power >= MUCH_SLOWER:
            return level / self._factor
        if level > good and self._factor == 2.0:  # the level before was not looked at: go down
            self._known, self._factor = (good, before), 1.5
            return good / 2
        self._factor = 1.5
        self._hold_until = now + max(HOLD_SECONDS, HOLD_TRIPS * lower[1])
        if level > good:
            fits = 1.25 * level * before / median  # by Little's law, without the waiting
            self._known = (max(good, min(level, fits)), before)
        else:
            self._known = known
        return self._known[0]
