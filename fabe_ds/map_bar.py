"""What the progress bar of a `Dataset.map` says beside its own count."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from fabe_ds.pace import Pace, counts_told
from fabe_ds.repeating import repeating
from fabe_ds.request import Stats

SECONDS = 0.5


class MapBar:
    """The bar that `datasets` shows for a map moves once a batch, of a thousand records or more.
    While a batch is answered, this one says behind it how many are done, cached and failed, at
    which rate, and how long the rest takes."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._pace = Pace()
        self._before = Stats()
        self._began = 0.0

    @contextlib.contextmanager
    def following(self, stats: Callable[[], Stats]) -> Iterator[None]:
        """Tells the counts while the block runs; does nothing where no bar is shown."""
        bar = _bar_of_a_map()
        if bar is None:
            yield
            return
        if bar is not self._bar:  # another map, whose counts begin at 0
            self._bar, self._pace, self._began = bar, Pace(), time.monotonic()
            self._before = Stats(**{name: getattr(stats(), name) for name in _COUNTS})
        try:
            with repeating(lambda: self._tell(stats()), SECONDS):
                yield
        finally:
            self._tell(stats())

    def _tell(self, stats: Stats) -> None:
        counts = {name: getattr(stats, name) - getattr(self._before, name) for name in _COUNTS}
        now = Stats(**counts, state=stats.state)
        self._pace.note(now)
        seconds = time.monotonic() - self._began
        told = counts_told(now, self._pace, self._bar.total or 0, seconds)
        self._bar.set_postfix_str(told + (f"; {now.state}" if now.state else ""))


_COUNTS = (
    *("done", "cached", "failed", "skipped", "not_chosen"),
    *("prompt_tokens", "completion_tokens"),
)


def _bar_of_a_map() -> Any:
    """The bar of the map that runs in this process, the newest; None where none is shown."""
    from datasets.utils import tqdm

    # tqdm keeps its bars to itself; without the set of them, nothing is said.
    bars = [
        bar
        for bar in list(getattr(tqdm, "_instances", ()))
        if isinstance(bar, tqdm) and not bar.disable and bar.unit.strip() == "examples"
    ]
    return max(bars, key=lambda bar: bar.start_t, default=None)
