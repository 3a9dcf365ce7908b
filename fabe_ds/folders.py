"""The folder for what is worth keeping between runs."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from fabe_ds.errors import CacheError


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
