"""Why a record of a run would, or would not, be answered from the record cache."""

from __future__ import annotations

from itertools import islice
from typing import Any

from fabe_ds.config.settings import RunConfig
from fabe_ds.engine.coalesce import stored
from fabe_ds.errors import RecordFailed, UsageError
from fabe_ds.job import Job, open_job
from fabe_ds.prompts.acceptance import acceptance
from fabe_ds.request import LASTING, Item, NotChosen, Request
from fabe_ds.store.completions import RecordCache
from fabe_ds.tools.dry_run import loaded
from fabe_ds.transform import Transform


def explain(config: RunConfig, record: int) -> str:
    """Why a record of the run (counted from 0) would or would not be answered from the cache.

    Raises: FabeError.
    """
    job = open_job(config)
    if not job.transform.provider.cached:
        return f"{config.provider}: its answers cost nothing and are not kept"
    records = loaded(job)
    if not 0 <= record < len(records):
        raise UsageError(f"record {record}: the input has {len(records)}")
    table = records.dataset.with_format("arrow")[record : record + 1]
    (row,) = table.to_pylist()
    (asked,) = job.format.rows(table, job.transform.needs_record)
    where = next(islice(records.positions(), record, None))[0]
    if asked.error is not None:
        return f"{where}: record {record}: not sent: {asked.error}"
    items = job.transform.items([asked])
    skips = _skips(job, row)
    samples = job.transform.targets.samples
    return "\n".join(
        f"{where}: record {record}: {_why(job.transform, item, skips[number // samples])}"
        for number, item in enumerate(items)
    )


def _skips(job: Job, row: dict[str, Any]) -> list[str]:
    """For each text, why the record has none in it."""
    names = ("skip" if not n else f"skip_{n}" for n in range(len(job.transform.targets.names)))
    words: list[str] = []
    for name in names:
        found = row.get(name)
        words += [word or "empty" for word in (found if isinstance(found, list) else [found])]
    return words


def _why(transform: Transform, item: Item, skip: str) -> str:
    """Why what a record asks for would, or would not, be answered; `skip`: why it asks nothing."""
    if isinstance(item, NotChosen):
        return "not sent: not chosen (--where)"
    if item is None:
        return f"not sent: the field is {skip}"
    if not isinstance(item, Request):
        return f"not sent: {item}"
    key = transform.provider.key(item)
    shown = f"{key.hex()[:16]}\n{transform.provider.shown(item)}"
    cache = RecordCache.existing(transform.config.cache_dir)
    found = stored(cache, transform.provider, {key: item}) if cache else {}
    count = cache.count() if cache else 0
    if cache:
        cache.close()
    if key not in found:
        return (
            f"miss: none of the {count} stored completions was asked for with this very request, "
            f"key {shown}"
        )
    if not transform.config.resume:
        return f"stored, but --no-resume leaves it unread, key {shown}"
    try:
        acceptance(transform.config, transform.provider)(item, found[key])
    except RecordFailed as error:
        if error.kind in LASTING and item.sampling.repeats:
            return (
                f"stored: it fails ({error}), and would again; retry --all asks anew, key {shown}"
            )
        return f"stored, but no use ({error}), so it is asked again, key {shown}"
    return f"hit, key {shown}"
