"""What commands print: the summary of a run, a dry run, a preview."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from fabe_ds.config.settings import STANDARD, RunConfig
from fabe_ds.files import from_here
from fabe_ds.report import summary
from fabe_ds.report.advice import what_helps

if TYPE_CHECKING:
    from fabe_ds.report.result import RunResult


def print_dry_run(seen: Any, quiet: bool, as_json: bool) -> None:
    if as_json:
        counts = {field.name: getattr(seen, field.name) for field in fields(seen)}
        if seen.tokens is not None:
            counts["tokens"] = {"prompt": seen.tokens.total, "counted_by": seen.tokens.how}
        print(json.dumps(counts, default=str))
        return
    for number, request in () if quiet else enumerate(seen.requests, 1):
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
    if seen.tokens is not None and seen.tokens.requests:
        total = seen.tokens.total
        more = ", fallback models not counted" if seen.has_fallbacks else ""
        cost = "" if seen.most_cost is None else f"; cost {seen.most_cost:.4g} at most{more}"
        print(
            f"about {total:,} prompt tokens ({seen.tokens.how}), at most "
            f"{seen.most_completion_tokens:,} completion tokens{cost}"
        )
    for error in seen.bad_files:
        print(f"left out: {error}")


def print_tuned(tuned: Any) -> None:
    print(f"{'batch size':>10} {'in flight':>9} {'records':>7} {'records/s':>9} {'tokens/s':>9}")
    for trial in tuned.trials:
        best = "  <- best" if trial is tuned.best else ""
        print(
            f"{trial.batch_size:10} {trial.in_flight:9} {trial.records:7} "
            f"{trial.records_per_second:9.2f} {trial.tokens_per_second:9.0f}{best}"
        )
    if tuned.ended:
        print(f"no more are tried: {tuned.ended}")


def print_preview(seen: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    from fabe_ds.tools.preview import SHOWN_LINES

    console = Console(highlight=False, soft_wrap=True)
    marks = {"same": ("  ", "dim"), "gone": ("- ", "red"), "new": ("+ ", "green")}
    for shown in seen.shown:
        console.print(Text(f"--- {shown}", style="bold"))
        lines = shown.diff()
        for kind, line in lines[:SHOWN_LINES]:
            mark, style = marks[kind]
            console.print(Text(mark + line, style=style))
        if left := max(0, len(lines) - SHOWN_LINES):
            console.print(Text(f"  ... {left} more lines", style="dim"))
    console.print(str(seen))


def _in_words(what: str, counts: Any) -> str:
    if not counts:
        return ""
    return f"; {sum(counts.values())} {what} ({summary.counts(counts)})"


STYLES = {
    "good": "green",
    "known": "cyan",
    "bad": "red",
    "advice": "yellow",
    "quiet": "dim",
    "plain": "",
}
"""Colours of a summary, by what they mean."""


def print_summary(result: RunResult, settings: RunConfig) -> None:
    """The counts of a run, what failed and what helps, and where it all is: a panel on a terminal,
    plain lines elsewhere."""
    from fabe_ds.remote import url_of

    url = url_of(settings.input_path if settings.inplace else settings.output_path)
    if settings.output_path == STANDARD:
        result = replace(result, outputs=[])
    if _is_terminal():
        _print_panel(result, settings, url)
    else:
        _print_lines(result, settings, url)


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _print_panel(result: RunResult, settings: RunConfig, url: str | None) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for fact in summary.facts(result, settings.max_new_tokens, url):
        style = STYLES[fact.style]
        grid.add_row(Text(fact.name, style or "bold"), Text(fact.text, style))
    title = Text(f"{result.records:,} records", "bold")
    edge = "red" if result.exit_code else "green"
    Console(highlight=False).print(
        Panel(grid, title=title, title_align="left", border_style=edge, expand=False)
    )
    if result.report is not None:
        print(f"a page about it: fabe-ds report {summary.report_name(result)}")


def _print_lines(result: RunResult, settings: RunConfig, url: str | None) -> None:
    rate = summary.records_per_second(result)
    print(
        f"{result.records} records: {result.done} rewritten, {result.cached} from cache"
        + (f", {result.failed} failed" if result.failed else "")
        + _in_words("skipped", result.skipped)
        + f"; {result.seconds:.1f} s"
        + (f" ({result.loading:.1f} of them loading the model)" if result.loading > 1 else "")
        + f", {rate:.1f} records/s"
    )
    if result.requests:
        cost = f", cost {result.cost:.4f}" if result.cost else ""
        sent, told = summary.requests(result).split(" ", 1)
        print(f"{sent} requests {told}, {summary.tokens(result)}{cost}")
    if result.failed and result.failures_file is not None:
        print(
            f"failed {result.failed} ({summary.counts(result.failures_by_kind)}): "
            f"{result.failures_file}"
        )
        print(f"the first: {summary.first_failure(result.failures_file)}")
        helps = what_helps(
            result.failures_by_kind, settings.max_new_tokens, summary.report_name(result)
        )
        for line in helps:
            print(line)
    if len(result.answered_by) > 1:
        print(f"answered by: {summary.answered_by(result)}")
    for error in result.bad_files:
        print(f"left out: {error}")
    for note in result.notes:
        print(f"note: {note}")
    if result.outputs:
        print(f"written: {url or summary.place_of(result.outputs)}")
    if result.report is not None:
        print(f"report: {from_here(result.report)} (fabe-ds report makes a page of it)")


def print_failures(result: RunResult) -> None:
    """The one line of a quiet run in which records failed, on standard error."""
    if result.failed:
        kinds = summary.counts(result.failures_by_kind)
        print(
            f"fabe-ds: {result.failed} of {result.records} records failed ({kinds}): "
            f"{result.failures_file}",
            file=sys.stderr,
        )
    for error in result.bad_files:
        print(f"fabe-ds: left out: {error}", file=sys.stderr)
    if not (result.done or result.cached or result.failed):
        for note in result.notes:
            print(f"fabe-ds: {note}", file=sys.stderr)
