"""A run of the command line, from its flags to its exit code."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import typer

from fabe_ds.cli.display import print_failures, print_summary
from fabe_ds.cli.terminal import complain, log_to_stderr
from fabe_ds.config.load import read_config, validated
from fabe_ds.config.settings import STANDARD, RunConfig, flag
from fabe_ds.errors import INTERRUPTED, FabeError, UsageError
from fabe_ds.store.layout import Layout

if TYPE_CHECKING:
    from fabe_ds.report.course import Course, Watch
    from fabe_ds.report.result import RunResult


def settings_of(config: Path | None, flags: dict[str, Any]) -> RunConfig:
    from fabe_ds.cli.streams import stored_input

    for name in ("template_vars", "provider_options"):
        if given := flags.pop(name, None):
            flags[name] = dict(_pair(flag(name), text) for text in given)
    settings = read_config(
        {name: value for name, value in flags.items() if value not in (None, [])}, config
    )
    log_to_stderr(settings.log_level)
    if config is not None and not flags.get("base_url"):
        settings = _at_the_environments_address(settings)
    if settings.input_path != STANDARD:
        return settings
    if sys.stdin.isatty():
        print("reading standard input (Ctrl-D ends it)", file=sys.stderr)
    folder = Layout(settings.cache_dir).stdin
    if settings.dry_run:
        folder = Path(tempfile.mkdtemp(prefix="fabe-ds-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return stored_input(settings, sys.stdin.buffer, folder)


def _at_the_environments_address(settings: RunConfig) -> RunConfig:
    """The settings without a file's base URL, where the environment names another: a variable goes
    over a file."""
    from fabe_ds.providers import HttpProvider, provider_class

    kind = provider_class(settings.provider)
    names = kind.base_url_variables if issubclass(kind, HttpProvider) else ()
    is_named = any(os.environ.get(name, "").strip() for name in names)
    return settings.model_copy(update={"base_url": []}) if is_named else settings


class Telling(NamedTuple):
    """What a command says of a run."""

    quiet: bool = False
    """Nothing but what went wrong."""
    json: bool = False
    """The summary as one JSON object on standard output, and nothing else there."""
    live: bool = False
    """The page of the run, served while it goes on."""

    def begin(self, settings: RunConfig) -> None:
        """Says no more than is wanted from now on. Raises: UsageError."""
        if self.json and settings.output_path == STANDARD:
            raise UsageError("--json: standard output is for the records (--output -)")
        if self.quiet and settings.log_level == "INFO":
            log_to_stderr("WARNING")


def run_and_report(settings: RunConfig, telling: Telling) -> NoReturn:
    from fabe_ds.cli.streams import copy_to

    telling.begin(settings)
    if settings.output_path != STANDARD and not telling.json:
        result, _, error = _run_and_print(settings, telling)
        raise typer.Exit(_code(result, error))
    # Standard output is for records alone, or for the summary.
    with contextlib.redirect_stdout(sys.stderr):
        result, pushed, error = _run_and_print(settings, telling)
    if telling.json:
        from fabe_ds.report.summary import as_json

        print(as_json(result, pushed=pushed, **({} if error is None else told_as_json(error))))
    else:
        copy_to(sys.stdout.buffer, result.outputs)
    raise typer.Exit(_code(result, error))


def _code(result: RunResult, error: FabeError | None) -> int:
    """The exit code of a run that came to its end; says why it could not be pushed."""
    if error is None:
        return result.exit_code
    complain(str(error))
    return error.exit_code


def told_as_json(error: FabeError) -> dict[str, Any]:
    """What --json says of an error, beside the line on standard error."""
    return {"error": str(error), "exit_code": error.exit_code}


@contextlib.contextmanager
def errors_as_json(wanted: bool) -> Iterator[None]:
    """Where it is wanted, prints one JSON object of an error that ends the block too."""
    try:
        yield
    except FabeError as error:
        if wanted:
            print(json.dumps(told_as_json(error)))
        raise
    except KeyboardInterrupt:
        if wanted:
            print(json.dumps({"error": "stopped", "exit_code": INTERRUPTED}))
        raise


def _run_and_print(
    settings: RunConfig, telling: Telling
) -> tuple[RunResult, str | None, FabeError | None]:
    """The result, where it was pushed to, and why it could not be."""
    from fabe_ds.pipeline import run
    from fabe_ds.report.progress import watching

    # Records make millions of small objects and no cycles; collecting at every 700th of them
    # takes a third of the time of a run without a model.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    push = _push_of(settings)
    show = None if telling.quiet else watching
    result = run(settings, _live(show) if telling.live else show, progress=not telling.quiet)
    if telling.quiet:
        print_failures(result)
    else:
        print_summary(result, settings)
    if push is None:
        return result, None, None
    if result.failed and not settings.force:
        print("not pushed: records failed (--force pushes all the same)", file=sys.stderr)
        return result, None, None
    try:
        place = push(result)
    except FabeError as error:
        return result, None, error
    if not telling.quiet:
        print(f"pushed: {place}")
    return result, place, None


def _live(show: Watch | None) -> Watch:
    """Serves the page of a run while it is shown as `show` does."""
    from fabe_ds.report.follower import Follower

    @contextlib.contextmanager
    def watch(course: Course) -> Iterator[None]:
        with contextlib.closing(Follower(lambda: course.report, since=time.time())) as follower:
            print(f"live: {follower.url}", file=sys.stderr, flush=True)
            with show(course) if show else contextlib.nullcontext():
                yield

    return watch


def _push_of(settings: RunConfig) -> Callable[[RunResult], str] | None:
    """What pushes the result of a run, checked before its first record is spent."""
    if settings.push_to_hub is None:
        return None
    from fabe_ds.hub import push_to_hub, wanted_push

    options = {
        "private": not settings.public,
        "revision": settings.revision,
        "config_name": settings.push_config_name,
        "force": settings.force,
        "failures": settings.push_failures,
        "hub": settings.hub,
    }
    repo, read = settings.push_to_hub, settings.model_dump(include={"config_name", "split"})
    wanted_push(repo, read, options)
    return lambda result: push_to_hub(result, repo, **options)


def _pair(spelled: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"{spelled} {text}: write name=value")
    return name, value


def config_of(report: Path, api_key: str | None = None) -> RunConfig:
    from fabe_ds.report.run_report import read_report

    return validated(RunConfig, {**read_report(report).config, "api_key": api_key}, {})
