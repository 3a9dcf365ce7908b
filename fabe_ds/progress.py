"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from fabe_ds.engine.intake import Stats

log = logging.getLogger(__name__)

BAR_SECONDS, LINE_SECONDS = 0.2, 5.0


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
    seconds = max(seconds, 1e-9)
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
    return ", ".join(parts)


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _lines(stats: Stats, total: int, stop: threading.Event) -> None:
    started = time.monotonic()
    while not stop.wait(LINE_SECONDS):
        log.info("%s", describe(stats, total, time.monotonic() - started))


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
