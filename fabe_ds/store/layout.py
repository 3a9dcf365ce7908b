"""Every path below the cache folder, and how its files are made and known to be whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fabe_ds.errors import CacheError, UsageError, reason
from fabe_ds.files import NO_ROOM, clear_scratch, digest, is_text, remove, scratch_in


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


def not_kept(folder: Path, error: OSError) -> CacheError:
    """What is said where something cannot be kept in the cache folder, or in one below it."""
    hint = "; make room, or give another --cache-dir" if error.errno in NO_ROOM else ""
    return CacheError(f"{folder}: cannot be written: {reason(error)}{hint}")


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
