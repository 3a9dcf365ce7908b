"""How far a run is, phase by phase: written by the run, read by the display of its progress."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fabe_ds.pace import Pace
from fabe_ds.request import Stats

LOADING, ANSWERING, WRITING = "loading", "answering", "writing"


@dataclass(slots=True)
class Course:
    """`done` of `total` are bytes of the input while it is loaded, records afterwards; 0 is not
    known. `stats` are the counts of the answers."""

    phase: str = ""
    began: float = 0.0
    """When the phase began, on the monotonic clock."""
    done: int = 0
    total: int = 0
    stats: Stats = field(default_factory=Stats)
    started: float = field(default_factory=time.monotonic)
    """When the run began, on the monotonic clock."""
    history: list[Point] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)
    report: Path | None = None
    """Where the run will leave its report, once that is known."""

    def begin(self, phase: str, total: int = 0) -> None:
        self.began = time.monotonic()
        self.phase, self.done, self.total = phase, 0, total

    @property
    def seconds(self) -> float:
        """Since the phase began."""
        return time.monotonic() - self.began

    def tick(self, amount: int) -> None:
        self.done += amount

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Notes how the answers go while the block runs, for the charts of the report."""
        with recorded(self.stats) as self.history:
            yield


Watch = Callable[[Course], contextlib.AbstractContextManager[object]]
"""Shows how far a run is while its block runs."""


MOST_POINTS = 400


Point = tuple[float, int, int, int, int, int, int]
"""Seconds since the start; records settled, records failed and completion tokens so far; requests
that may be in flight and that are; refusals (too much at once) so far."""


@contextlib.contextmanager
def recorded(stats: Stats, seconds: float = 0.25) -> Iterator[list[Point]]:
    """A list of points that grows while the block runs; the longer the run, the further apart."""
    points: list[Point] = []
    started, over = time.monotonic(), threading.Event()

    def note() -> None:
        moment = round(time.monotonic() - started, 3)
        counts = (stats.settled, stats.failed, stats.completion_tokens)
        points.append((moment, *counts, stats.limit, stats.in_flight, stats.refusals))

    def follow() -> None:
        pause = seconds
        while not over.wait(pause):
            note()
            if len(points) >= MOST_POINTS:
                del points[1::2]
                pause *= 2

    note()
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield points
    finally:
        over.set()
        thread.join()
        note()
