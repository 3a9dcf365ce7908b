"""One pass over a stream of items: what is pulled, sent, tried again, stored and handed over."""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from fabe_ds.engine.intake import Intake, Item, Slot
from fabe_ds.engine.local import POLL_SECONDS
from fabe_ds.engine.verdict import Verdict
from fabe_ds.errors import CacheError, FabeError, RecordFailed, RunStopped
from fabe_ds.providers.base import Completion, Request

if TYPE_CHECKING:
    from fabe_ds.engine.http import HttpEngine

log = logging.getLogger(__name__)

CHUNK = 64
SLOT_SECONDS = 0.005
WATCH_SECONDS = 0.5
CHARACTERS_A_TOKEN = 4  # a guess, put right by the usage that comes with the answer
BACKOFF_SECONDS, BACKOFF_MOST, PROBE_MOST = 0.5, 30.0, 10.0
SUSPICIOUS = 20  # records that all failed before any went well: it is not the records


class Task:
    """A slot on its way: how often it was tried, and since when.

    `twin` is the second request for the same slot, where the first does not answer; `over` says
    that the other one was first.
    """

    __slots__ = ("free_retry", "over", "running", "sent_at", "slot", "tries", "twin")

    def __init__(self, slot: Slot) -> None:
        self.slot, self.tries, self.free_retry = slot, 0, True
        self.running: asyncio.Task[None] | None = None
        self.sent_at = 0.0
        self.twin: Task | None = None
        self.over = False


def _request(task: Task) -> Request:
    assert task.slot.request is not None
    return task.slot.request


def _used_up(cap: str) -> str:
    return (
        f"the budget is used up ({cap}); what was answered is kept, run the same command again "
        "with a higher one to go on"
    )


def _tokens_at_most(task: Task) -> int:
    request = _request(task)
    return len(request.prompt) // CHARACTERS_A_TOKEN + request.sampling.max_new_tokens


class Job:
    """One pass over a stream of items. All but `ready` and `drained` belongs to the loop."""

    def __init__(self, engine: HttpEngine, items: Iterator[Item]) -> None:
        self.engine, self.policy = engine, engine.policy
        self.intake: Intake = engine.intake
        self.items = items
        self.ready: queue.SimpleQueue[list[Slot] | None] = queue.SimpleQueue()
        self.drained = threading.Event()
        self.error: BaseException | None = None
        self._order: deque[Slot] = deque()  # pulled and not yet delivered
        self._todo: deque[Task] = deque()
        self._foreign: list[Slot] = []
        self._tasks: dict[asyncio.Task[None], Task] = {}
        self._sleeping: dict[Task, asyncio.TimerHandle] = {}
        self._ahead = 0  # pulled and not yet consumed
        self._exhausted = self._stopping = False
        self._unstored: list[tuple[Task, Completion]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._gone_since: float | None = None
        self._failures = 0
        self._probe_at = 0.0
        self._bad = 0

    # Pulling and starting.

    def pump(self) -> None:
        """Starts what may be started, and pulls items while there is room for more."""
        if self.drained.is_set():
            return
        stats, limiter = self.intake.stats, self.engine.limiter
        try:
            while not self._stopping:
                limit = 1 if self._outage else limiter.limit
                if len(self._todo) < limit:
                    self._pull()
                busy = self.engine.busy
                if not self._todo or busy >= limit:
                    break
                if (pause := max(limiter.pause(), self._until_probe())) > 0:
                    self._wake_after(pause)
                    break
                if lacking := self.engine.budget.lacking(_request(self._todo[0])):
                    if not busy:  # else an answer may give some of what it reserved back
                        self.fatal(RunStopped(_used_up(lacking)))
                    break
                if self.engine.slots and not self.engine.slots.hold(busy + 1):
                    self._wake_after(SLOT_SECONDS)
                    break
                self._start(self._todo.popleft())
        except BaseException as error:  # the items are the caller's code: it gets its error back
            self.fatal(error)
        stats.in_flight = self.engine.busy
        if self.engine.slots:
            self.engine.slots.hold(self.engine.busy)
        self._deliver()

    @property
    def busy(self) -> int:
        """Places in flight that it holds; one is given up when its answer is on disk."""
        return len(self._tasks) + len(self._unstored)

    def _pull(self) -> None:
        room = self.policy.window - self._ahead
        while not self._exhausted and room > 0 and len(self._todo) < 2 * self.engine.limiter.limit:
            chunk = list(islice(self.items, min(CHUNK, room)))
            if not chunk:
                self._exhausted = True
                break
            slots, todo, foreign = self.intake.take(chunk, self)
            if todo:
                self.engine.check()
            self._order.extend(slots)
            self._ahead += len(slots)
            room -= len(slots)
            self._todo.extend(map(Task, todo))
            self._watch(foreign)

    def _watch(self, foreign: list[Slot]) -> None:
        if foreign and not self._foreign:
            asyncio.get_running_loop().call_later(POLL_SECONDS, self._poll)
        self._foreign += foreign

    def _poll(self) -> None:
        """Looks after the records that another process is sending."""
        waiting, self._foreign = self._foreign, []
        try:
            todo, foreign = self.intake.take_over(waiting)
        except CacheError as error:
            self.fatal(error)
            return
        self._todo.extend(map(Task, todo))
        if not self._stopping:
            self._watch(foreign)
        self.pump()

    def _wake_after(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.pump()

    def _start(self, task: Task) -> None:
        self.intake.stats.requests += 1
        self.engine.limiter.sent(_tokens_at_most(task))
        self.engine.budget.reserve(_request(task))
        running = asyncio.get_running_loop().create_task(self._send(task))
        task.running, task.sent_at = running, time.monotonic()
        self._tasks[running] = task
        running.add_done_callback(self._over)

    def _over(self, running: asyncio.Task[None]) -> None:
        self._tasks.pop(running, None)
        if not running.cancelled() and (error := running.exception()) is not None:
            self.fatal(error)
        self.engine.pump()

    # Sending.

    async def _send(self, task: Task) -> None:
        limiter = self.engine.limiter
        started = time.monotonic()
        request = _request(task)
        answer = await self.engine.post(request)
        completion = answer if isinstance(answer, Completion) else None
        # A refusal costs nothing; where the answer never came, nobody knows.
        known = completion is not None or (isinstance(answer, Verdict) and answer.refused)
        self.engine.budget.settle(request, completion, known)
        self.intake.stats.cost = self.engine.budget.cost
        if task.over:
            return
        if twin := task.twin:
            task.over = twin.over = isinstance(answer, Completion)
            task.twin = twin.twin = None
            if not task.over:
                return  # the other one may still answer
            if twin.running is not None:
                twin.running.cancel()
        if isinstance(answer, Completion):
            self._gone_since, self._failures = None, 0
            limiter.answered(time.monotonic() - started, self.engine.busy)
            self.intake.stats.took(time.monotonic() - started)
            if answer.completion_tokens is not None:
                used = (answer.prompt_tokens or 0) + answer.completion_tokens
                limiter.corrected(used - _tokens_at_most(task))
            if not self._unstored:
                asyncio.get_running_loop().call_soon(self._flush)
            self._unstored.append((task, answer))
            return
        if answer.action == "stop":
            self._abandon([task])
            self.fatal(RunStopped(f"{self.engine.provider.identity()}: {answer.message}"))
        elif answer.action == "fail":
            self._gone_since, self._failures = None, 0
            self._fail(task, answer)
        else:
            self._retry(task, answer, started)

    def watch(self) -> None:
        """Asks a second time, once, where an answer takes far longer than all others did.

        A request that hangs would hold its record until the timeout; this costs one request.
        """
        if self.drained.is_set():
            return
        asyncio.get_running_loop().call_later(WATCH_SECONDS, self.watch)
        late = self.engine.limiter.late()
        room = self.engine.limiter.limit - self.engine.busy
        if late is None or self._stopping or self._outage:
            return
        now = time.monotonic()
        for task in list(self._tasks.values()):
            if room > 0 and not task.twin and not task.over and now - task.sent_at > late:
                if self.engine.budget.lacking(_request(task)):
                    return
                task.twin = Task(task.slot)
                task.twin.twin, task.twin.tries = task, task.tries
                self._start(task.twin)
                self.intake.stats.hedged += 1
                room -= 1

    def _flush(self) -> None:
        """Stores the completions of this turn of the loop, all in one commit.

        On the loop itself: a writer's thread would wait for the interpreter at every row while
        the loop is busy. A place in flight is given up only afterwards, so that what a kill can
        lose stays within the limit.
        """
        rows, self._unstored = self._unstored, []
        try:
            self.intake.store([(task.slot, completion) for task, completion in rows])
            for task, completion in rows:
                if not self.intake.answered(task.slot, completion):
                    self._todo.appendleft(Task(task.slot))
                    continue
                if task.slot.outcome is not None and task.slot.outcome.kind is not None:
                    self._bad += 1
        except BaseException as error:  # it runs as a callback: nobody else would hear of it
            self.fatal(error)
        self.engine.pump()

    def _fail(self, task: Task, verdict: Verdict) -> None:
        self.intake.failed(task.slot, RecordFailed(verdict.kind, verdict.message))
        self._bad += 1
        nothing_went_well = not self.intake.stats.done and not self.intake.stats.cached
        if nothing_went_well and self._bad == max(SUSPICIOUS, self.engine.limiter.limit):
            self.fatal(
                RunStopped(f"the first {self._bad} records all failed; the last: {verdict.message}")
            )

    def _retry(self, task: Task, verdict: Verdict, sent_at: float) -> None:
        now = time.monotonic()
        limiter = self.engine.limiter
        if self._stopping:
            self._abandon([task])
            return
        if verdict.floor is not None and verdict.floor > self.policy.give_up_after:
            self._abandon([task])
            self.fatal(
                RunStopped(
                    f"the server asks to wait {verdict.floor:.0f} s, longer than --give-up-after; "
                    f"run the same command again then ({verdict.message})"
                )
            )
            return
        if verdict.busy:
            limiter.refused(sent_at, verdict.floor)
        if verdict.gone:
            self._gone_since = self._gone_since or now
            self._failures += 1
            if now - self._gone_since > self.policy.give_up_after:
                self._abandon([task])
                self.fatal(
                    RunStopped(
                        f"{self.engine.provider.identity()}: gone for "
                        f"{now - self._gone_since:.0f} s ({verdict.message}); what was answered is "
                        "kept, run the same command again to go on"
                    )
                )
                return
        if verdict.gone and task.free_retry and not self._outage:
            task.free_retry = False  # an idle connection that the server had closed
            self._todo.appendleft(task)
            return
        if verdict.gone and self._outage:  # a probe does not cost the record a try
            self.intake.stats.retries += 1
            ceiling = min(PROBE_MOST, BACKOFF_SECONDS * 2 ** min(10, self._beyond))
            self._probe_at = now + max(random.uniform(ceiling / 2, ceiling), verdict.floor or 0.0)
            self._todo.appendleft(task)
            return
        task.tries += 1
        if task.tries > self.policy.retry:
            self._fail(task, verdict)
            return
        self.intake.stats.retries += 1
        ceiling = min(BACKOFF_MOST, BACKOFF_SECONDS * 2 ** min(10, task.tries))
        delay = max(random.uniform(0, ceiling), verdict.floor or 0.0)
        self._sleeping[task] = asyncio.get_running_loop().call_later(delay, self._again, task)

    @property
    def _outage(self) -> bool:
        """Nothing answers any more: one request at a time finds out when it does."""
        return self._beyond >= 0

    @property
    def _beyond(self) -> int:
        """Failures in a row beyond those that make an outage."""
        return self._failures - max(5, self.engine.limiter.limit)

    def _until_probe(self) -> float:
        return self._probe_at - time.monotonic() if self._outage else 0.0

    def _again(self, task: Task) -> None:
        del self._sleeping[task]
        self._todo.appendleft(task)
        self.pump()

    # Handing over, and ending.

    def _deliver(self) -> None:
        ready = []
        while self._order and self._order[0].outcome is not None:
            ready.append(self._order.popleft())
        if ready:
            self.ready.put(ready)
        if (self._stopping and not self.busy) or (self._exhausted and not self._order):
            self._finish()

    def consumed(self, count: int) -> None:
        self._ahead -= count
        self.pump()

    def fatal(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        self.stop()

    def stop(self) -> None:
        """Sends no more; what is on its way is waited for."""
        if not self._stopping:
            self._stopping = True
            for timer in self._sleeping.values():
                timer.cancel()
            self._abandon([*self._todo, *self._sleeping])
            self._todo.clear()
            self._sleeping.clear()
        self.pump()

    def abort(self) -> None:
        for running in self._tasks:
            running.cancel()
        self._abandon(self._tasks.values())
        self._finish()

    def _abandon(self, tasks: Iterable[Task]) -> None:
        try:
            self.intake.abandon([task.slot for task in tasks])
        except FabeError as error:
            log.debug("claims were not given up: %s", error)

    def _finish(self) -> None:
        if not self.drained.is_set():
            if self._timer is not None:
                self._timer.cancel()
            self.engine.jobs.remove(self)
            self.drained.set()
            self.ready.put(None)
