"""Moves records between waiting, sleeping, in flight and answered.

What a verdict means is decided in `retry`, whether one more request may go in `capacity`, what one
request comes to in `client`. Everything here but `ready` and `drained` belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from fabe_ds.engine.capacity import GO_ON
from fabe_ds.engine.coalesce import Pending
from fabe_ds.engine.endpoint import Endpoint, Endpoints, Task
from fabe_ds.engine.local import POLL_SECONDS
from fabe_ds.engine.retry import AT_ONCE_SECONDS, decide
from fabe_ds.engine.verdict import Verdict, in_context
from fabe_ds.errors import CacheError, FabeError, RecordFailed, RunStopped
from fabe_ds.request import Completion, Item
from fabe_ds.text import listed

log = logging.getLogger(__name__)

CHUNK = 64
"""Items that are pulled, and looked up in the record cache, together."""
WATCH_SECONDS = 0.5
SUSPICIOUS = 20
"""Records that all failed before any went well: it is not the records."""
OF_RECORDS = ("refused", "context", "too large")
"""Kinds of failures that are a record's own, whichever server it is sent to."""
FORBIDDEN = 3
"""Records that were refused with 403, and none answered: it is the key."""


class Pass:
    """One pass over a stream of items."""

    def __init__(self, endpoints: Endpoints, items: Iterator[Item]) -> None:
        self._all, self._items = endpoints, items
        self._coalescer, self._stats = endpoints.coalescer, endpoints.coalescer.stats
        self.ready: queue.SimpleQueue[list[Pending] | None] = queue.SimpleQueue()
        self.drained = threading.Event()
        self.error: BaseException | None = None
        self._order: deque[Pending] = deque()  # pulled and not yet delivered
        self._todo: deque[Task] = deque()
        self._elsewhere: list[Pending] = []
        self._tasks: dict[asyncio.Task[None], Task] = {}
        self._sleeping: dict[Task, asyncio.TimerHandle] = {}
        self._unstored: list[tuple[Task, Completion]] = []
        self._forbidden: list[tuple[Task, Verdict]] = []  # until others show what it means
        self._ahead = 0  # pulled and not yet consumed
        self._exhausted = self._stopping = False
        self._timer: asyncio.TimerHandle | None = None
        self._forbidden_in_a_row = self._failures = 0

    def begin(self) -> None:
        self._all.passes.append(self)
        self.pump()
        self.watch()

    def pump(self) -> None:
        """Starts what may be started, and pulls items while there is room for more."""
        if self.drained.is_set():
            return
        try:
            while not self._stopping:
                limit = self._all.limit
                if len(self._todo) < limit:
                    self._pull()
                busy = self._all.busy
                if self._forbidden and not (self._todo or self._sleeping or busy):
                    self._classify_forbidden()  # nobody is left to show what it meant
                if not self._todo or busy >= limit:
                    break
                endpoint = self._next(busy)
                if endpoint is None:
                    break
                self._start(self._todo.popleft(), endpoint)
        except BaseException as error:  # the items are the caller's code: it gets its error back
            self.fatal(error)
        # An answer that is not yet on disk has its place, but is no request any more.
        self._stats.in_flight = max(0, self._all.busy - len(self._unstored))
        self._stats.limit = self._all.width
        for each in self._all.each:
            each.capacity.hold(self._all.busy)
        self._deliver()

    def _next(self, busy: int) -> Endpoint | None:
        """The endpoint that the next request may go to now; where there is none, what wakes us is
        under way."""
        if not self._all.ready(asyncio.get_running_loop()):
            return None
        task = self._todo[0]
        endpoint, gate = self._all.choose(task.request, busy, task.failed_at)
        if gate.stop is not None:
            self.fatal(
                RunStopped(f"{endpoint.address}: {gate.stop}" if gate.by_server else gate.stop)
            )
        elif gate.wait is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(gate.wait, self._wake)
        return endpoint if gate.opens else None

    @property
    def busy(self) -> int:
        """Places in flight that it holds; one is given up when its answer is on disk."""
        return len(self._tasks) + len(self._unstored)

    def _pull(self) -> None:
        room = self._all.window - self._ahead
        most = 2 * self._all.width
        while not self._exhausted and room > 0 and len(self._todo) < most:
            chunk = list(islice(self._items, min(CHUNK, room)))
            if not chunk:
                self._exhausted = True
                break
            entries, todo, elsewhere = self._coalescer.admit(chunk, self)
            self._order.extend(entries)
            self._ahead += len(entries)
            room -= len(entries)
            self._todo.extend(map(Task, todo))
            self._wait_for(elsewhere)

    def _wait_for(self, elsewhere: list[Pending]) -> None:
        """Looks again, after a while, after records that another process is sending."""
        if elsewhere and not self._elsewhere:
            asyncio.get_running_loop().call_later(POLL_SECONDS, self._poll)
        self._elsewhere += elsewhere

    def _poll(self) -> None:
        waiting, self._elsewhere = self._elsewhere, []
        if self._stopping:
            return
        try:
            todo, elsewhere = self._coalescer.adopt(waiting)
        except CacheError as error:
            self.fatal(error)
            return
        self._todo.extend(map(Task, todo))
        self._wait_for(elsewhere)
        self.pump()

    def _wake(self) -> None:
        self._timer = None
        self.pump()

    def _start(self, task: Task, endpoint: Endpoint) -> None:
        self._stats.requests += 1
        task.at = endpoint
        endpoint.busy += 1
        endpoint.sent += 1
        endpoint.capacity.sent(task.request)
        running = asyncio.get_running_loop().create_task(self._send(task))
        task.running, task.sent_at = running, time.monotonic()
        self._tasks[running] = task
        running.add_done_callback(self._over)

    def _over(self, running: asyncio.Task[None]) -> None:
        task = self._tasks.pop(running, None)
        if task is not None:
            task.at.busy -= 1
        if not running.cancelled() and (error := running.exception()) is not None:
            self.fatal(error)
        self._all.pump()

    # Sending.

    async def _send(self, task: Task) -> None:
        client, capacity = task.at.client, task.at.capacity
        result, headers = await client.post(task.request)
        if headers is not None:
            capacity.read(headers)
        self._stats.cost = capacity.settle(task.request, result)
        # The twin was first; what came second is booked, and no more.
        if task.over:
            return
        if twin := task.twin:
            task.over = twin.over = isinstance(result, Completion)
            task.twin = twin.twin = None
            if not task.over:
                return  # the other one may still answer
            if twin.running is not None:
                twin.running.cancel()
        if isinstance(result, Completion):
            self._answered(task, result)
        else:
            about_key = result.doubtful and result.kind == "key"
            verdict = in_context(result, client.answered_ago)
            self._forbidden_in_a_row += about_key and verdict.action == "fail"
            self._refused(task, verdict)

    def _answered(self, task: Task, completion: Completion) -> None:
        self._forbidden_in_a_row = 0
        task.at.client.answered()
        self._all.answered(task.at)
        capacity = task.at.capacity
        capacity.proven = True
        capacity.answered(task.request, task.sent_at, completion, task.at.busy)
        self._stats.took(time.monotonic() - task.sent_at)
        if not self._unstored:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unstored.append((task, completion))
        task.at.busy += 1
        self._classify_forbidden()

    def _refused(self, task: Task, verdict: Verdict) -> None:
        """Does what a verdict says."""
        log.debug("%s (%s): %s", verdict.action, verdict.kind, verdict.message)
        # A server that judges a record is there.
        if verdict.action == "fail":
            task.at.capacity.outage.reset()
        if verdict.lesson is not None:
            task.at.client.learn(verdict.lesson, verdict.message)
            if verdict.proxy_cut:  # the model ran for nothing, which counts
                self._retry(task, verdict)
            else:
                self._todo.appendleft(task)
        elif verdict.doubtful and verdict.kind == "key":
            self._forbidden.append((task, verdict))
            if len(self._forbidden) >= FORBIDDEN:
                self._classify_forbidden()
        elif verdict.action == "stop":
            models = task.at.client.provider.models if verdict.kind == "model" else []
            hint = f"; it has {listed(models)}" if models else ""
            self._give_up([task], f"{verdict.message}{hint}", task.at)
        elif verdict.action == "fail" and self._goes_elsewhere(task, verdict):
            self._todo.appendleft(task)
        elif verdict.action == "fail":
            self._fail(task, verdict)
            if self._forbidden_in_a_row >= SUSPICIOUS:
                self._give_up(
                    [],
                    f"the last {SUSPICIOUS} records were all refused, is the key still good? "
                    f"({verdict.message})",
                    task.at,
                )
        else:
            self._retry(task, verdict)

    def _goes_elsewhere(self, task: Task, verdict: Verdict) -> bool:
        """Notes that a request came to nothing at a server; whether it is to be sent to another,
        as what is wrong may be the server, and not the record."""
        if verdict.kind in OF_RECORDS:
            return False
        self._all.failed(task.at, verdict.message)
        task.failed_at = (*task.failed_at, task.at)
        return self._all.others_for(task)

    def _give_up(self, tasks: Sequence[Task], message: str, at: Endpoint) -> None:
        """Ends the run, with these records unanswered; or goes on without that server."""
        if not self._stopping and self._all.leave_out(at, message):
            self._todo.extendleft(tasks)
            return
        self._abandon(tasks)
        self.fatal(RunStopped(f"{at.address}: {message}"))

    def _classify_forbidden(self) -> None:
        """What a 403 meant: the key, where nobody was answered; else those records."""
        held, self._forbidden = self._forbidden, []
        for task, verdict in held:
            ago = task.at.client.answered_ago
            if ago is not None:
                self._fail(task, in_context(verdict, ago))
            else:
                self._give_up([task], verdict.message, task.at)

    def _retry(self, task: Task, verdict: Verdict) -> None:
        if self._stopping:
            self._abandon([task])
            return
        capacity, give_up_after = task.at.capacity, self._all.policy.give_up_after
        if verdict.wait is not None and verdict.wait > give_up_after:
            self._give_up(
                [task],
                f"the server asks to wait {verdict.wait:.0f} s, longer than --give-up-after; run "
                f"the same command again then ({verdict.message})",
                task.at,
            )
            return
        self._stats.refusals += verdict.busy and not verdict.loading
        capacity.refused(verdict, task.entry, task.sent_at, task.at.busy)
        outage = capacity.outage
        if outage.down and self._all.away_for > min(verdict.patience, give_up_after):
            how = f"{outage.how} for {outage.seconds:.0f} s"
            self._abandon([task])
            self.fatal(RunStopped(f"{task.at.address}: {how} ({verdict.message}); {GO_ON}"))
        elif outage.down and verdict.unavailable:
            # A probe costs the record no try; the next asks for another.
            self._stats.retries += 1
            outage.probed(verdict.wait)
            self._todo.append(task)
        else:
            if not verdict.unavailable and self._goes_elsewhere(task, verdict):
                self._stats.retries += 1
                self._sleep(task, AT_ONCE_SECONDS)
                return
            policy = self._all.policy
            decision = decide(
                task.attempts, verdict, policy.retry, random.uniform, policy.give_up_after
            )
            task.attempts = decision.attempts
            if decision.after is None:
                self._fail(task, verdict)
                return
            self._stats.retries += decision.counts
            self._sleep(task, decision.after)

    def _fail(self, task: Task, verdict: Verdict) -> None:
        self._coalescer.failed(task.entry, RecordFailed(verdict.kind, verdict.message))
        self._count_failure(verdict.kind, verdict.message)

    def _count_failure(self, kind: str, message: str) -> None:
        """Stops the run where nothing has gone well, and so many records have failed."""
        self._failures += kind not in self._all.tolerated
        nothing_went_well = not self._stats.done and not self._stats.cached
        many = max(SUSPICIOUS, self._all.width)
        if nothing_went_well and self._failures >= many and not self._all.patient:
            self.fatal(RunStopped(f"the first {many} records all failed; the last: {message}"))

    def _sleep(self, task: Task, seconds: float) -> None:
        log.debug("again in %.1f s, after %d tries", seconds, task.attempts.tries)
        timer = asyncio.get_running_loop().call_later(seconds, self._again, task)
        self._sleeping[task] = timer

    def _again(self, task: Task) -> None:
        del self._sleeping[task]
        self._todo.appendleft(task)
        self.pump()

    def watch(self) -> None:
        """Twice a second: says what holds the run up, and asks a second time, once, where an
        answer takes far longer than all others did.

        A request that hangs would hold its record until the timeout; this costs one request.
        """
        if self.drained.is_set():
            return
        asyncio.get_running_loop().call_later(WATCH_SECONDS, self.watch)
        held = self._all.said(self._stopping)
        stopping = f"stopping: {self._all.busy} answers are on their way" if self.busy else ""
        self._stats.state = stopping if self._stopping else held
        if self._stopping:
            return
        late_at = {each: each.capacity.limiter.late() for each in self._all.each if each.is_up}
        if all(late is None for late in late_at.values()):
            return
        room, now = self._all.width - self._all.busy, time.monotonic()
        for task in list(self._tasks.values()):
            late = late_at.get(task.at)
            is_late = late is not None and now - task.sent_at > late
            if is_late and room > 0 and not task.twin and not task.over:
                endpoint, gate = self._all.choose(task.request, self._all.busy, [task.at])
                if not gate.opens:
                    return
                task.twin = Task(task.entry, task.attempts)
                task.twin.twin = task
                self._start(task.twin, endpoint)
                self._stats.hedged += 1
                room -= 1

    # Handing over, and ending.

    def _flush(self) -> None:
        """Stores the completions of this turn of the loop, all in one commit.

        On the loop itself: a writer's thread would wait for the interpreter at every row while
        the loop is busy. A place in flight is given up only afterwards, so that what a kill can
        lose stays within the limit.
        """
        rows, self._unstored = self._unstored, []
        for task, _ in rows:
            task.at.busy -= 1
        try:
            self._coalescer.store([(task.entry, completion) for task, completion in rows])
            for task, completion in rows:
                if not self._coalescer.answered(task.entry, completion):
                    self._todo.appendleft(Task(task.entry))
                elif (outcome := task.entry.outcome) is not None and outcome.kind is not None:
                    self._count_failure(outcome.kind, outcome.message or "")
        except BaseException as error:  # it runs as a callback: nobody else would hear of it
            self._abandon([task for task, _ in rows])
            self.fatal(error)
        self._all.pump()

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
        """Ends the pass with this error, or with the one that came before it."""
        if self.error is None:
            self.error = error
        self.stop()

    def stop(self) -> None:
        """Sends no more; what is on its way is waited for."""
        if not self._stopping:
            self._stopping = True
            for timer in self._sleeping.values():
                timer.cancel()
            held = (task for task, _ in self._forbidden)
            self._abandon([*self._todo, *self._sleeping, *held])
            for waiting in (self._todo, self._sleeping, self._forbidden):
                waiting.clear()
        self.pump()

    def abort(self) -> None:
        """Drops what is on its way."""
        for running in self._tasks:
            running.cancel()
        self._abandon(self._tasks.values())
        self._finish()

    def _abandon(self, tasks: Iterable[Task]) -> None:
        try:
            self._coalescer.abandon([task.entry for task in tasks])
        except FabeError as error:
            log.debug("claims were not given up: %s", error)

    def _finish(self) -> None:
        if self.drained.is_set():
            return
        if self._timer is not None:
            self._timer.cancel()
        # Whatever happened, no entry of ours may be waited for.
        self._abandon([Task(entry) for entry in self._order if entry.outcome is None])
        if self in self._all.passes:
            self._all.passes.remove(self)
        self._stats.in_flight, self._stats.state = self._all.busy, ""
        self.drained.set()
        self.ready.put(None)
