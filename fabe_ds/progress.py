"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from fabe_ds.advice import often_failing
from fabe_ds.engine.intake import Stats
from fabe_ds.engine.local import LOADING
from fabe_ds.text import clock

log = logging.getLogger(__name__)

BAR_SECONDS = 0.2
LINE_SECONDS = ((60.0, 5.0), (180.0, 15.0), (float("inf"), 60.0))
"""Until so many seconds of a run, a line each so many."""


@contextlib.contextmanager
def watching(stats: Stats, total: int) -> Iterator[None]:
    """Shows `stats` of a run over `total` records while the block runs."""
    stop = threading.Event()
    show = _bar if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=show, args=(stats, total, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def describe(stats: Stats, total: int, seconds: float) -> str:
    """One line: counts, rates a second, and the time that is left."""
    if stats.state == LOADING:
        return f"{stats.settled}/{total}, {LOADING}"
    seconds = max(seconds - stats.loading, 1e-9)
    # What is in the cache takes no time, and says nothing of what is still to be asked for.
    asked = stats.done + stats.failed
    rate = (asked or stats.cached) / seconds
    parts = [f"{stats.settled}/{total}", f"{stats.done} done"]
    for name in ("cached", "failed", "skipped"):
        if count := getattr(stats, name):
            parts.append(f"{count} {name}")
    parts.append(f"{rate:.1f} records/s")
    tokens = stats.prompt_tokens + stats.completion_tokens
    if tokens:
        parts.append(f"{tokens / seconds:.0f} tokens/s")
    if rate and stats.settled < total:
        parts.append(f"{clock((total - stats.settled) / rate)} left")
    line = ", ".join(parts)
    if stats.state:
        line += f"; {stats.state}"
    elif advice := often_failing(stats.failures, asked):
        line += f"; {advice}"
    return line


def _lines(stats: Stats, total: int, stop: threading.Event) -> None:
    started = time.monotonic()
    while not stop.wait(_line_seconds(time.monotonic() - started)):
        log.info("%s", describe(stats, total, time.monotonic() - started))


def _line_seconds(seconds: float) -> float:
    return next(pause for until, pause in LINE_SECONDS if seconds < until)


def _bar(stats: Stats, total: int, stop: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    started = time.monotonic()
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        while not stop.wait(BAR_SECONDS):
            text = describe(stats, total, time.monotonic() - started)
            progress.update(task, completed=stats.settled, description=text)
