"""Parquet, CSV and Arrow files, saved Datasets and those of the Hub -> a Dataset."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fabe_ds.config.settings import RunConfig
from fabe_ds.errors import ExportError, FabeError, InputError, UsageError, first_line, reason
from fabe_ds.files import NO_ROOM, clear_scratch
from fabe_ds.formats.csv import load_csv, read_head, read_rows
from fabe_ds.formats.discover import Walk, check_there, kind_of, say_hidden, walk
from fabe_ds.formats.json.load import refuse_unread
from fabe_ds.formats.parquet import held_columns, refuse_other_columns
from fabe_ds.quiet import quiet_datasets
from fabe_ds.run_files import DEFAULT_OUTPUT, LEFT_BEHIND, beside
from fabe_ds.store.layout import not_kept, private_folder, usable_folder

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

log = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t"}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", **dict.fromkeys(SEPARATORS, "csv")}
_JSON = (".json", ".jsonl", ".ndjson", ".gz")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INFOS = ("dataset_info.json", "dataset_infos.json")  # what datasets says beside Parquet files
_HUB_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Table:
    """A table that was read. `files` are those that its rows come from, `ranges` which of their
    rows, all counted through; of a saved Dataset, and of one of the Hub, there are none. `bad` are
    files that were left out, a line each."""

    dataset: Dataset
    files: list[Path] = field(default_factory=list)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    states: list[tuple[int, ...]] = field(default_factory=list)
    """Of each file when it was read."""

    def check_unchanged(self) -> None:
        """Raises: ExportError where a file is not what it was when it was read."""
        for file, state in zip(self.files, self.states, strict=True):
            if _state(file) != state:
                raise ExportError(
                    f"{file}: it was changed while the run went on, and nothing is written; what "
                    "was answered is kept: run the same command again"
                )


def _state(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def is_table(config: RunConfig) -> bool:
    """Whether the input is a table, and not JSON."""
    path = config.input_path
    if path is None:
        return False
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where it may not look
        return is_saved(path) or bool(_tables(config)[0])
    if os.path.lexists(path):
        return path.suffix.lower() in BUILDERS
    return _is_hub_id(path)


def _is_hub_id(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in _JSON or suffix in BUILDERS or os.path.lexists(path.parent):  # a misspelled path
        return False
    return _HUB_ID.fullmatch(str(path)) is not None


def is_saved(path: Path) -> bool:
    """Whether this is a folder that `save_to_disk` has made."""
    return any(os.path.isfile(path / name) for name in ("state.json", "dataset_dict.json"))  # noqa: PTH113


def _tables(config: RunConfig) -> tuple[list[Path], Walk]:
    """The table files of a folder that has no JSON, and all that was found there. What a run leaves
    there itself, and what is hidden, does not count."""
    folder = config.input_path
    assert folder is not None
    output = config.output_path or DEFAULT_OUTPUT
    ours = [config.cache_dir, output, *(beside(output, name) for name in LEFT_BEHIND)]
    found = walk(folder, config.input_glob, ours)
    files = [name for name in found.files if Path(name).name not in _INFOS]
    tables = [folder / name for name in files if _suffix(name) in BUILDERS]
    if any(kind_of(name) for name in files):
        if tables:
            log.warning("%s: JSON is read, and %d tables are left out", folder, len(tables))
        return [], found
    return tables, found


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _alike(folder: Path, tables: list[Path]) -> list[Path]:
    """Those of the tables that are of the first one's kind; says which are left out."""
    alike = [file for file in tables if file.suffix.lower() == tables[0].suffix.lower()]
    if len(alike) < len(tables):
        log.warning(
            "%s: %d files like %s are read, and %d others left out (--glob chooses)",
            *(folder, len(alike), tables[0].name, len(tables) - len(alike)),
        )
    return alike


def load_table(config: RunConfig) -> Table:
    """The input as a Dataset with its own columns.

    Raises: UsageError (no such dataset or split), InputError (a file that cannot be read, unless it
    is to be left out).
    """
    import datasets

    path = config.input_path
    assert path is not None
    files: list[Path] = []
    try:
        with quiet_datasets():
            if path.is_dir() and is_saved(path):
                return _split_of(datasets.load_from_disk(str(path)), config.split)
            if path.exists():
                check_there(path)
                files, bad = _files(config)
                states = [_state(file) for file in files]
                table = _split_of(load_files(files, config.cache_dir), config.split)
                return replace(table, files=files, bad=bad, states=states)
            _look_for(str(path))
            return Table(datasets.load_dataset(str(path), config.config_name, split=config.split))
    except FabeError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            raise not_kept(config.cache_dir, cause) from None
        if wrong := next(filter(None, map(_broken, files)), None):
            raise wrong from None
        message = reason(cause) if isinstance(cause, OSError) else first_line(cause)
        if isinstance(error, FileNotFoundError | ConnectionError | ValueError):
            raise UsageError(f"--input {path}: {message}") from None
        raise InputError(path, f"cannot be read: {message}") from None


def _files(config: RunConfig) -> tuple[list[Path], list[str]]:
    """The files to read, and what is left out because it cannot be read.

    Raises: InputError, unless such is to be left out.
    """
    path = config.input_path
    assert path is not None
    if not path.is_dir():
        check_readable(path)
        return [path], []
    tables, found = _tables(config)
    refuse_unread(found.unread, config.on_bad_input)
    say_hidden(path, found)
    files, bad = _alike(path, tables), list(map(str, found.unread))
    if config.on_bad_input == "fail":
        for file in files:
            check_readable(file)
    if config.on_bad_input == "skip":
        for file in list(files):
            if wrong := _broken(file):
                log.warning("left out: %s", wrong)
                files.remove(file)
                bad.append(str(wrong))
        if not files:
            raise UsageError(f"--input {path}: none of its files can be read; {bad[-1]}")
    return files, bad


def check_readable(file: Path) -> None:
    """Raises: InputError."""
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise InputError(file, f"cannot be read: {reason(error)}") from None


def _broken(file: Path) -> InputError | None:
    """What is wrong with a file; it is read whole."""
    suffix = file.suffix.lower()
    try:
        if suffix in SEPARATORS:
            for _ in read_rows(file, read_head(file, SEPARATORS[suffix])):
                pass
        elif suffix == ".parquet":
            for _ in pq.ParquetFile(file).iter_batches():
                pass
        else:
            for _ in _arrow_batches(file):
                pass
    except InputError as error:
        return error
    except Exception as error:
        return InputError(file, f"cannot be read: {first_line(error)}")
    return None


def _arrow_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Of a file in Arrow's stream format, or in its file format."""
    with pa.memory_map(str(file)) as source:
        try:
            yield from pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            source.seek(0)
            opened = pa.ipc.open_file(source)
            for number in range(opened.num_record_batches):
                yield opened.get_batch(number)


def _split_of(found: Dataset | DatasetDict, split: str) -> Table:
    """The rows that a split names, as datasets writes it: test, train[:100], train[50%:]+test."""
    from datasets import Dataset, ReadInstruction, concatenate_datasets

    if isinstance(found, Dataset):
        named = {"train": found, str(found.split or "train"): found}
    else:
        named = dict(found)
        if split in named and len(named) > 1:
            log.info("split %s of %s (--split takes another)", split, ", ".join(named))
    try:
        instruction = ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({name: len(rows) for name, rows in named.items()})
    except (ValueError, AssertionError):
        raise UsageError(f"--split {split}: has {', '.join(named)}") from None
    chosen, ranges = [], []
    for part in parts:
        rows = named[part.splitname]
        end = len(rows) if part.to is None else min(part.to, len(rows))
        first = min(part.from_ or 0, end)
        part_of = range(first, end) if first < end else range(0)
        chosen.append(rows if (first, end) == (0, len(rows)) else rows.select(part_of))
        ranges.append((first, end))
    whole = chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)
    return Table(whole, ranges=ranges)


def load_files(files: list[Path], cache_dir: Path) -> Dataset:
    """The rows of files of one kind, kept as Arrow in the cache folder.

    Columns of a Parquet file whose types `datasets` does not know (maps) are left out.
    Raises: InputError, and what `datasets.load_dataset` does.
    """
    import datasets

    suffix = files[0].suffix.lower()
    usable_folder(cache_dir)
    place = private_folder(private_folder(cache_dir) / "tables")
    clear_scratch(place)
    if suffix in SEPARATORS:
        return load_csv(files, SEPARATORS[suffix], place)
    options: dict[str, Any] = {}
    if suffix == ".parquet":
        held = held_columns(pq.read_schema(files[0]))
        options = {"columns": held.names, "features": datasets.Features.from_arrow_schema(held)}
        refuse_other_columns(files)
        if not any(pq.read_metadata(file).num_rows for file in files):
            return datasets.Dataset(held.empty_table())
    return datasets.load_dataset(
        BUILDERS[suffix],
        data_files=[glob.escape(str(file.resolve())) for file in files],
        split="train",
        cache_dir=str(place),
        **options,
    )


def _look_for(repo: str) -> None:
    """Asks the Hub once; datasets itself would ask a Hub that is away for half a minute."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    from fabe_ds.hub.huggingface import hub_errors

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(repo, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError:
        raise UsageError(
            f"--input {repo}: no such file or folder, and no such dataset on the Hub (a private "
            "one needs HF_TOKEN)"
        ) from None
    except hub_errors():
        raise UsageError(
            f"--input {repo}: no such file or folder, and the Hub cannot be reached"
        ) from None
