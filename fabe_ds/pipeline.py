"""The whole job: load, map, export, report."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.config import rules
from fabe_ds.config.settings import RunConfig, by_name, signature_of, validated
from fabe_ds.destinations import Plan, make_plan
from fabe_ds.errors import ExportError, UsageError, reason
from fabe_ds.executors.worker_counts import gathered
from fabe_ds.fields import dotted_hint
from fabe_ds.files import digest, remove, scratch_folder, scratch_in
from fabe_ds.formats.json.load import BROKEN, Loaded, by_target, load_fields
from fabe_ds.formats.json.write import copy_unchanged, write_files
from fabe_ds.formats.paging import passed_over
from fabe_ds.quiet import quiet_datasets
from fabe_ds.report.course import ANSWERING, LOADING, WRITING, Course, Watch, size_of
from fabe_ds.report.history import Point, recorded
from fabe_ds.report.result import RunResult, leave, sizes, spread
from fabe_ds.request import Item
from fabe_ds.run_files import FAILURES, REPORT, beside
from fabe_ds.store.completions import RecordCache, written_mark
from fabe_ds.transform import Transform, result_features

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

KEYS_SHOWN = 20
MAP_ROWS = 1000  # part of the fingerprint, so it is the same for every run


def run(
    config: RunConfig | None = None,
    watch: Watch | None = None,
    *,
    progress: bool = True,
    **options: Any,
) -> RunResult:
    """Rewrites the field of every record of the input, and writes the records back.

    JSON comes back byte for byte but for the field; a table (Parquet, CSV, Arrow, a Dataset) comes
    back with its other columns as they were.

    Takes a configuration, or the command line's options by their names in Python (`RunConfig` lists
    them): `run(input="data.jsonl", provider="openai", ...)`. `watch` shows how far the run is; by
    default, a terminal and a notebook do, and the log elsewhere; with `progress=False`, nothing
    does. A failed record keeps its original and is listed in the failures file.

    Raises: FabeError.
    """
    from fabe_ds.formats.table import is_table
    from fabe_ds.report.progress import watching
    from fabe_ds.table_run import run_table

    if config is not None and options:
        config = validated(RunConfig, {**dict(config), **by_name(options)}, {})
    config = config or validated(RunConfig, by_name(options), {})
    if watch is None and progress:
        watch = watching
    course = Course()
    course.begin(LOADING)
    with watch(course) if watch else contextlib.nullcontext(), quiet_datasets():
        return run_table(config, course) if is_table(config) else _run_json(config, course)


run.__signature__ = signature_of(  # type: ignore[attr-defined]
    RunConfig,
    *(
        parameter
        for parameter in inspect.signature(run).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ),
).replace(return_annotation="RunResult")


def _run_json(config: RunConfig, course: Course) -> RunResult:
    started = time.monotonic()
    transform = Transform(config)
    rules.check(config, transform.provider)
    plan = make_plan(config)
    config = config.model_copy(update={"base_url": transform.config.base_url})
    fields = len(transform.targets)
    course.begin(LOADING, fields * size_of(source.location for source in plan.sources))
    loaded = load_fields(
        plan.sources,
        transform.targets,
        config.records_key,
        config.on_bad_input,
        config.cache_dir,
        course.tick,
    )
    _look_at(loaded.dataset, transform)
    rules.remark(config, transform.provider)
    state = _State.of(loaded.dataset, transform)
    try:
        course.stats = transform.session.stats
        with recorded(course.stats) as history:
            course.begin(ANSWERING, len(loaded.dataset))
            written = _map(config, loaded.dataset, transform, plan, state)
        course.begin(WRITING, len(written) // fields)
        if config.inplace:
            _mark_written(transform, plan, written)
        outputs = _export(written, loaded, plan, state, course)
        return _report(config, plan, written, loaded, transform, outputs, started, history)
    finally:
        transform.close()


def _look_at(dataset: Dataset, transform: Transform) -> None:
    """Says what a person would want to know before anything is sent.

    Raises: UsageError where no record at all has a field.
    """
    import pyarrow.compute as pc

    for (name, backup), part in zip(transform.targets, by_target(dataset), strict=False):
        table = part.with_format("arrow")[:]
        skip = table.column("skip")
        readable = pc.is_null(table.column("error"))
        missing = pc.equal(skip.fill_null(""), "missing")
        if pc.any(readable).as_py() and not pc.any(pc.and_not(readable, missing)).as_py():
            first = pc.index(readable, True).as_py()
            raise no_such_field(name, pc.sum(readable).as_py(), table.column("raw")[first].as_py())
        if backup and (kept := _holding(table)):
            log.info(
                "%d records hold %r already: it stays as it is, and no other original is kept",
                kept,
                backup,
            )
        if log.isEnabledFor(logging.DEBUG):
            for row in table.filter(pc.is_valid(skip)).select(["file", "line", "skip"]).to_pylist():
                log.debug("%s:%d: %r skipped: %s", row["file"], row["line"], name, row["skip"])


def _holding(table: pa.Table) -> int:
    """Records to be rewritten whose object has the backup's key already."""
    import pyarrow.compute as pc

    there = pc.and_(pc.is_valid(table.column("text")), pc.equal(table.column("joint"), ""))
    return int(pc.sum(there).as_py() or 0)


def no_such_field(name: str, records: int, raw: str) -> UsageError:
    """What is said where none of so many records has the field; `raw` is the first one's text."""
    try:
        first = json.loads(raw)
    except (ValueError, RecursionError):
        first = None
    if isinstance(first, list):
        return UsageError(
            f"--field {name}: a record is a JSON list; if the file is one list of records, name it "
            ".json"
        )
    keys = first if isinstance(first, dict) else {}
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    there = ", ".join(list(keys)[:KEYS_SHOWN]) + more or "no keys"
    lists = [key for key, value in keys.items() if isinstance(value, list)]
    hint = (
        f" (--records-key {lists[0]}, if the records are there)" if lists and records == 1 else ""
    )
    dotted = dotted_hint(name, keys)
    return UsageError(f"--field {name}: no record has it{dotted}; the first one has {there}{hint}")


@dataclass(slots=True)
class _State:
    """What is remembered of finished runs of one transform over one carrier."""

    path: Path
    answers: Path
    """The file of the answers; a process each has one like it, where there are several."""
    clean: bool = False
    digests: list[str] = field(default_factory=list)
    """Of the answers."""
    exports: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset, transform: Transform) -> _State:
        folder, name = Path(dataset.cache_files[0]["filename"]).parent, transform.digest()
        state = cls(folder / f"finished-{name}.json", folder / f"answers-{name}.arrow")
        try:
            told = json.loads(state.path.read_text())
            state.exports = {str(path): str(digest) for path, digest in told["exports"].items()}
            state.digests = state._digests()
            state.clean = told["answers"] == state.digests
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return state

    def _digests(self) -> list[str]:
        return [digest(path) for path in sorted(self.path.parent.glob(f"{self.answers.stem}*"))]

    def remember(self) -> None:
        """The answers are there, and none of them is a failure."""
        with contextlib.suppress(OSError):
            self.digests, self.clean = self._digests(), True
            self.save()

    def save(self) -> None:
        """Remembers it, as far as there is room: without it, a run is but done anew."""
        scratch = scratch_in(self.path.parent)
        try:
            told = {"answers": self.digests, "exports": self.exports}
            scratch.write_text(json.dumps(told))
            scratch.replace(self.path)
        except OSError as error:
            log.warning("%s: not remembered as finished: %s", self.path, reason(error))
            remove(scratch)

    def is_current(self, path: str) -> bool:
        """Whether the file is what an earlier run of this very job exported."""
        expected = self.exports.get(_absolute(path))
        try:
            return expected is not None and digest(path) == expected
        except OSError:
            return False


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - there may be very many


def _map(
    config: RunConfig,
    dataset: Dataset,
    transform: Transform,
    plan: Plan,
    state: _State,
) -> Dataset:
    """The carrier with the transform's columns beside its own."""
    import datasets

    if not len(dataset):
        features = datasets.Features({**dataset.features, **result_features()})
        return datasets.Dataset.from_dict({name: [] for name in features}, features)
    finished = state.clean and config.resume
    several = len(config.devices) > 1
    if not several:
        transform.look_ahead(_items(dataset, transform, plan))
    stats = transform.session.stats
    place = state.answers
    with contextlib.ExitStack() as stack:
        workers: dict[str, Any] = {}
        if several:
            counts = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(gathered(Path(counts), stats))
            stack.enter_context(_spawning())
            workers = {"num_proc": len(config.devices), "with_rank": True}
        if config.runner == "ray" and not (finished and place.exists()):
            from fabe_ds.executors.ray.map import mapped

            rows = _tables(dataset, transform, plan)
            result = mapped(
                rows, len(dataset), transform, config, result_features(), place, carrier=True
            )
        else:
            # A run with failures is never answered from the fingerprint cache, or they would
            # stay for ever; the record cache makes that cheap.
            folder = place.parent if finished else stack.enter_context(scratch_folder(place.parent))
            result = dataset.map(
                transform,
                batched=True,
                batch_size=MAP_ROWS,
                remove_columns=dataset.column_names,
                features=result_features(),
                cache_file_name=str(folder / place.name),
                load_from_cache_file=finished,
                **workers,
            )
            if not finished:
                for path in folder.iterdir():
                    path.replace(place.parent / path.name)
    if result.data.column("failure").null_count != len(result):
        return datasets.concatenate_datasets([dataset, result], axis=1)
    if not finished:
        state.remember()
    return datasets.concatenate_datasets([dataset, result], axis=1)


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """Worker processes begin afresh: a device that was used cannot be used in a forked child."""
    import multiprocess

    before = multiprocess.get_start_method()
    multiprocess.set_start_method("spawn", force=True)
    try:
        yield
    finally:
        multiprocess.set_start_method(before, force=True)


def _items(dataset: Dataset, transform: Transform, plan: Plan) -> Iterator[Item]:
    for table in _tables(dataset, transform, plan):
        yield from transform.carrier_items(table.to_pydict())


def _tables(dataset: Dataset, transform: Transform, plan: Plan) -> Iterator[pa.Table]:
    """What the transform needs of the rows; no text where there is nothing to do."""
    columns = ["text", "error", *_target_column(dataset)]
    if transform.needs_record:
        columns.append("raw")
    if plan.output is None:
        columns += ["file", "index"]
    rows = dataset.select_columns(columns).with_format("arrow")
    cache = _marks(transform) if plan.output is None and transform.config.resume else None
    for table in passed_over(rows.iter(batch_size=MAP_ROWS)):
        if cache is None:
            yield table
            continue
        texts = [
            None if not marks or any(map(cache.was_written, marks)) else text
            for marks, text in _value_marks(table, "text", transform, plan)
        ]
        left = table.drop_columns(["file", "index", "text"])
        yield left.append_column("text", pa.array(texts, pa.large_string()))


def _target_column(dataset: Dataset) -> list[str]:
    """The column that says which of several fields a row is for, where there is one."""
    return ["target"] if "target" in dataset.column_names else []


def _value_marks(
    table: pa.Table, column: str, transform: Transform, plan: Plan
) -> Iterator[tuple[list[bytes], str | None]]:
    """Each value of the column, after the marks that say that this very job wrote it in place: the
    first is this version's."""
    jobs, fields = transform.jobs(), len(transform.paths)
    places = {source.name: str(source.path.resolve()) for source in plan.sources}
    names = ("file", "index", column)
    targets = table.column("target").to_pylist() if fields > 1 else [0] * len(table)
    rows = zip(*(table.column(name).to_pylist() for name in names), targets, strict=True)
    for file, index, value, target in rows:
        if value is None:
            yield [], None
        else:
            place, number = places[file], index * fields + target
            yield [written_mark(job, place, number, value) for job in jobs], value


def _marks(transform: Transform) -> RecordCache:
    cache = transform.session.cache
    return cache if isinstance(cache, RecordCache) else RecordCache(transform.config.cache_dir)


def _mark_written(transform: Transform, plan: Plan, written: Dataset) -> None:
    cache = _marks(transform)
    columns = ["file", "index", "completion", *_target_column(written)]
    rows = written.select_columns(columns).with_format("arrow")
    for table in passed_over(rows.iter(batch_size=MAP_ROWS)):
        found = _value_marks(table, "completion", transform, plan)
        cache.mark_written(marks[0] for marks, _ in found if marks)


def _export(
    written: Dataset, loaded: Loaded, plan: Plan, state: _State, course: Course
) -> list[Path]:
    """Writes the files, unless an earlier run of this very job has; gives their paths."""
    usable = {file.name for file in loaded.files if not file.error}
    empty = {file.name for file in loaded.files if not file.error and not file.records}
    places = {name: place for name, place in plan.places.items() if name in usable}
    if plan.output is None:
        if written.data.column("completion").null_count < len(written):
            _check_unchanged(places, loaded)
            write_files(written, places.__getitem__, course.tick)
        return list(map(Path, places.values()))
    if state.clean and state.exports and all(map(state.is_current, places.values())):
        return list(map(Path, places.values()))
    digests = write_files(written, places.__getitem__, course.tick)
    for source in plan.sources:
        if source.name in empty:
            digests[places[source.name]] = copy_unchanged(source, places[source.name])
    if state.clean:
        state.exports |= {_absolute(path): digest for path, digest in digests.items()}
        state.save()
    return list(map(Path, digests))


def _check_unchanged(places: dict[str, str], loaded: Loaded) -> None:
    """Raises: ExportError where a file that is to be replaced is not what was loaded."""
    for name, place in places.items():
        try:
            same = digest(place) == loaded.digests[name]
        except OSError:
            same = False
        if not same:
            raise ExportError(
                f"{place}: it was changed while the run went on, and nothing is replaced; what was "
                "answered is kept: run the same command again"
            )


def _report(
    config: RunConfig,
    plan: Plan,
    written: Dataset,
    loaded: Loaded,
    transform: Transform,
    outputs: list[Path],
    started: float,
    history: list[Point],
) -> RunResult:
    table, stats = written.data.table, transform.stats
    counts = _record_counts(written, asked=stats.settled > 0)
    failed = counts["failed"]
    result = RunResult(
        **counts,
        bad_files=[*map(str, plan.unread), *(file.error for file in loaded.files if file.error)],
        outputs=outputs,
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
        failures_file=beside(plan.reports, FAILURES) if failed else None,
        report=beside(plan.reports, REPORT),
    )
    course = {
        "history": history,
        "latency": stats.latency,
        "instruction": transform.template[0],
        "prompt_tokens_each": sizes(table.column("prompt_tokens")),
        "completion_tokens_each": sizes(table.column("completion_tokens")),
    }
    failing = _failures(written, transform) if failed else ()
    leave(config, result, plan.reports, failing, _samples(written), course)
    return result


def _record_counts(written: Dataset, asked: bool) -> dict[str, Any]:
    """The counts of records for a RunResult: failed where any field did, else rewritten where any
    was. `asked` False: all that was answered comes from an earlier run."""
    import pyarrow.compute as pc

    parts = [part.with_format("arrow")[:] for part in by_target(written)]

    def columns(name: str) -> list[pa.ChunkedArray]:
        return [part.column(name) for part in parts]

    failure = pc.coalesce(*columns("failure"))
    good = pc.is_null(failure)
    changed = [pc.is_valid(values) for values in columns("completion")]
    rewritten = pc.and_(good, reduce(pc.or_, changed))
    sent = map(pc.and_not, changed, columns("cached"))
    done = pc.sum(pc.and_(rewritten, reduce(pc.or_, sent))).as_py() or 0 if asked else 0
    left = pc.and_(good, pc.invert(rewritten))
    skip = pc.coalesce(*columns("skip")).filter(left)
    skipped = _counts(skip)
    if skip.null_count:
        skipped["done before"] = skip.null_count
    return {
        "records": len(failure),
        "done": done,
        "cached": (pc.sum(rewritten).as_py() or 0) - done,
        "failed": len(failure) - failure.null_count,
        "skipped": skipped,
        "failures_by_kind": _counts(failure),
    }


def _counts(column: Any) -> dict[str, int]:
    counts = column.drop_null().value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts}


def _samples(written: Dataset) -> Iterator[tuple[str, str, str]]:
    import pyarrow.compute as pc

    table = written.data.table.select(["file", "line", "index", "text", "completion"])
    there = pc.indices_nonzero(pc.is_valid(table.column("completion")))
    for index in spread(there.to_numpy()):
        (row,) = table.slice(index, 1).to_pylist()  # take would make one copy of all the texts
        where = f"{row['file']}:{row['line']} (record {row['index']})"
        yield where, row["text"], row["completion"]


def _failures(written: Dataset, transform: Transform) -> Iterable[dict[str, Any]]:
    import pyarrow.compute as pc

    names = [
        "file",
        "index",
        "line",
        "failure",
        "message",
        "finish_reason",
        "text",
        "answer",
        "raw",
    ]
    table = written.data.table.select([*names, *_target_column(written)])
    fields = [name for name, _ in transform.targets]
    for row in table.filter(pc.is_valid(table.column("failure"))).to_pylist():
        target, raw = row.pop("target", 0), row.pop("raw")
        if row["failure"] == BROKEN:
            row["text"] = raw
        which = {} if len(fields) == 1 else {"field": fields[target]}
        yield {"record": row.pop("index"), **which, **row}
