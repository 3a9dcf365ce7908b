"""Counts of the processes that share a run's work, added up in the one that started them."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

from fabe_ds.engine.intake import Stats

FOLDER = "FABE_DS_TALLY"
"""The environment variable that tells workers where to leave their counts."""
SECONDS = 0.5


def leave(stats: Stats) -> None:
    """Leaves this process's counts, where it is a worker of a run."""
    if folder := os.environ.get(FOLDER):
        scratch = Path(folder) / f".{os.getpid()}"
        scratch.write_text(json.dumps(asdict(stats)))
        scratch.replace(Path(folder) / f"{os.getpid()}.json")


def add_up(folder: Path, into: Stats) -> None:
    """Sets `into` to the sum of what the workers have left."""
    left = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    for field in fields(Stats):
        if field.name == "latency":
            into.latency = Counter()
            for counts in left:
                into.latency.update({int(n): count for n, count in counts["latency"].items()})
        else:
            setattr(into, field.name, sum(counts[field.name] for counts in left))


@contextlib.contextmanager
def gathered(folder: Path, into: Stats) -> Iterator[None]:
    """While the block runs, workers leave their counts in `folder` and `into` follows them."""
    os.environ[FOLDER] = str(folder)
    over = threading.Event()

    def follow() -> None:
        while not over.wait(SECONDS):
            add_up(folder, into)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        del os.environ[FOLDER]
        over.set()
        thread.join()
        add_up(folder, into)
