"""What the record cache holds, and why a record would or would not be answered from it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fabe_ds.config.settings import RunConfig
from fabe_ds.destinations import make_plan
from fabe_ds.engine.coalesce import LASTING, stored
from fabe_ds.engine.runtime import acceptance
from fabe_ds.errors import RecordFailed, UsageError
from fabe_ds.files import is_in_use, is_locked, remove
from fabe_ds.formats.json.load import Row, field_target
from fabe_ds.formats.table import is_table, load_table
from fabe_ds.request import Item, Request
from fabe_ds.store.completions import RecordCache
from fabe_ds.table_run import check_columns, table_items
from fabe_ds.tools.dry_run import records_of
from fabe_ds.transform import Transform

log = logging.getLogger(__name__)

DAY = 86_400.0


PARTS = {
    "loaded records": ("datasets", "tables", "typed", "stdin", "shards"),
    "reports and outputs of runs in place": ("runs",),
}
"""What the cache folder holds beside the record cache: folders of entries, each with a use of its
own."""
_DAMAGED = "records.sqlite.damaged-*"


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Sizes are in bytes, `oldest` and `newest` in seconds since the epoch. `parts` are entries and
    their size by what they are."""

    completions: int
    size: int
    prompt_tokens: int
    completion_tokens: int
    oldest: float | None
    newest: float | None
    parts: dict[str, tuple[int, int]]
    whole: int


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed: completions, entries of other kinds, and the bytes that both have freed."""

    completions: int
    entries: int
    size: int


def open_cache(folder: Path) -> RecordCache:
    """Raises: UsageError where there is none."""
    cache = RecordCache.existing(folder)
    if cache is None:
        raise UsageError(f"--cache-dir {folder}: no record cache there")
    return cache


def stats(folder: Path) -> CacheStats:
    """What the cache folder holds. Raises: UsageError where it is none."""
    parts = {
        name: (len(entries), sum(map(_size, entries)))
        for name, folders in PARTS.items()
        if (entries := _entries(folder, folders))
    }
    cache = RecordCache.existing(folder)
    if cache is None:
        if not parts:
            raise UsageError(f"--cache-dir {folder}: nothing of fabe-ds there")
        return CacheStats(0, 0, 0, 0, None, None, parts, _size(folder))
    try:
        query = (
            "SELECT COUNT(*), TOTAL(prompt_tokens), TOTAL(completion_tokens), MIN(created), "
            "MAX(created) FROM completions"
        )
        count, asked, answered, oldest, newest = cache.query(query)[0]
        size = sum(path.stat().st_size for path in folder.glob("records.sqlite*"))
        tokens = int(asked), int(answered)
        return CacheStats(count, size, *tokens, oldest, newest, parts, _size(folder))
    finally:
        cache.close()


def _entries(folder: Path, names: Iterable[str]) -> list[Path]:
    found: list[Path] = []
    for name in names:
        with contextlib.suppress(OSError):
            found += (folder / name).iterdir()
    return found


def _size(path: Path) -> int:
    """Bytes of a file, or of all the files below a folder."""
    total = 0
    with contextlib.suppress(OSError):
        total += path.lstat().st_size if not path.is_dir() else sum(map(_size, path.iterdir()))
    return total


def prune(folder: Path, days: float) -> Pruned:
    """Removes completions older than so many days, and what was not used for as long, but for what
    a run is using. Raises: UsageError, CacheError."""
    before, cut = stats(folder).whole, time.time() - days * DAY
    count = 0
    if (cache := RecordCache.existing(folder)) is not None:
        try:
            query = "SELECT COUNT(*) FROM completions WHERE created < ?"
            count = int(cache.query(query, (cut,))[0][0])
            cache.query("DELETE FROM completions WHERE created < ?", (cut,))
            cache.query("DELETE FROM limits WHERE key NOT IN (SELECT key FROM completions)")
            cache.query("VACUUM")
            cache.query("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            cache.close()
    entries = _entries(folder, (name for names in PARTS.values() for name in names))
    entries += folder.glob(_DAMAGED)
    if any(map(is_locked, folder.glob("owners/*.lock"))):
        log.warning("a run is using %s: just completions are removed", folder)
        entries = []
    old = [path for path in entries if _used(path) < cut and not is_in_use(path)]
    for path in old:
        remove(path)
    return Pruned(count, len(old), max(0, before - _size(folder)))


def _used(path: Path) -> float:
    """When something was last used, or written, in seconds since the epoch."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return math.inf


def export(folder: Path) -> Iterator[str]:
    """Every completion as a line of JSON."""
    cache = open_cache(folder)
    names = ("key", "text", "finish_reason", "prompt_tokens", "completion_tokens", "created")
    try:
        last = 0
        while rows := cache.query(
            f"SELECT rowid, {', '.join(names)} FROM completions WHERE rowid > ? "
            "ORDER BY rowid LIMIT 1000",
            (last,),
        ):
            for rowid, key, *rest in rows:
                last = rowid
                row = dict(zip(names, (key.hex(), *rest), strict=True))
                yield json.dumps(row, ensure_ascii=False)
    finally:
        cache.close()


def explain(config: RunConfig, record: int) -> str:
    """Why a record of the run (counted from 0) would or would not be answered from the cache."""
    transform = Transform(config)
    if not transform.provider.cached:
        return f"{config.provider}: its answers cost nothing and are not kept"
    if is_table(config):
        return _explain_row(config, transform, record)
    seen = 0
    targets = [field_target(*target) for target in transform.targets]
    for source in make_plan(config).sources:
        keep = config.on_bad_input == "skip"
        for rows in records_of(source, targets, config.records_key, keep):
            if seen == record:
                return "\n".join(
                    f"{source.path}: record {record}: " + _why(transform, row, field)
                    for field, row in enumerate(rows)
                )
            seen += 1
    raise UsageError(f"record {record}: the input has {seen}")


def _explain_row(config: RunConfig, transform: Transform, record: int) -> str:
    dataset = load_table(config).dataset
    check_columns(dataset, transform)
    if not 0 <= record < len(dataset):
        raise UsageError(f"record {record}: the input has {len(dataset)}")
    return "\n".join(
        f"{config.input_path}: record {record}: {_told(transform, item, 'empty')}"
        for item in table_items(dataset.select([record]), transform)
    )


def _why(transform: Transform, row: Row, field: int) -> str:
    if row.error is not None:
        return f"not sent: {row.error}"
    return _told(transform, transform.item(row.text, row.raw, field), row.skip or "")


def _told(transform: Transform, item: Item, skip: str) -> str:
    """Why what a record asks for would, or would not, be answered; `skip`: why it asks nothing."""
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
