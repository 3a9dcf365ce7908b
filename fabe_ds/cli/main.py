"""The command line: flags -> RunConfig -> run. The flags are the settings of `RunConfig`."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import difflib
import gc
import inspect
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from fabe_ds.config.load import read_config, validated
from fabe_ds.config.section import PANELS
from fabe_ds.config.settings import STANDARD, VERY_NEAR, RunConfig, TransformConfig, flag, setting
from fabe_ds.errors import (
    INTERRUPTED,
    USAGE,
    FabeError,
    RunStopped,
    UsageError,
    first_line,
    reason,
)
from fabe_ds.report.advice import what_helps
from fabe_ds.store.layout import Layout

if TYPE_CHECKING:
    from fabe_ds.report.result import RunResult

app = typer.Typer(
    name="fabe-ds",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Rewrite one field of every record with a language model; give the rest back as it was.",
)
# Typer comes with a click of its own, or uses the installed one, by its version.
_CallError: type[Any] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)
SHOWN_LINES, SHOWN_CHARACTERS = 80, 20_000
"""Of each record that a preview shows."""
LINE_SHOWN = 1000
"""Characters of a complaint."""
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


class ValuedFlags(TyperCommand):
    """Takes `--resume false` and `--resume=false` beside `--resume` and `--no-resume`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {
            name
            for parameter in self.params
            if getattr(parameter, "is_flag", False) and parameter.secondary_opts
            for name in parameter.opts
        }
        given = Counter(arg.partition("=")[0] for arg in args if arg.startswith("--"))
        if given["--input"] > 1:
            raise UsageError("--input is given twice; for several files, a folder and --glob")
        for parameter in self.params:
            several = getattr(parameter, "multiple", False) or getattr(parameter, "is_flag", False)
            for name in () if several else parameter.opts:
                if given[name] > 1:
                    print(
                        f"fabe-ds: {name} is given {given[name]} times; the last one holds",
                        file=sys.stderr,
                    )
        return super().parse_args(ctx, list(_without_values(args, names)))


def _without_values(args: list[str], names: set[str]) -> Iterator[str]:
    waiting = iter(range(len(args)))
    for index in waiting:
        name, equals, value = args[index].partition("=")
        if name not in names:
            yield args[index]
            continue
        if not equals and index + 1 < len(args):
            value = args[index + 1]
        if value.lower() in _TRUE | _FALSE:
            if not equals:
                next(waiting)
            yield name if value.lower() in _TRUE else f"--no-{name[2:]}"
        else:
            yield args[index]


def _run(config: Path | None, **flags: Any) -> None:
    settings = _settings(config, flags)
    if settings.dry_run:
        from fabe_ds.tools.dry_run import dry_run

        _print_dry_run(dry_run(settings))
        return
    _run_and_report(settings)


def _preview(config: Path | None, number: int, **flags: Any) -> None:
    from fabe_ds.tools.preview import preview

    settings = _settings(config, flags)
    if settings.dry_run:
        raise UsageError("a preview sends requests; `fabe-ds run --dry-run` sends none")
    seen = preview(settings, number)
    _print_preview(seen)
    if seen.stopped:
        raise RunStopped(seen.stopped)


def _settings(config: Path | None, flags: dict[str, Any]) -> RunConfig:
    from fabe_ds.cli.streams import stored_input

    variables = flags.pop("template_vars", None)
    if variables:
        flags["template_vars"] = dict(map(_variable, variables))
    settings = read_config(
        {name: value for name, value in flags.items() if value not in (None, [])}, config
    )
    _log_to_stderr(settings.log_level)
    if settings.input_path != STANDARD:
        return settings
    if sys.stdin.isatty():
        print("reading standard input (Ctrl-D ends it)", file=sys.stderr)
    folder = Layout(settings.cache_dir).stdin
    if settings.dry_run:
        folder = Path(tempfile.mkdtemp(prefix="fabe-ds-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return stored_input(settings, sys.stdin.buffer, folder)


def _run_and_report(settings: RunConfig) -> None:
    from fabe_ds.cli.streams import copy_to

    if settings.output_path != STANDARD:
        raise typer.Exit(_run_and_print(settings).exit_code)
    with contextlib.redirect_stdout(sys.stderr):
        result = _run_and_print(settings)
    copy_to(sys.stdout.buffer, result.outputs)
    raise typer.Exit(result.exit_code)


def _run_and_print(settings: RunConfig) -> RunResult:
    from fabe_ds.pipeline import run
    from fabe_ds.report.progress import watching

    # Records make millions of small objects and no cycles; collecting at every 700th of them
    # takes a third of the time of a run without a model.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    push = _push_of(settings)
    result = run(settings, watching)
    _print_summary(result, settings.max_new_tokens, settings.output_path == STANDARD)
    if push is not None and result.failed and not settings.force:
        print("not pushed: records failed (--force pushes all the same)", file=sys.stderr)
    elif push is not None:
        print(f"pushed: {push(result)}")
    return result


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


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--template-var {text}: write name=value")
    return name, value


def _signature() -> inspect.Signature:
    """The run command's parameters, made of the settings that `RunConfig` declares."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    file = Annotated[
        Path | None,
        typer.Option("--config", help="YAML file of settings.", rich_help_panel="Input and output"),
    ]
    parameters = [inspect.Parameter("config", keyword, default=None, annotation=file)]
    for name in sorted(RunConfig.model_fields, key=_place):
        declared = RunConfig.model_fields[name]
        kind = _flag_type(declared.annotation)
        spelled = flag(name)
        names = [f"{spelled}/--no-{spelled[2:]}"] if kind is bool else [spelled]
        option = typer.Option(
            *names,
            help=_help(name, declared),
            rich_help_panel=setting(name, "panel"),
            show_default=False,
            metavar=_choices(declared.annotation),
            autocompletion=_completion(name, declared.annotation),
        )
        listed = list[str] if kind is list else kind
        annotation = Annotated[listed | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, keyword, default=None, annotation=annotation))
    return inspect.Signature(parameters)


def _flag_type(annotation: Any) -> type:
    """How a flag's text is read; pydantic does the rest."""
    options = get_args(annotation) if get_origin(annotation) is not None else (annotation,)
    if get_origin(annotation) in (list, dict):
        return list
    if any(get_origin(option) is Literal for option in options):
        return str
    for kind in (bool, int, float):
        if kind in options:
            return kind
    return str


def _place(name: str) -> tuple[int, bool]:
    """Where a flag stands in --help: its panel, and in the first what is read and written."""
    panel = setting(name, "panel")
    return PANELS.index(panel), panel == PANELS[0] and name in TransformConfig.model_fields


def _help(name: str, declared: FieldInfo) -> str:
    text = declared.description or ""
    default = declared.get_default(call_default_factory=True)
    if default not in (None, [], {}):
        shown = str(default).lower() if isinstance(default, bool) else default
        text += f"  [default: {shown}]"
    if variable := setting(name, "environment"):
        text += f"  [env: {variable}]"
    return text.replace("[", "\\[")  # else a style of rich's


def _choices(annotation: Any) -> str | None:
    """What --help shows for the values of a flag that takes but a few words."""
    options = _options(annotation)
    words = [value for option in options for value in _words(option)]
    if not words:
        return None
    numbers = any(not _words(option) and option is not type(None) for option in options)
    return "|".join(["NUMBER", *words] if numbers else words)


def _options(annotation: Any) -> tuple[Any, ...]:
    return (annotation,) if get_origin(annotation) is Literal else get_args(annotation)


def _words(option: Any) -> tuple[str, ...]:
    return get_args(option) if get_origin(option) is Literal else ()


def _completion(name: str, annotation: Any) -> Callable[[str], list[str]] | None:
    """What the shell offers for a flag's value; None leaves it the names of files."""
    words = [value for option in _options(annotation) for value in _words(option)]
    if not words and name != "provider":
        return None

    def complete(incomplete: str) -> list[str]:
        if name == "provider":
            from fabe_ds.providers import provider_names

            known: Iterable[str] = provider_names()
        else:
            known = words
        return [value for value in known if value.startswith(incomplete)]

    return complete


_run.__signature__ = _signature()  # type: ignore[attr-defined]
app.command("run", cls=ValuedFlags, help="Rewrite a field of every record.")(_run)
_preview.__signature__ = _run.__signature__.replace(  # type: ignore[attr-defined]
    parameters=[
        inspect.Parameter(
            "number",
            inspect.Parameter.KEYWORD_ONLY,
            default=5,
            annotation=Annotated[int, typer.Option("-n", help="How many records.", min=1)],
        ),
        *_run.__signature__.parameters.values(),  # type: ignore[attr-defined]
    ]
)
app.command(
    "preview",
    cls=ValuedFlags,
    help="Rewrite a few records for real, show before and after, and what all would take.",
)(_preview)


@app.command("providers")
def providers() -> None:
    """List the providers, what each needs, and whether it is there."""
    from fabe_ds.providers import missing_of, provider_class, provider_names

    for name in provider_names():
        try:
            found = provider_class(name)
            state, needs = missing_of(found) or "ready", found.needs
        except UsageError as error:
            state, needs = str(error), "?"
        print(f"{name:<12} {state}\n{'':<12} needs {needs}")


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="Where.")] = Path(),
    provider: Annotated[str, typer.Option(help="Who answers.")] = "openai",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a commented configuration and a prompt to begin with."""
    from fabe_ds.tools.init import write_project

    for path in write_project(folder, provider, force):
        print(f"written: {path}")


@app.command("doctor")
def doctor(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of a run's settings, to check these too.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="The cache folder.  \\[default: .cache]")
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="A server to look for.")] = None,
) -> None:
    """Check packages, devices, servers, keys and the cache."""
    from fabe_ds.tools.doctor import findings

    flags = {"cache_dir": cache_dir, "base_url": base_url}
    settings = read_config({name: value for name, value in flags.items() if value}, config)
    bad = False
    asked = settings if config is not None else None
    for state, what, detail in findings(settings.cache_dir, settings.base_url, asked):
        print(f"{state:<5} {what:<18} {detail}")
        bad = bad or state == "bad"
    raise typer.Exit(int(bad))


@app.command("retry")
def retry(
    report: Annotated[Path, typer.Argument(help="The run's outputs.run.json.")],
    api_key: Annotated[str | None, typer.Option(help="Key for the server.")] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Those too that would fail the same (truncated, refused, ...)."),
    ] = False,
) -> None:
    """Run a run again as it was: just its failed records are sent."""
    changes = {"resume": True, "offline": False, "retry_all": everything}
    settings = _config_of(report, api_key).model_copy(update=changes)
    _log_to_stderr(settings.log_level)
    _run_and_report(settings)


def _config_of(report: Path, api_key: str | None = None) -> RunConfig:
    from fabe_ds.report.run_report import read_report

    return validated(RunConfig, {**read_report(report).config, "api_key": api_key}, {})


@app.command("push")
def push(
    report: Annotated[Path, typer.Argument(help="The run's outputs.run.json.")],
    repo: Annotated[str, typer.Argument(help="Dataset of the Hub (org/name).")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    config_name: Annotated[
        str | None,
        typer.Option(help="Configuration to push as.  \\[default: the one that was read]"),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split to push as.  \\[default: the one that was read]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="With failed records too.")] = False,
    failures: Annotated[
        bool, typer.Option("--failures", help="The failed ones too, as a configuration.")
    ] = False,
    hub: Annotated[Literal["huggingface", "modelscope"], typer.Option(help="Whose hub.")] = (
        "huggingface"
    ),
) -> None:
    """Push what a run has written to the Hub, with a card that says how it was made."""
    from fabe_ds.hub import push_to_hub

    place = push_to_hub(
        report,
        repo,
        private=not public,
        revision=revision,
        config_name=config_name,
        split=split,
        force=force,
        failures=failures,
        hub=hub,
    )
    print(f"pushed: {place}")


@app.command("report")
def report_page(
    report: Annotated[Path, typer.Argument(help="The run's outputs.run.json.")],
    output: Annotated[Path | None, typer.Option(help="The page.  \\[default: beside it]")] = None,
) -> None:
    """Write a page about a run: counts, charts, failures, before and after."""
    from fabe_ds.report.page import write_page

    print(f"written: {write_page(report, output)}")


cache_app = typer.Typer(no_args_is_help=True, help="Look into the cache folder.")
app.add_typer(cache_app, name="cache")
_Folder = Annotated[Path, typer.Option("--cache-dir", help="The cache folder.")]


@cache_app.command("stats")
def cache_stats(cache_dir: _Folder = Path(".cache")) -> None:
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
    cache_dir: _Folder = Path(".cache"),
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
def cache_export(cache_dir: _Folder = Path(".cache")) -> None:
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

    print(explain(_config_of(report), record))


@app.command("version")
def version() -> None:
    """Print the version."""
    from fabe_ds.version import __version__

    print(__version__)


def _say_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """What all commands have in common."""
    try:
        Path.cwd()
    except OSError:
        raise UsageError("the folder that this command runs in is gone; go to another") from None


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is when a line is logged: a progress bar stands in for it, and
    puts the line above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[_ToStderr()],
        force=True,
    )
    logging.getLogger("fabe_ds").setLevel(level)
    if level != "DEBUG":
        for noisy in ("datasets", "transformers", "modelscope"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


def _print_dry_run(seen: Any) -> None:
    for number, request in enumerate(seen.requests, 1):
        tokens = f" ({seen.prompt_tokens[number - 1]} tokens)" if seen.prompt_tokens else ""
        print(f"--- request {number}{tokens}\n{request}")
    print(
        f"dry run: {seen.records} records, {seen.to_do} to do"
        + (f", of them {seen.cached} answered already" if seen.cached else "")
        + _in_words("failed before, and not asked again", seen.kept).replace(";", ",", 1)
        + (f", {seen.to_send} to send" if seen.to_send != seen.to_do - seen.cached else "")
        + _in_words("skipped", seen.skipped)
        + _in_words("failing", seen.failed)
    )
    for error in seen.bad_files:
        print(f"left out: {error}")


def _print_preview(seen: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    from fabe_ds.report.page import diff_lines

    console = Console(highlight=False, soft_wrap=True)
    marks = {"same": ("  ", "dim"), "gone": ("- ", "red"), "new": ("+ ", "green")}
    for number, request, outcome in seen.shown:
        answer = outcome.completion
        tokens = (
            f", {answer.prompt_tokens} prompt and {answer.completion_tokens} completion tokens"
            if answer is not None and answer.completion_tokens is not None
            else ""
        )
        state = outcome.message or ("from cache" if outcome.cached else "done")
        console.print(Text(f"--- record {number}: {state}{tokens}", style="bold"))
        if outcome.text is None:
            continue
        lines = diff_lines(request.text[:SHOWN_CHARACTERS], outcome.text[:SHOWN_CHARACTERS])
        left = max(0, len(lines) - SHOWN_LINES)
        for kind, line in lines[:SHOWN_LINES]:
            mark, style = marks[kind]
            console.print(Text(mark + line, style=style))
        if left:
            console.print(Text(f"  ... {left} more lines", style="dim"))
    counts = seen.counts
    console.print(
        f"{len({number for number, *_ in seen.shown})} records in {seen.seconds:.1f} s, kept in "
        f"the cache; {counts.records} in all, {counts.to_send} were to be asked for"
    )
    for estimate in seen.estimates:
        likely, least, most = (
            _measured(number, estimate.name)
            for number in (estimate.likely, estimate.least, estimate.most)
        )
        what = "" if estimate.name == "time" else f" {estimate.name}"
        within = "" if least == most else f" ({least} to {most})"
        console.print(f"whole run: about {likely}{what}{within}")


def _measured(number: float, name: str) -> str:
    """A number of tokens, money or seconds, for people."""
    if name == "cost":
        return f"{number:,.4g}"
    if name != "time":
        return f"{number:,.0f}"
    from fabe_ds.text import clock

    return clock(number) if number >= 60 else f"{number:.2g} s"


def _in_words(what: str, counts: Any) -> str:
    if not counts:
        return ""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    return f"; {sum(counts.values())} {what} ({reasons})"


def _print_summary(result: RunResult, max_new_tokens: int, to_stdout: bool) -> None:
    rate = result.records / max(result.seconds - result.loading, 1e-9)
    print(
        f"{result.records} records: {result.done} rewritten, {result.cached} from cache"
        + (f", {result.failed} failed" if result.failed else "")
        + _in_words("skipped", result.skipped)
        + f"; {result.seconds:.1f} s"
        + (f" ({result.loading:.1f} of them loading the model)" if result.loading > 1 else "")
        + f", {rate:.1f} records/s"
    )
    if result.requests:
        kinds = {"retries": result.retries, "asked again": result.reasks, "twice": result.hedged}
        told = ", ".join(f"{n} {what}" for what, n in kinds.items() if n or what == "retries")
        print(
            f"{result.requests} requests ({told}), {result.prompt_tokens} prompt "
            f"and {result.completion_tokens} completion tokens"
            + (f", cost {result.cost:.4f}" if result.cost else "")
        )
    if result.failed and result.failures_file is not None:
        how = ", ".join(f"{n} {kind}" for kind, n in sorted(result.failures_by_kind.items()))
        print(f"failed {result.failed} ({how}): {result.failures_file}")
        print(f"the first: {_first_failure(result.failures_file)}")
        for line in what_helps(result.failures_by_kind, max_new_tokens):
            print(line)
    for error in result.bad_files:
        print(f"left out: {error}")
    for note in result.notes:
        print(f"note: {note}")
    if result.outputs and not to_stdout:
        print(f"written: {_outputs(result.outputs)}")
    if result.report is not None:
        print(f"report: {_near(result.report)} (fabe-ds report makes a page of it)")


def _outputs(paths: list[Path]) -> str:
    if len(paths) == 1:
        return str(_near(paths[0]))
    folder = Path(os.path.commonpath(paths))
    return f"{_near(folder)}/ ({len(paths)} files)"


def _near(path: Path) -> Path:
    """The path as it is from here, where it is below this folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _first_failure(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        failure = json.loads(next(lines))
    where = f"{failure['file']}:{failure['line']}" if "file" in failure else failure["record"]
    return f"record {where}: {failure['message']}"


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM, and SIGHUP where it is not ignored (nohup), end a run as Ctrl-C does; a second
    signal of these ends it at once."""

    def interrupt(number: int, frame: object) -> None:
        for either in before:
            signal.signal(either, lambda *_: os._exit(INTERRUPTED))
        print("stopping: waiting for what is on its way (again to drop it)", file=sys.stderr)
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Entry point of the commands. Every error is one line; exit codes are those of errors.py."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would write over ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _use_any_terminal()
    try:
        with _terminating():
            code = app(standalone_mode=False)
            sys.stdout.flush()
    except typer.Exit as error:
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except _CallError as error:
        _suggest_near_ones(error)
        if message := error.format_message():  # empty where it was just help that was shown
            _complain(message)
        code = USAGE
    except FabeError as error:
        _complain(str(error))
        code = error.exit_code
    except BrokenPipeError:
        code = 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _complain(place + reason(error))
        code = 1
    except MemoryError:
        _complain("out of memory")
        code = 1
    except Exception as error:
        _complain(_unexpected(error))
        code = 1
    if code == INTERRUPTED:  # typer makes an Exit of KeyboardInterrupt
        print(
            "stopped; what was answered is kept, run the same command again to go on",
            file=sys.stderr,
        )
    sys.exit(_flushed(code if isinstance(code, int) else 0))


def _use_any_terminal() -> None:
    """What a terminal cannot show is written as an escape; a stream that is closed is none."""
    codecs.register_error("fabe-ds", _escaped)
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 - until we end
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fabe-ds")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Bytes of a file's name that are no UTF-8 as \\xNN, other characters as Python has them."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    shown = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)
    return shown.encode("ascii", "backslashreplace").decode(), error.end


def _complain(message: str) -> None:
    """Says what is wrong, in one line."""
    message = " ".join(message.split("\n"))
    if len(message) > LINE_SHOWN:
        message = f"{message[:LINE_SHOWN]}..."
    with contextlib.suppress(OSError):  # standard error is full: the exit code says it
        print(f"fabe-ds: {message}", file=sys.stderr, flush=True)


def _suggest_near_ones(error: Any) -> None:
    """Leaves of the flags that may have been meant those that are very near."""
    name = getattr(error, "option_name", None)
    if name and getattr(error, "possibilities", None):
        error.possibilities = difflib.get_close_matches(name, error.possibilities, 1, VERY_NEAR)


def _unexpected(error: Exception) -> str:
    """What is said of a fault of ours. Where it is goes into a file."""
    what = f"a fault of fabe-ds: {type(error).__name__}: {first_line(error)}"
    try:
        handle, name = tempfile.mkstemp(prefix="fabe-ds-", suffix=".txt")
        with os.fdopen(handle, "w", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return what
    return f"{what}; please report it, with {name}"


def _flushed(code: int) -> int:
    """The exit code, when what was printed is where it belongs."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _complain(f"standard output: {reason(error)}")
        with contextlib.suppress(OSError):  # or the interpreter complains of it once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code
