"""The limiter under a clock of the test's own."""

from __future__ import annotations

import time

import pytest

from fabe_ds.engine.limiter import AUTO_START, Limiter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_fixed_limit_stays():
    limiter = Limiter(8, Clock())
    for _ in range(100):
        limiter.answered(0.1, 8)
    assert limiter.limit == 8


def round_of_answers(limiter, clock, seconds=0.1):
    clock.now += seconds
    for _ in range(limiter.limit):
        limiter.answered(seconds, limiter.limit)


def test_auto_grows_while_answers_come_and_not_while_they_slow_down():
    clock = Clock()
    limiter = Limiter(None, clock)
    for _ in range(4):
        round_of_answers(limiter, clock)
    grown = limiter.limit
    assert grown > AUTO_START + 20
    for _ in range(20):
        round_of_answers(limiter, clock, 1.0)
    slow = limiter.limit
    for _ in range(20):
        round_of_answers(limiter, clock, 1.0)
    assert limiter.limit == slow


def test_auto_does_not_grow_where_the_limit_was_not_reached():
    limiter = Limiter(None, Clock())
    for _ in range(50):
        limiter.answered(0.1, 1)
    assert limiter.limit == AUTO_START


def test_a_refusal_while_searching_goes_back_to_the_good_level():
    clock = Clock()
    limiter = Limiter(None, clock)
    round_of_answers(limiter, clock)
    good = limiter.limit
    round_of_answers(limiter, clock)
    assert limiter.limit > good
    for _ in range(5):
        limiter.refused(clock.now, None)
    assert limiter.limit == good


def test_refusals_at_the_good_level_cut_it_once_a_round_trip():
    clock = Clock()
    limiter = Limiter(None, clock)
    for _ in range(4):
        round_of_answers(limiter, clock)
    limiter.refused(clock.now, None)
    good = limiter.limit
    for expected in (int(good * 0.7), int(int(good * 0.7) * 0.7)):
        sent = clock.now + 0.05
        clock.now += 0.1
        for _ in range(10):
            limiter.refused(sent, None)
        assert limiter.limit == expected


@pytest.mark.parametrize("concurrency", [None, 8])
def test_a_cool_down_is_shared_and_a_floor(concurrency):
    clock = Clock()
    limiter = Limiter(concurrency, clock)
    limiter.refused(clock.now, 2.0)
    limiter.refused(clock.now, 1.0)
    assert limiter.pause() == 2.0
    clock.now += 2.0
    assert limiter.pause() == 0.0


def test_H21_waiting_is_by_the_monotonic_clock():
    """A wall clock that jumps moves no pause: nothing here reads it."""
    assert Limiter(8)._clock is time.monotonic
