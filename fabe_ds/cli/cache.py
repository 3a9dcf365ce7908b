"""The commands below `fabe-ds cache`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from fabe_ds.cli.running import config_of

Folder = Annotated[Path, typer.Option("--cache-dir", help="The cache folder.")]
cache_app = typer.Typer(no_args_is_help=True, help="Look into the cache folder.")


@cache_app.command("stats")
def cache_stats(cache_dir: Folder = Path(".cache")) -> None:
    """How much is in it."""
    from fabe_ds.tools.cache import stats

    found = stats(cache_dir)
    print(f"{found.completions} completions, {found.size / 1e6:.1f} MB")
    print(f"{found.prompt_tokens} prompt and {found.completion_tokens} completion tokens")
    for name, moment in (("oldest", found.oldest), ("newest", found.newest)):
        if moment:
            print(f"{name}: {datetime.fromtimestamp(moment):%Y-%m-%d %H:%M:%S}")
    for what, (count, size) in found.parts.items():
        print(f"{what}: {count}, {size / 1e6:.1f} MB")
    print(f"in all: {found.whole / 1e6:.1f} MB")


@cache_app.command("prune")
def cache_prune(
    days: Annotated[float, typer.Option("--older-than", help="Days.", min=0)],
    cache_dir: Folder = Path(".cache"),
) -> None:
    """Remove old completions, and loaded records and reports that were not used for as long."""
    from fabe_ds.tools.cache import prune

    gone = prune(cache_dir, days)
    print(
        f"{gone.completions} completions removed"
        + (f", and {gone.entries} loaded inputs and reports" if gone.entries else "")
        + f"; {gone.size / 1e6:.1f} MB freed"
    )


@cache_app.command("export")
def cache_export(cache_dir: Folder = Path(".cache")) -> None:
    """Print every completion as a line of JSON."""
    from fabe_ds.tools.cache import export

    for line in export(cache_dir):
        print(line)


@cache_app.command("explain")
def cache_explain(
    report: Annotated[Path, typer.Argument(help="A run's outputs.run.json.")],
    record: Annotated[int, typer.Option(help="Which record of the input, from 0.")] = 0,
) -> None:
    """Why a record would or would not be answered from it."""
    from fabe_ds.tools.explain import explain

    print(explain(config_of(report), record))
