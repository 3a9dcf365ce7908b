"""What a format is: how records become a Dataset, and how answers are written back into them."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from fabe_ds.answers import Answers
from fabe_ds.config.settings import InputSettings, OutputSettings
from fabe_ds.errors import ExportError, InputError, UsageError
from fabe_ds.fields import Targets
from fabe_ds.files import digest
from fabe_ds.formats.discover import InputFile

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

OURS = "__fabe_"
"""Prefix of helper columns added to records on their way to workers."""
BROKEN = "broken"
"""Class of the failure of what stands in a record's place and is none."""

Tick = Callable[[int], None]


def no_tick(amount: int) -> None:
    """Tells nobody how far the work is."""


class Row(NamedTuple):
    """What a record brings: the text of each field (None: nothing to do), and, where it is asked
    for, the record itself (its JSON text, or its values). `error` says why it is no record.

    Where a record may have a field several times, `fields` says which field each text is of; it
    may have none at all. `chosen` False: the run leaves the record out.
    """

    texts: Sequence[Any]
    record: str | Mapping[str, Any] | None = None
    error: str | None = None
    fields: Sequence[int] | None = None
    chosen: bool = True
    failure: str = BROKEN
    """Class of the failure that `error` is."""


def without(row: Row, done: Sequence[int]) -> Row:
    """The row without the texts that are done."""
    if not done:
        return row
    texts = [None if place in done else text for place, text in enumerate(row.texts)]
    return row._replace(texts=texts)


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one kind that a run reads. `root` is what the user named: a file, a folder, a
    saved Dataset, or a dataset's name on the Hub. `unread` could not be read and are left out."""

    root: Path
    files: list[InputFile] = field(default_factory=list)
    unread: list[InputError] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of all files, as far as they are there."""
        return sum(state[2] for file in self.files if (state := _state(file.location)))


@dataclass(slots=True)
class Records:
    """What a format has loaded: one row a record, in the order of the input.

    `parts` are the files that the rows come from, each with its number of rows; `left_out` says
    why input was left out, a line each; `digests` are the SHA-256 of files as they were read.
    """

    dataset: Dataset
    fingerprint: str
    """Names the records: the same for the same ones, and for no others."""
    parts: list[tuple[str, int]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    states: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Device, inode, size and time of change of each file when it was read."""
    details: Any = None
    """What the format itself wants to know again when it writes."""
    done: Sequence[Sequence[int]] | None = None
    """For each record, which of its texts are done: an earlier run has rewritten them in place, or
    the record has the output field already. None for no such."""
    limit: int | None = None
    """The first record that the run leaves out, with all behind it."""

    def __len__(self) -> int:
        return len(self.dataset)

    def positions(self) -> Iterator[tuple[str, int]]:
        """The file of each record, and the record's number in it, from 0."""
        for location, count in self.parts:
            for number in range(count):
                yield location, number

    def check_unchanged(self) -> None:
        """Raises: ExportError where a file is not what it was when it was read."""
        for location, state in self.states.items():
            # `touch` changes a file's time and none of its bytes.
            if _state(location) != state and not self._has_same_bytes(location):
                raise ExportError(
                    f"{location}: it was changed while the run went on, and nothing is written; "
                    "what was answered is kept: run the same command again"
                )

    def _has_same_bytes(self, location: str) -> bool:
        try:
            return location in self.digests and digest(location) == self.digests[location]
        except OSError:
            return False


def states_of(files: Sequence[InputFile]) -> dict[str, tuple[int, ...]]:
    """`Records.states` of files that are about to be read."""
    return {file.location: _state(file.location) for file in files}


def _state(location: str) -> tuple[int, ...]:
    try:
        status = os.stat(location)  # noqa: PTH116 - there may be very many
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Settings:
    """What a format is made with: the fields that are asked about, and the run's settings of input
    and output."""

    targets: Targets
    input: InputSettings
    output: OutputSettings
    cache_dir: Path


class Format(ABC):
    """One kind of records. Found through the entry-point group fabe_ds.formats.

    An instance serves one run. It is pickled with its settings alone, for the workers.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Of its files, in lower case and with the dot."""
    mirrors: ClassVar[bool] = True
    """Whether each file of the input becomes a file of the output; else all become one table."""

    replaceable: ClassVar[bool] = True
    """Whether its files can be replaced (--inplace)."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.targets = settings, settings.targets

    def __reduce__(self) -> tuple[type[Format], tuple[Settings]]:
        return type(self), (self.settings,)

    @abstractmethod
    def load(self, source: Source, tick: Tick) -> Records:
        """The records of the source's files. `tick` is told the bytes of the input that were read.

        Raises: UsageError, InputError (a file that cannot be read).
        """

    @abstractmethod
    def rows(self, table: pa.Table, whole: bool) -> Iterator[Row]:
        """What the rows of the Dataset bring, in their order; with the record where `whole`."""

    @abstractmethod
    def where(self, row: Mapping[str, Any], field: int = 0) -> dict[str, Any]:
        """Where a record stands, and what it holds in a field, for people: of one row of the
        Dataset. `record`, `file` and `line` are shown as its place, where they are there."""

    @abstractmethod
    def write(
        self, records: Records, answers: Answers, paths: Mapping[str, str], tick: Tick
    ) -> dict[str, str]:
        """Writes the records with their answers, each file whole or not at all.

        `paths` says where each file of the input goes, by its `InputFile.name`; of a format that
        does not mirror, it holds one path, under an empty name. Gives the SHA-256 of each file by
        its path, an empty text where there is none. Raises: UsageError, ExportError.
        """

    def check(self, records: Records) -> None:  # noqa: B027 - most have nothing to check
        """Says what a person should know before anything is sent.

        Raises: UsageError where the records lack a field, or hold one that is to be added.
        """

    def places(self, table: pa.Table) -> list[Sequence[int]] | None:
        """For each row, the field of each text that `rows` gives; None where each row has one text
        of each field."""
        if not self.targets.has_several:
            return None
        return [row.fields or () for row in self.rows(table, whole=False)]

    def existing(self, records: Records) -> Iterator[list[int]]:
        """For each record, which of its texts have an output already (--on-existing skip)."""
        raise UsageError(f"--on-existing skip does not go with {self.name}")

    def held(self, records: Records) -> dict[str, str]:
        """Fields to be added that records have already, each with what is said of it."""
        return {}

    def columns(self, records: Records, whole: bool) -> list[str]:
        """The columns of the Dataset that `rows` needs. All of them, unless a format knows less."""
        return list(records.dataset.column_names)

    def skips(self, records: Records) -> list[pa.ChunkedArray] | None:
        """For each field, why records have no text to ask about, as a word or null; None where
        nothing more is known of it."""
        return None

    def fingerprint(self, version: str, digests: Iterable[str]) -> str:
        """Names records: those of files with these digests, as this version of a format loads them
        for these settings."""
        unread = {"input_path", "limit"}
        settings = self.settings.input.model_dump(mode="json", exclude=unread)
        seed = repr([self.name, version, sorted(settings.items()), self.targets, list(digests)])
        return hashlib.sha256(seed.encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def output_kind(self, root: Path | None) -> str:
        """What a format that does not mirror its input is written as in a folder, as a suffix
        without its dot; "dataset" for a folder as `save_to_disk` makes it."""
        return self.settings.output.output_format or "parquet"

    def flag_of(self, name: str) -> str:
        """The flag that names a field which records gain."""
        return "--status-field" if name == self.targets.status_field else "--samples-field"
