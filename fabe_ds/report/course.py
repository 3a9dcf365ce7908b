"""How far a run is, phase by phase: written by the run, read by the display of its progress."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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

    def begin(self, phase: str, total: int = 0) -> None:
        self.began = time.monotonic()
        self.phase, self.done, self.total = phase, 0, total

    @property
    def seconds(self) -> float:
        """Since the phase began."""
        return time.monotonic() - self.began

    def tick(self, amount: int) -> None:
        self.done += amount


Watch = Callable[[Course], contextlib.AbstractContextManager[object]]
"""Shows how far a run is while its block runs."""


def size_of(paths: Iterable[str]) -> int:
    """Bytes of all the files, as far as they are there."""
    total = 0
    for path in paths:
        with contextlib.suppress(OSError):
            total += os.stat(path).st_size  # noqa: PTH116
    return total
