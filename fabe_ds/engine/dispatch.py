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

from fabe_ds.engine.coalesce import Intake, Slot
from fabe_ds.engine.local import POLL_SECONDS
from fabe_ds.engine.outage import Outage
from fabe_ds.engine.verdict import Verdict, in_context
from fabe_ds.errors import CacheError, FabeError, RecordFailed, RunStopped
from fabe_ds.request import Completion, Item, Request
from fabe_ds.text import clock, listed

if TYPE_CHECKING:
    from fabe_ds.engine.http import HttpEngine

log = logging.getLogger(__name__)

CHUNK = 64
SLOT_SECONDS = 0.005
WATCH_SECONDS = 0.5
CHARACTERS_A_TOKEN = 4  # a guess, put right by the usage that comes with the answer
BACKOFF_SECONDS, BACKOFF_MAX = 0.5, 30.0
SUSPICIOUS = 20  # records that all failed before any went well: it is not the records
HEAD_START_SECONDS = 1.0
"""How long the first request of all goes alone to an endpoint that has never answered: a refused
key, model or parameter comes sooner, and then costs one request."""
FORBIDDEN = 3  # records refused with 403, and none answered: it is the key
SAID_AFTER, CUT_SAID_AFTER = 1.0, 3.0
"""Seconds that a wait, and a limit that is held back, last before the log says so."""


class Task:
    """A slot on its way: how often it was tried, and since when.

    `twin` is the second request for the same slot, where the first does not answer; `over` says
    that the other one was first.
    """

    __slots__ = ("cuts", "free_retry", "over", "running", "sent_at", "slot", "tries", "twin")

    def __init__(self, slot: Slot) -> None:
        self.slot, self.tries, self.free_retry, self.cuts = slot, 0, True, 0
        self.running: asyncio.Task[None] | None = None
        self.sent_at = 0.0
        self.twin: Task | None = None
        self.over = False


def _request(task: Task) -> Request:
    assert task.slot.request is not None
    return task.slot.request


def _how_unavailable(verdict: Verdict) -> str:
    if verdict.gone:
        return "the server is gone"
    return "the model is loading" if verdict.loading else "the server refuses all"


def _used_up(cap: str) -> str:
    return (
        f"the budget is used up ({cap}); what was answered is kept: run the same command again "
        "with a higher one to go on, or with --offline to write what there is"
    )


_GO_ON = (
    "what was answered is kept: run the same command again to go on, or with --offline to write "
    "what there is"
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
        self._outage = Outage(time.monotonic)
        self._forbidden: list[tuple[Task, Verdict]] = []  # until others show what it means
        self._forbidden_in_a_row = 0
        self._first_sent_at: float | None = None
        self._held_since: float | None = None
        self._held_said = False
        self._reason = ""  # of the latest refusal
        self._bad = 0

    # Pulling and starting.

    def begin(self) -> None:
        self.engine.jobs.append(self)
        self.pump()
        self.watch()

    def pump(self) -> None:
        """Starts what may be started, and pulls items while there is room for more."""
        if self.drained.is_set():
            return
        engine, stats = self.engine, self.intake.stats
        try:
            while not self._stopping:
                limit = 1 if self._outage.down else engine.limiter.limit
                if len(self._todo) < limit:
                    self._pull()
                busy = engine.busy
                if self._forbidden and not (self._todo or self._sleeping or busy):
                    self._judge_forbidden()  # nobody is left to show what it meant
                if not self._todo or busy >= limit or not self._may_send(busy):
                    break
                self._start(self._todo.popleft())
        except BaseException as error:  # the items are the caller's code: it gets its error back
            self.fatal(error)
        stats.in_flight, stats.limit = engine.busy, engine.limiter.limit
        if engine.slots:
            engine.slots.hold(engine.busy)
        self._deliver()

    def _may_send(self, busy: int) -> bool:
        """Whether the next request may go now; where not, what wakes us is under way."""
        engine = self.engine
        if not engine.checked:
            engine.begin_check()
            return False
        if (asked := engine.rates.asked_for) > self.policy.give_up_after:
            self.fatal(
                RunStopped(
                    f"{engine.provider.address}: {engine.rates.reason}, for {clock(asked)} more: "
                    f"longer than --give-up-after; {_GO_ON}"
                )
            )
            return False
        if (pause := max(engine.rates.pause(), self._outage.until_probe())) > 0:
            self._wake_after(pause)
            return False
        if not engine.proven and busy and (left := self._head_start()) > 0:
            self._wake_after(left)
            return False
        if lacking := engine.budget.lacking(_request(self._todo[0])):
            if not busy:  # else an answer may give some of what it reserved back
                self.fatal(RunStopped(_used_up(lacking)))
            return False
        if engine.slots and not engine.slots.hold(busy + 1):
            self._wake_after(SLOT_SECONDS)
            return False
        return True

    def _head_start(self) -> float:
        """Seconds for which the first request still goes alone."""
        first = self._first_sent_at
        return 0.0 if first is None else first + HEAD_START_SECONDS - time.monotonic()

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
            self._order.extend(slots)
            self._ahead += len(slots)
            room -= len(slots)
            self._todo.extend(map(Task, todo))
            self._watch_foreign(foreign)

    def _watch_foreign(self, foreign: list[Slot]) -> None:
        if foreign and not self._foreign:
            asyncio.get_running_loop().call_later(POLL_SECONDS, self._poll)
        self._foreign += foreign

    def _poll(self) -> None:
        """Looks after the records that another process is sending."""
        waiting, self._foreign = self._foreign, []
        if self._stopping:
            return
        try:
            todo, foreign = self.intake.take_over(waiting)
        except CacheError as error:
            self.fatal(error)
            return
        self._todo.extend(map(Task, todo))
        self._watch_foreign(foreign)
        self.pump()

    def _wake_after(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.pump()

    def _start(self, task: Task) -> None:
        self.intake.stats.requests += 1
        self.engine.limiter.sent()
        self.engine.rates.sent(_tokens_at_most(task))
        self.engine.budget.reserve(_request(task))
        running = asyncio.get_running_loop().create_task(self._send(task))
        task.running, task.sent_at = running, time.monotonic()
        self._first_sent_at = self._first_sent_at or task.sent_at
        self._tasks[running] = task
        running.add_done_callback(self._over)

    def _over(self, running: asyncio.Task[None]) -> None:
        self._tasks.pop(running, None)
        if not running.cancelled() and (error := running.exception()) is not None:
            self.fatal(error)
        self.engine.pump()

    # Sending.

    async def _send(self, task: Task) -> None:
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
            self._answered(task, answer)
        else:
            about_key = answer.doubtful and answer.kind == "key"
            verdict = in_context(answer, self.engine.answered_ago)
            self._forbidden_in_a_row += about_key and verdict.action == "fail"
            self._refused(task, verdict)

    def _answered(self, task: Task, completion: Completion) -> None:
        stats, engine = self.intake.stats, self.engine
        if self._outage.down and self._outage.seconds >= SAID_AFTER:  # as it was said to be gone
            log.info("the server answers again after %s", clock(self._outage.seconds))
        self._outage.reset()
        self._forbidden_in_a_row = 0
        engine.answered()
        engine.limiter.answered(task.sent_at, engine.busy)
        stats.took(time.monotonic() - task.sent_at)
        if completion.completion_tokens is not None:
            used = (completion.prompt_tokens or 0) + completion.completion_tokens
            engine.rates.corrected(used - _tokens_at_most(task))
        if not self._unstored:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unstored.append((task, completion))
        self._judge_forbidden()

    def _refused(self, task: Task, verdict: Verdict) -> None:
        """Does what a verdict says."""
        log.debug("%s (%s): %s", verdict.action, verdict.kind, verdict.message)
        if verdict.action == "fail":
            self._outage.reset()
        if verdict.lesson is not None:
            self.engine.learn(verdict.lesson, verdict.message)
            self._todo.appendleft(task)
        elif verdict.doubtful and verdict.kind == "key":
            self._forbidden.append((task, verdict))
            if len(self._forbidden) >= FORBIDDEN:
                self._judge_forbidden()
        elif verdict.action == "stop":
            self._abandon([task])
            models = self.engine.provider.models if verdict.kind == "model" else []
            hint = f"; it has {listed(models)}" if models else ""
            self.fatal(RunStopped(f"{self.engine.provider.address}: {verdict.message}{hint}"))
        elif verdict.action == "fail":
            self._fail(task, verdict)
            if self._forbidden_in_a_row >= SUSPICIOUS:
                self.fatal(
                    RunStopped(
                        f"{self.engine.provider.address}: the last {SUSPICIOUS} records were all "
                        f"refused, is the key still good? ({verdict.message})"
                    )
                )
        else:
            self._retry(task, verdict)

    def _judge_forbidden(self) -> None:
        """What a 403 meant: the key, where nobody was answered; else those records."""
        held, self._forbidden = self._forbidden, []
        ago = self.engine.answered_ago
        for task, verdict in held:
            if ago is None:
                self._abandon([task])
            else:
                self._fail(task, in_context(verdict, ago))
        if held and ago is None:
            self.fatal(RunStopped(f"{self.engine.provider.address}: {held[0][1].message}"))

    def watch(self) -> None:
        """Twice a second: says what holds the run up, and asks a second time, once, where an
        answer takes far longer than all others did.

        A request that hangs would hold its record until the timeout; this costs one request.
        """
        if self.drained.is_set():
            return
        asyncio.get_running_loop().call_later(WATCH_SECONDS, self.watch)
        self._tell()
        late = self.engine.limiter.late()
        room = self.engine.limiter.limit - self.engine.busy
        if late is None or self._stopping or self._outage.down:
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

    def _tell(self) -> None:
        """Puts what holds the run up into its counts, and into the log where it lasts."""
        state = self._state()
        if state and not self.intake.stats.state:
            log.debug("%s", state)
        self.intake.stats.state = state
        if not state:
            self._held_since, self._held_said = None, False
            return
        now = time.monotonic()
        self._held_since = self._held_since or now
        waits = self._outage.down or self._stopping or self.engine.rates.pause() > 0
        if not self._held_said and now - self._held_since >= (
            SAID_AFTER if waits else CUT_SAID_AFTER
        ):
            self._held_said = True
            log.info("%s", state)

    def _state(self) -> str:
        limiter, rates = self.engine.limiter, self.engine.rates
        if self._stopping:
            return f"stopping: {self.engine.busy} answers are on their way" if self.busy else ""
        if self._outage.down:
            left = self.policy.give_up_after - self._outage.seconds
            return (
                f"{self._outage.how} for {clock(self._outage.seconds)} ({self._outage.reason}), "
                f"looking for it, for {clock(max(0.0, left))} more"
            )
        if rates.asked_for >= 1:
            return f"waiting {clock(rates.asked_for)}: {rates.reason}"
        if rates.pause() >= 1:
            return "waiting for --rpm or --tpm"
        if limiter.held_back:
            return (
                f"{limiter.limit} at once, not {limiter.ceiling}: the server refuses "
                f"{limiter.share:.0%} ({self._reason})"
            )
        return ""

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
                    self._failed_first(task.slot.outcome.message or "")
        except BaseException as error:  # it runs as a callback: nobody else would hear of it
            self._abandon([task for task, _ in rows])
            self.fatal(error)
        self.engine.pump()

    def _fail(self, task: Task, verdict: Verdict) -> None:
        self.intake.failed(task.slot, RecordFailed(verdict.kind, verdict.message))
        self._failed_first(verdict.message)

    def _failed_first(self, message: str) -> None:
        """Stops the run where nothing has gone well, and so many records have failed."""
        self._bad += 1
        if self.policy.patient:
            return
        nothing_went_well = not self.intake.stats.done and not self.intake.stats.cached
        if nothing_went_well and self._bad == max(SUSPICIOUS, self.engine.limiter.limit):
            self.fatal(RunStopped(f"the first {self._bad} records all failed; the last: {message}"))

    def _retry(self, task: Task, verdict: Verdict) -> None:
        if self._stopping:
            self._abandon([task])
            return
        wait, give_up_after = verdict.wait, self.policy.give_up_after
        if wait is not None and wait > give_up_after:
            self._abandon([task])
            self.fatal(
                RunStopped(
                    f"the server asks to wait {wait:.0f} s, longer than --give-up-after; "
                    f"run the same command again then ({verdict.message})"
                )
            )
            return
        self._note_refusal(task, verdict)
        if self._outage.down:
            if self._outage.seconds > min(verdict.patience, give_up_after):
                self._abandon([task])
                self.fatal(
                    RunStopped(
                        f"{self.engine.provider.address}: {self._outage.how} for "
                        f"{self._outage.seconds:.0f} s ({verdict.message}); {_GO_ON}"
                    )
                )
                return
            if verdict.unavailable:  # a probe costs the record no try; the next asks for another
                self.intake.stats.retries += 1
                self._outage.probed(wait)
                self._todo.append(task)
                return
        if verdict.local or (verdict.gone and task.free_retry):
            task.free_retry = False  # an idle connection that the server had closed
            self._sleep(task, SLOT_SECONDS)
            return
        task.tries += 1
        task.cuts += verdict.proxy_cut
        if task.tries > self.policy.retry or task.cuts > 1:  # the model ran for nothing, twice
            self._fail(task, verdict)
            return
        self.intake.stats.retries += 1
        ceiling = min(BACKOFF_MAX, BACKOFF_SECONDS * 2 ** min(10, task.tries))
        self._sleep(task, max(random.uniform(0, ceiling), wait or 0.0))

    def _note_refusal(self, task: Task, verdict: Verdict) -> None:
        """Tells the limiter, the rates and the outage of a refusal."""
        engine = self.engine
        if not verdict.unavailable:
            return
        others = engine.busy - 1
        if verdict.busy and not verdict.loading:
            self.intake.stats.refusals += 1
            self._reason = verdict.message
            engine.limiter.refused(task.sent_at, others)
            if verdict.wait and verdict.kind == "rate":
                engine.rates.hold(verdict.wait, f"the server asks for it ({verdict.message})")
        self._outage.failed(
            task.slot,
            verdict.message,
            _how_unavailable(verdict),
            engine.limiter.limit,
            certain=verdict.loading,
            alone=verdict.gone or others == 0,
        )

    def _sleep(self, task: Task, seconds: float) -> None:
        log.debug("again in %.1f s, retry %d of %d", seconds, task.tries, self.policy.retry)
        timer = asyncio.get_running_loop().call_later(seconds, self._again, task)
        self._sleeping[task] = timer

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
            held = [task for task, _ in self._forbidden]
            self._abandon([*self._todo, *self._sleeping, *held])
            for waiting in (self._todo, self._sleeping, self._forbidden):
                waiting.clear()
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
        if self.drained.is_set():
            return
        if self._timer is not None:
            self._timer.cancel()
        # Whatever happened, no slot of ours may be waited for.
        self._abandon([Task(slot) for slot in self._order if slot.outcome is None])
        if self in self.engine.jobs:
            self.engine.jobs.remove(self)
        stats = self.intake.stats
        stats.in_flight, stats.state = self.engine.busy, ""
        self.drained.set()
        self.ready.put(None)
