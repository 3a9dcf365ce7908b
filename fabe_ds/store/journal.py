"""The journal of runs in place: which values in which files an earlier run has rewritten.

A value that is a job's own answer is not asked about again, or each run would rewrite what the one
before has written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fabe_ds.store.completions import RecordCache

_MANY = 1 << 20
Position = tuple[str, int]
"""The file of a record, and the record's number in it."""


class Journal:
    """The marks of the values that `jobs` have written; the first job is the run's own, others are
    names under which earlier versions knew it."""

    def __init__(self, cache: RecordCache, jobs: Sequence[str], fields: int | None) -> None:
        """`fields`: how many texts each record has, None where they have any number of them."""
        self._cache, self._jobs = cache, jobs
        self._fields = fields or _MANY
        self._paths: dict[str, str] = {}

    def rewritten(
        self, positions: Iterable[Position], texts: Iterable[Sequence[str | None]]
    ) -> Iterator[list[int]]:
        """For each record, the fields whose values are answers of these jobs."""
        for (location, number), values in zip(positions, texts, strict=True):
            yield [
                field
                for field, value in enumerate(values)
                if isinstance(value, str)
                and any(
                    self._cache.was_written(self._mark(job, location, number, field, value))
                    for job in self._jobs
                )
            ]

    def write(
        self, positions: Iterable[Position], completions: Iterable[Sequence[str | None]]
    ) -> None:
        """Remembers the values that are about to be written."""
        self._cache.mark_written(
            self._mark(self._jobs[0], location, number, field, value)
            for (location, number), values in zip(positions, completions, strict=True)
            for field, value in enumerate(values)
            if value is not None
        )

    def add(self, files: Iterable[str], names: Sequence[str]) -> None:
        """Remembers fields that are about to be added to files; runs in place may replace them."""
        self._cache.mark_written(_added(name, self._path(f)) for f in files for name in names)

    def has_added(self, files: Iterable[str], name: str) -> bool:
        """Whether runs in place have added the field to all the files."""
        return all(self._cache.was_written(_added(name, self._path(file))) for file in files)

    def _path(self, location: str) -> str:
        path = self._paths.get(location)
        if path is None:
            # Resolved: the same file under another name has the same marks.
            path = self._paths[location] = str(Path(location).resolve())
        return path

    def _mark(self, job: str, location: str, number: int, field: int, value: str) -> bytes:
        return written_mark(job, self._path(location), number * self._fields + field, value)


def _added(name: str, path: str) -> bytes:
    return written_mark("added", path, 0, name)


def written_mark(job: str, path: str, index: int, value: str) -> bytes:
    """Names one value that job `job` wrote into record `index` of the file `path`."""
    seed = f"{job}\0{path}\0{index}\0{value}"
    return hashlib.sha256(seed.encode("utf-8", "surrogateescape")).digest()[:16]
