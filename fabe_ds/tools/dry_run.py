"""What a run would do: counted and shown, with nothing sent and nothing written."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import cast

from fabe_ds import pipeline
from fabe_ds.config import rules
from fabe_ds.config.settings import RunConfig
from fabe_ds.engine.coalesce import Coalescer
from fabe_ds.errors import RecordFailed
from fabe_ds.escalation import ESCALATED
from fabe_ds.executors.base import Work
from fabe_ds.formats.base import BROKEN, Records, no_tick
from fabe_ds.job import Job, open_job
from fabe_ds.prompts.acceptance import acceptance, asking_again
from fabe_ds.quiet import quiet_datasets
from fabe_ds.report.counts import counted
from fabe_ds.request import NOT_CHOSEN, Completion, Item, NotChosen, Request, Stats
from fabe_ds.store.completions import Completions, RecordCache
from fabe_ds.tools.estimates import PromptTokens
from fabe_ds.transform import Transform

SHOWN = 3
ROWS = 1000


@dataclass(slots=True)
class DryRun:
    """Counts; `to_do` are values, `to_send` requests (equal ones once, unless sampled). `kept` have
    an answer that failed and would fail the same. `requests` are the first ones, each as it would
    be sent."""

    records: int = 0
    to_do: int = 0
    cached: int = 0
    to_send: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    bad_files: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    kept: Counter[str] = field(default_factory=Counter)
    tokens: PromptTokens | None = None
    """Those of the prompts to send."""
    most_completion_tokens: int = 0
    has_fallbacks: bool = False
    most_cost: float | None = None
    """What the answers would cost, by the first model's price, where there is one."""


def dry_run(config: RunConfig) -> DryRun:
    """Raises: FabeError, as the run would."""
    # Records are loaded as a run loads them, and not into the run's cache.
    with tempfile.TemporaryDirectory(prefix="fabe-ds-") as folder:
        job = open_job(config, cache_dir=Path(folder))
        with contextlib.closing(job.transform):
            seen = count(job, loaded(job))
    rules.remark(config, job.transform.provider)
    return seen


def loaded(job: Job) -> Records:
    """The records of a run, looked at as the run would. Raises: FabeError."""
    with quiet_datasets():
        return pipeline.loaded(job, no_tick)


def items_by_record(job: Job, records: Records) -> Iterator[list[Item]]:
    """What each record asks for."""
    return Work.of(records, job.format, job.transform, Path()).items_by_record()


def count(job: Job, records: Records) -> DryRun:
    """What a run over these records would do."""
    seen = DryRun(records=len(records), bad_files=records.left_out)
    cache = None
    if job.transform.provider.cached and job.config.resume:
        cache = RecordCache.existing(job.config.cache_dir)
    with contextlib.closing(cache) if cache else contextlib.nullcontext():
        counter = _Counter(job.transform, cache, seen)
        items = chain.from_iterable(items_by_record(job, records))
        while part := list(islice(items, ROWS)):
            counter.count(part)
    _estimate(job, seen)
    skips = job.format.skips(records)
    if skips is not None:
        broken, left_out = seen.failed[BROKEN], seen.skipped[NOT_CHOSEN]
        seen.skipped = Counter({NOT_CHOSEN: left_out}) if left_out else Counter()
        for column in skips:
            seen.skipped.update(counted(column))
        for name in (BROKEN, "not UTF-8"):
            seen.skipped.pop(name, None)
        seen.failed[BROKEN] = broken
    seen.failed = +seen.failed
    return seen


def _estimate(job: Job, seen: DryRun) -> None:
    """Adds what is to be sent up: tokens, and what they cost at most."""
    tokens, config = seen.tokens, job.config
    if tokens is None or not tokens.requests:
        return
    seen.has_fallbacks = bool(config.fallback_models)
    seen.most_completion_tokens = config.max_new_tokens * tokens.requests
    if config.prices is not None:
        each = math.ceil(tokens.total / tokens.requests)
        cost = job.transform.session.prices()[0].cost(each, config.max_new_tokens)
        seen.most_cost = cost * tokens.requests


class _Counter:
    """Sorts items as a run would: answered already, failed before, to be sent."""

    def __init__(self, transform: Transform, cache: RecordCache | None, seen: DryRun) -> None:
        config, self._transform, self._seen = transform.config, transform, seen
        self._keys: set[bytes] = set()
        if transform.provider.cached:
            seen.tokens = PromptTokens(transform.provider)
        asked = [transform.provider, *transform.session.behind]
        self._sorters = [
            Coalescer(
                provider,
                cache or cast(Completions, _NothingStored()),  # offline, it is but asked
                acceptance(config, provider),
                Stats(),
                asking_again(config),
                offline=True,
                retry_all=config.retry_all,
                passed_on=ESCALATED if provider is not asked[-1] else (),
            )
            for provider in asked
        ]

    def count(self, items: Sequence[Item]) -> None:
        seen, provider = self._seen, self._transform.provider
        requests = [item for item in items if isinstance(item, Request)]
        seen.failed.update(item.kind for item in items if isinstance(item, RecordFailed))
        seen.skipped["no text"] += sum(item is None for item in items)
        seen.skipped[NOT_CHOSEN] += sum(isinstance(item, NotChosen) for item in items)
        seen.skipped = +seen.skipped
        seen.to_do += len(requests)
        for request in requests[: SHOWN - len(seen.requests)]:
            seen.requests.append(provider.shown(request))
            tokens = provider.prompt_tokens(request)
            if tokens is not None:
                seen.prompt_tokens.append(tokens)
        if provider.cached:
            self._sort(requests)
        else:
            seen.to_send += len(requests)

    def _sort(self, requests: Sequence[Request], model: int = 0) -> None:
        """Sorts by what the model has answered; what it failed in is sorted by the next one."""
        entries, _, _ = self._sorters[model].admit(requests)
        is_last = model == len(self._sorters) - 1
        passed_on, sent = [], []
        for request, entry in zip(requests, entries, strict=True):
            assert entry.outcome is not None
            kind = entry.outcome.kind
            if kind is None:
                self._seen.cached += 1
            elif entry.outcome.completion is not None and kind in ESCALATED and not is_last:
                passed_on.append(request)
            elif entry.outcome.completion is not None:
                self._seen.kept[kind] += 1
            elif entry.key not in self._keys:
                self._keys.add(entry.key)
                sent.append(request)
        self._seen.to_send += len(sent)
        if self._seen.tokens is not None:
            self._seen.tokens.add(sent)
        if passed_on:
            self._sort(passed_on, model + 1)


class _NothingStored:
    """A record cache that is empty and stays so."""

    def get(self, keys: Sequence[bytes], since: float = 0.0) -> dict[bytes, Completion]:
        return {}

    def other_limits(self, max_tokens: int) -> bool:
        return False
