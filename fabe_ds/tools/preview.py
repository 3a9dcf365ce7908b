"""A few records for real, and what the whole run would take at that rate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from fabe_ds.config import rules
from fabe_ds.config.settings import RunConfig
from fabe_ds.engine.prices import Price
from fabe_ds.errors import RunStopped
from fabe_ds.job import open_job
from fabe_ds.providers.base import LocalProvider
from fabe_ds.request import Outcome, Request
from fabe_ds.tools.dry_run import DryRun, items_by_record, loaded
from fabe_ds.tools.dry_run import count as count_all

TIME_SPREAD = 0.2
"""The least range of an estimate of time, as a part of it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A total for the whole run, and a range it is likely in (two standard errors)."""

    name: str
    least: float
    likely: float
    most: float


@dataclass(frozen=True, slots=True)
class Preview:
    """`shown` are requests, each after the number of its record (from 1), with what became of
    them; `counts` those of the whole input; `stopped` says why it ended early."""

    shown: list[tuple[int, Request, Outcome]]
    seconds: float
    counts: DryRun
    estimates: list[Estimate]
    stopped: str | None = None


def preview(config: RunConfig, count: int) -> Preview:
    """Runs the first `count` records that have text; the record cache keeps their answers.

    Raises: FabeError.
    """
    job = open_job(config)
    transform = job.transform
    records = loaded(job)
    counts = count_all(job, records)
    rules.remark(config, transform.provider)
    requests = (
        [(number, item) for item in items if isinstance(item, Request)]
        for number, items in enumerate(items_by_record(job, records), 1)
    )
    asked = list(chain.from_iterable(islice(filter(None, requests), count)))
    outcomes: list[Outcome] = []
    stopped = None
    try:
        _ = transform.runtime
        if asked and isinstance(transform.provider, LocalProvider) and not config.offline:
            transform.provider.preflight()  # a model's loading is no part of what a record takes
        started = time.monotonic()
        outcomes.extend(transform.answers(item for _, item in asked))
    except RunStopped as error:
        if not outcomes:
            raise
        stopped = str(error)
    finally:
        transform.close()
    seconds = time.monotonic() - started
    shown = [(*pair, outcome) for pair, outcome in zip(asked, outcomes, strict=False)]
    estimates = list(_estimates(config, outcomes, seconds, counts, transform.session.prices()[0]))
    return Preview(shown, seconds, counts, estimates, stopped)


def _estimates(
    config: RunConfig, outcomes: Sequence[Outcome], seconds: float, counts: DryRun, price: Price
) -> Iterator[Estimate]:
    answers = [outcome.completion for outcome in outcomes if outcome.completion is not None]
    left = counts.to_send
    if not answers or left <= 0:
        return
    prompts = [answer.prompt_tokens or 0 for answer in answers]
    completions = [answer.completion_tokens or 0 for answer in answers]
    if any(prompts):
        yield _estimate("prompt tokens", prompts, left)
    if any(completions):
        yield _estimate("completion tokens", completions, left)
    fresh = sum(not outcome.cached for outcome in outcomes)
    if fresh:
        # So few records may not fill all the places in flight.
        concurrency = config.concurrency if isinstance(config.concurrency, int) else fresh
        wide = concurrency / min(concurrency, fresh)
        likely = left * seconds / fresh / wide
        # Of equal answers too: the server is not always as quick.
        spread = max(TIME_SPREAD, _spread(completions) if any(completions) else 0.0)
        yield Estimate("time", likely * max(0.0, 1 - spread), likely, likely * (1 + spread))
    if config.prices is not None:
        costs = [
            price.cost(asked, answered)
            for asked, answered in zip(prompts, completions, strict=True)
        ]
        yield _estimate("cost", costs, left)


def _estimate(name: str, values: Sequence[float], records: int) -> Estimate:
    likely, spread = statistics.fmean(values) * records, _spread(values)
    return Estimate(name, max(0.0, likely * (1 - spread)), likely, likely * (1 + spread))


def _spread(values: Sequence[float]) -> float:
    """Two standard errors of the mean, as a part of it; all of it where one value is known."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not mean:
        return 1.0
    return float(2 * statistics.stdev(values) / len(values) ** 0.5 / mean)
