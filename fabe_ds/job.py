"""A run before it runs: its settings, its input, its output, and who answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fabe_ds.config import rules
from fabe_ds.config.settings import InputSettings, OutputSettings, RunConfig
from fabe_ds.destinations import Destination, destination_of, paths_of
from fabe_ds.formats.base import Format, Settings, Source
from fabe_ds.formats.registry import open_source
from fabe_ds.remote import Staged, staged
from fabe_ds.transform import Transform


@dataclass(frozen=True, slots=True)
class Job:
    """What a run is about: what is read and how, where it is written to, who answers."""

    config: RunConfig
    transform: Transform
    source: Source
    format: Format
    destination: Destination
    paths: dict[str, str]
    """Where each file of the input goes, by its name."""
    shown: RunConfig
    """The settings as they were given, with the addresses of remote files."""
    copies: Staged


def open_job(
    config: RunConfig, transform: Transform | None = None, cache_dir: Path | None = None
) -> Job:
    """All that is known of a run before its records are loaded. Nothing is written.

    `cache_dir`: the folder that loaded records are kept in, where it is another than the run's.

    Raises: FabeError where the run could not begin.
    """
    transform = transform or checked_transform(config)
    shown = config = config.model_copy(update={"base_url": transform.config.base_url})
    copies = staged(config, cache_dir)
    config = copies.config
    destination = destination_of(config)
    # What the run writes must be known first: it is never input.
    kind, source = open_source(config, destination.ours(config))
    settings = Settings(
        transform.targets,
        config.part(InputSettings),
        config.part(OutputSettings),
        cache_dir or config.cache_dir,
    )
    opened = kind(settings)
    paths = paths_of(config, destination, opened, source)
    return Job(config, transform, source, opened, destination, paths, shown, copies)


def checked_transform(config: RunConfig) -> Transform:
    """The transform of a run whose settings go together. Raises: FabeError."""
    transform = Transform(config)
    rules.check(config, transform.provider)
    transform.session.prices()  # one that is missing is said now
    return transform
