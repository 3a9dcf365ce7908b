"""Answers records over HTTP: as many at once as the endpoint takes, each until it is answered."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Generator, Iterable, Sequence

from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.budget import Budget
from fabe_ds.engine.capacity import Capacity, pace_of
from fabe_ds.engine.client import HttpClient
from fabe_ds.engine.coalesce import Coalescer, Pending
from fabe_ds.engine.dispatch import Pass
from fabe_ds.engine.endpoint import Endpoint, Endpoints
from fabe_ds.engine.loop import LoopThread
from fabe_ds.engine.worker_slots import SharedSlots
from fabe_ds.providers.http import HttpProvider
from fabe_ds.request import Item, Outcome

SIGNAL_SECONDS = 0.5
"""Longest blocking wait in seconds. A Ctrl-C that arrives just before a wait is handled only when
the wait returns."""


class HttpEngine:
    """Answers items in order, keeping the endpoints busy from the first to the last.

    A loop in a thread of its own pulls items as places get free, so the caller's pace and batch
    size hold nothing up. Each completion is on disk before it counts.
    """

    def __init__(
        self,
        providers: Sequence[HttpProvider],
        coalescer: Coalescer,
        policy: PolicySettings,
        budget: Budget,
        *,
        slots: SharedSlots | None = None,
        patient: bool = False,
        tolerated: Sequence[str] = (),
        others: Sequence[HttpProvider] = (),
    ) -> None:
        """`providers`: one for each server. `patient`: whether to go on where the first records all
        fail; `tolerated`: the kinds of failures that are never counted for that. `others` may be
        asked later, and have to be there before anything is spent."""
        self._thread = LoopThread.shared()
        pace = pace_of(policy, slots)
        each = [
            Endpoint(
                HttpClient(provider, policy, coalescer.cache),
                Capacity(policy, budget, slots, pace=pace),
            )
            for provider in providers
        ]
        self._endpoints = Endpoints(each, coalescer, policy, patient, tolerated, others)
        for endpoint in each:
            self._thread.call(endpoint.client.open())

    def outcomes(self, items: Iterable[Item]) -> Generator[Outcome, None, None]:
        """One outcome an item, in order.

        Left early (an error, Ctrl-C), it sends no more, waits for what is on its way, and keeps
        it. Raises: RunStopped, CacheError.
        """
        run = Pass(self._endpoints, iter(items))
        loop = self._thread.loop
        loop.call_soon_threadsafe(run.begin)
        try:
            while (ready := _waited(run.ready)) is not None:
                for entry in ready:
                    assert entry.outcome is not None
                    yield entry.outcome
                loop.call_soon_threadsafe(run.consumed, len(ready))
            if run.error is not None:
                raise run.error
        finally:
            loop.call_soon_threadsafe(run.stop)
            try:
                while not run.drained.wait(SIGNAL_SECONDS):
                    pass
            except BaseException:  # a second Ctrl-C: do not wait for the last answers
                loop.call_soon_threadsafe(run.abort)
                raise
            finally:
                run.error = None  # its traceback holds this frame, which holds the pass

    def close(self) -> None:
        for endpoint in self._endpoints.each:
            self._thread.finish(endpoint.client.close())


def _waited(ready: queue.SimpleQueue[list[Pending] | None]) -> list[Pending] | None:
    while True:
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=SIGNAL_SECONDS)
