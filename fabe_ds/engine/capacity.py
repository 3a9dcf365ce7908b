"""Whether one more request may be sent to an endpoint, and when.

What limits requests in flight, rates, spending, outages and other processes say, put together. It
sends nothing and waits for nothing: events come in, decisions go out, the clock is handed in.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fabe_ds import network
from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.budget import Budget
from fabe_ds.engine.limiter import Limiter
from fabe_ds.engine.outage import Outage
from fabe_ds.engine.rates import Rates
from fabe_ds.engine.verdict import Verdict
from fabe_ds.engine.worker_slots import SharedSlots
from fabe_ds.request import Completion, Request
from fabe_ds.text import clock as clock_text

log = logging.getLogger(__name__)

FILES_BESIDE = 48
"""Open files of a process beside its connections."""
SLOT_SECONDS = 0.005
"""Seconds until places that other processes hold are looked at again."""
CHARACTERS_A_TOKEN = 4
"""A guess, put right by the usage that comes with the answer."""
HEAD_START_SECONDS = 1.0
"""How long the first request of all goes alone to an endpoint that has never answered: a refused
key, model or parameter comes sooner, and then costs one request."""
SAID_AFTER, CUT_SAID_AFTER = 1.0, 3.0
"""Seconds that a wait, and a limit that is held back, last before the log says so."""
GO_ON = (
    "what was answered is kept: run the same command again to go on, or with --offline to write "
    "what there is"
)


class Gate(NamedTuple):
    """Whether the next request may go. Where not: `wait` seconds until it is worth another look
    (None: an answer that is on its way will show), `stop` why the run cannot go on."""

    opens: bool = False
    wait: float | None = None
    stop: str | None = None
    by_server: bool = False
    """Whether it is the server that stops the run, and not a cap of the user's."""


def tokens_at_most(request: Request) -> int:
    """Tokens that a request may take, its answer's included."""
    return len(request.prompt) // CHARACTERS_A_TOKEN + request.sampling.max_new_tokens


class Capacity:
    """What an endpoint takes of one process. `busy` is always the number of requests in flight."""

    def __init__(
        self,
        policy: PolicySettings,
        budget: Budget,
        slots: SharedSlots | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[float, float], float] = random.uniform,
        pace: Rates | None = None,
    ) -> None:
        """`pace`: the user's own rates, where several endpoints share them."""
        self.name = ""
        """Goes before what is said of it, where there are several."""
        self.budget, self._slots, self._policy, self._clock = budget, slots, policy, clock
        self.limiter = Limiter(None if policy.concurrency == "auto" else policy.concurrency, clock)
        self.limiter.ceiling = network.allow_open_files(self.limiter.ceiling, FILES_BESIDE)
        self._pace = pace or pace_of(policy, slots, clock)
        self._rates = Rates(clock=clock)  # the server's own
        self.outage = Outage(clock, chance)
        self.proven = False
        """Whether the endpoint has ever answered."""
        self._first_sent_at: float | None = None
        self._refusal = ""  # the message of the latest one
        self._held_since: float | None = None
        self._held_said = False

    @property
    def limit(self) -> int:
        """Requests that may be in flight: one, where the server is being looked for."""
        return 1 if self.outage.down else self.limiter.limit

    def gate(self, request: Request, busy: int, all_busy: int | None = None) -> Gate:
        """Whether this request may go now. `all_busy`: requests in flight to all endpoints."""
        all_busy = busy if all_busy is None else all_busy
        # An answer frees a place, and wakes whoever waits for one.
        if busy >= self.limit:
            return Gate()
        if (asked := self._rates.asked_for) > self._policy.give_up_after:
            seconds = clock_text(asked)
            return Gate(
                stop=f"{self._rates.reason}, for {seconds} more: longer than --give-up-after; "
                + GO_ON,
                by_server=True,
            )
        if (pause := max(self._pause(), self.outage.until_probe())) > 0:
            return Gate(wait=pause)
        if not self.proven and busy and (left := self._head_start()) > 0:
            return Gate(wait=left)
        if lacking := self.budget.lacking(request):
            # An answer may give back some of what its request has reserved.
            return Gate() if all_busy else Gate(stop=_used_up(lacking))
        # Last: a place is taken only for what may go.
        if self._slots and not self._slots.hold(all_busy + 1):
            return Gate(wait=SLOT_SECONDS)
        return Gate(opens=True)

    def _pause(self) -> float:
        """Seconds for which rates hold the next request back."""
        return max(self._rates.pause(), self._pace.pause())

    def _head_start(self) -> float:
        """Seconds for which the first request still goes alone."""
        first = self._first_sent_at
        return 0.0 if first is None else first + HEAD_START_SECONDS - self._clock()

    def hold(self, busy: int) -> None:
        """Gives places back that other processes may take."""
        if self._slots:
            self._slots.hold(busy)

    def sent(self, request: Request) -> None:
        """The request goes out now."""
        self.limiter.sent()
        self._pace.sent(tokens_at_most(request))
        self.budget.reserve(request)
        if self._first_sent_at is None:
            self._first_sent_at = self._clock()

    def settle(self, request: Request, result: Completion | Verdict | None) -> float:
        """Books what a request took; None where its answer never came. Gives all costs so far."""
        completion = result if isinstance(result, Completion) else None
        # A refusal costs nothing; where the answer never came, nobody knows.
        known = completion is not None or (isinstance(result, Verdict) and result.refused)
        self.budget.settle(request, completion, known)
        return self.budget.cost

    def answered(self, request: Request, sent_at: float, completion: Completion, busy: int) -> None:
        """An answer has come to a request of the moment `sent_at`."""
        if self.outage.down and self.outage.seconds >= SAID_AFTER:  # as it was said to be gone
            away = clock_text(self.outage.seconds)
            log.info("%sthe server answers again after %s", self.name, away)
        self.outage.reset()
        self.limiter.answered(sent_at, busy)
        if completion.completion_tokens is not None:
            used = (completion.prompt_tokens or 0) + completion.completion_tokens
            self._pace.corrected(used - tokens_at_most(request))

    def read(self, headers: Mapping[str, str]) -> None:
        """Takes what an answer's headers say of rates."""
        self._rates.read(headers)

    def refused(self, verdict: Verdict, record: object, sent_at: float, busy: int) -> None:
        """A request of the moment `sent_at` was not answered, and this is why."""
        if verdict.local:
            self.limiter.ceiling = max(1, min(self.limiter.ceiling, busy - 1))
            log.warning("no more open files (ulimit -n): %d at once", self.limiter.ceiling)
        # A record's own fault says nothing of the server.
        if not verdict.unavailable:
            return
        others = busy - 1
        if verdict.busy and not verdict.loading:
            self._refusal = verdict.message
            self.limiter.refused(sent_at, others)
            if verdict.wait and verdict.kind == "rate":
                self._rates.hold(verdict.wait, f"the server asks for it ({verdict.message})")
        self.outage.failed(
            record,
            verdict.message,
            _how_unavailable(verdict),
            self.limiter.limit,
            certain=verdict.loading,
            alone=verdict.gone or others == 0,
        )

    def state(self) -> str:
        """What holds requests up, for people; empty where nothing does."""
        limiter, rates = self.limiter, self._rates
        if self.outage.down:
            left = self._policy.give_up_after - self.outage.seconds
            return (
                f"{self.outage.how} for {clock_text(self.outage.seconds)} ({self.outage.reason}), "
                f"looking for it, for {clock_text(max(0.0, left))} more"
            )
        if rates.asked_for >= 1:
            return f"waiting {clock_text(rates.asked_for)}: {rates.reason}"
        if self._pace.pause() >= 1:
            return "waiting for --rpm or --tpm"
        if limiter.held_back:
            return (
                f"{limiter.limit} at once, not {limiter.ceiling}: the server refuses "
                f"{limiter.share:.0%} ({self._refusal})"
            )
        return ""

    def say(self, state: str, waits: bool) -> None:
        """Logs what holds the run up, once, where it lasts. `waits`: nothing at all is sent."""
        if not state:
            self._held_since, self._held_said = None, False
            return
        now = self._clock()
        if self._held_since is None:
            self._held_since = now
            log.debug("%s%s", self.name, state)
        waits = waits or self.outage.down or self._pause() > 0
        if not self._held_said and now - self._held_since >= (
            SAID_AFTER if waits else CUT_SAID_AFTER
        ):
            self._held_said = True
            log.info("%s%s", self.name, state)


def pace_of(
    policy: PolicySettings,
    slots: SharedSlots | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Rates:
    """The rates that the user sets."""
    return Rates(policy.rpm, policy.tpm, clock, slots.workers if slots else None)


def _how_unavailable(verdict: Verdict) -> str:
    if verdict.gone:
        return "the server is gone"
    return "the model is loading" if verdict.loading else "the server refuses all"


def _used_up(cap: str) -> str:
    return (
        f"the budget is used up ({cap}); what was answered is kept: run the same command again "
        "with a higher one to go on, or with --offline to write what there is"
    )
