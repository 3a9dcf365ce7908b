"""A dataset of the Hugging Face Hub as a format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fabe_ds.compression import SUFFIXES
from fabe_ds.errors import UsageError
from fabe_ds.formats.base import Source
from fabe_ds.formats.table import Split, TableFormat

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SECONDS = 30.0


class HubFormat(TableFormat):
    """A dataset that is named as the Hub names it (org/name), fetched by `datasets`."""

    name = "hub"
    replaceable = False

    def read(self, source: Source, folder: Path) -> Any:
        import datasets

        _look_for(str(source.root))
        settings = self.settings.input
        return datasets.load_dataset(str(source.root), settings.config_name, split=settings.split)

    def chosen(self, source: Source, folder: Path) -> Split:
        return Split(self.read(source, folder))  # datasets itself has fetched no more than that

    def batches(self, file: Path) -> Iterator[Any]:
        return iter(())


def is_hub_id(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a path that is not there may name a dataset of the Hub, and is no misspelled file:
    one with one of these suffixes, or in a folder that is there."""
    suffix = path.suffix.lower()
    if suffix in suffixes or suffix in SUFFIXES or os.path.lexists(path.parent):
        return False
    return _HUB_ID.fullmatch(str(path)) is not None


def _look_for(repo: str) -> None:
    """Asks the Hub once; datasets itself would ask a Hub that is away for half a minute."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(repo, timeout=_SECONDS)
    except RepositoryNotFoundError:
        raise UsageError(
            f"--input {repo}: no such file or folder, and no such dataset on the Hub (a private "
            "one needs HF_TOKEN)"
        ) from None
    except hub_errors():
        raise UsageError(
            f"--input {repo}: no such file or folder, and the Hub cannot be reached"
        ) from None


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises where the Hub refuses, or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its versions are built on one HTTP library or another, whose own errors share this base.
    bases = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (HfHubHTTPError, OSError, *bases)
