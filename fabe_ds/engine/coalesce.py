"""What need not be sent: answers already in the cache, and requests already on their way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from fabe_ds.errors import RecordFailed
from fabe_ds.providers.base import Provider
from fabe_ds.providers.finish import ended_by_itself
from fabe_ds.request import (
    LASTING,
    LEFT_OUT,
    SKIPPED,
    UNANSWERED,
    Accept,
    Completion,
    Item,
    NotChosen,
    Outcome,
    Reask,
    Request,
    Stats,
    never,
)
from fabe_ds.store.completions import Completions, Row


class Pending:
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


class Coalescer:
    """Sorts items into those that are answered and those that are to be sent, each once.

    Whoever takes entries must settle or abandon each of them: until then, equal requests wait.
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
        passed_on: Collection[str] = (),
    ) -> None:
        """`offline`: nothing is sent, and what the cache lacks fails. `retry_all`: answers that
        failed are asked for again even where they would fail the same. `passed_on`: classes of
        failures that another model is asked about, so that they are not asked again here."""
        self._passed_on = passed_on
        self._reask = reask
        self.provider, self.accept, self.stats = provider, accept, stats
        self.cache = cache if provider.cached else None
        self.offline, self._retry_all = offline, retry_all
        self._waiting: dict[bytes, list[Pending]] = {}
        self._failed: dict[bytes, Outcome] = {}
        self._samples: Counter[bytes] = Counter()
        self._asked: set[bytes] = set()  # by us, so the stored answer is as new as can be

    def begin(self) -> None:
        """A new pass over records: what failed is sent again, samples are numbered anew."""
        self._failed.clear()
        self._samples.clear()

    def admit(
        self, items: Iterable[Item], owner: object = None
    ) -> tuple[list[Pending], list[Pending], list[Pending]]:
        """Slots for all items in order; those of them to send; those that are being sent by
        another process, or by this one for another `owner`."""
        entries: list[Pending] = []
        for item in items:
            if isinstance(item, Request):
                entries.append(Pending(request=item, owner=owner))
            elif item is None:
                self.stats.skipped += 1
                entries.append(Pending(outcome=SKIPPED))
            elif isinstance(item, NotChosen):
                self.stats.not_chosen += 1
                entries.append(Pending(outcome=LEFT_OUT))
            else:
                entries.append(Pending())
                self._settle(entries[-1], Outcome(kind=item.kind, message=str(item)))
        asking = [entry for entry in entries if entry.request is not None]
        if self.cache is None:
            return entries, asking, []
        for entry in asking:
            self._give_key(entry)
        todo, elsewhere = self._sort(asking)
        if self.offline:
            for entry in todo + elsewhere:
                if entry.outcome is None:
                    self._finish(entry, UNANSWERED)
            return entries, [], []
        return entries, todo, elsewhere

    def adopt(self, entries: list[Pending]) -> tuple[list[Pending], list[Pending]]:
        """Looks again at what others were sending: what is left to send by us, and what they still
        have. Answered ones are settled."""
        return (entries, []) if self.cache is None else self._sort(entries)

    def _sort(self, asking: list[Pending]) -> tuple[list[Pending], list[Pending]]:
        """Settles what is answered; gives what is to be sent by us, and what others are sending."""
        fresh: list[Pending] = []
        elsewhere: list[Pending] = []
        try:
            while asking:
                asking = self._look_up(asking, fresh, elsewhere)
            todo, held = ([], []) if self.offline else self._claim(fresh)
        except BaseException:
            self._forget(fresh)
            raise
        return (fresh if self.offline else todo), elsewhere + held

    def _look_up(
        self, asking: list[Pending], fresh: list[Pending], elsewhere: list[Pending]
    ) -> list[Pending]:
        """Settles what is answered, adds to `fresh` what is to be sent and to `elsewhere` what is
        being sent for another owner; gives those that were asked again because of their stored
        answer, under their new keys."""
        assert self.cache is not None
        wanted = {
            entry.key: entry.request
            for entry in asking
            if entry.request is not None and entry.key not in self._failed
        }
        found = stored(self.cache, self.provider, wanted)
        again = []
        for entry in asking:
            waiting = self._waiting.get(entry.key)
            if entry.key in self._failed:
                self._settle(entry, self._failed[entry.key])
            elif waiting and waiting[0] is not entry:
                (waiting if waiting[0].owner is entry.owner else elsewhere).append(entry)
            elif self._settled_by(entry, found.get(entry.key)):
                pass
            elif entry.key in found and self._asks_again(entry, found[entry.key]):
                again.append(entry)
            else:
                self._waiting.setdefault(entry.key, [entry])
                fresh.append(entry)
        return again

    def _asks_again(self, entry: Pending, completion: Completion) -> bool:
        """Whether the answer calls for another request, which the entry then holds."""
        outcome = self._outcome(entry, completion, cached=False)
        if outcome.kind is None or entry.request is None:
            return False
        request = self._reask(entry.request, completion, outcome.kind, outcome.message or "")
        if request is None:
            return False
        entry.request, entry.key = request, self.provider.key(request)
        return True

    def _claim(self, entries: list[Pending]) -> tuple[list[Pending], list[Pending]]:
        if not entries or self.cache is None:
            return entries, []
        held = self.cache.claim([entry.key for entry in entries])
        mine = [entry for entry in entries if entry.key not in held]
        # Between the look-up and the claim another process may have been done with a few.
        found = self.cache.get([entry.key for entry in mine])
        late = [entry for entry in mine if self._settled_by(entry, found.get(entry.key))]
        if late:
            self.cache.release([entry.key for entry in late])
        todo = [entry for entry in mine if entry.outcome is None]
        return todo, [entry for entry in entries if entry.key in held]

    def store(self, rows: list[tuple[Pending, Completion]]) -> None:
        """Puts completions on disk; afterwards they may be settled."""
        if self.cache is not None and rows:
            self.cache.put([self._row(entry, completion) for entry, completion in rows])

    def _row(self, entry: Pending, completion: Completion) -> Row:
        request = entry.request
        assert request is not None
        if not request.sampling.repeats:
            return Row(entry.key, completion)
        base = self.provider.key_without_limit(request)
        return Row(entry.key, completion, base, request.sampling.max_new_tokens)

    def answered(self, entry: Pending, completion: Completion) -> bool:
        """Settles a entry, and all that wait for the same request, with a new completion.

        False where the entry is to be sent again, with another request.
        """
        if entry.outcome is not None:
            return True
        self.stats.prompt_tokens += completion.prompt_tokens or 0
        self.stats.completion_tokens += completion.completion_tokens or 0
        self.stats.cached_tokens += completion.cached_tokens or 0
        self.stats.reasoning_tokens += completion.reasoning_tokens or 0
        if self._retry_all:
            self._asked.add(entry.key)
        key = entry.key
        if self._asks_again(entry, completion):
            self.stats.reasks += 1
            if self.cache is not None:
                waiting = self._waiting.pop(key, [entry])
                self._waiting.setdefault(entry.key, []).extend(waiting)
                self.cache.claim([entry.key])
            return False
        self._finish(entry, self._outcome(entry, completion, cached=False))
        return True

    def failed(self, entry: Pending, error: RecordFailed) -> None:
        """Settles a entry, and all that wait for the same request, with a failure."""
        if entry.outcome is not None:
            return
        if self.cache is not None:
            self.cache.release([entry.key])
        self._finish(entry, Outcome(kind=error.kind, message=str(error)))

    def abandon(self, entries: Iterable[Pending]) -> None:
        """Gives up what will not be sent after all: another owner, or a later pass, may. Slots
        that are settled, or wait for another, are passed over."""
        if self.cache is None:
            return
        keys = self._forget(entries)
        if keys:
            self.cache.release(keys)

    def _forget(self, entries: Iterable[Pending]) -> list[bytes]:
        """Lets nothing wait for these entries any more; the keys that they had."""
        keys = []
        for entry in entries:
            waiting = self._waiting.get(entry.key)
            if entry.outcome is not None or not waiting:
                continue
            if waiting[0] is entry:
                del self._waiting[entry.key]
                keys.append(entry.key)
            elif entry in waiting:
                waiting.remove(entry)
        return keys

    def _finish(self, entry: Pending, outcome: Outcome) -> None:
        self._settle(entry, outcome)
        if self.cache is None:
            return
        for other in self._waiting.pop(entry.key, ()):
            if other is not entry:
                self._settle(other, outcome._replace(cached=outcome.kind is None))
        if outcome.kind is not None:
            self._failed[entry.key] = outcome

    def _settled_by(self, entry: Pending, completion: Completion | None) -> bool:
        """Whether a stored completion serves. One that fails serves too, where it would fail the
        same if it were asked for again."""
        if completion is None:
            return False
        outcome = self._outcome(entry, completion, cached=True)
        if outcome.kind is not None and not self._lasts(entry, completion, outcome):
            return False
        self._settle(entry, outcome)
        for other in self._waiting.pop(entry.key, ()):
            if other is not entry:
                self._settle(other, outcome)
        return True

    def _lasts(self, entry: Pending, completion: Completion, outcome: Outcome) -> bool:
        request = entry.request
        assert request is not None
        assert outcome.kind is not None
        again = self._retry_all and entry.key not in self._asked
        # An answer of reasoning alone is the model's; one of nothing at all may be the server's.
        lasting = outcome.kind in LASTING or (outcome.kind == "empty" and completion.text.strip())
        repeats = request.sampling.repeats or outcome.kind in self._passed_on
        if again or not (lasting or outcome.kind in self._passed_on) or not repeats:
            return False
        return self._reask(request, completion, outcome.kind, outcome.message or "") is None

    def _outcome(self, entry: Pending, completion: Completion, cached: bool) -> Outcome:
        assert entry.request is not None
        original = entry.request.text
        try:
            text = self.accept(entry.request, completion)
        except RecordFailed as error:
            return Outcome(None, completion, error.kind, str(error), cached, original)
        return Outcome(text, completion, cached=cached, original=original)

    def _settle(self, entry: Pending, outcome: Outcome) -> None:
        entry.outcome = outcome
        if outcome.kind is not None:
            self.stats.failed_as(outcome.kind, outcome.message or "")
        elif outcome.cached:
            self.stats.cached += 1
        else:
            self.stats.answered(outcome.original, outcome.text or "")

    def _give_key(self, entry: Pending) -> None:
        """The key; where tokens are sampled, equal requests are told apart by their number."""
        request = entry.request
        assert request is not None
        entry.key = self.provider.key(request)
        if request.sampling.is_sampling:
            number = self._samples[entry.key]
            self._samples[entry.key] += 1
            if number:
                entry.request = request._replace(sample=request.sample + number)
                entry.key = self.provider.key(entry.request)
