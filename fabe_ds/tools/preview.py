"""A few records for real, and what the whole run would take at that rate."""

from __future__ import annotations

import html
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

from fabe_ds.config import rules
from fabe_ds.config.load import config_from, with_settings
from fabe_ds.config.settings import RunConfig
from fabe_ds.diff import Kind, diff_lines
from fabe_ds.engine.prices import Price
from fabe_ds.errors import RunStopped
from fabe_ds.job import open_job
from fabe_ds.providers.base import LocalProvider
from fabe_ds.report.notebook import diff_html
from fabe_ds.request import Outcome, Request
from fabe_ds.text import clock
from fabe_ds.tools.dry_run import DryRun, items_by_record, loaded
from fabe_ds.tools.dry_run import count as count_all

SHOWN_LINES, SHOWN_CHARACTERS = 80, 20_000
"""Of each record."""
TIME_SPREAD = 0.2
"""The least range of an estimate of time, as a part of it."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A total for the whole run, and a range it is likely in (two standard errors)."""

    name: str
    least: float
    likely: float
    most: float

    def __str__(self) -> str:
        likely, least, most = map(self._measured, (self.likely, self.least, self.most))
        what = "" if self.name == "time" else f" {self.name}"
        within = "" if least == most else f" ({least} to {most})"
        return f"about {likely}{what}{within}"

    def _measured(self, number: float) -> str:
        if self.name == "cost":
            return f"{number:,.4g}"
        if self.name != "time":
            return f"{number:,.0f}"
        return clock(number) if number >= 60 else f"{number:.2g} s"


class Shown(NamedTuple):
    """A request of a preview, and what became of it."""

    record: int
    """From 1."""
    request: Request
    outcome: Outcome
    in_place: bool
    """Whether the answer takes the place of the text."""

    def __str__(self) -> str:
        answer = self.outcome.completion
        tokens = (
            f", {answer.prompt_tokens} prompt and {answer.completion_tokens} completion tokens"
            if answer is not None and answer.completion_tokens is not None
            else ""
        )
        state = self.outcome.message or ("from cache" if self.outcome.cached else "done")
        return f"record {self.record}: {state}{tokens}"

    def diff(self) -> list[tuple[Kind, str]]:
        """The lines of the text and of the answer to it; none where there is no good answer."""
        if self.outcome.text is None:
            return []
        before, after = self.request.text, self.outcome.text
        return diff_lines(before[:SHOWN_CHARACTERS], after[:SHOWN_CHARACTERS], self.in_place)


@dataclass(frozen=True, slots=True)
class Preview:
    """`shown` are requests with what became of them; `counts` those of the whole input; `stopped`
    says why it ended early."""

    shown: list[Shown]
    seconds: float
    counts: DryRun
    estimates: list[Estimate]
    stopped: str | None = None

    def __str__(self) -> str:
        """What was done, and what the whole run would take, a line each."""
        records = len({shown.record for shown in self.shown})
        counts = self.counts
        first = (
            f"{records} records in {self.seconds:.1f} s, kept in the cache; {counts.records} in "
            f"all, {counts.to_send} were to be asked for"
        )
        return "\n".join([first, *(f"whole run: {each}" for each in self.estimates)])

    def __repr__(self) -> str:
        return f"<Preview: {str(self).splitlines()[0]}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        diffs = (diff_html(str(shown), shown.diff()[:SHOWN_LINES]) for shown in self.shown)
        lines = [*str(self).split("\n"), *([self.stopped] if self.stopped else [])]
        return "".join([*diffs, *(f"<div>{html.escape(line)}</div>" for line in lines)])


def preview(config: RunConfig | None = None, count: int = 5, **options: Any) -> Preview:
    """Rewrites the first `count` records that have text, and writes none: what comes back, and
    what the whole run would take. The record cache keeps the answers.

    Takes what `fabe_ds.run` takes. In a notebook, the result shows itself.

    Raises: FabeError.
    """
    config = config_from(config, options)
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
    in_place = not config.output_fields
    shown = [Shown(*each, done, in_place) for each, done in zip(asked, outcomes, strict=False)]
    estimates = list(_estimates(config, outcomes, seconds, counts, transform.session.prices()[0]))
    return Preview(shown, seconds, counts, estimates, stopped)


preview.__signature__ = with_settings(preview)  # type: ignore[attr-defined]


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
