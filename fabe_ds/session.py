"""What asks the models of a transform in one process: engines, cache, budget."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from fabe_ds.config.sections import BudgetSettings
from fabe_ds.config.settings import TransformConfig
from fabe_ds.engine.budget import Budget, budget_of
from fabe_ds.engine.prices import BATCH, FREE, Price, is_auto, read_price
from fabe_ds.engine.runtime import Runtime
from fabe_ds.escalation import ESCALATED, Escalation
from fabe_ds.judging import Judge
from fabe_ds.prompts.acceptance import acceptance, asking_again
from fabe_ds.prompts.template import Instruction
from fabe_ds.providers import HttpProvider, Provider
from fabe_ds.providers.http import TIER
from fabe_ds.request import Item, Outcome, Stats
from fabe_ds.store.completions import Completions
from fabe_ds.who_answers import Fallback, Providers

GROUP, BATCH_GROUP = 256, 50_000
"""Answers whose failures are asked of a fallback model together; of batches, those of a window."""


class Session:
    """The engine of the run's own model, and, where they are wanted, a judge's and those of other
    models. Opened when it is first needed, and never shared with a forked child."""

    def __init__(
        self,
        config: TransformConfig,
        providers: Providers,
        judging: list[Instruction] | None,
        open_cache: Callable[[TransformConfig], Completions],
    ) -> None:
        """`judging`: a judge's template, made ready for each field; None where there is none."""
        self._config, self._providers, self._judging = config, providers, judging
        self._open_cache = open_cache
        self._budget = budget_of(config.part(BudgetSettings))
        self._rank = 0
        self._build()
        self._forget()

    def _build(self) -> None:
        providers, wanted = self._providers, map(Fallback.parse, self._config.fallback_models)
        self.provider = providers.build(self._rank)
        self.behind = [providers.fallback(each, self._rank) for each in wanted]
        """Who is asked where the run's own model gave no good answer, in order."""

    def _forget(self) -> None:
        self._runtime: Runtime | None = None
        self._judge: Judge | None = None
        self._escalation: Escalation | None = None
        # Threads may call for the first time; and a lock that another held at a fork stays shut.
        self._opening = (os.getpid(), threading.Lock())

    def _lock(self) -> threading.Lock:
        if self._opening[0] != os.getpid():
            if self._runtime is not None:
                self._build()
            self._forget()
        return self._opening[1]

    @property
    def runtime(self) -> Runtime:
        """Who asks the run's own model."""
        with self._lock():
            if self._runtime is None:
                self._runtime = self._opened(self.provider, self.behind)
                weakref.finalize(self, self._runtime.close)  # a map's callable has no last call
            return self._runtime

    def _opened(
        self, provider: Provider, others: Sequence[Provider] = (), name: str = ""
    ) -> Runtime:
        """`others`: who is asked behind it."""
        config = self._config
        return Runtime(
            config,
            provider,
            self._open_cache,
            acceptance(config, provider),
            asking_again(config),
            self._budget_for(provider),
            ESCALATED if self.behind else (),
            name,
            passes_on=others,
        )

    @property
    def judge(self) -> Judge | None:
        """Who gives answers a score, where the run picks the best of several so."""
        if self._judging is None:
            return None
        with self._lock():
            if self._judge is None:
                config, provider = self._config, self.provider
                if config.judge_model not in (None, config.model):
                    provider = self._providers.build(self._rank, config.judge_model)
                budget = self._budget_for(provider)
                self._judge = Judge(config, provider, self._open_cache, self._judging, budget)
                weakref.finalize(self, self._judge.close)
            return self._judge

    @property
    def escalation(self) -> Escalation | None:
        """The models that are asked where the run's own gave no good answer."""
        if not self.behind:
            return None
        with self._lock():
            if self._escalation is None:
                models = []
                for number, provider in enumerate(self.behind, 1):
                    opened = self._opened(provider, self.behind[number:], f"-fallback-{number}")
                    models.append((provider.endpoint.model, opened))
                group = BATCH_GROUP if self._config.batch_api else GROUP
                self._escalation = Escalation(models, group)
                weakref.finalize(self, self._escalation.close)
            return self._escalation

    def answers(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """The outcomes of items, in order. Raises: RunStopped, CacheError."""
        ask = self.runtime.outcomes
        if (escalation := self.escalation) is not None:
            ask = partial(escalation.answered, ask=ask, stats=self.runtime.stats)
        if (judge := self.judge) is not None:
            return judge.scored(items, ask, self.runtime.stats)
        return ask(items)

    @property
    def stats(self) -> Stats:
        """Counts so far in this process."""
        return self._runtime.stats if self._runtime else Stats()

    def begin(self) -> None:
        """A new pass over records: what failed is sent again, samples are numbered anew."""
        for each in (self._runtime, self._judge, self._escalation):
            if each is not None:
                each.begin()

    def use_rank(self, rank: int) -> None:
        """Takes the device of a process's rank, where several share the work."""
        if rank != self._rank:
            self.close()
            self._rank = rank
            self._build()

    def close(self) -> None:
        """Closes what is open in this process."""
        for each in (self._runtime, self._judge, self._escalation):
            if each is not None:
                each.close()
        self._forget()

    # Money.

    def prices(self) -> list[Price]:
        """The price of each model that may be asked, the run's own first. Raises: UsageError."""
        asked = [self.provider, *self.behind]
        if self._config.judge_model is not None:
            asked.append(self._providers.build(self._rank, self._config.judge_model))
        return list(map(self._price, asked))

    def _budget_for(self, provider: Provider) -> Budget:
        """The run's budget, of which each model takes its part at its own price."""
        return self._budget.at(self._price(provider))

    def _price(self, provider: Provider) -> Price:
        """Raises: UsageError where a price is needed that is not known."""
        config, model = self._config, provider.endpoint.model
        if config.prices is None and config.max_cost is None:
            return FREE
        if not isinstance(provider, HttpProvider):
            is_known = config.prices is not None and not is_auto(config.prices)
            return read_price(config.prices, model) if is_known else FREE
        given = config.service_tier or config.given_params.get(TIER)
        tier = BATCH if config.batch_api else given
        return read_price(config.prices, model, provider.base_url, tier)
