"""The rate and the time left that a run's progress tells, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fabe_ds.pace import Pace
from fabe_ds.request import Stats

TOTAL = 10_000


def after(seconds: int, asked: Callable[[float], float], cached: Callable[[float], float]):
    """The pace and the counts of a run of so many seconds, by functions of the time."""
    pace, stats = Pace(), Stats()
    for now in range(seconds + 1):
        stats = Stats(done=int(asked(now)), cached=int(cached(now)))
        pace.note(stats, now)
    return pace, stats


CASES = {
    # what: seconds so far, records asked about and records cached by then, seconds left in truth
    "nothing is cached": (100, lambda t: 10 * t, lambda t: 0, 900),
    "a run that goes on: 9,000 cached in the first 2 s": (
        32,
        lambda t: 10 * max(0, t - 2),
        lambda t: min(9000, 4500 * t),
        70,
    ),
    "nine of ten are cached, evenly": (50, lambda t: 10 * t, lambda t: 90 * t, 50),
    "the server became four times as quick 60 s ago": (
        120,
        lambda t: 10 * t if t < 60 else 600 + 40 * (t - 60),
        lambda t: 0,
        175,
    ),
    "all is cached": (5, lambda t: 0, lambda t: 1000 * t, 5),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_time_left_is_right(case):
    seconds, asked, cached, left = case
    pace, stats = after(seconds, asked, cached)
    told = pace.left(TOTAL - stats.settled, stats, seconds, now=seconds)
    assert told == pytest.approx(left, rel=0.1)


def test_the_rate_is_that_of_the_last_minute():
    pace, stats = after(600, lambda t: 10 * min(t, 500) + 2 * max(0, t - 500), lambda t: 0)
    assert pace.rates(stats, 600, now=600)[0] == pytest.approx(2)


def test_a_minute_without_an_answer_leaves_the_rate_of_the_whole_run():
    pace, stats = after(200, lambda t: min(t, 100), lambda t: 0)
    assert pace.rates(stats, 200, now=200)[0] == pytest.approx(0.5)


def test_what_is_cached_says_nothing_of_what_is_asked_for():
    stats = Stats(cached=9000, in_flight=64)
    assert Pace().left(1000, stats, 2) is None
    assert Pace().rates(stats, 2)[0] == 0


def test_nothing_is_known_before_the_first_answer():
    assert Pace().left(10, Stats(), 5) is None
