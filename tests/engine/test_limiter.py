"""The limiter under a clock of the test's own."""

from __future__ import annotations

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


def test_auto_grows_while_answers_come_and_not_while_they_slow_down():
    limiter = Limiter(None, Clock())
    for _ in range(50):
        limiter.answered(0.1, limiter.limit)
    grown = limiter.limit
    assert grown > AUTO_START + 20
    for _ in range(200):
        limiter.answered(1.0, limiter.limit)
    slow = limiter.limit
    for _ in range(50):
        limiter.answered(1.0, limiter.limit)
    assert limiter.limit == slow


def test_auto_does_not_grow_where_the_limit_was_not_reached():
    limiter = Limiter(None, Clock())
    for _ in range(50):
        limiter.answered(0.1, 1)
    assert limiter.limit == AUTO_START


def test_a_refusal_cuts_the_limit_once_a_round_trip():
    clock = Clock()
    limiter = Limiter(None, clock)
    for _ in range(60):
        limiter.answered(0.1, limiter.limit)
    before = limiter.limit
    clock.now += 1
    for _ in range(10):
        limiter.refused(clock.now - 0.1, None)
    assert limiter.limit == int(before * 0.7) or limiter.limit == int((before + 0.9) * 0.7)


@pytest.mark.parametrize("concurrency", [None, 8])
def test_a_cool_down_is_shared_and_a_floor(concurrency):
    clock = Clock()
    limiter = Limiter(concurrency, clock)
    limiter.refused(clock.now, 2.0)
    limiter.refused(clock.now, 1.0)
    assert limiter.pause() == 2.0
    clock.now += 2.0
    assert limiter.pause() == 0.0
