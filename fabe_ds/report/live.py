"""The file in which a run says how far it is, while it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fabe_ds.repeating import repeating
from fabe_ds.report.course import Course
from fabe_ds.report.progress import describe
from fabe_ds.run_files import live_file
from fabe_ds.scratch import unlink
from fabe_ds.version import __version__

SECONDS = 1.0
POINTS = 80
"""Moments of a run that its live file holds."""


def in_place(config: Mapping[str, Any]) -> bool:
    """Whether answers take the place of the texts that were asked about."""
    return not config["output_fields"]


def about(config: Mapping[str, Any]) -> str:
    """What is asked about, and who is asked."""
    asked = f"{config['provider']} {config['model'] or ''}".strip()
    return f"{config['field']} of {config['input_path']}, by {asked}"


@contextlib.contextmanager
def told_beside(report: Path, course: Course, config: Mapping[str, Any]) -> Iterator[None]:
    """While the block runs, a hidden file beside the report says, once a second, how far the run
    is. Where it cannot be written, nothing is said, and the run goes on."""
    place = live_file(report)
    asked = {"about": about(config), "in_place": in_place(config), "began": time.time()}

    def tell() -> None:
        with contextlib.suppress(OSError):
            _write(place, _told(course, asked))

    try:
        with repeating(tell, SECONDS):
            yield
    finally:
        for left in (place, _scratch(place)):
            unlink(str(left))


def _write(place: Path, told: dict[str, Any]) -> None:
    """Not brought to the disk: what a crash leaves of it is of no use."""
    scratch = _scratch(place)
    scratch.write_text(json.dumps(told), encoding="utf-8")
    scratch.replace(place)


def _scratch(place: Path) -> Path:
    """Where the file is written before it takes its place: a name that is no input's either."""
    return place.with_name(f".new{place.name}")


def _told(course: Course, asked: Mapping[str, Any]) -> dict[str, Any]:
    stats, points = course.stats, list(course.history)
    counts = stats.counts()
    return {
        "fabe_ds": __version__,
        "pid": os.getpid(),
        **asked,
        "line": describe(course),
        "done": stats.settled if course.stats.settled else course.done,
        "total": course.total,
        "seconds": time.monotonic() - course.started,
        "counts": {
            name: counts[name]
            for name in ("done", "cached", "failed", "requests", "refusals", "loading", "cost")
        },
        "skipped": stats.skipped + stats.not_chosen,
        "tokens": [stats.prompt_tokens, stats.completion_tokens],
        "notes": counts["notes"],
        "history": points[:: max(1, len(points) // POINTS)],
        "latency": counts["latency"],
        "failures": counts["failures"],
        "messages": counts["messages"],
        "latest": counts["latest"],
    }
