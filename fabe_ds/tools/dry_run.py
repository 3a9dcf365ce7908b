"""What a run would do: counted and shown, with nothing sent and nothing written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

from fabe_ds.config import rules
from fabe_ds.config.settings import RunConfig
from fabe_ds.destinations import Plan, make_plan
from fabe_ds.engine.coalesce import Intake
from fabe_ds.engine.runtime import acceptance, asking_again
from fabe_ds.errors import InputError, RecordFailed
from fabe_ds.formats.discover import Source
from fabe_ds.formats.json.load import BROKEN, Row, field_target, row_of
from fabe_ds.formats.json.read import Tail, read_records
from fabe_ds.formats.json.scan import Field
from fabe_ds.formats.table import is_table, load_table
from fabe_ds.pipeline import no_such_field
from fabe_ds.request import Completion, Request, Stats
from fabe_ds.store.completions import Completions, RecordCache
from fabe_ds.table_run import check_columns, table_items
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
    keys: set[bytes] = field(default_factory=set, repr=False)
    intake: Intake | None = field(default=None, repr=False)

    def sorter(self, transform: Transform, cache: RecordCache | None) -> Intake:
        """What tells requests that are answered from those that are not, as a run would."""
        if self.intake is None:
            config, provider = transform.config, transform.provider
            self.intake = Intake(
                provider,
                cache or cast(Completions, _NothingStored()),  # offline, it is but asked
                acceptance(config, provider),
                Stats(),
                asking_again(config),
                offline=True,
                retry_all=config.retry_all,
            )
        return self.intake


class _NothingStored:
    """A record cache that is empty and stays so."""

    def get(self, keys: Sequence[bytes], since: float = 0.0) -> dict[bytes, Completion]:
        return {}

    def other_limits(self, max_tokens: int) -> bool:
        return False


def dry_run(config: RunConfig, transform: Transform | None = None) -> DryRun:
    """Raises: FabeError, as the run would."""
    transform = transform or Transform(config)
    rules.check(config, transform.provider)
    cache = None
    if transform.provider.cached and config.resume:
        cache = RecordCache.existing(config.cache_dir)
    seen = DryRun()
    try:
        rows = _rows(config, transform, seen)
        while part := [item for _, item in islice(rows, ROWS)]:
            _count(part, transform, cache, seen)
    finally:
        if cache is not None:
            cache.close()
    rules.remark(config, transform.provider)
    return seen


def requests_of(
    config: RunConfig, transform: Transform
) -> Iterator[tuple[int, Request | RecordFailed]]:
    """What the records that have text ask for, each after its record's number from 0.

    Raises: FabeError.
    """
    return _rows(config, transform, DryRun())


def _rows(
    config: RunConfig, transform: Transform, seen: DryRun
) -> Iterator[tuple[int, Request | RecordFailed]]:
    if is_table(config):
        return _table_items(config, transform, seen)
    return _items(config, make_plan(config), transform, seen)


def _items(
    config: RunConfig, plan: Plan, transform: Transform, seen: DryRun
) -> Iterator[tuple[int, Request | RecordFailed]]:
    seen.bad_files += map(str, plan.unread)
    targets = [field_target(*target) for target in transform.targets]
    missing, first = [0] * len(targets), ""
    for source in plan.sources:
        try:
            keep = config.on_bad_input == "skip"
            for rows in records_of(source, targets, config.records_key, keep):
                seen.records += 1
                if rows[0].error is not None:
                    seen.failed[BROKEN] += 1
                    continue
                first = first or rows[0].raw
                for field, row in enumerate(rows):
                    item = transform.item(row.text, row.raw, field)
                    if item is None:
                        seen.skipped[row.skip or ""] += 1
                        missing[field] += row.skip == "missing"
                    else:
                        yield seen.records - 1, item
        except InputError as error:
            if config.on_bad_input == "fail":
                raise
            seen.bad_files.append(str(error))
    for (name, _), count in zip(transform.targets, missing, strict=True):
        if count and count == seen.records - seen.failed[BROKEN]:
            raise no_such_field(name, count, first)


def records_of(
    source: Source, targets: Sequence[Field], records_key: str | None, keep_broken: bool
) -> Iterator[tuple[Row, ...]]:
    """For each record of a file, the row of each of its targets. Raises: InputError."""
    readers = (
        read_records(source, target, records_key, keep_broken=keep_broken) for target in targets
    )
    for items in zip(*readers, strict=True):
        records = [item for item in items if not isinstance(item, Tail)]
        if records:
            yield tuple(map(row_of, records))


def _table_items(
    config: RunConfig, transform: Transform, seen: DryRun
) -> Iterator[tuple[int, Request | RecordFailed]]:
    table = load_table(config)
    dataset = table.dataset
    check_columns(dataset, transform)
    seen.bad_files += table.bad
    seen.records = len(dataset)
    for number, item in enumerate(table_items(dataset, transform)):
        if item is None:
            seen.skipped["no text"] += 1
        else:
            yield number // transform.answers_each, item


def _count(
    items: list[Request | RecordFailed],
    transform: Transform,
    cache: RecordCache | None,
    seen: DryRun,
) -> None:
    requests = []
    for item in items:
        if isinstance(item, RecordFailed):
            seen.failed[item.kind] += 1
        else:
            requests.append(item)
    seen.to_do += len(requests)
    for request in requests[: SHOWN - len(seen.requests)]:
        seen.requests.append(transform.provider.shown(request))
        tokens = transform.provider.prompt_tokens(request)
        if tokens is not None:
            seen.prompt_tokens.append(tokens)
    if not transform.provider.cached:
        seen.to_send += len(requests)
        return
    slots, _, _ = seen.sorter(transform, cache).take(requests)
    for slot in slots:
        assert slot.outcome is not None
        if slot.outcome.kind is None:
            seen.cached += 1
        elif slot.outcome.completion is not None:
            seen.kept[slot.outcome.kind] += 1
        elif slot.key not in seen.keys:
            seen.to_send += 1
            seen.keys.add(slot.key)
