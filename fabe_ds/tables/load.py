"""Parquet, CSV and Arrow files, saved Datasets and those of the Hub -> a Dataset."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.config import RunConfig
from fabe_ds.errors import InputError, UsageError, first_line
from fabe_ds.folders import private_folder

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON = (".json", ".jsonl", ".ndjson", ".gz")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_SECONDS = 30.0


def is_table(config: RunConfig) -> bool:
    """Whether the input is a table, and not JSON."""
    path = config.input_path
    if path is None:
        return False
    if path.is_dir():
        return is_saved(path) or (not config.input_glob and bool(_files(path)))
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


def _files(folder: Path) -> list[Path]:
    """The table files of a folder that has no JSON, all of one kind."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    if any(file.suffix.lower() in _JSON for file in files):
        return []
    tables = [file for file in files if file.suffix.lower() in BUILDERS]
    return [file for file in tables if file.suffix == tables[0].suffix]


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
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                if config.split not in saved:
                    raise UsageError(f"--split {config.split}: has {', '.join(saved)}")
                saved = saved[config.split]
            return saved
        if path.exists():
            files = _files(path) if path.is_dir() else [path]
            return load_files(files, config.split, config.cache_dir)
        _look_for(str(path))
        return datasets.load_dataset(str(path), config.config_name, split=config.split)
    except UsageError:
        raise
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        raise UsageError(f"--input {path}: {first_line(error)}") from None
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        raise InputError(path, first_line(error.__cause__ or error)) from None


def load_files(files: list[Path], split: str, cache_dir: Path) -> Dataset:
    """The rows of files of one kind, kept as Arrow in the cache folder.

    Raises: what `datasets.load_dataset` does.
    """
    import datasets

    kind = BUILDERS[files[0].suffix.lower()]
    return datasets.load_dataset(
        kind,
        data_files=[str(file.resolve()) for file in files],
        split=split,
        cache_dir=str(private_folder(cache_dir) / "tables"),
        **(_as_text(files[0]) if kind == "csv" else {}),
    )


def _as_text(file: Path) -> dict[str, Any]:
    """Options that leave the fields of a CSV file the text that they are: 007, 1.10, NA."""
    import pandas as pd
    from datasets import Features, Value

    separator = SEPARATORS[file.suffix.lower()]
    columns = pd.read_csv(file, sep=separator, nrows=0).columns
    features = Features({name: Value("string") for name in columns})
    return {"sep": separator, "features": features, "keep_default_na": False}


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
