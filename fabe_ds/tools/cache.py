"""What the cache folder holds, and what of it is old."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fabe_ds.errors import UsageError
from fabe_ds.files import is_locked
from fabe_ds.scratch import is_in_use, remove
from fabe_ds.store.completions import RecordCache
from fabe_ds.store.layout import PARTS, Layout

log = logging.getLogger(__name__)

DAY = 86_400.0


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
    layout = Layout(folder)
    parts = {
        name: (len(entries), sum(map(_size, entries)))
        for name, folders in PARTS.items()
        if (entries := layout.entries(folders))
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
        size = sum(path.stat().st_size for path in layout.completion_files())
        tokens = int(asked), int(answered)
        return CacheStats(count, size, *tokens, oldest, newest, parts, _size(folder))
    finally:
        cache.close()


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
    layout = Layout(folder)
    entries = layout.entries(name for names in PARTS.values() for name in names)
    entries += layout.damaged()
    if any(map(is_locked, layout.owners.glob("*.lock"))):
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
