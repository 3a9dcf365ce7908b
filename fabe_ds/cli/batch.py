"""The commands below `fabe-ds batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fabe_ds.config.load import read_config
from fabe_ds.config.settings import RunConfig
from fabe_ds.errors import UsageError

batch_app = typer.Typer(no_args_is_help=True, help="Look after the batches of --batch-api.")

Config = Annotated[Path | None, typer.Option("--config", help="YAML file of a run's settings.")]
Server = Annotated[
    list[str] | None, typer.Option("--base-url", help="Server to ask.  \\[default: those known]")
]
Protocol = Annotated[
    str | None, typer.Option("--provider", help="Whose protocol it speaks.  \\[default: openai]")
]
Key = Annotated[str | None, typer.Option("--api-key", help="Key for the server.")]
Folder = Annotated[
    Path | None, typer.Option("--cache-dir", help="The cache folder.  \\[default: .cache]")
]


@batch_app.command("list")
def list_batches(
    config: Config = None,
    base_url: Server = None,
    provider: Protocol = None,
    api_key: Key = None,
    cache_dir: Folder = None,
) -> None:
    """The batches at the server, the newest first; * is one that a run from here waits for."""
    from fabe_ds.tools.batches import listed

    count = 0
    settings = _settings(config, base_url, provider, api_key, cache_dir)
    for endpoint, state, is_ours in listed(settings):
        count += 1
        why = f"  {state.reason}" if state.reason else ""
        shown = "  ".join(filter(None, (state.name, state.word, state.counted, endpoint)))
        print(f"{'*' if is_ours else ' '} {shown}{why}")
    if not count:
        print("no batches")


@batch_app.command("cancel")
def cancel_batches(
    names: Annotated[list[str] | None, typer.Argument(help="Names of batches.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All that runs from this cache folder wait for.")
    ] = False,
    config: Config = None,
    base_url: Server = None,
    provider: Protocol = None,
    api_key: Key = None,
    cache_dir: Folder = None,
) -> None:
    """End batches; what they have answered by then is still read by the next run."""
    from fabe_ds.tools.batches import cancelled

    if bool(names) == everything:
        raise UsageError("name the batches to cancel, or say --all")
    settings = _settings(config, base_url, provider, api_key, cache_dir)
    count = 0
    for _, state, _ in cancelled(settings, names or [], everything):
        count += 1
        print(f"{state.name}  {state.word}")
    if not count:
        print("no batch is running")


def _settings(
    config: Path | None,
    base_url: list[str] | None,
    provider: str | None,
    api_key: str | None,
    cache_dir: Path | None,
) -> RunConfig:
    flags = {"base_url": base_url, "provider": provider, "api_key": api_key, "cache_dir": cache_dir}
    given = {name: value for name, value in flags.items() if value}
    settings = read_config(given, config)
    # A run's own default asks nobody.
    is_named = "provider" in settings.model_fields_set
    return settings if is_named else settings.model_copy(update={"provider": "openai"})
