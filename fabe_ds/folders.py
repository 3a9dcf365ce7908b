"""The folder for what is worth keeping between runs."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from fabe_ds.errors import CacheError, UsageError


def private_folder(folder: Path) -> Path:
    """Makes the folder, readable by its owner alone: completions may hold personal data.

    Raises: CacheError.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise CacheError(f"--cache-dir {folder}: {error.strerror}") from None
    return folder


def check_writable(place: Path) -> None:
    """Raises: UsageError where no file or folder can be made at `place`."""
    nearest = next(path for path in (place, *place.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK) or (nearest != place and not nearest.is_dir()):
        raise UsageError(f"{place}: cannot be written")


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock on this file.

    The system lets go of it however a process ends, which a process number could not tell.
    """
    probe = FileLock(path)
    try:
        probe.acquire(timeout=0)
    except Timeout:
        return True
    probe.release()
    return False
