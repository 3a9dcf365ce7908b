"""The limiter in simulated weather (tests/support/weather.py), and under a clock of the test's own.

A unit test, because a night's weather over 20 seeds takes seconds here and hours over sockets;
scripts/bench/flaky.py runs the same laws over real ones.
"""

from __future__ import annotations

import math
import time

import pytest

from fabe_ds.engine.limiter import AUTO_START, Limiter
from fabe_ds.engine.rates import Rates
from tests.support.weather import RateLimited, Server, admits, simulate, sometimes

SEEDS = range(20)
MEDIAN = 0.1


def best(level: int, sigma: float) -> float:
    """Answers a second of so many requests at once, undisturbed."""
    return level / (MEDIAN * math.exp(sigma * sigma / 2))


@pytest.mark.parametrize("sigma", [0.0, 0.7])
@pytest.mark.parametrize(
    ("share", "mean", "least"),
    [(0.001, 0.97, 0.9), (0.01, 0.97, 0.9), (0.03, 0.95, 0.85), (0.1, 0.85, 0.3), (0.3, 0.6, 0.1)],
)
def test_refusals_that_come_whatever_we_do_cost_little(sigma, share, mean, least):
    rates = []
    for seed in SEEDS:
        server = Server(MEDIAN, sigma, refuses=sometimes(share))
        calm = simulate(32, Server(MEDIAN, sigma), 12, seed).rate(0, 12)
        rates.append(simulate(32, server, 12, seed).rate(0, 12) / calm)
    assert sum(rates) / len(rates) >= mean
    assert min(rates) >= least


@pytest.mark.parametrize("sigma", [0.0, 0.7])
@pytest.mark.parametrize(("share", "seconds"), [(0.3, 2.0), (1.0, 1.0), (0.6, 3.0)])
def test_five_seconds_after_a_burst_all_is_as_before(sigma, share, seconds):
    rates = []
    for seed in SEEDS:
        server = Server(MEDIAN, sigma, refuses=sometimes(share, until=seconds))
        seen = simulate(32, server, seconds + 15, seed)
        calm = simulate(32, Server(MEDIAN, sigma), seconds + 15, seed)
        rates.append(seen.rate(seconds + 5, seconds + 15) / calm.rate(seconds + 5, seconds + 15))
    assert min(rates) >= 0.85  # chance moves the undisturbed rate itself by so much
    assert sum(rates) / len(rates) >= 0.95


@pytest.mark.parametrize("sigma", [0.0, 0.7])
@pytest.mark.parametrize(("concurrency", "admitted"), [(256, 32), (64, 8), (8, 3), (4, 1)])
def test_what_the_server_lets_in_is_used_and_seldom_passed(sigma, concurrency, admitted):
    for seed in SEEDS[:10]:
        server = Server(MEDIAN, sigma, refuses=admits(lambda now: admitted))
        seen = simulate(concurrency, server, 20, seed, retry=20)
        assert seen.rate(2, 20) >= 0.7 * best(admitted, sigma), seed
        refused = sum(moment > 2 for moment in seen.refusals) / len(seen.answers)
        assert refused <= 0.2, seed


@pytest.mark.parametrize("concurrency", [64, None])
@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_a_limit_that_moves_is_followed(concurrency, sigma):
    for seed in SEEDS[:10]:
        moving = admits(lambda now: 32 if 8 <= now < 16 else 8)
        seen = simulate(concurrency, Server(MEDIAN, sigma, refuses=moving), 24, seed, retry=50)
        assert seen.rate(0, 24) >= 0.55 * best(16, sigma), seed
        assert seen.refused <= 0.15, seed


@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_a_rate_a_second_is_kept_to(sigma):
    for seed in SEEDS[:10]:
        server = Server(MEDIAN, sigma, refuses=RateLimited(100))
        seen = simulate(64, server, 20, seed, retry=20)
        assert seen.rate(2, 20) >= 75, seed
        assert sum(moment > 2 for moment in seen.refusals) <= 0.4 * len(seen.answers), seed


@pytest.mark.parametrize("sigma", [0.0, 0.7])
@pytest.mark.parametrize("workers", [4, 16, 64, 10_000])
@pytest.mark.parametrize("share", [0.0, 0.01])
def test_auto_finds_what_the_server_takes(sigma, workers, share):
    rates = []
    for seed in SEEDS[:10]:
        seen = simulate(None, Server(MEDIAN, sigma, workers, sometimes(share)), 20, seed)
        rates.append(seen.rate(8, 20))
    assert min(rates) >= 0.75 * max(rates)
    assert min(rates) >= 0.75 * best(min(512, workers), sigma)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_fixed_limit_stays():
    clock = Clock()
    limiter = Limiter(8, clock)
    for _ in range(100):
        sent_at = clock.now
        clock.now += 0.1
        limiter.answered(sent_at, 8)
    assert limiter.limit == 8
    assert not limiter.held_back


def test_auto_does_not_grow_where_the_limit_was_not_reached():
    clock = Clock()
    limiter = Limiter(None, clock)
    for _ in range(200):
        limiter.sent()
        sent_at = clock.now
        clock.now += 0.1
        limiter.answered(sent_at, 1)
    assert limiter.limit == AUTO_START


def test_however_many_refusals_at_once_there_is_one_cut():
    clock = Clock()
    limiter = Limiter(32, clock)
    sent_at = clock.now
    for _ in range(32):
        clock.now += 0.001
        limiter.answered(sent_at, 32)
    sent_at = clock.now
    clock.now += 0.1
    for in_flight in range(31, 20, -1):
        limiter.refused(sent_at, in_flight)
    assert 15 <= limiter.limit < 32
    assert limiter.held_back


def test_the_limit_never_falls_below_one():
    clock = Clock()
    limiter = Limiter(4, clock)
    for _ in range(200):
        clock.now += 0.01
        limiter.refused(clock.now, 0)
    assert limiter.limit == 1


@pytest.mark.parametrize("seconds", [(2.0, 1.0), (1.0, 2.0)])
def test_a_pause_is_shared_and_the_longest_holds(seconds):
    clock = Clock()
    rates = Rates(clock=clock)
    for wait in seconds:
        rates.hold(wait, f"{wait}")
    assert (rates.pause(), rates.reason) == (2.0, "2.0")
    clock.now += 2.0
    assert rates.pause() == 0.0


def test_waiting_is_by_the_monotonic_clock():
    """A wall clock that jumps moves no pause: nothing here reads it."""
    assert Limiter(8)._clock is time.monotonic
    assert Rates()._clock is time.monotonic
