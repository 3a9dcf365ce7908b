"""Which files a run reads, and what each is called below its root."""

from __future__ import annotations

import gzip
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from fabe_ds.errors import UsageError

log = logging.getLogger(__name__)

JSON, LINES = "json", "lines"
_KINDS = {".json": JSON, ".jsonl": LINES, ".ndjson": LINES}
LEFT_BEHIND = ("run.json", "failures.jsonl", "samples.jsonl")
"""What stands beside the output of a run, after its name and a dot."""
_OURS = b'"fabe_ds":'  # as a report begins
_EVERY = [f"**/*{suffix}{gz}" for suffix in _KINDS for gz in ("", ".gz")]


@dataclass(frozen=True, slots=True)
class Source:
    """One input file: `name` is its path below the input root, with forward slashes."""

    path: Path
    name: str

    @property
    def kind(self) -> str | None:
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes and suffixes[-1] == ".gz":
            suffixes.pop()
        return _KINDS.get(suffixes[-1]) if suffixes else None

    @property
    def compressed(self) -> bool:
        return self.path.suffix.lower() == ".gz"

    def open(self) -> BinaryIO:
        """The file's bytes, uncompressed."""
        if self.compressed:
            return cast(BinaryIO, gzip.open(self.path, "rb"))
        return self.path.open("rb")

    def digest(self) -> str:
        """SHA-256 of the file as it lies on disk."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def left_by_runs(root: Path) -> list[Path]:
    """What earlier runs have left below a folder: their outputs, and the files beside those."""
    left = []
    for report in root.rglob("*.run.json"):
        if not report.is_file():
            continue
        with report.open("rb") as file:
            if _OURS not in file.read(64):
                continue
        output = report.with_name(report.name.removesuffix(".run.json")).resolve()
        left += [output, *(output.with_name(f"{output.name}.{name}") for name in LEFT_BEHIND)]
    return left


def discover(root: Path, globs: Sequence[str] = (), exclude: Sequence[Path] = ()) -> list[Source]:
    """The input files below `root` (or `root` itself), in the order of their names.

    `exclude`: files and folders that are never input, which is where the output goes.
    Raises: UsageError where nothing is there to read.
    """
    if not root.exists():
        raise UsageError(f"--input {root}: no such file or directory")
    if root.is_file():
        source = Source(root, root.name)
        if source.kind is None:
            raise UsageError(f"--input {root}: not a .json, .jsonl or .ndjson file (or .gz of one)")
        return [source]
    if not root.is_dir():
        raise UsageError(f"--input {root}: not a regular file or directory")
    patterns = list(globs) or _EVERY
    try:
        paths = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    except (ValueError, NotImplementedError) as error:
        raise UsageError(f"--glob {' '.join(globs)}: {error}") from None
    skipped = [path.resolve() for path in exclude if path.resolve() != root.resolve()]
    if not globs:
        skipped += left_by_runs(root)
    sources = []
    for path in sorted(paths):
        source = Source(path, path.relative_to(root).as_posix())
        if any(path.resolve().is_relative_to(skip) for skip in skipped):
            continue
        if not globs and any(part.startswith(".") for part in path.relative_to(root).parts):
            continue
        if source.kind is None:
            log.warning("%s: not JSON or JSON lines, left out", path)
            continue
        sources.append(source)
    if not sources:
        raise UsageError(f"--input {root}: no file matches --glob {' '.join(patterns)}")
    return sources
