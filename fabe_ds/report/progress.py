"""How far a run is, shown: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from fabe_ds.engine.local import LOADING as LOADING_MODEL
from fabe_ds.report.advice import often_failing
from fabe_ds.report.course import ANSWERING, LOADING, Course
from fabe_ds.request import Stats
from fabe_ds.text import clock

log = logging.getLogger(__name__)

BAR_SECONDS, NOTEBOOK_SECONDS = 0.2, 0.5
LINE_SECONDS = ((60.0, 5.0), (180.0, 15.0), (float("inf"), 60.0))
"""Until so many seconds of a run, a line each so many."""


@contextlib.contextmanager
def watching(course: Course) -> Iterator[None]:
    """Shows how far a run is while the block runs: a bar on a terminal, one line that changes in a
    notebook, and a line of the log now and then elsewhere."""
    over = threading.Event()
    show = _bar if sys.stderr.isatty() else _one_line if in_notebook() else _lines
    thread = threading.Thread(target=show, args=(course, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    shell = sys.modules.get("IPython")
    running = shell.get_ipython() if shell is not None else None
    return type(running).__name__ == "ZMQInteractiveShell"


def describe(course: Course) -> str:
    """One line: the phase, how far it is, and the time that it has left."""
    seconds = course.seconds
    if course.phase == ANSWERING:
        return _answering(course.stats, course.total, seconds)
    if not course.total:
        return course.phase
    done, total = min(course.done, course.total), course.total
    if course.phase == LOADING:
        line = f"{LOADING}, {_size(done)} of {_size(total)}"
    else:
        line = f"{course.phase}, {done} of {total} records"
    return f"{line}, {_left(done, total, seconds)} left" if 0 < done < total else line


def _answering(stats: Stats, total: int, seconds: float) -> str:
    if stats.state == LOADING_MODEL:
        return f"{stats.settled}/{total}, {LOADING_MODEL}"
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


def _left(done: int, total: int, seconds: float) -> str:
    return clock(seconds * (total - done) / done)


def _size(count: int) -> str:
    """Bytes, for people."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.0f} {units[0]}" if size >= 10 or units[0] == "B" else f"{size:.1f} {units[0]}"


def _lines(course: Course, over: threading.Event) -> None:
    started = time.monotonic()
    while not over.wait(_line_seconds(time.monotonic() - started)):
        log.info("%s", describe(course))


def _line_seconds(seconds: float) -> float:
    return next(pause for until, pause in LINE_SECONDS if seconds < until)


def _one_line(course: Course, over: threading.Event) -> None:
    width = 0
    while not over.wait(NOTEBOOK_SECONDS):
        line = describe(course)
        sys.stderr.write(f"\r{line:<{width}}")
        sys.stderr.flush()
        width = len(line)
    sys.stderr.write(f"\r{'':<{width}}\r")


def _bar(course: Course, over: threading.Event) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        while not over.wait(BAR_SECONDS):
            text = describe(course)
            done = course.stats.settled if course.phase == ANSWERING else course.done
            total = course.total or None
            progress.update(task, completed=done, total=total, description=escape(text))
