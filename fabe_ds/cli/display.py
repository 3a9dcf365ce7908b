"""What commands print: the summary of a run, a dry run, a preview."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.config.settings import STANDARD, RunConfig
from fabe_ds.report.advice import what_helps

if TYPE_CHECKING:
    from fabe_ds.report.result import RunResult


SHOWN_LINES, SHOWN_CHARACTERS = 80, 20_000
"""Of each record that a preview shows."""


def print_dry_run(seen: Any) -> None:
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


def print_summary(result: RunResult, settings: RunConfig) -> None:
    """The counts of a run, what failed and what helps, and where it all is."""
    from fabe_ds.remote import url_of

    to_stdout = settings.output_path == STANDARD
    url = url_of(settings.input_path if settings.inplace else settings.output_path)
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
            + (f"({result.cached_tokens} cached) " if result.cached_tokens else "")
            + f"and {result.completion_tokens} completion tokens"
            + (f" ({result.reasoning_tokens} reasoning)" if result.reasoning_tokens else "")
            + (f", cost {result.cost:.4f}" if result.cost else "")
        )
    if result.failed and result.failures_file is not None:
        how = ", ".join(f"{n} {kind}" for kind, n in sorted(result.failures_by_kind.items()))
        print(f"failed {result.failed} ({how}): {result.failures_file}")
        print(f"the first: {_first_failure(result.failures_file)}")
        for line in what_helps(result.failures_by_kind, settings.max_new_tokens):
            print(line)
    if len(result.answered_by) > 1:
        by = sorted(result.answered_by.items(), key=lambda pair: -pair[1])
        print(f"answered by: {', '.join(f'{model} {count}' for model, count in by)}")
    for error in result.bad_files:
        print(f"left out: {error}")
    for note in result.notes:
        print(f"note: {note}")
    if result.outputs and not to_stdout:
        print(f"written: {url or _outputs(result.outputs)}")
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
