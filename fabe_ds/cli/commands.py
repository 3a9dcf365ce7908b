"""The commands: from their flags to what they do."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fabe_ds.cli.batch import batch_app
from fabe_ds.cli.cache import cache_app
from fabe_ds.cli.display import print_dry_run, print_preview, print_tuned
from fabe_ds.cli.flags import ValuedFlags, run_signature
from fabe_ds.cli.running import Telling, config_of, errors_as_json, run_and_report, settings_of
from fabe_ds.cli.terminal import ended_by_signal, log_to_stderr
from fabe_ds.config.load import read_config
from fabe_ds.errors import RunStopped, UsageError

app = typer.Typer(
    name="fabe-ds",
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Rewrite one field of every record with a language model; give the rest back as it was.",
)


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Say nothing but what went wrong.", rich_help_panel="Execution"
    ),
]
AsJson = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the summary as one JSON object, and nothing else to standard output.",
        rich_help_panel="Execution",
    ),
]
Live = Annotated[
    bool,
    typer.Option(
        "--live",
        help="Serve the page of the run on this machine while it goes on.",
        rich_help_panel="Execution",
    ),
]


def _run(config: Path | None, quiet: bool, as_json: bool, live: bool, **flags: Any) -> None:
    telling = Telling(quiet, as_json, live)
    with errors_as_json(as_json):
        settings = settings_of(config, flags)
        if not settings.dry_run:
            run_and_report(settings, telling)
        from fabe_ds.tools.dry_run import dry_run

        telling.begin(settings)
        print_dry_run(dry_run(settings), quiet, as_json)


def _preview(config: Path | None, number: int, **flags: Any) -> None:
    from fabe_ds.tools.preview import preview

    settings = settings_of(config, flags)
    if settings.dry_run:
        raise UsageError("a preview sends requests; `fabe-ds run --dry-run` sends none")
    seen = preview(settings, number)
    print_preview(seen)
    if seen.stopped:
        raise RunStopped(seen.stopped)


def _flags(**more: tuple[Any, Any]) -> inspect.Signature:
    """The flags of a run, and more: (annotation, default) by their names."""
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in more.items()
    ]
    return _FLAGS.replace(parameters=[*_FLAGS.parameters.values(), *added])


Number = Annotated[int, typer.Option("-n", help="How many records.", min=1)]
_FLAGS = run_signature()
_run.__signature__ = _flags(  # type: ignore[attr-defined]
    quiet=(Quiet, False), as_json=(AsJson, False), live=(Live, False)
)
app.command("run", cls=ValuedFlags, help="Rewrite a field of every record.")(_run)
_preview.__signature__ = _flags(number=(Number, 5))  # type: ignore[attr-defined]
app.command(
    "preview",
    cls=ValuedFlags,
    help="Rewrite a few records for real, show before and after, and what all would take.",
)(_preview)


def _tune(config: Path | None, number: int, **flags: Any) -> None:
    from fabe_ds.tools.tune import tune, write_settings

    settings = settings_of(config, flags)
    if settings.dry_run:
        raise UsageError("tune asks the model; `fabe-ds run --dry-run` does not")
    tuned = tune(settings, number)
    print_tuned(tuned)
    size = tuned.best.batch_size
    if config is None:
        print(f"use it: --batch-size {size} --concurrency {tuned.concurrency}")
        return
    write_settings(config, {"batch_size": size, "concurrency": tuned.concurrency})
    print(f"written to {config}: batch_size: {size}, concurrency: {tuned.concurrency}")


_tune.__signature__ = _flags(number=(Number, 200))  # type: ignore[attr-defined]
app.command(
    "tune",
    cls=ValuedFlags,
    help="Find out on some records how many a local model is quickest with at once, and write that "
    "into --config.",
)(_tune)


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
    base_url: Annotated[
        list[str] | None, typer.Option(help="A server to look for; repeatable.")
    ] = None,
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
    quiet: Quiet = False,
    as_json: AsJson = False,
    live: Live = False,
) -> None:
    """Run a run again as it was: just its failed records are sent."""
    changes = {"resume": True, "offline": False, "retry_all": everything}
    with errors_as_json(as_json):
        settings = config_of(report, api_key).model_copy(update=changes)
        log_to_stderr(settings.log_level)
        run_and_report(settings, Telling(quiet, as_json, live))


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
    report: Annotated[Path, typer.Argument(help="The run's report.")] = Path("outputs.run.json"),
    output: Annotated[Path | None, typer.Option(help="The page.  \\[default: beside it]")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Serve the page while the run goes on, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int,
        typer.Option(help="Of --follow.  \\[default: any]", show_default=False, min=0, max=65535),
    ] = 0,
) -> None:
    """Write a page about a run: counts, charts, failures, before and after."""
    if follow:
        _follow(report, port)
        return
    from fabe_ds.report.page import write_page

    print(f"written: {write_page(report, output)}")


def _topics(incomplete: str) -> list[str]:
    from fabe_ds.cli.docs import TOPICS

    return [topic for topic in TOPICS if topic.startswith(incomplete)]


@app.command("docs")
def docs(
    topic: Annotated[
        str | None,
        typer.Argument(help="What about.  \\[default: list the topics]", autocompletion=_topics),
    ] = None,
) -> None:
    """Read the reference: files, answers, servers, local models, Python, ..."""
    from fabe_ds.cli.docs import listed, show, text_of

    if topic is None:
        print(listed())
        print("\nfabe-ds docs TOPIC shows one of them.")
    else:
        show(text_of(topic))


def _follow(report: Path, port: int) -> None:
    from fabe_ds.report.follower import Follower

    if not report.name.endswith(".run.json") or not report.absolute().parent.is_dir():
        raise UsageError(f"{report}: name where the run leaves its report (outputs.run.json)")
    with contextlib.closing(Follower(lambda: report, port)) as follower, ended_by_signal() as over:
        print(f"following {report}: {follower.url} (Ctrl-C ends it)", flush=True)
        over.wait()


app.add_typer(batch_app, name="batch")
app.add_typer(cache_app, name="cache")


@app.command("version")
def version() -> None:
    """Print the version."""
    from fabe_ds.version import __version__

    print(__version__)


def _say_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


FIRST_STEPS = """\
Rewrites one field of every record with a language model; the rest comes back as
it was. To begin with:

  try it without a model   fabe-ds run --input data.jsonl --field text
  then with one            ... --instruction "Correct the spelling." \\
                             --provider openai --model NAME \\
                             --base-url http://localhost:8000/v1
  look at a few first      fabe-ds preview -n 3 ...    (with the same flags)
  write a configuration    fabe-ds init --provider openai
  is everything there?     fabe-ds doctor
  read about it            fabe-ds docs

fabe-ds --help lists the commands, fabe-ds run --help every flag."""


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """What all commands have in common."""
    try:
        Path.cwd()
    except OSError:
        raise UsageError("the folder that this command runs in is gone; go to another") from None
    if context.invoked_subcommand is None:
        print(FIRST_STEPS)
