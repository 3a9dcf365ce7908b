"""One endpoint as all passes over it share it: how it is asked, and what it takes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Protocol

from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.capacity import Capacity
from fabe_ds.engine.client import HttpClient
from fabe_ds.engine.coalesce import Coalescer, Pending
from fabe_ds.engine.retry import Attempts
from fabe_ds.request import Request


class Task:
    """A record on its way: what its request has been through, and since when it is in flight.

    `twin` is the second request for the same record, where the first does not answer; `over` says
    that the other one was first.
    """

    __slots__ = ("attempts", "entry", "over", "running", "sent_at", "twin")

    def __init__(self, entry: Pending, attempts: Attempts | None = None) -> None:
        self.entry, self.attempts = entry, attempts or Attempts()
        self.running: asyncio.Task[None] | None = None
        self.sent_at = 0.0
        self.twin: Task | None = None
        self.over = False

    @property
    def request(self) -> Request:
        assert self.entry.request is not None
        return self.entry.request


class Passing(Protocol):
    """What an endpoint asks of the passes over it (`dispatch.Pass`)."""

    @property
    def busy(self) -> int: ...
    def pump(self) -> None: ...
    def fatal(self, error: BaseException) -> None: ...


class Endpoint:
    """What the passes over one endpoint share."""

    def __init__(
        self,
        client: HttpClient,
        capacity: Capacity,
        coalescer: Coalescer,
        policy: PolicySettings,
        patient: bool,
    ) -> None:
        self.client, self.capacity, self.coalescer = client, capacity, coalescer
        self.policy, self.patient = policy, patient
        capacity.proven = client.proven
        self.passes: list[Passing] = []  # several, where several threads call
        self.checked = self._checking = False

    @property
    def address(self) -> str:
        """The server's address, without what is secret in it."""
        return str(self.client.provider.address)

    @property
    def window(self) -> int:
        """Records looked at ahead of the oldest unanswered one."""
        concurrency = self.policy.concurrency
        return max(2000, 64 * (64 if concurrency == "auto" else concurrency))

    @property
    def busy(self) -> int:
        """Places in flight that are taken."""
        return sum(each.busy for each in self.passes)

    def pump(self) -> None:
        """Lets the passes start what they may, the oldest first."""
        for each in list(self.passes):
            each.pump()

    def begin_check(self, loop: asyncio.AbstractEventLoop) -> None:
        """Asks whether the endpoint is there; the passes go on, or end with what is wrong, when it
        has answered. In a thread: it blocks for seconds, and other endpoints share the loop."""
        if not self._checking:
            self._checking = True
            check = threading.Thread(
                target=self._check, args=(loop,), name="fabe-ds-preflight", daemon=True
            )
            check.start()

    def _check(self, loop: asyncio.AbstractEventLoop) -> None:
        problem: BaseException | None = None
        try:
            self.client.check()
        except BaseException as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(self._has_checked, problem)

    def _has_checked(self, problem: BaseException | None) -> None:
        self._checking, self.checked = False, problem is None
        # A copy: a pass that ends leaves the list.
        for each in list(self.passes):
            if problem is not None:
                each.fatal(problem)
            each.pump()
