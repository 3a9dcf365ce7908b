"""What need not be sent: answers already in the cache, and requests already on their way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from fabe_ds.engine.cache import Completions
from fabe_ds.errors import RecordFailed
from fabe_ds.providers.base import Completion, Provider, Request

Item = Request | RecordFailed | None
"""What a record asks for: a request, a failure to write one, or nothing (it is skipped)."""

Accept = Callable[[Request, Completion], str]
"""Makes a record's new text of a completion. Raises: RecordFailed."""

Reask = Callable[[Request, Completion, str, str], Request | None]
"""The request to send where an answer failed with this kind and message; None for no other."""


def never(request: Request, completion: Completion, kind: str, message: str) -> Request | None:
    return None


class Outcome(NamedTuple):
    """What became of one record. `text` is None where it keeps what it has."""

    text: str | None = None
    completion: Completion | None = None
    kind: str | None = None
    message: str | None = None
    cached: bool = False


SKIPPED = Outcome()


@dataclass(slots=True)
class Stats:
    """Counts of a run, in records but for `requests` and tokens. Read by the progress display."""

    done: int = 0
    cached: int = 0
    failed: int = 0
    skipped: int = 0
    requests: int = 0
    retries: int = 0
    reasks: int = 0
    hedged: int = 0
    cost: float = 0.0
    in_flight: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency: Counter[int] = field(default_factory=Counter)
    """Answers by the time they took: those of up to 2**(n/4) seconds under n."""

    def took(self, seconds: float) -> None:
        self.latency[math.ceil(4 * math.log2(max(1e-3, seconds)))] += 1

    def counts(self) -> dict[str, Any]:
        """All of it as plain values, to be sent elsewhere."""
        counts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**counts, "latency": dict(self.latency)}  # asdict spoils a Counter

    @property
    def settled(self) -> int:
        return self.done + self.cached + self.failed + self.skipped


class Slot:
    """A record's place in the order of answers."""

    __slots__ = ("key", "outcome", "owner", "request")

    def __init__(
        self,
        request: Request | None = None,
        outcome: Outcome | None = None,
        owner: object = None,
    ) -> None:
        self.request, self.outcome, self.owner = request, outcome, owner
        self.key = b""


class Intake:
    """Sorts items into those that are answered and those that are to be sent, each once."""

    def __init__(
        self,
        provider: Provider,
        cache: Completions | None,
        accept: Accept,
        stats: Stats,
        reask: Reask = never,
    ) -> None:
        self._reask = reask
        self.provider, self.accept, self.stats = provider, accept, stats
        self.cache = cache if provider.cached else None
        self._waiting: dict[bytes, list[Slot]] = {}
        self._failed: dict[bytes, Outcome] = {}
        self._samples: Counter[bytes] = Counter()

    def begin(self) -> None:
        """A new pass over records: what failed is sent again, samples are numbered anew."""
        self._failed.clear()
        self._samples.clear()

    def take(
        self, items: Iterable[Item], owner: object = None
    ) -> tuple[list[Slot], list[Slot], list[Slot]]:
        """Slots for all items in order; those of them to send; those that are being sent by
        another process, or by this one for another `owner`."""
        slots: list[Slot] = []
        for item in items:
            if isinstance(item, Request):
                slots.append(Slot(request=item, owner=owner))
            elif item is None:
                self.stats.skipped += 1
                slots.append(Slot(outcome=SKIPPED))
            else:
                self.stats.failed += 1
                slots.append(Slot(outcome=Outcome(kind=item.kind, message=str(item))))
        asking = [slot for slot in slots if slot.request is not None]
        if self.cache is None:
            return slots, asking, []
        for slot in asking:
            self._give_key(slot)
        fresh: list[Slot] = []
        foreign: list[Slot] = []
        while asking:
            asking = self._look_up(asking, fresh, foreign)
        todo, held = self._claim(fresh)
        return slots, todo, foreign + held

    def _look_up(self, asking: list[Slot], fresh: list[Slot], foreign: list[Slot]) -> list[Slot]:
        """Settles what is answered, adds to `fresh` what is to be sent and to `foreign` what is
        being sent for another owner; gives those that were asked again because of their stored
        answer, under their new keys."""
        assert self.cache is not None
        found = self.cache.get(list({slot.key for slot in asking} - self._failed.keys()))
        again = []
        for slot in asking:
            if slot.key in self._failed:
                self._settle(slot, self._failed[slot.key])
            elif slot.key in self._waiting:
                first = self._waiting[slot.key][0]
                (self._waiting[slot.key] if first.owner is slot.owner else foreign).append(slot)
            elif self._settled_by(slot, found.get(slot.key)):
                pass
            elif slot.key in found and self._asks_again(slot, found[slot.key]):
                again.append(slot)
            else:
                self._waiting[slot.key] = [slot]
                fresh.append(slot)
        return again

    def _asks_again(self, slot: Slot, completion: Completion) -> bool:
        """Whether the answer calls for another request, which the slot then holds."""
        outcome = self._outcome(slot, completion, cached=False)
        if outcome.kind is None or slot.request is None:
            return False
        request = self._reask(slot.request, completion, outcome.kind, outcome.message or "")
        if request is None:
            return False
        slot.request, slot.key = request, self.provider.key(request)
        return True

    def _claim(self, slots: list[Slot]) -> tuple[list[Slot], list[Slot]]:
        if not slots or self.cache is None:
            return slots, []
        held = self.cache.claim([slot.key for slot in slots])
        mine = [slot for slot in slots if slot.key not in held]
        # Between the look-up and the claim another process may have been done with a few.
        found = self.cache.get([slot.key for slot in mine])
        late = [slot for slot in mine if self._settled_by(slot, found.get(slot.key))]
        if late:
            self.cache.release([slot.key for slot in late])
        todo = [slot for slot in mine if slot.outcome is None]
        return todo, [slot for slot in slots if slot.key in held]

    def take_over(self, slots: list[Slot]) -> tuple[list[Slot], list[Slot]]:
        """Looks again at what others were sending: what is left to send by us, and what they still
        have. Answered ones are settled."""
        if self.cache is None:
            return slots, []
        found = self.cache.get([slot.key for slot in slots])
        left, foreign = [], []
        for slot in slots:
            if slot.key in self._failed:
                self._settle(slot, self._failed[slot.key])
            elif self._waiting.get(slot.key, [slot])[0] is not slot:
                foreign.append(slot)
            elif not self._settled_by(slot, found.get(slot.key)):
                self._waiting.setdefault(slot.key, [slot])
                left.append(slot)
        todo, held = self._claim(left)
        return todo, foreign + held

    def store(self, rows: list[tuple[Slot, Completion]]) -> None:
        """Puts completions on disk; afterwards they may be settled."""
        if self.cache is None or not rows:
            return
        self.cache.put([(slot.key, completion) for slot, completion in rows])

    def answered(self, slot: Slot, completion: Completion) -> bool:
        """Settles a slot, and all that wait for the same request, with a new completion.

        False where the slot is to be sent again, with another request.
        """
        self.stats.prompt_tokens += completion.prompt_tokens or 0
        self.stats.completion_tokens += completion.completion_tokens or 0
        key = slot.key
        if self._asks_again(slot, completion):
            self.stats.reasks += 1
            if self.cache is not None:
                self._waiting[slot.key] = self._waiting.pop(key, [slot])
                self.cache.claim([slot.key])
            return False
        self._finish(slot, self._outcome(slot, completion, cached=False))
        return True

    def failed(self, slot: Slot, error: RecordFailed) -> None:
        """Settles a slot, and all that wait for the same request, with a failure."""
        if self.cache is not None:
            self.cache.release([slot.key])
        self._finish(slot, Outcome(kind=error.kind, message=str(error)))

    def abandon(self, slots: Iterable[Slot]) -> None:
        """Gives up what will not be sent after all: another owner, or a later pass, may."""
        if self.cache is not None and (keys := [slot.key for slot in slots]):
            for key in keys:
                self._waiting.pop(key, None)
            self.cache.release(keys)

    def _finish(self, slot: Slot, outcome: Outcome) -> None:
        self._settle(slot, outcome)
        if self.cache is None:
            return
        for other in self._waiting.pop(slot.key, ())[1:]:
            self._settle(other, outcome._replace(cached=outcome.kind is None))
        if outcome.kind is not None:
            self._failed[slot.key] = outcome

    def _settled_by(self, slot: Slot, completion: Completion | None) -> bool:
        """Whether a stored completion serves. One that does not (cut off, empty) is asked again."""
        if completion is None:
            return False
        outcome = self._outcome(slot, completion, cached=True)
        if outcome.kind is not None:
            return False
        self._settle(slot, outcome)
        for other in self._waiting.pop(slot.key, ()):
            if other is not slot:
                self._settle(other, outcome)
        return True

    def _outcome(self, slot: Slot, completion: Completion, cached: bool) -> Outcome:
        assert slot.request is not None
        try:
            text = self.accept(slot.request, completion)
        except RecordFailed as error:
            return Outcome(None, completion, error.kind, str(error), cached)
        return Outcome(text, completion, cached=cached)

    def _settle(self, slot: Slot, outcome: Outcome) -> None:
        slot.outcome = outcome
        if outcome.kind is not None:
            self.stats.failed += 1
        elif outcome.cached:
            self.stats.cached += 1
        else:
            self.stats.done += 1

    def _give_key(self, slot: Slot) -> None:
        """The key; where tokens are sampled, equal requests are told apart by their number."""
        request = slot.request
        assert request is not None
        slot.key = self.provider.key(request)
        if request.sampling.samples:
            number = self._samples[slot.key]
            self._samples[slot.key] += 1
            if number:
                slot.request = request._replace(sample=request.sample + number)
                slot.key = self.provider.key(slot.request)
