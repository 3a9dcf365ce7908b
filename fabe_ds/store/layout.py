"""Every path below the cache folder, and how its files are made and known to be whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from fabe_ds.errors import CacheError, UsageError, reason
from fabe_ds.files import digest, is_text
from fabe_ds.scratch import clear_scratch, not_kept, remove, scratch_in

LOADED = ("datasets", "tables", "typed", "stdin", "remote", "shards", "answers")
RUNS = ("runs",)
PARTS = {"loaded records": LOADED, "reports and outputs of runs in place": RUNS}
"""Folders below the cache folder whose entries are each of use by themselves, by what they hold.
`cache stats` counts them, and `cache prune` removes those that were not used for long."""


class Layout:
    """The paths below a cache folder. Nothing is made by naming a path; `made` makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.completions = folder / "records.sqlite"
        self.opening_lock = folder / "opening.lock"
        self.owners = folder / "owners"
        """Locks that living processes hold, which have claimed requests."""
        self.models = folder / "models.json"
        """Digests of the weights of local models."""
        self.slots = folder / "slots"
        """Places in flight that worker processes share."""
        self.datasets = folder / "datasets"
        """Carriers: the records of JSON files."""
        self.tables = folder / "tables"
        self.typed = folder / "typed"
        """Written JSON records as columns of their own types."""
        self.stdin = folder / "stdin"
        self.remote = folder / "remote"
        """Copies of files of other file systems, and what is written to them."""
        self.shards = folder / "shards"
        """Records on their way to the workers of a cluster."""
        self.runs = folder / "runs"
        """Reports of runs in place, and of those that write to standard output."""

    def answers(self, records: str) -> Path:
        """The answers to records of this fingerprint, one file for each transform."""
        return self.folder / "answers" / records

    def completion_files(self) -> list[Path]:
        """The record cache, with what SQLite keeps beside it."""
        return list(self.folder.glob("records.sqlite*"))

    def damaged(self) -> list[Path]:
        """Record caches that were set aside."""
        return list(self.folder.glob("records.sqlite.damaged-*"))

    def entries(self, parts: Iterable[str]) -> list[Path]:
        """What stands in folders of `PARTS`."""
        found: list[Path] = []
        for name in parts:
            with contextlib.suppress(OSError):
                found += (self.folder / name).iterdir()
        return found

    def made(self, folder: Path) -> Path:
        """Makes a folder of this cache, private as the whole. Raises: CacheError, UsageError."""
        private_folder(self.folder)
        return private_folder(folder)


def kept_file(place: Path, write: Callable[[Path], None]) -> Path:
    """The file at `place`, which `write` makes (at the path that it is given) where there is none,
    or where it is not what was made. Raises: CacheError, and what `write` does."""
    beside = place.with_suffix(".sha256")
    try:
        if beside.read_text() == digest(place):
            os.utime(place)  # its last use, which `cache prune` looks at
            return place
    except (OSError, ValueError):
        pass
    clear_scratch(place.parent)
    scratch = scratch_in(place.parent)
    try:
        write(scratch)
        made = digest(scratch)
        scratch.replace(place)
        beside.write_text(made)
    except OSError as error:
        raise not_kept(place.parent, error) from None
    finally:
        remove(scratch)
    return place


def private_folder(folder: Path) -> Path:
    """Makes the folder, readable by its owner alone: completions may hold personal data.

    Raises: CacheError, UsageError.
    """
    try:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"--cache-dir {folder}: not a folder") from None
    except OSError as error:
        raise CacheError(f"--cache-dir {folder}: {reason(error)}") from None
    return folder


def usable_folder(folder: Path) -> None:
    """Raises: UsageError where the libraries that write into the cache folder cannot name it."""
    if "::" in str(folder) or "://" in str(folder) or not is_text(str(folder)):
        raise UsageError(f"--cache-dir {folder}: give a folder whose name is UTF-8, without ::")
