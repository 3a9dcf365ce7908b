"""Runs a model in this process: a window of records at a time, in the order that suits it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice

from fabe_ds.engine.coalesce import Intake, Slot
from fabe_ds.errors import RecordFailed
from fabe_ds.providers.base import LocalProvider
from fabe_ds.request import SKIPPED, Completion, Item, Outcome, Request

POLL_SECONDS = 0.5
LOADING = "loading the model"


def answer_window(
    intake: Intake, items: list[Item], answer: Callable[[list[Slot]], None]
) -> Iterator[Outcome]:
    """One outcome an item, in order; `answer` settles the slots that are to be sent.

    What another process is sending is waited for, or taken over when that process ends.
    """
    slots, todo, foreign = intake.take(items)
    try:
        answer(todo)
        while foreign:
            todo, foreign = intake.take_over(foreign)
            answer(todo)
            if foreign:
                time.sleep(POLL_SECONDS)
    finally:  # whatever happened, nothing may wait for what we do not send
        intake.abandon(slots)
    for slot in slots:
        assert slot.outcome is not None
        yield slot.outcome


class LocalEngine:
    """Answers items in order. `window`: how many records are looked at together."""

    def __init__(self, provider: LocalProvider, intake: Intake, window: int) -> None:
        self.provider, self.intake, self.window = provider, intake, window
        self._checked = False

    def outcomes(self, items: Iterable[Item]) -> Generator[Outcome, None, None]:
        """One outcome an item, in order; each completion is stored before the next batch runs."""
        iterator = iter(items)
        while window := list(islice(iterator, self.window)):
            if self.intake.cache is None:
                yield from self._straight(window)
                continue
            asked = any(isinstance(item, Request) for item in window)
            if asked and not self._checked and not self.intake.offline:
                self._check_once()
            yield from answer_window(self.intake, window, self._answer)

    def _straight(self, items: list[Item]) -> Iterator[Outcome]:
        """Answers that nothing is kept of: no keys, no look-ups."""
        stats = self.intake.stats
        requests = [item for item in items if isinstance(item, Request)]
        answers = iter(self.provider.complete(requests))
        for item in items:
            answer = next(answers) if isinstance(item, Request) else item
            if isinstance(answer, Completion):
                stats.done += 1
                yield Outcome(answer.text, answer)
            elif answer is None:
                stats.skipped += 1
                yield SKIPPED
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
        stats, started = self.intake.stats, time.monotonic()
        stats.state = LOADING
        try:
            self.provider.preflight()
        finally:
            stats.state = ""
            stats.loading += time.monotonic() - started
        self._checked = True

    def _answer(self, slots: list[Slot]) -> None:
        while slots:
            slots = self._answer_once(slots)
        self.intake.stats.notes = self.provider.told()

    def _answer_once(self, slots: list[Slot]) -> list[Slot]:
        """Gives those that are to be asked again."""
        if not self._checked:
            self._load()
        requests = [slot.request for slot in slots if slot.request is not None]
        stats, again = self.intake.stats, []
        for batch in self.provider.stream(requests):
            stats.requests += len(batch)
            good = [(slots[i], a) for i, a in batch if isinstance(a, Completion)]
            self.intake.store(good)
            for index, answer in batch:
                if isinstance(answer, RecordFailed):
                    self.intake.failed(slots[index], answer)
                elif not self.intake.answered(slots[index], answer):
                    again.append(slots[index])
        return again
