"""Sends requests through a batch API: at half the price, some time within a day.

A batch is remembered, with the keys of its requests, before it is sent, so a run that was killed
finds it again instead of paying for another.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.batch_api import (
    AGAIN,
    CANCELLED,
    FAILED,
    RUNNING,
    WAIT_MOST,
    WAIT_SECONDS,
    BatchState,
    Refusal,
    batch_client,
)
from fabe_ds.engine.budget import Budget
from fabe_ds.engine.coalesce import Coalescer, Pending
from fabe_ds.engine.local import POLL_SECONDS
from fabe_ds.engine.verdict import Verdict
from fabe_ds.errors import RecordFailed, RunStopped
from fabe_ds.providers import Completion, HttpProvider
from fabe_ds.request import Item, Outcome
from fabe_ds.store.completions import OpenBatch, RecordCache, Row

log = logging.getLogger(__name__)

CHUNK, STORED = 1000, 500
"""Items that are looked up together, and answers that are stored together."""
WAIT_GROWTH = 1.5
_STATES_SHOWN = 3
_is_key = re.compile("[0-9a-f]{64}")
_TAKEN = ("in_progress", "finalizing")
"""What is said of a batch that has found its place in the queue."""


@dataclass(slots=True, eq=False)
class _Job:
    """A batch that is on its way. `lines` are the keys of its requests, in order; `entries` those
    that are waited for, by their keys. `was_alone`: no other was on its way when it was sent, and
    `known` what was known of the server then."""

    opened: OpenBatch
    lines: list[str]
    entries: dict[str, Pending] = field(default_factory=dict)
    was_alone: bool = False
    known: dict[str, str] | None = None
    state: BatchState | None = None
    look_at: float = 0.0
    seconds: float = WAIT_SECONDS

    @property
    def batch(self) -> str:
        return self.opened.batch or ""


class BatchEngine:
    """Answers items in order; what the cache lacks goes into batches, several at a time."""

    def __init__(
        self,
        provider: HttpProvider,
        coalescer: Coalescer,
        policy: PolicySettings,
        budget: Budget,
    ) -> None:
        """`budget` is told of what was answered; it holds nothing back."""
        assert isinstance(coalescer.cache, RecordCache)  # batches are not sent from other nodes
        provider.refuse_open_key()
        self.coalescer, self.policy, self.cache = coalescer, policy, coalescer.cache
        self._stats, self._budget = coalescer.stats, budget
        self._endpoint = str(provider.address)
        self._client = batch_client(provider, policy, self.cache)
        self._most = min(self._client.limits.requests, policy.batch_requests or 1 << 62)
        self._order: deque[Pending] = deque()  # pulled and not yet delivered
        self._todo: deque[Pending] = deque()
        self._elsewhere: list[Pending] = []
        self._jobs: list[_Job] = []
        self._held: dict[str, _Job] = {}  # the batches of earlier runs, by what they hold
        self._doubtful: list[tuple[list[Pending], str]] = []  # of batches that failed, and why
        self._tries: Counter[bytes] = Counter()
        self._has_ended_well = False
        self._looks_for_room = False  # how much the server queues for us is being found out
        self._queue_full_since: float | None = None
        self._send_at, self._queue_seconds = 0.0, WAIT_SECONDS

    def outcomes(self, items: Iterable[Item]) -> Generator[Outcome, None, None]:
        """One outcome an item, in order. Raises: RunStopped, CacheError."""
        if not self.coalescer.offline:
            self._take_up()
        iterator = iter(items)
        pulls = True
        try:
            while True:
                pulls = pulls and self._pull(iterator)
                self._send(whole=pulls)
                while self._order and (outcome := self._order[0].outcome) is not None:
                    self._order.popleft()
                    yield outcome
                if not self._order and not pulls:
                    return
                if not self._has_room or not pulls:
                    self._look()
        finally:  # whatever happened, nothing may wait for what we do not send
            self.coalescer.abandon(self._order)
            for waiting in (self._order, self._todo, self._elsewhere, self._doubtful):
                waiting.clear()
            for job in self._jobs:  # they go on at the server
                job.entries.clear()
            self._stats.state = ""

    def close(self) -> None:
        self._client.close()

    # Items.

    @property
    def _has_room(self) -> bool:
        """Whether more items may be pulled: a part more than the batches in flight hold."""
        ahead = (self.policy.batches + 1) * self._most
        return len(self._order) < ahead and len(self._todo) < self._most

    def _pull(self, iterator: Iterator[Item]) -> bool:
        """Takes items until a batch is full. False when there are no more."""
        while self._has_room:
            chunk = list(islice(iterator, CHUNK))
            if not chunk:
                return False
            entries, todo, elsewhere = self.coalescer.admit(chunk, self)
            self._order.extend(entries)
            self._elsewhere += elsewhere
            self._wait_for(todo)
        return True

    def _wait_for(self, todo: Iterable[Pending]) -> None:
        """Sorts what is to be sent into what an open batch holds, and the rest."""
        for entry in todo:
            job = self._held.get(entry.key.hex())
            if job is not None and self._is_there(job):
                job.entries[entry.key.hex()] = entry
            else:
                self._todo.append(entry)

    def _is_there(self, job: _Job) -> bool:
        """Whether a batch of an earlier run is at the server; where it is not, it is forgotten."""
        if job not in self._jobs:
            return False
        if job.state is not None:
            return True
        if job.opened.batch is None:  # killed before its name was noted
            job.opened = job.opened._replace(batch=self._client.find(job.opened.run))
        state = self._client.state(job.batch) if job.opened.batch else None
        if state is not None and state.kind != FAILED:
            log.info("batch %s: taken up again", job.batch)
            job.state = state
            return True
        what = f"failed: {state.reason}" if state else "is not there any more"
        log.info("batch %s %s; its requests are sent again", job.batch or "of a killed run", what)
        self._forget(job)
        return False

    # Batches.

    @property
    def _wanted(self) -> list[_Job]:
        """The batches that somebody waits for: those of other data are left to other runs."""
        return [job for job in self._jobs if job.entries]

    def _take_up(self) -> None:
        """Finds the batches that killed runs left. They are asked for when a record wants them, so
        those of other data, or of a run that is still on its way, are left alone."""
        here = {job.opened.run for job in self._jobs}
        for opened in self.cache.open_batches(self._endpoint):
            if opened.run in here:
                continue
            job = _Job(opened, self.cache.batch_keys(opened.run))
            self._jobs.append(job)
            if not job.lines and self._is_there(job):  # of a version that did not note them
                while job.state is not None and job.state.kind == RUNNING:
                    self._stats.state = f"batch {job.batch}: {job.state.progress}"
                    time.sleep(min(WAIT_MOST, job.seconds))
                    job.seconds *= WAIT_GROWTH
                    job.state = self._client.state(job.batch)
                self._ended(job, job.state)
        self._held = {key: job for job in self._jobs for key in job.lines}

    def _send(self, whole: bool) -> None:
        """Starts batches while there may be more; `whole`: full ones only."""
        most = 1 if self._looks_for_room else self.policy.batches
        while self._todo and len(self._wanted) < most:
            if self._doubtful or time.monotonic() < self._send_at:
                return
            if whole and len(self._todo) < self._most and self._has_room:
                return
            self._start()

    def _start(self) -> None:
        """Sends one batch, of a size that is taken."""
        part: list[Pending] = []
        lines: list[bytes] = []
        size = 0
        while self._todo and len(part) < self._most:
            entry = self._todo[0]
            assert entry.request is not None
            line = self._client.line(entry.key, entry.request)
            if part and size + len(line) > self._client.limits.size:
                break
            self._todo.popleft()
            part.append(entry)
            lines.append(line)
            size += len(line)
        keys = [entry.key.hex() for entry in part]
        run = hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()[:32]
        opened = OpenBatch(run, self._endpoint, None)
        self.cache.remember_batch(opened, [entry.key for entry in part])
        first = part[0].request
        assert first is not None
        self._stats.requests += len(part)
        opened = opened._replace(batch=self._client.create(run, first, lines))
        self.cache.remember_batch(opened)
        log.info("batch %s: %d requests", opened.batch, len(part))
        look_at = time.monotonic() + WAIT_SECONDS
        entries = dict(zip(keys, part, strict=True))
        is_alone, known = not self._wanted, self._client.lessons.known
        self._jobs.append(_Job(opened, keys, entries, is_alone, known, look_at=look_at))

    def _look(self) -> None:
        """Waits until something may have changed, and looks."""
        if self._elsewhere:
            waiting, self._elsewhere = self._elsewhere, []
            todo, self._elsewhere = self.coalescer.adopt(waiting)
            self._wait_for(todo)
        wanted, now = self._wanted, time.monotonic()
        times = [job.look_at for job in wanted]
        times += [now + POLL_SECONDS] if self._elsewhere else []
        times += [self._send_at] if self._todo and now < self._send_at < math.inf else []
        self._stats.in_flight = sum(len(job.entries) for job in wanted)
        self._stats.state = _shown(wanted)
        if times:
            time.sleep(max(0.0, min(times) - now))
        for job in wanted:
            if time.monotonic() < job.look_at:
                continue
            job.state = self._client.state(job.batch)
            if job.state is not None and job.state.kind == RUNNING:
                self._looks_for_room &= job.state.word.lower() not in _TAKEN
                job.seconds = min(WAIT_MOST, job.seconds * WAIT_GROWTH)
                job.look_at = time.monotonic() + job.seconds
            else:
                self._ended(job, job.state)
        if self._doubtful and not self._wanted:
            raise RunStopped(f"{self._endpoint}: {self._doubtful[0][1]}")

    def _ended(self, job: _Job, state: BatchState | None) -> None:
        """Reads what a batch came to; None where the server knows nothing of it any more."""
        if state is None:
            log.warning("batch %s is not there any more; its requests are sent again", job.batch)
            self._forget(job)
            gone = Verdict("retry", "batch", f"batch {job.batch} is not there any more")
            self._try_again((entry, gone) for entry in job.entries.values())
            return
        if state.kind == FAILED:
            self._failed(job, state)
            return
        stop = self._read(job, state)
        self._forget(job)
        left = list(job.entries.values())
        log.info("batch %s: %s; %d requests are left of it", job.batch, state.word, len(left))
        if stop is not None:
            raise RunStopped(f"{self._endpoint}: {stop}")
        if state.kind == CANCELLED and left:
            raise RunStopped(
                f"batch {job.batch} was cancelled; what it had answered is kept: run the same "
                "command again to go on"
            )
        self._queue_full_since, self._queue_seconds = None, WAIT_SECONDS
        self._looks_for_room = False
        self._has_ended_well = True
        self._try_again((entry, AGAIN) for entry in left)
        doubtful, self._doubtful = self._doubtful, []
        for entries, reason in doubtful:
            self._try_again((entry, Verdict("retry", "batch", reason)) for entry in entries)

    def _read(self, job: _Job, state: BatchState) -> str | None:
        """Takes the answers of a batch; gives why the run cannot go on, if an answer says so."""
        stop, rows = None, []
        known = set(job.lines)
        for key, answer in self._client.results(state):
            if answer is AGAIN:  # as of those that nobody answered
                continue
            if key not in known and (known or not _is_key.fullmatch(key)):
                log.debug("batch %s: an answer to nothing that was asked: %s", job.batch, key)
                continue
            entry = job.entries.pop(key, None)
            if isinstance(answer, Refusal) and entry is not None:
                assert entry.request is not None
                answer = self._client.judged(answer, entry.request, job.known)
            if isinstance(answer, Completion):
                rows.append((key, entry, answer))
                if len(rows) >= STORED:
                    self._take(rows)
                    rows = []
            elif entry is None or isinstance(answer, Refusal):
                continue
            elif answer.lesson is not None:
                self._client.lessons.learn(answer.lesson, answer.message)
                self._todo.append(entry)
            elif answer.action == "stop":
                stop = answer.message
            elif answer.action == "retry":
                self._try_again([(entry, answer)])
            else:
                self.coalescer.failed(entry, RecordFailed(answer.kind, answer.message))
        self._take(rows)
        return stop

    def _take(self, rows: list[tuple[str, Pending | None, Completion]]) -> None:
        """Stores answers, and settles those that are waited for."""
        others = [Row(bytes.fromhex(key), got) for key, entry, got in rows if entry is None]
        if others:
            self.cache.put(others)
        mine = [(entry, got) for _, entry, got in rows if entry is not None]
        self.coalescer.store(mine)
        for entry, got in mine:
            assert entry.request is not None
            self._budget.used(entry.request, got)
        self._stats.cost = self._budget.cost
        again = [entry for entry, got in mine if not self.coalescer.answered(entry, got)]
        self._todo.extendleft(again)

    def _failed(self, job: _Job, state: BatchState) -> None:
        """What becomes of a batch that the server did not take. It is forgotten, or each later
        run would stop at it."""
        self._forget(job)
        reason = f"batch {job.batch} failed: {state.reason}"
        if state.passing:
            self._queue_is_full(job, reason)
            return
        for number, message in state.bad_lines.items():
            key = job.lines[number - 1] if 0 < number <= len(job.lines) else ""
            if (entry := job.entries.pop(key, None)) is not None:
                self.coalescer.failed(entry, RecordFailed("rejected", message))
        left = list(job.entries.values())
        if state.bad_lines:
            log.info("%s; sent again without %d lines", reason, len(state.bad_lines))
            self._todo.extendleft(left)
        elif self._has_ended_well:
            log.info("%s; sent again", reason)
            verdict = Verdict("retry", "batch", reason)
            self._try_again((entry, verdict) for entry in left)
        else:  # until another shows what it means
            self._doubtful.append((left, reason))

    def _queue_is_full(self, job: _Job, reason: str) -> None:
        """Sends a batch again when others have ended; where there are none, in smaller parts.

        Raises: RunStopped.
        """
        now = time.monotonic()
        self._todo.extendleft(reversed(job.entries.values()))
        self._stats.retries += len(job.entries)
        if self._wanted:
            self._send_at = math.inf  # until one of them has ended
            return
        self._looks_for_room = True  # one at a time
        if not job.was_alone:
            return
        since = self._queue_full_since = self._queue_full_since or now
        if len(job.lines) == 1 and now - since > self.policy.give_up_after:
            raise RunStopped(reason)
        self._most = max(1, len(job.lines) // 2)
        log.info("%s; sending it again in %.0f s", reason, self._queue_seconds)
        self._send_at = now + self._queue_seconds
        self._queue_seconds = min(WAIT_MOST, self._queue_seconds * 2)

    def _try_again(self, entries: Iterable[tuple[Pending, Verdict]]) -> None:
        """Sends requests once more, or fails their records."""
        for entry, verdict in entries:
            self._tries[entry.key] += 1
            if self._tries[entry.key] > self.policy.retry:
                self.coalescer.failed(entry, RecordFailed(verdict.kind, verdict.message))
            else:
                self._stats.retries += 1
                self._todo.append(entry)

    def _forget(self, job: _Job) -> None:
        self._jobs.remove(job)
        self._send_at = 0.0
        self.cache.forget_batch(job.opened.run)


def _shown(jobs: list[_Job]) -> str:
    """How far the batches are, for people."""
    states = [
        f"{job.batch} {job.state.progress if job.state else 'sent'}" for job in jobs[:_STATES_SHOWN]
    ]
    more = len(jobs) - len(states)
    what = "batch" if len(jobs) == 1 else f"{len(jobs)} batches"
    shown = ", ".join(states) + (f" and {more} more" if more else "")
    return f"{what}: {shown}" if jobs else ""
