"""The servers of a run: one each, and all of them as the passes over records share them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.capacity import Capacity, Gate
from fabe_ds.engine.client import HttpClient
from fabe_ds.engine.coalesce import Coalescer, Pending
from fabe_ds.engine.retry import Attempts
from fabe_ds.errors import RunStopped, ServerAway
from fabe_ds.providers.http import HttpProvider
from fabe_ds.request import Request

log = logging.getLogger(__name__)

FEWEST, REST_MOST = 5, 60.0
"""Requests in a row that come to nothing before a server rests, and the most seconds of a rest."""
SOON_SECONDS, SOON_MOST = 0.05, 2.0
"""Until a server that is being asked whether it is there is thought of again, and the longest that
a record waits for another server than the one that failed it."""
CHECK_AGAIN_SECONDS = 5.0
"""Until a server that was not there, while others are, is looked for again."""


class Task:
    """A record on its way: what its request has been through, and since when it is in flight.

    `at` is the server that has it, or had it last; `failed_at` those whose answers were no good.
    `twin` is the second request for the same record, where the first does not answer; `over` says
    that the other one was first.
    """

    __slots__ = ("at", "attempts", "entry", "failed_at", "over", "running", "sent_at", "twin")

    def __init__(self, entry: Pending, attempts: Attempts | None = None) -> None:
        self.entry, self.attempts = entry, attempts or Attempts()
        self.running: asyncio.Task[None] | None = None
        self.sent_at = 0.0
        self.twin: Task | None = None
        self.over = False
        self.at: Endpoint
        self.failed_at: tuple[Endpoint, ...] = ()

    @property
    def request(self) -> Request:
        assert self.entry.request is not None
        return self.entry.request


class Passing(Protocol):
    """What endpoints ask of the passes over them (`dispatch.Pass`)."""

    @property
    def busy(self) -> int: ...
    def pump(self) -> None: ...
    def fatal(self, error: BaseException) -> None: ...


class Endpoint:
    """One server: how it is asked, and what it takes. `busy`: places in flight that it has."""

    def __init__(self, client: HttpClient, capacity: Capacity) -> None:
        self.client, self.capacity = client, capacity
        capacity.proven = client.proven
        self.busy = self.sent = 0
        self.checked = self.checking = False
        self.problem: BaseException | None = None
        """What its last check found wrong."""
        self.is_looked_for = False
        """Whether it is asked again, later, if it is there."""
        self.failures = 0
        """Requests in a row that came to nothing there."""
        self.rests_until = 0.0
        self.is_out = False
        """Whether nothing more is sent to it, as others can go on."""

    @property
    def address(self) -> str:
        """The server's address, without what is secret in it."""
        return str(self.client.provider.address)

    @property
    def is_up(self) -> bool:
        is_there = self.checked and not self.is_out and not self.capacity.outage.down
        return is_there and time.monotonic() >= self.rests_until

    @property
    def may_come(self) -> bool:
        """Whether it is being asked for the first time if it is there."""
        return self.checking and not self.is_looked_for

    @property
    def load(self) -> tuple[int, int]:
        """What it has to do: the server with the least is asked next."""
        return self.busy, self.sent


class Endpoints:
    """The servers of a run, which all have the same model: one that is gone is left out, and
    looked for while the others go on."""

    def __init__(
        self,
        each: Sequence[Endpoint],
        coalescer: Coalescer,
        policy: PolicySettings,
        patient: bool = False,
        tolerated: Sequence[str] = (),
        others: Sequence[HttpProvider] = (),
    ) -> None:
        """`patient`: whether to go on where the first records all fail; `tolerated`: the kinds of
        failures that in any case say nothing of the run. `others` are asked later, if at all, and
        have to be there all the same."""
        self._others, self._others_are_there = others, not others
        self.each, self.coalescer, self.policy = list(each), coalescer, policy
        self.patient, self.tolerated = patient, tolerated
        self.passes: list[Passing] = []  # several, where several threads call
        if len(self.each) > 1:
            for endpoint in self.each:
                endpoint.capacity.name = f"{endpoint.address}: "

    @property
    def window(self) -> int:
        """Records looked at ahead of the oldest unanswered one."""
        concurrency = self.policy.concurrency
        return max(2000, 64 * (64 * len(self.each) if concurrency == "auto" else concurrency))

    @property
    def busy(self) -> int:
        """Places in flight that are taken."""
        return sum(each.busy for each in self.passes)

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        if len(self.each) == 1:  # asked for with every request
            return self.each[0].capacity.limit
        return self._whole(each.capacity.limit for each in self._open)

    @property
    def width(self) -> int:
        """Requests that may be in flight where no server is away."""
        return self._whole(each.capacity.limiter.limit for each in self._open)

    def _whole(self, limits: Iterable[int]) -> int:
        whole, concurrency = sum(limits), self.policy.concurrency
        return whole if concurrency == "auto" else min(whole, concurrency)

    @property
    def _open(self) -> list[Endpoint]:
        return self.each if len(self.each) == 1 else [each for each in self.each if not each.is_out]

    def others_go_on(self, endpoint: Endpoint) -> bool:
        """Whether another server is there."""
        return any(each.is_up for each in self.each if each is not endpoint)

    @property
    def away_for(self) -> float:
        """Seconds for which no server has been there; 0 where one is."""
        there = [each for each in self._open if each.checked]
        down = (each.capacity.outage.seconds if not each.is_up else 0.0 for each in there)
        return min(down, default=0.0)

    def leave_out(self, endpoint: Endpoint, why: str) -> bool:
        """Sends a server nothing more, where others can go on without it; else False."""
        if not any(each is not endpoint for each in self._open):
            return False
        if not endpoint.is_out:
            endpoint.is_out = True
            log.warning("%s: %s; the others go on without it", endpoint.address, why)
        return True

    def answered(self, endpoint: Endpoint) -> None:
        """A server has given a good answer."""
        endpoint.failures = 0

    def failed(self, endpoint: Endpoint, why: str) -> None:
        """A request came to nothing at a server that is there: one that does so again and again,
        while others answer, is left alone for a while."""
        endpoint.failures += 1
        if endpoint.failures < FEWEST or not self.others_go_on(endpoint):
            return
        seconds = min(REST_MOST, 2.0 ** (endpoint.failures - FEWEST + 1))
        if not endpoint.rests_until:
            log.warning(
                "%s: %d requests in a row came to nothing (%s); the others go on, and it is asked "
                "again now and then",
                endpoint.address,
                endpoint.failures,
                why,
            )
        endpoint.rests_until = time.monotonic() + seconds

    def others_for(self, task: Task) -> bool:
        """Whether there is a server that has not failed with this record yet."""
        others = (each for each in self._open if each not in task.failed_at)
        return any(each.is_up or each.may_come for each in others)

    def choose(
        self, request: Request, busy: int, but: Sequence[Endpoint] = ()
    ) -> tuple[Endpoint, Gate]:
        """The server that is asked next, and whether it may be now: of those that may, the one
        with the least to do, and none of `but` where there is another."""
        if len(self.each) == 1:
            return self.each[0], self.each[0].capacity.gate(request, self.each[0].busy, busy)
        shut: list[tuple[Endpoint, Gate]] = []
        there = [each for each in self._open if each.checked]
        now = time.monotonic()
        there = [each for each in there if now >= each.rests_until] or there
        if but and any(each.may_come for each in self._open):
            return there[0], Gate(wait=SOON_SECONDS)  # another may be there in a moment
        others = [each for each in there if each.is_up and each not in but] if but else []
        for endpoint in sorted(there, key=lambda each: (each not in others, each.load)):
            if others and endpoint not in others and _is_soon(shut):
                break  # better a little later, and not where it came to nothing
            gate = endpoint.capacity.gate(request, endpoint.busy, busy)
            if gate.opens:
                return endpoint, gate
            shut.append((endpoint, gate))
        waits = [gate.wait for _, gate in shut if gate.wait is not None]
        if any(gate.stop is None or not gate.by_server for _, gate in shut):
            # One that asks to wait for too long stops no run that others can end.
            stop = next((g.stop for _, g in shut if g.stop is not None and not g.by_server), None)
            return shut[0][0], Gate(wait=min(waits, default=None), stop=stop)
        return shut[0]

    def pump(self) -> None:
        """Lets the passes start what they may, the oldest first."""
        for each in list(self.passes):
            each.pump()

    def said(self, stopping: bool) -> str:
        """What holds the servers up, for people; logged where it lasts."""
        states = []
        for each in self._open:
            if state := each.capacity.state():
                states.append(f"{each.capacity.name}{state}")
            each.capacity.say(state, stopping)
        return "; ".join(states)

    # Whether they are there.

    def ready(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether a server is there. Where that is not known, it is asked: in a thread, as that
        blocks for seconds, and other endpoints share the loop."""
        if self._others_are_there and len(self.each) == 1 and self.each[0].checked:
            return True
        for each in self._open:
            if not (each.checked or each.checking or each.problem):
                self._begin_check(each, loop)
        if self._others and not self._others_are_there:
            others, self._others = self._others, ()
            self._in_thread(self._check_others, others, loop)
        return self._others_are_there and any(each.checked for each in self._open)

    def _check_others(
        self, others: Sequence[HttpProvider], loop: asyncio.AbstractEventLoop
    ) -> None:
        problem: BaseException | None = None
        try:
            for provider in others:
                provider.refuse_open_key()
                provider.preflight()
        except BaseException as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(self._have_checked_others, problem, others)

    def _have_checked_others(
        self, problem: BaseException | None, others: Sequence[HttpProvider]
    ) -> None:
        self._others_are_there = problem is None
        if problem is not None:
            self._others = others  # the next pass asks again
            for running in list(self.passes):
                running.fatal(problem)
        self.pump()

    def _in_thread(self, work: Callable[..., None], *words: Any) -> None:
        thread = threading.Thread(target=work, args=words, name="fabe-ds-preflight", daemon=True)
        thread.start()

    def _begin_check(self, endpoint: Endpoint, loop: asyncio.AbstractEventLoop) -> None:
        endpoint.checking = True
        self._in_thread(self._check, endpoint, loop)

    def _check(self, endpoint: Endpoint, loop: asyncio.AbstractEventLoop) -> None:
        problem: BaseException | None = None
        try:
            endpoint.client.check()
        except BaseException as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(self._has_checked, endpoint, problem, loop)

    def _has_checked(
        self, endpoint: Endpoint, problem: BaseException | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        endpoint.checking, endpoint.checked, endpoint.problem = False, problem is None, problem
        if problem is None and endpoint.is_looked_for:
            endpoint.is_looked_for = False
            log.info("%s: the server is there now", endpoint.address)
        elif endpoint.is_looked_for:
            loop.call_later(CHECK_AGAIN_SECONDS, self._check_again, endpoint, loop)
        if not any(each.checking for each in self._open):
            self._settle_problems(loop)
        self.pump()

    def _settle_problems(self, loop: asyncio.AbstractEventLoop) -> None:
        """What becomes of servers that are not there, when all have been asked."""
        wrong = [each for each in self._open if each.problem is not None]
        wrong = [each for each in wrong if not each.is_looked_for]
        if not any(each.checked for each in self._open):
            first = next((each.problem for each in wrong), None)
            for each in wrong:
                each.problem = None  # the next pass asks again
            for running in list(self.passes):  # a copy: a pass that ends leaves the list
                running.fatal(first or RunStopped("no server is there"))
            return
        for each in wrong:
            if not isinstance(each.problem, ServerAway):
                self.leave_out(each, _said_of(each))
                continue
            log.warning("%s; the others go on, and it is looked for", each.problem)
            each.is_looked_for = True
            loop.call_later(CHECK_AGAIN_SECONDS, self._check_again, each, loop)

    def _check_again(self, endpoint: Endpoint, loop: asyncio.AbstractEventLoop) -> None:
        if self.passes:
            self._begin_check(endpoint, loop)
        else:
            endpoint.problem, endpoint.is_looked_for = None, False  # the next pass asks


def _is_soon(shut: Sequence[tuple[Endpoint, Gate]]) -> bool:
    """Whether one of these may be asked in a moment."""
    gates = (gate for _, gate in shut if gate.stop is None)
    return any(gate.wait is None or gate.wait <= SOON_MOST for gate in gates)


def _said_of(endpoint: Endpoint) -> str:
    """What is wrong with a server, without its address."""
    return str(endpoint.problem).removeprefix(f"{endpoint.address}: ")
