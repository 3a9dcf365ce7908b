"""How a run went, second by second."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from fabe_ds.request import Stats

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
