"""The files that a run leaves beside its output: their names, and how they are known again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fabe_ds.errors import UsageError, first_line

LEFT_BEHIND = ("run.json", "failures.jsonl", "samples.jsonl")
"""What stands beside the output of a run, after its name and a dot."""


_OURS = b'"fabe_ds":'  # as a report begins


def left_by_run(report: Path) -> Iterator[str]:
    """The output of the run that left this report, and the files beside it."""
    try:
        with report.open("rb") as file:
            if _OURS not in file.read(64):
                return
    except OSError:
        return
    output = report.with_name(report.name.removesuffix(".run.json"))
    for path in (output, *(output.with_name(f"{output.name}.{name}") for name in LEFT_BEHIND)):
        yield os.path.realpath(path)


REPORT, FAILURES, SAMPLES = LEFT_BEHIND


def of_report(report: Path, name: str) -> Path:
    """A file that stands beside the same output as a report."""
    return report.with_name(f"{report.name.removesuffix('.run.json')}.{name}")


LIVE_SUFFIX = ".live.json"


def live_file(report: Path) -> Path:
    """Where a run says how far it is, while it runs: a hidden file, which nobody reads as input."""
    return report.with_name(f".{report.name.removesuffix('.run.json')}{LIVE_SUFFIX}")


DEFAULT_OUTPUT = Path("outputs")


def beside(path: Path, name: str) -> Path:
    """`outputs/` -> `outputs.run.json`: beside the output, where no later run takes it for data."""
    try:
        path = path.resolve()
    except (OSError, RuntimeError) as error:  # a folder that is gone, links in a circle
        raise UsageError(f"{path}: {first_line(error)}") from None
    return path.with_name(f"{path.name}.{name}")
