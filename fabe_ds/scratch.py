"""Things that are being made: their names, by which what a killed process left is known."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from fabe_ds.errors import CacheError, reason

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_TOKEN = secrets.token_hex(4)
_SCRATCH = re.compile(rf"\.fabe-ds-{_HOST}-(\d+)-([0-9a-f]{{8}})-\d+")
_numbers = count()


def unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        Path(path).unlink()


def scratch_name() -> str:
    return f".fabe-ds-{_HOST}-{os.getpid()}-{_TOKEN}-{next(_numbers)}"


def scratch_in(folder: Path) -> Path:
    """The path of something that is to be made in the folder, and to get its own name when it is
    whole. What killed processes leave under such names is known by them."""
    return folder / scratch_name()


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder inside another, for the time of the block. Raises: CacheError, for the block too."""
    clear_scratch(folder)
    scratch = scratch_in(folder)
    try:
        scratch.mkdir(mode=0o700)
        yield scratch
    except OSError as error:
        raise not_kept(folder, error) from None
    finally:
        remove(scratch)


def clear_scratch(folder: Path) -> None:
    """Removes what processes of this machine left in a folder that were killed while they wrote."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if (left := _SCRATCH.fullmatch(path.name)) and not _is_alive(left):
                remove(path)


def is_in_use(path: Path) -> bool:
    """Whether a living process of this machine is making this, or something in it."""
    names = [path.name]
    with contextlib.suppress(OSError):
        names += (inside.name for inside in path.iterdir())
    made_by = (_SCRATCH.fullmatch(name) for name in names)
    return any(made is not None and _is_alive(made) for made in made_by)


def remove(path: Path) -> None:
    """Removes something of ours: a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        unlink(str(path))


def _is_alive(scratch: re.Match[str]) -> bool:
    """Whether the process is alive that has made something of this name. In containers, every
    process may have the number of one that was killed: ours is told by its token."""
    process = int(scratch[1])
    if process == os.getpid():
        return scratch[2] == _TOKEN
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def not_kept(folder: Path, error: OSError) -> CacheError:
    """What is said where something cannot be kept in the cache folder, or in one below it."""
    hint = "; make room, or give another --cache-dir" if error.errno in NO_ROOM else ""
    return CacheError(f"{folder}: cannot be written: {reason(error)}{hint}")
