"""Counts of the processes that share a run's work, added up in the one that started them."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from fabe_ds.repeating import repeating
from fabe_ds.request import Stats

FOLDER = "FABE_DS_TALLY"
"""The environment variable that tells workers where to leave their counts."""
SECONDS = 0.5


def publish(stats: Stats) -> None:
    """Leaves this process's counts, where it is a worker of a run."""
    if folder := os.environ.get(FOLDER):
        scratch = Path(folder) / f".{os.getpid()}"
        scratch.write_text(json.dumps(stats.counts()))
        scratch.replace(Path(folder) / f"{os.getpid()}.json")


def add_up(left: Iterable[Mapping[str, Any]], into: Stats) -> None:
    """Sets `into` to the sum of workers' counts, each what `Stats.counts` gives."""
    left = list(left)
    for field in fields(Stats):
        values = [counts[field.name] for counts in left]
        if field.name == "state":
            into.state = next(filter(None, values), "")
        elif field.name == "loading":  # at the same time in each
            into.loading = max(values, default=0.0)
        elif field.name == "notes":
            into.notes = list(dict.fromkeys(note for notes in values for note in notes))
        elif field.name in ("latency", "failures"):
            total: Counter[Any] = Counter()
            for counts in values:  # the keys of a JSON object are text
                read = int if field.name == "latency" else str
                total.update({read(name): count for name, count in counts.items()})
            setattr(into, field.name, total)
        elif field.name == "messages":
            into.messages = {kind: text for told in reversed(values) for kind, text in told.items()}
        elif field.name == "latest":
            into.latest.clear()
            # In turns, so that each process is seen.
            turns = chain.from_iterable(zip_longest(*values))
            into.latest.extend((pair[0], pair[1]) for pair in turns if pair is not None)
        else:
            setattr(into, field.name, sum(values))


@contextlib.contextmanager
def gathered(folder: Path, into: Stats) -> Iterator[None]:
    """While the block runs, workers leave their counts in `folder` and `into` follows them."""
    os.environ[FOLDER] = str(folder)
    try:
        with followed(lambda: [json.loads(p.read_text()) for p in folder.glob("*.json")], into):
            yield
    finally:
        del os.environ[FOLDER]


@contextlib.contextmanager
def followed(read: Callable[[], Iterable[Mapping[str, Any]]], into: Stats) -> Iterator[None]:
    """While the block runs, `into` is the sum of the counts that `read` gives."""
    try:
        with repeating(lambda: add_up(read(), into), SECONDS):
            yield
    finally:
        add_up(read(), into)
