"""Which files a run reads, and what each is called below its root."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from fabe_ds import compression
from fabe_ds.errors import InputError, UsageError, reason
from fabe_ds.files import digest
from fabe_ds.run_files import LIVE_SUFFIX, left_by_run
from fabe_ds.text import listed, shown_name

log = logging.getLogger(__name__)

JSON, LINES = "json", "lines"
_KINDS = {".json": JSON, ".jsonl": LINES, ".ndjson": LINES}
_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file. `name` is its path below the input root, with forward slashes; bytes in it
    that are no UTF-8 are shown as `\\xNN`."""

    location: str  # not a Path, which takes ten times the room: there may be very many
    name: str

    @property
    def path(self) -> Path:
        return Path(self.location)

    @property
    def kind(self) -> str | None:
        return kind_of(self.name)

    @property
    def compressed(self) -> bool:
        return bool(compression.suffix_of(self.name))

    def open(self) -> BinaryIO:
        """The file as it lies on the disk."""
        return cast(BinaryIO, open(self.location, "rb", buffering=0))  # noqa: PTH123

    def plain(self, file: BinaryIO) -> BinaryIO:
        """The bytes of what `open` gave, uncompressed."""
        return compression.decompressed(file, self.name)

    def digest(self) -> str:
        """SHA-256 of the file as it lies on disk. Raises: InputError."""
        try:
            return digest(self.location)
        except OSError as error:
            raise InputError(self.path, f"cannot be read: {reason(error)}") from None


def kind_of(name: str) -> str | None:
    """JSON or LINES, by the suffix of a file's name (that of compression left out), or None."""
    stem, dot, suffix = compression.without_suffix(name.lower()).rpartition(".")
    return _KINDS.get(dot + suffix) if stem.rpartition("/")[2] else None


@dataclass(slots=True)
class Walk:
    """What stands below a folder. `files` are paths below it, sorted, with forward slashes."""

    files: list[str] = field(default_factory=list)
    unread: list[InputError] = field(default_factory=list)
    """Folders, links and special files that cannot be read."""
    hidden: list[str] = field(default_factory=list)
    """Files and folders that were passed over because their names begin with a dot."""
    others: list[str] = field(default_factory=list)
    """Files that no pattern takes."""


def walk(root: Path, globs: Sequence[str] = (), exclude: Sequence[Path] = ()) -> Walk:
    """The files below `root` that any of the patterns takes (all, without patterns, but those of
    earlier runs and hidden ones). Linked folders are followed, but not into one that holds them.

    `exclude`: files and folders that are never input, which is where the output goes.
    Raises: UsageError (a pattern of files elsewhere).
    """
    patterns = [_parts(glob) for glob in globs]
    top = os.path.realpath(root)
    skipped = {os.path.realpath(path) for path in exclude} - {top}
    if inside := next((path for path in skipped if _is_below(top, path)), None):
        raise UsageError(f"--input {root}: it is inside {inside}, which is written to")
    found = Walk()
    left: list[str] = []
    folders = [("", top, frozenset({top}))]
    while folders:
        folder, real, above = folders.pop()
        try:
            with os.scandir(root / folder if folder else root) as listing:
                entries = list(listing)
        except OSError as error:
            found.unread.append(InputError(root / folder, f"cannot be read: {reason(error)}"))
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            link = entry.is_symlink()
            place = os.path.realpath(entry.path) if link else f"{real}/{entry.name}"
            if place in skipped or (link and any(_is_below(place, path) for path in skipped)):
                continue
            if entry.name.startswith(".") and entry.name.endswith(LIVE_SUFFIX):
                continue  # of a run of ours, which goes on or was killed
            if not globs and entry.name.startswith("."):
                found.hidden.append(name)
            elif _is_folder(entry):
                if place in above:
                    log.info("%s: a link to a folder that holds it, not followed", entry.path)
                else:
                    folders.append((name, place, above | {place}))
            elif patterns and not any(_matches(name.split("/"), parts) for parts in patterns):
                found.others.append(name)
            elif _is_file(entry):
                found.files.append(name)
                if not globs and name.endswith(".run.json"):
                    left += left_by_run(Path(place))
            elif globs or link or kind_of(name):
                found.unread.append(InputError(entry.path, _not_a_file(entry)))
    for names in (found.files, found.hidden, found.others):
        names.sort(key=lambda name: name.split("/"))
    if left:
        places = {name: os.path.realpath(root / name) for name in found.files}
        found.files = [
            name for name in found.files if not any(_is_below(places[name], path) for path in left)
        ]
    return found


def _parts(glob: str) -> list[str]:
    parts = [part for part in glob.split("/") if part not in ("", ".")]
    if glob.startswith("/") or ".." in parts or not parts:
        raise UsageError(f"--glob {glob!r}: write a pattern of files inside the input folder")
    return parts


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path's parts follow a pattern's, of which ** stands for any number of folders."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_matches(name[start:], pattern[1:]) for start in range(len(name) + 1))
    return (
        bool(name) and fnmatch.fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])
    )


def glob_takes(globs: Sequence[str], name: str) -> bool:
    """Whether any of the patterns takes the file of this path below the root.

    Raises: UsageError (a pattern of files elsewhere).
    """
    return any(_matches(name.split("/"), _parts(glob)) for glob in globs)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):
        return entry.is_file()
    return False


def _not_a_file(entry: os.DirEntry[str]) -> str:
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError) and entry.is_symlink():
            return f"a link to nothing ({Path(entry.path).readlink()})"
        return f"cannot be read: {reason(error)}"
    return f"{_SPECIAL.get(stat.S_IFMT(mode), 'not a file')}, not a regular file"


@dataclass(frozen=True, slots=True)
class Discovered:
    """`unread` are files and folders that should have been read and cannot be."""

    sources: list[InputFile]
    unread: list[InputError] = field(default_factory=list)


def discover(root: Path, globs: Sequence[str] = (), exclude: Sequence[Path] = ()) -> Discovered:
    """The JSON and JSON-lines files below `root` (or `root` itself), in the order of their names.

    `exclude`: files and folders that are never input, which is where the output goes.
    Raises: UsageError where nothing is there to read.
    """
    check_there(root)
    if not root.is_dir():
        source = InputFile(os.fspath(root), shown_name(root.name))
        if source.kind is None:
            raise UsageError(
                f"--input {root}: not a .json, .jsonl or .ndjson file (or .gz, .xz, .zst of one)"
            )
        return Discovered([source])
    return discovered(root, globs, walk(root, globs, exclude))


def discovered(root: Path, globs: Sequence[str], found: Walk) -> Discovered:
    """The JSON and JSON-lines files of those that were found; says what is left out.

    Raises: UsageError where there are none.
    """
    names = [name for name in found.files if kind_of(name)]
    others = [name for name in found.files if not kind_of(name)]
    if others:
        level = logging.WARNING if globs else logging.INFO
        log.log(level, "%s: left out, not JSON or JSON lines: %s", root, listed(others))
    say_hidden(root, found)
    if not names and not found.unread:
        raise UsageError(f"--input {root}: {nothing_matches(globs, found)}")
    below = os.path.join(root, "")  # noqa: PTH118
    sources = [InputFile(f"{below}{name}", shown_name(name)) for name in names]
    return Discovered(sources, found.unread)


def check_there(path: Path) -> None:
    """Raises: UsageError where the input path is neither a file nor a folder."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        what = "a link to nothing" if path.is_symlink() else "no such file or directory"
        raise UsageError(f"--input {path}: {what}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise UsageError(f"--input {path}: {reason(error)}") from None
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        what = _SPECIAL.get(stat.S_IFMT(mode), "something else")
        raise UsageError(f"--input {path}: {what}, not a file or a folder (- reads standard input)")


def say_hidden(root: Path, found: Walk) -> None:
    if found.hidden:
        log.info("%s: left out, hidden: %s (--glob takes them)", root, listed(found.hidden))


def nothing_matches(globs: Sequence[str], found: Walk) -> str:
    """What is said where no file was found."""
    if not globs:
        return "no .json, .jsonl or .ndjson file (or .gz, .xz, .zst of one) in it"
    hint = ""
    for glob in globs:
        deeper = _parts(glob)
        if "**" not in deeper:
            count = sum(_matches(name.split("/"), ["**", *deeper]) for name in found.others)
            if count:
                hint = f"; --glob '**/{glob}' takes {count} deeper down"
    return f"no file matches --glob {' '.join(globs)}{hint}"


def refuse_unread(unread: Sequence[InputError], on_bad_input: str) -> None:
    """Says what cannot be read. Raises: the first InputError, unless it is to be left out."""
    for error in unread:
        if on_bad_input == "fail":
            raise error
        log.warning("left out: %s", error)
