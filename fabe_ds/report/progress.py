"""How far a run is, shown: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

from fabe_ds.engine.local import LOADING as LOADING_MODEL
from fabe_ds.pace import STEP_SECONDS, counts_told
from fabe_ds.repeating import repeating
from fabe_ds.report.advice import often_failing
from fabe_ds.report.course import ANSWERING, LOADING, Course
from fabe_ds.report.notebook import Shown, bar_html, in_notebook
from fabe_ds.text import clock

log = logging.getLogger(__name__)

WIDE = 80
"""Columns of a terminal in which a whole line of progress has room."""
BAR_SECONDS, NOTEBOOK_SECONDS = 0.2, 0.5
LINE_SECONDS = ((60.0, 5.0), (180.0, 15.0), (float("inf"), 60.0))
"""Until so many seconds of a run, a line each so many."""


@contextlib.contextmanager
def watching(course: Course) -> Iterator[None]:
    """Shows how far a run is while the block runs: a bar on a terminal and in a notebook, and a
    line of the log now and then elsewhere."""
    over = threading.Event()
    show = _bar if sys.stderr.isatty() else _notebook_bar if in_notebook() else _lines
    thread = threading.Thread(target=show, args=(course, over), daemon=True)
    thread.start()
    try:
        with repeating(lambda: _note(course), STEP_SECONDS / 2):
            yield
    finally:
        over.set()
        thread.join()


def _note(course: Course) -> None:
    """Notes the counts, however seldom they are shown."""
    if course.stats.state == LOADING_MODEL:
        course.pace.forget()
    elif course.phase == ANSWERING:
        course.pace.note(course.stats)


def describe(course: Course, brief: bool = False) -> str:
    """One line: the phase, how far it is, and the time that it has left. `brief`: for a narrow
    terminal, where what holds the run up is the most that there is room for."""
    if course.phase == ANSWERING:
        return _answering(course, brief)
    if not course.total:
        return course.phase
    done, total = min(course.done, course.total), course.total
    if course.phase == LOADING:
        line = f"{LOADING}, {_size(done)} of {_size(total)}"
    else:
        line = f"{course.phase}, {done} of {total} records"
    return f"{line}, {_left(done, total, course.seconds)} left" if 0 < done < total else line


def _answering(course: Course, brief: bool) -> str:
    stats, total = course.stats, course.total
    if stats.state == LOADING_MODEL:
        return f"{stats.settled}/{total}, {LOADING_MODEL}"
    if brief and stats.state:
        return f"{stats.settled}/{total}; {stats.state}"
    told = counts_told(stats, course.pace, total, course.seconds - stats.loading, brief)
    line = f"{stats.settled}/{total}, {told}"
    if stats.state:
        line += f"; {stats.state}"
    elif advice := often_failing(stats.failures, stats.done + stats.failed):
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


def _notebook_bar(course: Course, over: threading.Event) -> None:
    bar = Shown(bar_html("", 0, 0))
    while not over.wait(NOTEBOOK_SECONDS):
        bar.show(bar_html(describe(course), *_reached(course)))
    # It stays in the notebook, and says how far the run came.
    done, total = _reached(course)
    bar.show(bar_html(_final(course), done, total or 1))


def _final(course: Course) -> str:
    """What is left to say when a run has ended, or was stopped."""
    stats = course.stats
    counts = {name: getattr(stats, name) for name in ("done", "cached", "failed", "skipped")}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    seconds = time.monotonic() - course.started
    return f"{told or 'nothing was asked for'}, {clock(seconds)}"


def _reached(course: Course) -> tuple[int, int]:
    """How much is done, of how much; 0 is not known."""
    done = course.stats.settled if course.phase == ANSWERING else course.done
    return done, course.total


def _bar(course: Course, over: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn
    from rich.table import Column
    from rich.text import Text

    class Said(ProgressColumn):
        def render(self, task: Task) -> Text:
            line = Text(task.description, no_wrap=True, overflow="ellipsis")
            line.highlight_regex(r"\d+ failed", "red")
            line.highlight_regex(r"\d+ cached", "cyan")
            line.highlight_regex(r"\S+ left", "bold")
            line.highlight_regex(r"; .*", "yellow")
            return line

    console = Console(stderr=True)
    bar = BarColumn(max(10, min(40, console.width // 5)))
    said = Said(Column(no_wrap=True, overflow="ellipsis", ratio=1))
    shown = Progress(bar, TaskProgressColumn(), said, console=console, transient=True, expand=True)
    with shown:
        task = shown.add_task("")
        while not over.wait(BAR_SECONDS):
            done, total = _reached(course)
            line = describe(course, brief=console.width < WIDE)
            shown.update(task, completed=done, total=total or None, description=line)
