"""Files that appear whole or not at all, and the folder for what is worth keeping between runs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import logging
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, cast

from fabe_ds import compression
from fabe_ds.errors import ExportError, UsageError, reason
from fabe_ds.scratch import clear_scratch, scratch_name, unlink

log = logging.getLogger(__name__)

GROUP_FILES, GROUP_BYTES = 4096, 1 << 26
"""Most files, and bytes of them, that are brought to the disk together."""
FEW = 8
"""Files, or folders, that are brought to the disk one by one."""
_PIECE = 1 << 18
_UNSYNCABLE = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
"""What fsync of a folder answers on CIFS, FUSE and the like, and open where it may not be read."""
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
NO_FILE = "a device, a pipe or a socket, which is never replaced"


def from_here(path: Path) -> Path:
    """The path as it is from this folder, where it is below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


@contextlib.contextmanager
def replacing(path: Path, compress: bool = True) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and not before.

    Symlinks are followed; mode and owner of what is replaced are kept; the data is on disk before
    the name changes. Compressed where the name ends in .gz, .xz or .zst.

    Raises: ExportError.
    """
    with Replacing() as files, files.open(path, compress) as file:
        yield file


class Replacing:
    """`replacing` for many files, which take their places in groups when the block ends, or
    before: to bring each to the disk by itself takes ten times as long as to write a small one."""

    def __init__(self, journal: Path | None = None) -> None:
        """`journal`: a file that says, from the moment when all new files are on the disk until
        they are in their places, which they are: `finish_replacing` puts them there after a kill.
        """
        self._journal = journal
        self.digests: dict[str, str] = {}
        """SHA-256 of each file, by the path that it was opened as."""
        self._waiting: list[tuple[str, str]] = []  # where a file is, and where it belongs
        self._bytes = 0
        self._folders: dict[str, str] = {}

    def __enter__(self) -> Replacing:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            for scratch, _place in self._waiting:
                unlink(scratch)

    @contextlib.contextmanager
    def open(self, path: Path | str, compress: bool = True) -> Iterator[IO[bytes]]:
        """A file to write, which is to take the place of `path`. Raises: ExportError."""
        scratch = ""
        try:
            folder, name = self._split(os.fspath(path))
            place = f"{folder}/{name}"
            replaced = _status(place)
            if replaced is not None and stat.S_ISLNK(replaced.st_mode):
                folder, name = self._split(os.path.realpath(place))
                place = f"{folder}/{name}"
                replaced = _status(place)
            scratch = f"{folder}/{scratch_name()}"
            with _made_for(place, replaced, scratch) as file:
                hashed = _Hashed(file)
                kind = name if compress else ""
                with compression.compressed(cast(IO[bytes], hashed), kind) as to:
                    yield to
        except BaseException as error:
            if scratch:
                unlink(scratch)
            if isinstance(error, OSError):
                raise _not_written(path, error) from None
            raise
        self.digests[os.fspath(path)] = hashed.hexdigest()
        self._waiting.append((scratch, place))
        self._bytes += hashed.size
        many = len(self._waiting) >= GROUP_FILES or self._bytes >= GROUP_BYTES
        if many and self._journal is None:
            self._settle()

    def _split(self, path: str) -> tuple[str, str]:
        """The folder of a file, which is made where there is none, and its name."""
        parent, name = os.path.split(path)
        folder = self._folders.get(parent)
        if folder is None:
            Path(parent).mkdir(parents=True, exist_ok=True)
            folder = self._folders[parent] = os.path.realpath(parent)
            clear_scratch(Path(folder))
        return folder, name

    def _settle(self) -> None:
        """Brings the files that wait to the disk, and to their places. Raises: ExportError."""
        folders = {os.path.split(place)[0] for _, place in self._waiting}
        place = ""
        try:
            _sync([scratch for scratch, _ in self._waiting])
            if self._journal is not None and self._waiting:
                with replacing(self._journal) as file:
                    file.write(json.dumps(self._waiting).encode())
            while self._waiting:
                scratch, place = self._waiting[-1]
                os.replace(scratch, place)  # noqa: PTH105
                self._waiting.pop()
            _sync(folders)
            if self._journal is not None:
                self._journal.unlink(missing_ok=True)
        except OSError as error:
            raise _not_written(place or self._waiting[0][1], error) from None
        self._bytes = 0


def finish_replacing(journal: Path) -> None:
    """Puts files in their places that a killed process had written whole. Raises: ExportError."""
    try:
        waiting = json.loads(journal.read_text())
        for scratch, place in waiting:
            if Path(scratch).exists():
                os.replace(scratch, place)  # noqa: PTH105
        journal.unlink()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ExportError(f"{journal}: a run that was killed cannot be finished: {error}") from None


class _Hashed:
    """A file that is written, and the digest of what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.size, self.closed = 0, False

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += (size := memoryview(data).nbytes)
        written = self._file.write(data)
        while written < size:  # as the system does where the disk is full, or a signal came
            written += self._file.write(memoryview(data)[written:])
        return size

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self.size

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Whoever has opened the file closes it."""

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _status(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _made_for(place: str, replaced: os.stat_result | None, scratch: str) -> IO[bytes]:
    """A new file at `scratch`, with the mode and the owner of the one that it is to replace."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    if replaced is None:
        return io.FileIO(os.open(scratch, flags, 0o666), "wb")
    if not stat.S_ISREG(replaced.st_mode):
        raise OSError(errno.EINVAL, NO_FILE)
    if replaced.st_nlink > 1:
        log.warning("%s has other hard links; they keep the old contents", place)
    handle = os.open(scratch, flags, 0o600)
    with contextlib.suppress(PermissionError):  # only root gives files away; CIFS has no modes
        os.fchown(handle, replaced.st_uid, replaced.st_gid)
    with contextlib.suppress(PermissionError):
        os.fchmod(handle, replaced.st_mode & 0o7777)
    return io.FileIO(handle, "wb")


def _sync(paths: Collection[str]) -> None:
    """Brings files, or the names in folders, to the disk; many of them with their whole disk."""
    together = len(paths) > FEW and _syncfs is not None
    if together:
        paths = list({os.stat(path).st_dev: path for path in paths}.values())  # noqa: PTH116
    for path in paths:
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                (_sync_disk if together else os.fsync)(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if error.errno not in _UNSYNCABLE or not Path(path).is_dir():
                raise


_syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)  # Linux has it


def _sync_disk(handle: int) -> None:
    if _syncfs is not None and _syncfs(handle):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _not_written(path: Path | str, error: OSError) -> ExportError:
    return ExportError(f"{path}: cannot be written: {reason(error)}")


def digest(path: Path | str) -> str:
    """SHA-256 of a file. Raises: OSError."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - there may be very many
        # Not file_digest: it clears a quarter of a megabyte for every file, however small.
        sha256 = hashlib.sha256(file.read(_PIECE))
        while data := file.read(_PIECE):
            sha256.update(data)
        return sha256.hexdigest()


def is_text(text: str) -> bool:
    """Whether a text holds no half of a pair, as names that are no UTF-8 do."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def swap(new: Path, old: Path) -> None:
    """Puts a folder in the place of another, which takes the place of the first: in one step where
    the system can (Linux), so that a process that is killed loses neither. Raises: OSError."""
    if _renameat2 is not None:
        names = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old))
        if _renameat2(*names, _RENAME_EXCHANGE) == 0:
            return
    aside = new.with_name(f"{new.name}-before")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise


def check_writable(place: Path) -> None:
    """Raises: UsageError where no file or folder can be made at `place`, or in its place."""
    nearest = place
    for nearest in (place, *place.absolute().parents):
        try:
            mode = nearest.stat().st_mode
        except FileNotFoundError:
            continue
        except OSError as error:  # below a folder that may not be looked into
            raise UsageError(f"{place}: cannot be written: {reason(error)}") from None
        if nearest != place and not stat.S_ISDIR(mode):
            raise UsageError(f"{place}: cannot be written: {nearest} is not a folder")
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise UsageError(f"{place}: {NO_FILE}")
        break
    if not os.access(nearest, os.W_OK):
        why = "Permission denied" if nearest == place else f"no permission to write in {nearest}"
        raise UsageError(f"{place}: cannot be written: {why}")


def check_file_writable(place: Path) -> None:
    """`check_writable` of a file. Raises: UsageError."""
    check_writable(place)
    if place.is_dir():
        raise UsageError(f"{place}: cannot be written: a folder has that name")


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock on this file.

    The system lets go of it however a process ends, which a process number could not tell.
    """
    from filelock import FileLock, Timeout  # `fabe-ds --help` needs none

    probe = FileLock(path)
    try:
        probe.acquire(timeout=0)
    except Timeout:
        return True
    probe.release()
    return False
