"""Runs a model in this process: a window of records at a time, in the order that suits it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice

from fabe_ds.engine.coalesce import Coalescer, Pending
from fabe_ds.errors import RecordFailed
from fabe_ds.providers.base import LocalProvider
from fabe_ds.request import LEFT_OUT, SKIPPED, Completion, Item, NotChosen, Outcome, Request

POLL_SECONDS = 0.5
LOADING = "loading the model"


def answer_window(
    coalescer: Coalescer, items: list[Item], answer: Callable[[list[Pending]], None]
) -> Iterator[Outcome]:
    """One outcome an item, in order; `answer` settles the entries that are to be sent.

    What another process is sending is waited for, or taken over when that process ends.
    """
    entries, todo, elsewhere = coalescer.admit(items)
    try:
        answer(todo)
        while elsewhere:
            todo, elsewhere = coalescer.adopt(elsewhere)
            answer(todo)
            if elsewhere:
                time.sleep(POLL_SECONDS)
    finally:  # whatever happened, nothing may wait for what we do not send
        coalescer.abandon(entries)
    for entry in entries:
        assert entry.outcome is not None
        yield entry.outcome


class LocalEngine:
    """Answers items in order. `window`: how many records are looked at together."""

    def __init__(self, provider: LocalProvider, coalescer: Coalescer, window: int) -> None:
        self.provider, self.coalescer, self.window = provider, coalescer, window
        self._checked = False

    def outcomes(self, items: Iterable[Item]) -> Generator[Outcome, None, None]:
        """One outcome an item, in order; each completion is stored before the next batch runs."""
        iterator = iter(items)
        while window := list(islice(iterator, self.window)):
            if self.coalescer.cache is None:
                yield from self._straight(window)
                continue
            asked = any(isinstance(item, Request) for item in window)
            if asked and not self._checked and not self.coalescer.offline:
                self._check_once()
            yield from answer_window(self.coalescer, window, self._answer)

    def _straight(self, items: list[Item]) -> Iterator[Outcome]:
        """Answers that nothing is kept of: no keys, no look-ups."""
        stats = self.coalescer.stats
        requests = [item for item in items if isinstance(item, Request)]
        answers = iter(self.provider.complete(requests))
        for item in items:
            answer = next(answers) if isinstance(item, Request) else item
            if isinstance(answer, Completion):
                stats.answered(item.text if isinstance(item, Request) else "", answer.text)
                yield Outcome(answer.text, answer)
            elif answer is None:
                stats.skipped += 1
                yield SKIPPED
            elif isinstance(answer, NotChosen):
                stats.not_chosen += 1
                yield LEFT_OUT
            else:
                stats.failed += 1
                yield Outcome(kind=answer.kind, message=str(answer))

    def close(self) -> None:
        """Nothing is open."""

    def _check_once(self) -> None:
        """Loads a model that is not vouched for: an earlier version may have stored the answers of
        one that this version refuses."""
        if not self.provider.vouched():
            self._load()

    def _load(self) -> None:
        """Loads the model: a phase of its own, outside the rate of answers."""
        stats, started = self.coalescer.stats, time.monotonic()
        stats.state = LOADING
        try:
            self.provider.preflight()
        finally:
            stats.state = ""
            stats.loading += time.monotonic() - started
        self._checked = True

    def _answer(self, entries: list[Pending]) -> None:
        while entries:
            entries = self._answer_once(entries)
        self.coalescer.stats.notes = self.provider.notes()

    def _answer_once(self, entries: list[Pending]) -> list[Pending]:
        """Gives those that are to be asked again."""
        if not self._checked:
            self._load()
        requests = [entry.request for entry in entries if entry.request is not None]
        stats, again = self.coalescer.stats, []
        for batch in self.provider.stream(requests):
            stats.requests += len(batch)
            good = [(entries[i], a) for i, a in batch if isinstance(a, Completion)]
            self.coalescer.store(good)
            for index, answer in batch:
                if isinstance(answer, RecordFailed):
                    self.coalescer.failed(entries[index], answer)
                elif not self.coalescer.answered(entries[index], answer):
                    again.append(entries[index])
        return again
