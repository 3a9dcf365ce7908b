"""What a run has written, read again as a Dataset."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.errors import FabeError, UsageError, first_line
from fabe_ds.formats.discover import Source
from fabe_ds.formats.json.load import field_target
from fabe_ds.formats.json.typed import typed_records
from fabe_ds.formats.table import BUILDERS, load_files
from fabe_ds.store.layout import kept_file, private_folder

if TYPE_CHECKING:
    from datasets import Dataset


def written_records(run: dict[str, Any]) -> Dataset:
    """The records that the run of this report has written, as columns with types of their own.

    Those of JSON files are kept, typed, in the run's cache folder, for the next time.
    Raises: UsageError (nothing was written, or it is gone), InputError.
    """
    import datasets

    outputs = [Path(path) for path in run["outputs"]]
    if not outputs:
        raise UsageError("the run has written nothing")
    for path in outputs:
        if not path.exists():
            raise UsageError(f"{path}: what the run has written is gone")
    first, config = outputs[0], run["config"]
    cache_dir = Path(config["cache_dir"])
    try:
        if first.is_dir():
            saved = datasets.load_from_disk(str(first))
            assert isinstance(saved, datasets.Dataset)
            return saved
        if first.suffix.lower() in BUILDERS:
            return load_files(outputs, cache_dir)
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise FabeError(f"{first}: {first_line(error.__cause__ or error)}") from None
    sources = [Source(str(path), path.name) for path in outputs]
    seed = repr([config["field"], config["records_key"], *(file.digest() for file in sources)])
    name = hashlib.sha256(seed.encode()).hexdigest()[:32]
    place = private_folder(private_folder(cache_dir) / "typed") / f"{name}.arrow"
    field = field_target(config["field"], None)
    kept_file(place, lambda path: typed_records(sources, field, config["records_key"], path))
    return datasets.Dataset.from_file(str(place))
