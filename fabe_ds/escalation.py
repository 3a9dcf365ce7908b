"""Answers that are no good, asked of other models, one after another (--fallback-model)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from fabe_ds.engine.runtime import Runtime, in_groups
from fabe_ds.request import LASTING, Item, Outcome, Request, Stats

ESCALATED = (*LASTING, "empty")
"""Classes of failures that another model may not have. Faults on the way are none of them."""


class Escalation:
    """The models that a run turns to, in order. What each was asked is kept in the record cache."""

    def __init__(self, models: Sequence[tuple[str, Runtime]], group: int) -> None:
        """`models`: names, and who asks them. `group`: answers that are looked at together."""
        self._models, self._group = models, group

    def answered(
        self,
        items: Iterable[Item],
        ask: Callable[[Iterable[Item]], Iterator[Outcome]],
        stats: Stats,
    ) -> Iterator[Outcome]:
        """The outcomes that `ask` gives of items, and of others where these are no good. `stats`
        is put right, and told of what was sent."""
        for asked, outcomes in in_groups(items, ask, self._group):
            for model, runtime in self._models:
                self._ask(model, runtime, asked, outcomes, stats)
            yield from outcomes

    def _ask(
        self,
        model: str,
        runtime: Runtime,
        items: Sequence[Item],
        outcomes: list[Outcome],
        stats: Stats,
    ) -> None:
        """Puts the model's outcomes in the places of those that are no good."""
        places = [place for place, outcome in enumerate(outcomes) if outcome.kind in ESCALATED]
        places = [place for place in places if isinstance(items[place], Request)]
        if not places:
            return
        given = runtime.outcomes(items[place] for place in places)
        for place, outcome in zip(places, given, strict=True):
            _recount(stats, outcomes[place], outcome)
            outcomes[place] = outcome._replace(model=model)
        runtime.tell(stats)

    def begin(self) -> None:
        """A new pass over records."""
        for _, runtime in self._models:
            runtime.begin()

    def close(self) -> None:
        for _, runtime in self._models:
            runtime.close()


def _recount(stats: Stats, old: Outcome, new: Outcome) -> None:
    """Counts a record by its new outcome."""
    stats.failures[old.kind or ""] -= 1
    if new.kind is not None:
        stats.failures[new.kind] += 1
    else:
        stats.failed -= 1
        stats.cached += new.cached
        stats.done += not new.cached
    stats.failures = +stats.failures
