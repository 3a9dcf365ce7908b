"""What a run has written, read again as a Dataset."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from fabe_ds.config.settings import InputSettings, OutputSettings
from fabe_ds.errors import FabeError, UsageError, first_line
from fabe_ds.fields import Targets
from fabe_ds.formats.base import OURS, Format, Settings, Source, no_tick
from fabe_ds.formats.discover import InputFile
from fabe_ds.formats.json.format import JsonFormat
from fabe_ds.formats.json.typed import typed_records
from fabe_ds.formats.registry import class_of
from fabe_ds.report.run_report import RunReport
from fabe_ds.store.layout import Layout, kept_file

if TYPE_CHECKING:
    from datasets import Dataset


def written_records(run: RunReport) -> Dataset:
    """The records that the run of this report has written, as columns with types of their own.

    Those of JSON files are kept, typed, in the run's cache folder, for the next time.
    Raises: UsageError (nothing was written, or it is gone), InputError.
    """
    import datasets

    outputs = [Path(path) for path in run.outputs]
    if not outputs:
        raise UsageError("the run has written nothing")
    for path in outputs:
        if not path.exists():
            raise UsageError(f"{path}: what the run has written is gone")
    first, config = outputs[0], run.config
    cache_dir = Path(config["cache_dir"])
    try:
        if first.is_dir():
            saved = datasets.load_from_disk(str(first))
            assert isinstance(saved, datasets.Dataset)
            return saved
        kind = class_of(first.name)
        if kind is not None and kind is not JsonFormat:
            return _read(kind, outputs, cache_dir)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise FabeError(f"{first}: {first_line(error.__cause__ or error)}") from None
    sources = [InputFile(str(path), path.name) for path in outputs]
    seed = repr([config["field"], config["records_key"], *(file.digest() for file in sources)])
    name = hashlib.sha256(seed.encode()).hexdigest()[:32]
    layout = Layout(cache_dir)
    place = layout.made(layout.typed) / f"{name}.arrow"
    kept_file(place, lambda path: typed_records(sources, config["records_key"], path))
    return datasets.Dataset.from_file(str(place))


def _read(kind: type[Format], outputs: list[Path], cache_dir: Path) -> Dataset:
    """The rows of files of a format that has columns."""
    settings = Settings(Targets(()), InputSettings(), OutputSettings(), cache_dir)
    files = [InputFile(str(path), path.name) for path in outputs]
    dataset = kind(settings).load(Source(outputs[0], files), no_tick).dataset
    return dataset.remove_columns([n for n in dataset.column_names if n.startswith(OURS)])
