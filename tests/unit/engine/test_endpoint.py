"""Which server is asked next. A unit test, because the cases are moments of checks that take seconds
over sockets."""

from __future__ import annotations

import pytest

from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.budget import Budget
from fabe_ds.engine.capacity import Capacity
from fabe_ds.engine.coalesce import Coalescer
from fabe_ds.engine.endpoint import Endpoint, Endpoints
from fabe_ds.providers import Endpoint as Where
from fabe_ds.providers.openai import OpenAIProvider
from fabe_ds.request import Request, Sampling, Stats

ASKED = Request("x", "x", None, Sampling(8))


class Client:
    """One that is never asked."""

    proven = True

    def __init__(self, number: int) -> None:
        self.provider = OpenAIProvider(Where("m", f"http://h{number}/v1"))


@pytest.fixture
def servers():
    policy = PolicySettings(concurrency=4)
    each = [Endpoint(Client(n), Capacity(policy, Budget())) for n in range(2)]
    for endpoint in each:
        endpoint.checked = True
    provider = each[0].client.provider
    coalescer = Coalescer(provider, None, lambda request, got: got.text, Stats())
    return Endpoints(each, coalescer, policy)


def test_a_record_waits_for_a_server_that_is_asked_for_the_first_time(servers):
    one, other = servers.each
    other.checked, other.checking = False, True
    _, gate = servers.choose(ASKED, 0, [one])
    assert not gate.opens
    assert gate.wait


def test_a_server_that_is_looked_for_again_holds_no_record_up(servers):
    one, other = servers.each
    other.checked, other.checking, other.is_looked_for = False, True, True
    endpoint, gate = servers.choose(ASKED, 0, [one])
    assert gate.opens
    assert endpoint is one


def test_what_came_to_nothing_at_one_goes_to_the_other_however_busy(servers):
    one, other = servers.each
    other.busy = 3
    endpoint, gate = servers.choose(ASKED, 3, [one])
    assert gate.opens
    assert endpoint is other
    endpoint, gate = servers.choose(ASKED, 3)
    assert endpoint is one


def test_a_server_that_is_down_is_still_asked_now_and_then(servers):
    one, other = servers.each
    one.busy = 2
    other.capacity.outage.failed(1, "gone", "gone", 4, certain=True, alone=True)
    assert not other.is_up
    endpoint, gate = servers.choose(ASKED, 2)
    assert gate.opens
    assert endpoint is other
