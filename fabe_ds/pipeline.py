"""The job: open the input, load its records, map the transform over them, write them back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from fabe_ds.answers import Answers, values_of
from fabe_ds.config import rules
from fabe_ds.config.load import config_from, with_settings
from fabe_ds.config.settings import RunConfig
from fabe_ds.errors import UsageError
from fabe_ds.executors.base import Work, counts_of
from fabe_ds.executors.local import executor_for
from fabe_ds.formats.base import Records, Tick
from fabe_ds.job import Job, open_job
from fabe_ds.quiet import quiet_datasets
from fabe_ds.report.course import ANSWERING, LOADING, WRITING, Course, Watch
from fabe_ds.report.live import told_beside
from fabe_ds.report.result import RunResult
from fabe_ds.report.write import write_reports
from fabe_ds.request import Request
from fabe_ds.run_files import REPORT, beside
from fabe_ds.store.finished import Finished
from fabe_ds.store.journal import Journal
from fabe_ds.store.layout import Layout


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
    from fabe_ds.report.progress import watching

    config = config_from(config, options)
    if watch is None and progress:
        watch = watching
    course = Course()
    course.begin(LOADING)
    with watch(course) if watch else contextlib.nullcontext(), quiet_datasets():
        return _run(config, course)


run.__signature__ = with_settings(run)  # type: ignore[attr-defined]


def _run(config: RunConfig, course: Course) -> RunResult:
    course.started = time.monotonic()  # what is imported is no part of a run
    job = open_job(config)
    course.report = beside(job.destination.reports, REPORT)
    with contextlib.closing(job.transform), told_beside(course.report, course, dict(job.shown)):
        course.begin(LOADING, job.source.size)
        records = loaded(job, course.tick)
        # Only now: what is refused is said before what has merely no effect.
        rules.remark(job.config, job.transform.provider)
        course.stats = job.transform.runtime.stats
        finished = Finished.of(
            Layout(config.cache_dir).answers(records.fingerprint), _digest(job, records)
        )
        with course.recorded():
            course.begin(ANSWERING, _answers_expected(job, records))
            answers = _answered(job, records, finished)
        course.begin(WRITING, len(records))
        outputs = _written(job, records, answers, finished, course)
        result = write_reports(job, records, answers, outputs, course)
        job.copies.publish(outputs, job.destination.reports)
        return result


def _digest(job: Job, records: Records) -> str:
    """Names the answers of a run to its records."""
    digest = job.transform.digest()
    return digest if records.limit is None else f"{digest}-{records.limit}"


def loaded(job: Job, tick: Tick) -> Records:
    """The records, looked at before anything is sent. Raises: FabeError."""
    records = job.format.load(job.source, tick)
    # In place, the input is an earlier run's output: what it wrote is not asked about again, and
    # what it added may be replaced. A dry run makes no cache to look into.
    inplace = job.config.inplace and Layout(job.config.cache_dir).completions.exists()
    for name, why in job.format.held(records).items():
        replaced = job.transform.replaces_gained
        if not (replaced or (inplace and _journal(job).has_added(_files(records), name))):
            raise UsageError(f"{job.format.flag_of(name)} {name}: {why}; name another")
    job.format.check(records)
    if inplace and job.config.resume and not job.transform.targets.outputs:
        records.done = list(_done(job, records))
    if job.transform.targets.skips_existing:
        records.done = list(job.format.existing(records))
    if job.config.limit is not None:
        records.limit = _end_of_limit(job, records)
    return records


def _end_of_limit(job: Job, records: Records) -> int:
    """The first record that is left out: behind so many that ask for something."""
    left = job.config.limit or 0
    work = Work.of(records, job.format, job.transform, Path())
    for number, items in enumerate(work.items_by_record()):
        if any(isinstance(item, Request) for item in items):
            if not left:
                return number
            left -= 1
    return len(records)


def _answers_expected(job: Job, records: Records) -> int:
    """How many answers there will be."""
    targets = job.transform.targets
    if not targets.has_several:
        return len(records) * targets.each
    columns = job.format.columns(records, whole=False)
    dataset = records.dataset.select_columns(columns).with_format("arrow")
    counts = (counts_of(job.format, table) or () for table in dataset.iter(batch_size=1000))
    return sum(map(sum, counts)) * targets.samples


def _files(records: Records) -> list[str]:
    return [location for location, _ in records.parts]


def _answered(job: Job, records: Records, finished: Finished) -> Answers:
    """The answers to all records: of a finished run, or of the executor."""
    import datasets

    from fabe_ds.answers import features

    targets = job.transform.targets
    if not len(records):
        return Answers(datasets.Dataset.from_dict({"answers": []}, features(targets)), targets)
    work = Work.of(records, job.format, job.transform, finished.answers)
    partial = any(records.done or ()) or records.limit is not None
    known = finished.clean and job.config.resume and not partial
    answers = Answers(executor_for(job.config).map(work, known), targets)
    # What was done before has no answer here, and would be missing from the next run's output.
    if not (answers.has_failures or known or partial):
        finished.remember_answers()
    return answers


def _done(job: Job, records: Records) -> Iterator[list[int]]:
    """For each record, the fields that this very job has rewritten in place before."""
    columns = job.format.columns(records, whole=False)
    dataset = records.dataset.select_columns(columns).with_format("arrow")
    tables = dataset.iter(batch_size=1000)
    rows = chain.from_iterable(job.format.rows(table, whole=False) for table in tables)
    texts = (() if row.error is not None else row.texts for row in rows)
    yield from _journal(job).rewritten(records.positions(), texts)


def _journal(job: Job) -> Journal:
    transform = job.transform
    several = transform.targets.has_several
    fields = None if several else len(transform.targets.names)
    return Journal(transform.runtime.journal_cache(), transform.jobs(), fields)


def _written(
    job: Job, records: Records, answers: Answers, finished: Finished, course: Course
) -> list[Path]:
    """Writes the files, unless an earlier run of this very job has; gives their paths."""
    if job.config.inplace:
        # With nothing new, the files keep their times.
        targets = job.transform.targets
        failed_anew = answers.has_failures and bool(targets.gained or targets.failed_is_null)
        if answers.has_completions or failed_anew:
            records.check_unchanged()
            if not targets.outputs:
                values = (values_of(given, targets) for given in answers.records(1000))
                # Before the files: a mark of a value that was never written harms nothing.
                _journal(job).write(records.positions(), values)
            _journal(job).add(_files(records), targets.gained)
            job.format.write(records, answers, job.paths, course.tick)
        return list(map(Path, _files(records)))
    loaded = {location for location, _ in records.parts}
    left_out = {file.name for file in job.source.files if file.location not in loaded}
    paths = [path for name, path in job.paths.items() if not name or name not in left_out]
    if finished.are_current(paths):
        return list(map(Path, paths))
    digests = job.format.write(records, answers, job.paths, course.tick)
    finished.remember_exports(digests)
    return list(map(Path, digests))
