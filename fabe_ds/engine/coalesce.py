"""What need not be sent: answers already in the cache, and requests already on their way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from fabe_ds.errors import RecordFailed
from fabe_ds.providers.base import Provider
from fabe_ds.providers.finish import ended_by_itself
from fabe_ds.request import (
    SKIPPED,
    UNANSWERED,
    Accept,
    Completion,
    Item,
    Outcome,
    Reask,
    Request,
    Stats,
    never,
)
from fabe_ds.store.completions import Completions, Row


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


def stored(
    cache: Completions, provider: Provider, requests: Mapping[bytes, Request]
) -> dict[bytes, Completion]:
    """Answers that the cache has for requests, by their keys: to the very same request, or to one
    with another limit on tokens whose answer ended by itself and would have under this limit."""
    found = cache.get(list(requests))
    missing = {key: request for key, request in requests.items() if key not in found}
    found |= _under_former_keys(cache, provider, missing)
    lacking = [key for key in requests if key not in found and requests[key].sampling.repeats]
    limits = {requests[key].sampling.max_new_tokens for key in lacking}
    if not any(map(cache.other_limits, limits)):
        return found
    bases = {provider.key_without_limit(requests[key]): key for key in lacking}
    for base, answers in cache.under_other_limits(list(bases)).items():
        key = bases[base]
        limit = requests[key].sampling.max_new_tokens
        for old_limit, answer in answers:
            if _serves(answer, old_limit, limit):
                found[key] = answer
    return found


def _under_former_keys(
    cache: Completions, provider: Provider, requests: Mapping[bytes, Request]
) -> dict[bytes, Completion]:
    """Answers that earlier versions stored under other keys and that this one would give too."""
    named: dict[float, dict[bytes, bytes]] = {}
    for key, request in requests.items():
        if (former := provider.former_key(request)) is not None:
            named.setdefault(former[1], {})[former[0]] = key
    found: dict[bytes, Completion] = {}
    for since, keys in named.items():
        there = cache.get(list(keys), since)
        found |= {keys[former]: completion for former, completion in there.items()}
    provider.former_answers += len(found)
    return found


def _serves(answer: Completion, old_limit: int, limit: int) -> bool:
    """Whether a greedy answer under one limit is the answer under another, too."""
    if not ended_by_itself(answer.finish_reason):
        return False
    tokens = answer.completion_tokens
    return old_limit <= limit or (tokens is not None and 0 < tokens <= limit)


class Intake:
    """Sorts items into those that are answered and those that are to be sent, each once.

    Whoever takes slots must settle or abandon each of them: until then, equal requests wait.
    """

    def __init__(
        self,
        provider: Provider,
        cache: Completions | None,
        accept: Accept,
        stats: Stats,
        reask: Reask = never,
        *,
        offline: bool = False,
        retry_all: bool = False,
    ) -> None:
        """`offline`: nothing is sent, and what the cache lacks fails. `retry_all`: answers that
        failed are asked for again even where they would fail the same."""
        self._reask = reask
        self.provider, self.accept, self.stats = provider, accept, stats
        self.cache = cache if provider.cached else None
        self.offline, self._retry_all = offline, retry_all
        self._waiting: dict[bytes, list[Slot]] = {}
        self._failed: dict[bytes, Outcome] = {}
        self._samples: Counter[bytes] = Counter()
        self._asked: set[bytes] = set()  # by us, so the stored answer is as new as can be

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
                slots.append(Slot())
                self._settle(slots[-1], Outcome(kind=item.kind, message=str(item)))
        asking = [slot for slot in slots if slot.request is not None]
        if self.cache is None:
            return slots, asking, []
        for slot in asking:
            self._give_key(slot)
        todo, foreign = self._sort(asking)
        if self.offline:
            for slot in todo + foreign:
                if slot.outcome is None:
                    self._finish(slot, UNANSWERED)
            return slots, [], []
        return slots, todo, foreign

    def take_over(self, slots: list[Slot]) -> tuple[list[Slot], list[Slot]]:
        """Looks again at what others were sending: what is left to send by us, and what they still
        have. Answered ones are settled."""
        return (slots, []) if self.cache is None else self._sort(slots)

    def _sort(self, asking: list[Slot]) -> tuple[list[Slot], list[Slot]]:
        """Settles what is answered; gives what is to be sent by us, and what others are sending."""
        fresh: list[Slot] = []
        foreign: list[Slot] = []
        try:
            while asking:
                asking = self._look_up(asking, fresh, foreign)
            todo, held = ([], []) if self.offline else self._claim(fresh)
        except BaseException:
            self._forget(fresh)
            raise
        return (fresh if self.offline else todo), foreign + held

    def _look_up(self, asking: list[Slot], fresh: list[Slot], foreign: list[Slot]) -> list[Slot]:
        """Settles what is answered, adds to `fresh` what is to be sent and to `foreign` what is
        being sent for another owner; gives those that were asked again because of their stored
        answer, under their new keys."""
        assert self.cache is not None
        wanted = {
            slot.key: slot.request
            for slot in asking
            if slot.request is not None and slot.key not in self._failed
        }
        found = stored(self.cache, self.provider, wanted)
        again = []
        for slot in asking:
            waiting = self._waiting.get(slot.key)
            if slot.key in self._failed:
                self._settle(slot, self._failed[slot.key])
            elif waiting and waiting[0] is not slot:
                (waiting if waiting[0].owner is slot.owner else foreign).append(slot)
            elif self._settled_by(slot, found.get(slot.key)):
                pass
            elif slot.key in found and self._asks_again(slot, found[slot.key]):
                again.append(slot)
            else:
                self._waiting.setdefault(slot.key, [slot])
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

    def store(self, rows: list[tuple[Slot, Completion]]) -> None:
        """Puts completions on disk; afterwards they may be settled."""
        if self.cache is not None and rows:
            self.cache.put([self._row(slot, completion) for slot, completion in rows])

    def _row(self, slot: Slot, completion: Completion) -> Row:
        request = slot.request
        assert request is not None
        if not request.sampling.repeats:
            return Row(slot.key, completion)
        base = self.provider.key_without_limit(request)
        return Row(slot.key, completion, base, request.sampling.max_new_tokens)

    def answered(self, slot: Slot, completion: Completion) -> bool:
        """Settles a slot, and all that wait for the same request, with a new completion.

        False where the slot is to be sent again, with another request.
        """
        if slot.outcome is not None:
            return True
        self.stats.prompt_tokens += completion.prompt_tokens or 0
        self.stats.completion_tokens += completion.completion_tokens or 0
        if self._retry_all:
            self._asked.add(slot.key)
        key = slot.key
        if self._asks_again(slot, completion):
            self.stats.reasks += 1
            if self.cache is not None:
                waiting = self._waiting.pop(key, [slot])
                self._waiting.setdefault(slot.key, []).extend(waiting)
                self.cache.claim([slot.key])
            return False
        self._finish(slot, self._outcome(slot, completion, cached=False))
        return True

    def failed(self, slot: Slot, error: RecordFailed) -> None:
        """Settles a slot, and all that wait for the same request, with a failure."""
        if slot.outcome is not None:
            return
        if self.cache is not None:
            self.cache.release([slot.key])
        self._finish(slot, Outcome(kind=error.kind, message=str(error)))

    def abandon(self, slots: Iterable[Slot]) -> None:
        """Gives up what will not be sent after all: another owner, or a later pass, may. Slots
        that are settled, or wait for another, are passed over."""
        if self.cache is None:
            return
        keys = self._forget(slots)
        if keys:
            self.cache.release(keys)

    def _forget(self, slots: Iterable[Slot]) -> list[bytes]:
        """Lets nothing wait for these slots any more; the keys that they were to be sent under."""
        keys = []
        for slot in slots:
            waiting = self._waiting.get(slot.key)
            if slot.outcome is not None or not waiting:
                continue
            if waiting[0] is slot:
                del self._waiting[slot.key]
                keys.append(slot.key)
            elif slot in waiting:
                waiting.remove(slot)
        return keys

    def _finish(self, slot: Slot, outcome: Outcome) -> None:
        self._settle(slot, outcome)
        if self.cache is None:
            return
        for other in self._waiting.pop(slot.key, ()):
            if other is not slot:
                self._settle(other, outcome._replace(cached=outcome.kind is None))
        if outcome.kind is not None:
            self._failed[slot.key] = outcome

    def _settled_by(self, slot: Slot, completion: Completion | None) -> bool:
        """Whether a stored completion serves. One that fails serves too, where it would fail the
        same if it were asked for again."""
        if completion is None:
            return False
        outcome = self._outcome(slot, completion, cached=True)
        if outcome.kind is not None and not self._lasts(slot, completion, outcome):
            return False
        self._settle(slot, outcome)
        for other in self._waiting.pop(slot.key, ()):
            if other is not slot:
                self._settle(other, outcome)
        return True

    def _lasts(self, slot: Slot, completion: Completion, outcome: Outcome) -> bool:
        request = slot.request
        assert request is not None
        assert outcome.kind is not None
        again = self._retry_all and slot.key not in self._asked
        # An answer of reasoning alone is the model's; one of nothing at all may be the server's.
        lasting = outcome.kind in LASTING or (outcome.kind == "empty" and completion.text.strip())
        if again or not lasting or not request.sampling.repeats:
            return False
        return self._reask(request, completion, outcome.kind, outcome.message or "") is None

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
            self.stats.failures[outcome.kind] += 1
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


LASTING = ("check", "truncated", "context", "refused", "invalid", "unfinished", "tool call")
"""Classes that have been answered and would be answered the same: they are not asked again."""
