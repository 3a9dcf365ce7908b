"""A run over a table: Parquet, CSV or Arrow files, a saved Dataset, or a Dataset of the Hub."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.config import rules
from fabe_ds.config.settings import RunConfig
from fabe_ds.errors import UsageError
from fabe_ds.fields import dotted_hint, inside
from fabe_ds.files import scratch_folder
from fabe_ds.formats.table import load_table
from fabe_ds.formats.table_write import export_table, table_place
from fabe_ds.report.course import ANSWERING, WRITING, Course
from fabe_ds.report.history import recorded
from fabe_ds.report.result import RunResult, leave, sizes, spread
from fabe_ds.request import Item
from fabe_ds.run_files import FAILURES, REPORT, beside
from fabe_ds.store.layout import private_folder
from fabe_ds.text import listed
from fabe_ds.transform import OURS, Transform

if TYPE_CHECKING:
    from datasets import Dataset, Features

STATUS = "_fabe_ds"
ROWS = 1000


def run_table(config: RunConfig, course: Course) -> RunResult:
    """`run` of a table. Raises: FabeError."""
    import pyarrow.compute as pc

    started = time.monotonic()
    if config.inplace:
        raise UsageError("--inplace goes with JSON files; give an --output")
    if len(config.devices) > 1:
        raise UsageError(f"--device {config.device}: several go with JSON files; name one")
    place, reports = table_place(config)
    status = config.status_field or STATUS
    transform = Transform(config.model_copy(update={"on_error": "keep", "status_field": status}))
    rules.check(config, transform.provider)
    config = config.model_copy(update={"base_url": transform.config.base_url})
    table = load_table(config)
    dataset = table.dataset
    check_columns(dataset, transform)
    rules.remark(config, transform.provider)
    try:
        course.stats = transform.session.stats
        with recorded(course.stats) as history:
            course.begin(ANSWERING, len(dataset) * transform.answers_each)
            written = _map(dataset, transform, config)
        course.begin(WRITING, len(written))
        kept = written if config.status_field else written.remove_columns(status)
        changed = {path[0] for path in transform.paths}
        export_table(kept, table, changed, place, config, course.tick)
        states = written.with_format("arrow")[status].combine_chunks() if len(written) else None
        report = _result(transform, states, table.bad, place, reports, started)
        details: dict[str, Any] = {
            "history": history,
            "latency": transform.stats.latency,
            "instruction": transform.template[0],
        }
        if states is not None:
            for name in ("prompt_tokens", "completion_tokens"):
                details[f"{name}_each"] = sizes(pc.struct_field(states, name))
        failures, samples = _failures(written, transform), _samples(written, transform)
        leave(config, report, reports, failures, samples, details)
        return report
    finally:
        transform.close()


def check_columns(dataset: Dataset, transform: Transform) -> None:
    """Raises: UsageError where the table lacks a field, or has a column that is to be added."""
    config = transform.config
    there = [name for name in dataset.column_names if not name.startswith(OURS)]
    ours = {"--status-field": config.status_field}
    if config.samples > 1:
        ours["--samples-field"] = config.samples_field
    for spelled, taken in ours.items():
        if taken in there:
            raise UsageError(f"{spelled} {taken}: there is such a column; name another")
    names = (transform.config.field, *transform.config.also_fields)
    for name, (column, *inner) in zip(names, transform.paths, strict=True):
        if column not in there:
            raise UsageError(
                f"--field {name}: no column {column!r}{dotted_hint(name, there)}; there are "
                f"{listed(there)}"
            )
        kind = getattr(dataset.features[column], "dtype", None)
        if not inner and kind not in ("string", "large_string", "string_view"):
            raise UsageError(f"--field {name}: the column is {kind or 'nested'}, not text")


def _map(dataset: Dataset, transform: Transform, config: RunConfig) -> Dataset:
    import datasets

    new = pa.schema(list(transform.new_columns(dataset.column_names).items()))
    features = datasets.Features({**dataset.features, **datasets.Features.from_arrow_schema(new)})
    if not len(dataset):
        return datasets.Dataset.from_dict({name: [] for name in features}, features)
    # Kept in our own folder, never beside a Dataset that a person saved; made anew each time,
    # which the record cache makes cheap and which never keeps a failure.
    folder = private_folder(private_folder(config.cache_dir) / "tables")
    place = folder / f"{transform.digest()}-{dataset._fingerprint}.arrow"
    if config.runner == "ray":
        return _on_ray(dataset, transform, config, features, place)
    transform.look_ahead(table_items(dataset, transform))
    with scratch_folder(folder) as scratch:
        result = dataset.map(
            transform,
            batched=True,
            batch_size=ROWS,
            features=features,
            cache_file_name=str(scratch / place.name),
            load_from_cache_file=False,
        )
        (scratch / place.name).replace(place)
    return result


def _on_ray(
    dataset: Dataset, transform: Transform, config: RunConfig, features: Features, place: Path
) -> Dataset:
    """The same as the map: the workers are given what they need, and give what changes."""
    from datasets import Features, concatenate_datasets

    from fabe_ds.executors.ray.map import mapped

    changed = {path[0] for path in transform.paths}
    new = transform.new_columns(dataset.column_names).keys()
    backups = transform.new_columns(()).keys() & set(dataset.column_names)
    whole = transform.needs_record
    rows = dataset if whole else dataset.select_columns(sorted(changed | backups))
    tables = rows.with_format("arrow").iter(batch_size=ROWS)
    given = Features({name: features[name] for name in features if name in changed | new})
    result = mapped(tables, len(dataset), transform, config, given, place, carrier=False)
    joined = concatenate_datasets([dataset.remove_columns(sorted(changed)), result], axis=1)
    return joined.select_columns(list(features))


def table_items(dataset: Dataset, transform: Transform) -> Iterator[Item]:
    """What all the rows ask for."""
    if not transform.needs_record:
        dataset = dataset.select_columns(list(dict.fromkeys(path[0] for path in transform.paths)))
    for table in dataset.with_format("arrow").iter(batch_size=ROWS):
        yield from transform.table_items(table.to_pydict())


def _result(
    transform: Transform, states: Any, bad: list[str], place: Path, reports: Path, started: float
) -> RunResult:
    import pyarrow.compute as pc

    def counts(name: str) -> dict[str, int]:
        if states is None:
            return {}
        values = pc.struct_field(states, name).drop_null().value_counts().to_pylist()
        return {entry["values"]: entry["counts"] for entry in values}

    state, stats = counts("state"), transform.stats
    return RunResult(
        records=sum(state.values()),
        done=state.get("done", 0),
        cached=state.get("cached", 0),
        failed=state.get("failed", 0),
        skipped={"no text": state["skipped"]} if "skipped" in state else {},
        failures_by_kind=counts("failure"),
        bad_files=bad,
        outputs=[place],
        seconds=time.monotonic() - started,
        requests=stats.requests if transform.provider.cached else 0,
        retries=stats.retries,
        refusals=stats.refusals,
        reasks=stats.reasks,
        hedged=stats.hedged,
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
        cost=stats.cost,
        loading=stats.loading,
        notes=stats.notes,
        failures_file=beside(reports, FAILURES) if state.get("failed") else None,
        report=beside(reports, REPORT),
    )


def _samples(written: Dataset, transform: Transform) -> Iterator[tuple[str, str, str]]:
    config, (column, *inner) = transform.config, transform.path
    if not config.backup:
        return
    states = written.with_format("arrow")[config.status_field].to_pylist()
    rewritten = [row for row, told in enumerate(states) if told["state"] in ("done", "cached")]
    for row in spread(rewritten):
        record = written[row]
        if isinstance(before := record[config.backup], str):  # else a column of the table's own
            yield f"record {row}", before, inside(record[column], inner)


def _failures(written: Dataset, transform: Transform) -> Iterable[dict[str, Any]]:
    name = transform.config.status_field
    columns = [name, *{path[0]: None for path in transform.paths}]
    row = 0
    for table in written.select_columns(columns).with_format("arrow").iter(batch_size=ROWS):
        for entry in table.to_pylist():
            told = entry.pop(name)
            if told["state"] == "failed":
                yield {"record": row, **told, **entry}
            row += 1
