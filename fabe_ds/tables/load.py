"""Parquet, CSV and Arrow files, saved Datasets and those of the Hub -> a Dataset."""

from __future__ import annotations

import glob
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fabe_ds.config import RunConfig
from fabe_ds.errors import InputError, UsageError, first_line
from fabe_ds.folders import private_folder
from fabe_ds.records.discover import LEFT_BEHIND, left_by_runs
from fabe_ds.result import DEFAULT_OUTPUT, beside
from fabe_ds.tables.csv import load_csv

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

log = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t"}
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", **dict.fromkeys(SEPARATORS, "csv")}
_JSON = (".json", ".jsonl", ".ndjson", ".gz")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INFOS = ("dataset_info.json", "dataset_infos.json")  # what datasets says beside Parquet files
_HUB_SECONDS = 30.0


def is_table(config: RunConfig) -> bool:
    """Whether the input is a table, and not JSON."""
    path = config.input_path
    if path is None:
        return False
    if path.is_dir():
        return is_saved(path) or bool(_tables(config))
    if path.exists():
        return path.suffix.lower() in BUILDERS
    return _is_hub_id(path)


def _is_hub_id(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in _JSON or suffix in BUILDERS or path.parent.exists():  # a misspelled path
        return False
    return _HUB_ID.fullmatch(str(path)) is not None


def is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _tables(config: RunConfig) -> list[Path]:
    """The table files of a folder that has no JSON. What a run leaves there itself, and what is
    hidden, does not count."""
    folder = config.input_path
    assert folder is not None
    output = config.output_path or DEFAULT_OUTPUT
    ours = [config.cache_dir.resolve(), output.resolve()]
    ours += [beside(output, name) for name in LEFT_BEHIND]
    skipped = [place for place in (*ours, *left_by_runs(folder)) if place != folder.resolve()]
    found = {file for pattern in config.input_glob or ["**/*"] for file in folder.glob(pattern)}
    files = [
        file
        for file in sorted(found)
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and not any(file.resolve().is_relative_to(place) for place in skipped)
        and file.name not in _INFOS
    ]
    tables = [file for file in files if file.suffix.lower() in BUILDERS]
    if any(file.suffix.lower() in _JSON for file in files):
        if tables:
            log.warning("%s: JSON is read, and %d tables are left out", folder, len(tables))
        return []
    return tables


def _alike(folder: Path, tables: list[Path]) -> list[Path]:
    """Those of the tables that are of the first one's kind; says which are left out."""
    alike = [file for file in tables if file.suffix.lower() == tables[0].suffix.lower()]
    if len(alike) < len(tables):
        log.warning(
            "%s: %d files like %s are read, and %d others left out (--glob chooses)",
            *(folder, len(alike), tables[0].name, len(tables) - len(alike)),
        )
    return alike


def load_table(config: RunConfig) -> Dataset:
    """The input as a Dataset with its own columns.

    Raises: UsageError (no such dataset or split), InputError (a file that cannot be read).
    """
    import datasets

    path = config.input_path
    assert path is not None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we say what is wrong, in a line
    try:
        if path.is_dir() and is_saved(path):
            return _split_of(datasets.load_from_disk(str(path)), config.split)
        if path.exists():
            files = _alike(path, _tables(config)) if path.is_dir() else [path]
            return _split_of(load_files(files, config.cache_dir), config.split)
        _look_for(str(path))
        return datasets.load_dataset(str(path), config.config_name, split=config.split)
    except (UsageError, InputError):
        raise
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise UsageError(f"--input {path}: {first_line(error)}") from None
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        raise InputError(path, first_line(error.__cause__ or error)) from None


def _split_of(found: Dataset | DatasetDict, split: str) -> Dataset:
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
    chosen = []
    for part in parts:
        rows = named[part.splitname]
        first, end = part.from_ or 0, len(rows) if part.to is None else part.to
        chosen.append(rows if (first, end) == (0, len(rows)) else rows.select(range(first, end)))
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)


def load_files(files: list[Path], cache_dir: Path) -> Dataset:
    """The rows of files of one kind, kept as Arrow in the cache folder.

    Raises: InputError, and what `datasets.load_dataset` does.
    """
    import datasets
    import pyarrow.parquet as pq

    suffix = files[0].suffix.lower()
    place = private_folder(private_folder(cache_dir) / "tables")
    if suffix in SEPARATORS:
        return load_csv(files, SEPARATORS[suffix], place)
    if suffix == ".parquet" and not any(pq.read_metadata(file).num_rows for file in files):
        return datasets.Dataset(pq.read_schema(files[0]).empty_table())
    return datasets.load_dataset(
        BUILDERS[suffix],
        data_files=[glob.escape(str(file.resolve())) for file in files],
        split="train",
        cache_dir=str(place),
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
