"""A pass over items with any weather: no record is lost, none is settled twice, and never are more
in flight than may be. A state machine of hypothesis drives the dispatch with a client of its own,
since no server over a socket can be made to answer in just this order.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.budget import Budget
from fabe_ds.engine.capacity import Capacity
from fabe_ds.engine.client import Reply
from fabe_ds.engine.coalesce import Coalescer
from fabe_ds.engine.dispatch import Pass
from fabe_ds.engine.endpoint import Endpoint, Endpoints
from fabe_ds.engine.verdict import Verdict
from fabe_ds.providers import Completion, Sampling
from fabe_ds.providers import Endpoint as Where
from fabe_ds.providers.openai import OpenAIProvider
from fabe_ds.request import Request, Stats
from fabe_ds.store.completions import RecordCache

LIMIT = 3
ANSWER = Completion("y", "stop", 3, 1)
RESULTS = {
    "answer": ANSWER,
    "busy": Verdict("retry", "rate", "429", busy=True, refused=True),
    "gone": Verdict("retry", "connection", "closed", gone=True),
    "malformed": Verdict("retry", "malformed", "no JSON"),
    "refused": Verdict("fail", "refused", "for what it says", refused=True),
    "loading": Verdict("retry", "server", "503", busy=True, loading=True, refused=True),
}


class Client:
    """Answers when it is told to."""

    proven = True
    answered_ago = 0.0

    def __init__(self, provider: OpenAIProvider) -> None:
        self.provider = provider
        self.waiting: list[asyncio.Future[Reply]] = []
        self.most = 0

    async def post(self, request: Request) -> Reply:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        self.most = max(self.most, len(self.waiting))
        return await future

    def answered(self) -> None:
        """Nothing is learned."""

    def check(self) -> None:
        """It is there."""


class AnyWeather(RuleBasedStateMachine):
    """`asked` records, of which some are equal; what came out of the pass is in `settled`."""

    @initialize(
        count=st.integers(1, 12),
        alike=st.integers(1, 4),
        cached=st.booleans(),
        servers=st.integers(1, 3),
    )
    def begin(self, count, alike, cached, servers):
        self.loop = asyncio.new_event_loop()
        provider = OpenAIProvider(Where("m", "http://h/v1"))
        policy = PolicySettings(concurrency=LIMIT, retry=2, give_up_after=1e9)
        self.folder = tempfile.TemporaryDirectory()
        self.cache = RecordCache(Path(self.folder.name)) if cached else None
        coalescer = Coalescer(provider, self.cache, lambda request, got: got.text, Stats())
        self.client = Client(provider)
        # They share the client, which counts what is in flight to all of them.
        each = [Endpoint(self.client, Capacity(policy, Budget())) for _ in range(servers)]
        for endpoint in each:
            endpoint.checked = True
        self.endpoints = endpoints = Endpoints(each, coalescer, policy, patient=True)
        self.texts = [f"x{number % alike}" for number in range(count)]
        requests = (Request(text, text, None, Sampling(8)) for text in self.texts)
        self.run = Pass(endpoints, iter(requests))
        self.stats, self.settled, self.over = coalescer.stats, [], False
        self.stopped = False
        self.loop.call_soon(self.run.begin)
        self.turn()

    def turn(self):
        """Lets the loop do what it can do now."""
        for _ in range(6):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()
        while not self.run.ready.empty():
            ready = self.run.ready.get()
            if ready is None:
                self.over = True
                continue
            self.settled += [entry.outcome for entry in ready]
            self.loop.call_soon(self.run.consumed, len(ready))

    @rule(what=st.sampled_from(sorted(RESULTS)), which=st.integers(0, LIMIT - 1))
    def something_comes(self, what, which):
        waiting = [future for future in self.client.waiting if not future.done()]
        if waiting:
            waiting[which % len(waiting)].set_result(Reply(RESULTS[what]))
            self.client.waiting = [future for future in waiting if not future.done()]
        self.wake()
        self.turn()

    def wake(self):
        """Time passes: what sleeps goes on now."""
        for endpoint in self.endpoints.each:
            endpoint.capacity.outage._probe_at = 0.0
        for task, timer in list(self.run._sleeping.items()):
            timer.cancel()
            self.loop.call_soon(self.run._again, task)
        if self.run._timer is not None:
            self.run._timer.cancel()
            self.loop.call_soon(self.run._wake)

    @rule()
    def it_is_stopped(self):
        self.stopped = True
        self.loop.call_soon(self.run.stop)
        self.turn()

    @invariant()
    def never_more_in_flight_than_allowed(self):
        if hasattr(self, "client"):
            assert self.client.most <= LIMIT

    @invariant()
    def settled_in_order_and_once(self):
        if not hasattr(self, "settled"):
            return
        assert len(self.settled) <= len(self.texts)
        assert all(outcome is not None for outcome in self.settled)
        counted = self.stats.done + self.stats.failed + self.stats.cached
        assert counted <= len(self.texts)

    def teardown(self):
        if not hasattr(self, "run"):
            return
        try:
            self.see_the_end()
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.turn()
            self.loop.close()
            if self.cache is not None:
                self.cache.close()
            self.folder.cleanup()

    def see_the_end(self):
        for _ in range(200):
            if self.over:
                break
            self.something_comes("answer", 0)
        assert self.over, "the pass does not end"
        assert self.run.error is None
        if not self.stopped:
            assert len(self.settled) == len(self.texts)
            kinds = Counter(outcome.kind for outcome in self.settled)
            assert kinds[None] == self.stats.done + self.stats.cached
            assert len(self.texts) - kinds[None] == self.stats.failed
            if self.cache is not None:  # equal requests have one answer, and are sent once
                answered = {
                    text for text, got in zip(self.texts, self.settled, strict=True) if got.text
                }
                assert self.cache.count() == len(answered)
                assert not self.cache.query("SELECT 1 FROM claims")
        assert not self.run._tasks
        assert not any(endpoint.busy for endpoint in self.endpoints.each)
        assert not self.run._order or self.stopped


AnyWeather.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True
)
TestAnyWeather = AnyWeather.TestCase
