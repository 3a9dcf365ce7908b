"""Executors of one machine: `Dataset.map` in this process, or in a process for each device."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabe_ds.answers import features
from fabe_ds.config.settings import RunConfig
from fabe_ds.executors.base import MAP_ROWS, AnswerMap, Executor, Work
from fabe_ds.executors.worker_counts import gathered
from fabe_ds.scratch import scratch_folder

if TYPE_CHECKING:
    from datasets import Dataset


def executor_for(config: RunConfig) -> Executor:
    """The executor that a run's settings name."""
    if config.runner == "ray":
        from fabe_ds.executors.ray.map import RayExecutor

        return RayExecutor(config)
    return DevicesExecutor(len(config.devices)) if len(config.devices) > 1 else LocalExecutor()


class LocalExecutor:
    """`Dataset.map` in this process. Requests are sent ahead of the map, in the records' order."""

    def map(self, work: Work, finished: bool) -> Dataset:
        function = AnswerMap(work.kind, work.transform)
        # The runtime reads its items when the first batch is asked for, and not before.
        ahead = work.transform.answers(work.items())
        function.ahead = ahead
        with contextlib.closing(ahead):  # type: ignore[type-var]
            return mapped(work, function, finished)


class DevicesExecutor:
    """`Dataset.map` in a process for each device."""

    def __init__(self, devices: int) -> None:
        self._devices = devices

    def map(self, work: Work, finished: bool) -> Dataset:
        function = AnswerMap(work.kind, work.transform)
        stats = work.transform.runtime.stats
        with tempfile.TemporaryDirectory() as counts, gathered(Path(counts), stats), _spawning():
            return mapped(work, function, finished, num_proc=self._devices, with_rank=True)


def mapped(work: Work, function: AnswerMap, finished: bool, **workers: Any) -> Dataset:
    """The answers to all records, kept in the files that the work names.

    A run with failures is never answered from the fingerprint cache, or they would stay for ever;
    the record cache makes mapping anew cheap.
    """
    folder = work.path.parent
    with contextlib.ExitStack() as stack:
        # `datasets` takes a file of this name for the answers, whatever made it.
        place = folder if finished else stack.enter_context(scratch_folder(folder))
        result = work.dataset.with_format("arrow").map(
            function,
            batched=True,
            batch_size=MAP_ROWS,
            remove_columns=work.dataset.column_names,
            features=features(work.transform.targets),
            cache_file_name=str(place / work.path.name),
            load_from_cache_file=finished,
            **workers,
        )
        if not finished:
            for path in place.iterdir():
                path.replace(folder / path.name)
    return result.with_format(None)


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """Worker processes begin afresh: a device that was used cannot be used in a forked child."""
    import multiprocess

    before = multiprocess.get_start_method()
    multiprocess.set_start_method("spawn", force=True)
    try:
        yield
    finally:
        multiprocess.set_start_method(before, force=True)
