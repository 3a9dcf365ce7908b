"""Whether one more request may go, under a clock of the test's own. A unit test, because the cases
are moments of a run that take minutes over sockets."""

from __future__ import annotations

import pytest

from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.budget import Budget
from fabe_ds.engine.capacity import HEAD_START_SECONDS, Capacity, Gate
from fabe_ds.engine.verdict import Verdict
from fabe_ds.request import Completion, Request, Sampling

ASKED = Request("x", "Do\n\nx", None, Sampling(8))
ANSWER = Completion("y", "stop", 10, 4)
BUSY = Verdict("retry", "rate", "too much at once", busy=True, refused=True)
GONE = Verdict("retry", "connection", "no connection", gone=True)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def capacity(clock, budget=None, **policy):
    settings = PolicySettings(concurrency=policy.pop("concurrency", 4), **policy)
    made = Capacity(settings, budget or Budget(), None, clock, lambda low, high: high)
    made.proven = True
    return made


@pytest.mark.parametrize("busy", range(6))
def test_no_more_are_in_flight_than_may_be(busy):
    assert capacity(Clock()).gate(ASKED, busy).opens == (busy < 4)


def test_the_first_request_goes_alone_until_the_endpoint_has_answered():
    clock = Clock()
    made = capacity(clock)
    made.proven = False
    assert made.gate(ASKED, 0).opens
    made.sent(ASKED)
    clock.now += 0.25
    assert made.gate(ASKED, 1) == Gate(wait=HEAD_START_SECONDS - 0.25)
    clock.now += 0.75
    assert made.gate(ASKED, 1).opens


def test_rates_a_minute_hold_the_next_request_back():
    clock = Clock()
    made = capacity(clock, rpm=60)
    sent = 0
    while made.gate(ASKED, 0).opens:
        made.sent(ASKED)
        sent += 1
    assert sent == 6  # a tenth of a minute's at once
    wait = made.gate(ASKED, 0).wait
    assert wait is not None
    clock.now += wait
    assert made.gate(ASKED, 0).opens


def test_a_servers_wish_holds_all_back_and_a_long_one_stops_the_run():
    clock = Clock()
    made = capacity(clock, give_up_after=60)
    made.refused(Verdict("retry", "rate", "slow", busy=True, wait=5.0), 1, clock.now, 1)
    assert made.gate(ASKED, 0) == Gate(wait=5.0)
    assert made.state() == "waiting 0:05: the server asks for it (slow)"
    clock.now += 5
    assert made.gate(ASKED, 0).opens
    made.read({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2m0s"})
    stop = made.gate(ASKED, 0).stop
    assert stop is not None
    assert "longer than --give-up-after" in stop


def test_a_budget_that_is_reserved_waits_and_one_that_is_used_up_stops():
    clock = Clock()
    made = capacity(clock, Budget(requests=2))
    for _ in range(2):
        made.sent(ASKED)
    assert made.gate(ASKED, 2) == Gate()  # an answer may give something back
    stop = made.gate(ASKED, 0).stop
    assert stop is not None
    assert "--max-requests 2" in stop
    made.settle(ASKED, ANSWER)
    assert made.gate(ASKED, 0).stop is not None  # a request that was answered is spent


def test_an_outage_lets_one_request_look_for_the_server():
    clock = Clock()
    made = capacity(clock)
    for record in range(5):
        made.refused(GONE, record, clock.now, 1)
    assert made.outage.down
    assert made.limit == 1
    assert made.gate(ASKED, 0).opens
    assert not made.gate(ASKED, 1).opens
    made.outage.probed(None)
    wait = made.gate(ASKED, 0).wait
    assert wait == pytest.approx(0.5)
    assert made.state().startswith("the server is gone for 0:00 (no connection)")
    clock.now += 60
    made.answered(ASKED, clock.now, ANSWER, 1)
    assert not made.outage.down
    assert made.limit == 4
    assert made.state() == ""


def test_one_record_that_always_fails_is_no_outage():
    made = capacity(Clock())
    for _ in range(50):
        made.refused(GONE, "the same record", 0.0, 1)
    assert not made.outage.down


def test_a_server_that_refuses_many_is_asked_less_at_once():
    clock = Clock()
    made = capacity(clock, concurrency=32)
    for _ in range(64):
        made.sent(ASKED)
        clock.now += 0.01
        made.refused(BUSY, object(), clock.now, 20)
    assert made.limit < 32


def test_no_more_open_files_is_a_limit_and_no_fault_of_the_server():
    made = capacity(Clock(), concurrency=32)
    made.refused(Verdict("retry", "connection", "EMFILE", local=True), 1, 0.0, 12)
    assert made.limit == 11
    assert not made.outage.down
