"""What is open while a transform works in one process: the record cache, and the engine."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from fabe_ds.config.rules import refuse_caps
from fabe_ds.config.sections import PolicySettings
from fabe_ds.config.settings import RunConfig, TransformConfig
from fabe_ds.engine.budget import Budget
from fabe_ds.engine.coalesce import Coalescer
from fabe_ds.engine.local import LocalEngine
from fabe_ds.engine.worker_slots import SharedSlots, die_with_parent, is_worker
from fabe_ds.errors import RunStopped, UsageError
from fabe_ds.providers import HttpProvider, LocalProvider, Provider
from fabe_ds.request import Accept, Item, Outcome, Reask, Stats
from fabe_ds.store.completions import Completions, RecordCache

if TYPE_CHECKING:
    from fabe_ds.engine.batch import BatchEngine
    from fabe_ds.engine.http import HttpEngine

SENT = (
    *("requests", "retries", "reasks"),
    *("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens"),
)
"""Counts of what was sent, whoever asked for it."""


def open_cache(config: TransformConfig) -> RecordCache:
    """The record cache of this machine. Without --resume, it shows what is stored from now on."""
    cache = RecordCache(config.cache_dir)
    if not config.resume:
        cache.hide_all()
    return cache


def in_groups(
    items: Iterable[Item], ask: Callable[[Iterable[Item]], Iterator[Outcome]], size: int
) -> Iterator[tuple[list[Item], list[Outcome]]]:
    """Items and their outcomes, so many at a time, as `ask` gives them. It goes on with others
    while somebody works on a group."""
    passed: deque[Item] = deque()

    def passing() -> Iterator[Item]:
        for item in items:
            passed.append(item)
            yield item

    outcomes = ask(passing())
    with contextlib.closing(outcomes):  # type: ignore[type-var]
        while group := list(islice(outcomes, size)):
            yield [passed.popleft() for _ in group], group


class Runtime:
    """The open side of a transform in one process."""

    def __init__(
        self,
        config: TransformConfig,
        provider: Provider,
        open_cache: Callable[[TransformConfig], Completions],
        accept: Accept,
        reask: Reask,
        budget: Budget | None = None,
        tolerated: Sequence[str] = (),
        name: str = "",
        passes_on: Sequence[Provider] = (),
    ) -> None:
        """`accept` makes values of completions; `reask` says what is sent after one that failed.
        `budget` is what may be spent. `tolerated`: kinds of failures that are not the end, so that
        a run in which the first records all have one goes on; `passes_on`: who is asked about
        these. `name` tells a part of a run from its main one."""
        self._budget, self._tolerated = budget or Budget(), tolerated
        self._told, self._name, self._passes_on = Stats(), name, passes_on
        self.pid = os.getpid()
        self.closed = self.stopping = False
        self.stats = Stats()
        self._config = config
        self._journal: RecordCache | None = None
        self.cache = open_cache(config) if provider.cached else None
        self.coalescer = Coalescer(
            provider,
            self.cache,
            accept,
            self.stats,
            reask,
            offline=config.offline,
            retry_all=config.retry_all,
            passed_on=tolerated if passes_on else (),
        )
        self.engine = self._engine(config, provider)

    def _engine(
        self, config: TransformConfig, provider: Provider
    ) -> LocalEngine | HttpEngine | BatchEngine:
        """Raises: UsageError."""
        if is_worker():
            die_with_parent()
        if isinstance(provider, LocalProvider):
            refuse_caps(config, f"--provider {provider.name}")
            window = provider.window if provider.cached else 1000
            return LocalEngine(provider, self.coalescer, window)
        if not isinstance(provider, HttpProvider):
            raise UsageError(f"provider {provider.name}: neither an HTTP nor a local provider")
        policy = config.part(PolicySettings)
        if config.batch_api:
            refuse_caps(config, "--batch-api")
            from fabe_ds.engine.batch import BatchEngine

            return BatchEngine(provider, self.coalescer, policy, self._budget)
        from fabe_ds.engine.http import HttpEngine
        from fabe_ds.engine.limiter import AUTO_MAX

        slots = None
        if is_worker():
            refuse_caps(config, "num_proc")
            places = AUTO_MAX if policy.concurrency == "auto" else policy.concurrency
            slots = SharedSlots(config.cache_dir, places, self._name)
        # A run keeps failed records in any case, and is better stopped.
        patient = config.on_error == "keep" and not isinstance(config, RunConfig)
        return HttpEngine(
            provider.of_each_server(),
            self.coalescer,
            policy,
            self._budget,
            slots=slots,
            patient=patient,
            tolerated=self._tolerated,
            others=[each for each in self._passes_on if isinstance(each, HttpProvider)],
        )

    def outcomes(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """One outcome an item, in order. Raises: RunStopped, when `stopping` has been set."""
        with contextlib.closing(self.engine.outcomes(items)) as outcomes:
            while not self.stopping:
                outcome = next(outcomes, None)
                if outcome is None:
                    return
                yield outcome
        raise RunStopped("stopped; what was answered is kept")

    def begin(self) -> None:
        """A new pass over records: what failed is sent again, samples are numbered anew."""
        self.coalescer.begin()

    def tell(self, stats: Stats) -> None:
        """Adds what was sent since the last time to the counts of a run that this is a part of."""
        mine = self.stats
        for name in SENT:
            now = getattr(mine, name)
            setattr(stats, name, getattr(stats, name) + now - getattr(self._told, name))
            setattr(self._told, name, now)
        stats.cost = self._budget.cost  # which all share

    def journal_cache(self) -> RecordCache:
        """The record cache of this machine, which a provider that costs nothing has not opened."""
        if not isinstance(self.cache, RecordCache) and self._journal is None:
            self._journal = RecordCache(self._config.cache_dir)
        return self.cache if isinstance(self.cache, RecordCache) else self._journal  # type: ignore[return-value]

    def close(self) -> None:
        if self.closed or self.pid != os.getpid():
            return
        self.closed = True
        self.engine.close()
        for opened in (self.cache, self._journal):
            if opened is not None:
                opened.close()
