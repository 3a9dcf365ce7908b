"""What runs in each actor of the pool."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fabe_ds.answers import answer_table
from fabe_ds.config.settings import TransformConfig
from fabe_ds.errors import FabeError, RunStopped, first_line
from fabe_ds.executors.base import asking_rows, counts_of
from fabe_ds.executors.ray.driver_node import DriverNode
from fabe_ds.executors.ray.shards import ROW, SAMPLE
from fabe_ds.formats.base import Format
from fabe_ds.formats.columns import new_columns
from fabe_ds.prompts.asking import Texts
from fabe_ds.transform import Transform

TELL_SECONDS, DRAIN_SECONDS = 0.5, 60.0


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """What every worker is given. Without a progress actor, a block is a dataset's own rows."""

    config: TransformConfig  # with this worker's part of the limits; the key in it is masked
    texts: Texts  # of files that may be here alone
    node: DriverNode
    progress: Any = None  # the handle of a ProgressActor
    kind: Format | None = None


class Worker:
    """An actor of the pool."""

    def __init__(self, task: WorkerTask) -> None:
        self._task = task
        self._link = task.node.link()
        self._name = uuid.uuid4().hex
        self._lock = threading.Lock()
        self._running = 0
        self._transform: Transform | None = None
        if task.progress is not None:
            threading.Thread(target=self._keep_telling, daemon=True).start()

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block. Raises: FabeError; in a run, when nothing is on its way any more."""
        if self._task.progress is None:
            return _with_changes(block, _changed(self._opened(), block))
        self._count(1)
        try:
            shards = [self._answered(shard) for shard in block.column("shard").to_pylist()]
        except Exception as error:
            self._count(-1)
            self._end_all(error)
            raise
        self._count(-1)
        return pa.concat_tables(shards)

    def _opened(self) -> Transform:
        with self._lock:
            if self._transform is None:
                opened = Transform(
                    self._task.config, lambda _: self._link.cache(), self._task.texts
                )
                _ = opened.runtime  # here, and not by two calls at once
                self._transform = opened
        return self._transform

    def _answered(self, shard: str) -> pa.Table:
        """The rows' numbers, and the columns that change."""
        transform, rows = self._opened(), self._link.read(shard)
        self._tell()
        numbers = rows.column(SAMPLE).to_pylist() if SAMPLE in rows.column_names else None
        assert self._task.kind is not None
        items = transform.items(asking_rows(self._task.kind, rows, transform), numbers)
        places = counts_of(self._task.kind, rows)
        result = answer_table(transform.answers(items), transform.targets, places)
        return result.append_column(ROW, rows.column(ROW))

    # What it says, and is told, of the run.

    def _count(self, change: int) -> None:
        with self._lock:
            self._running += change
        self._tell()

    def _tell(self) -> None:
        import ray

        counts = self._transform.stats.counts() if self._transform else {}
        stop = self._task.progress.report.remote(self._name, counts, self._running > 0)
        with contextlib.suppress(ray.exceptions.RayError):  # the driver ends, and we with it
            if ray.get(stop) and self._transform is not None:
                self._transform.runtime.stopping = True

    def _keep_telling(self) -> None:
        while True:
            time.sleep(TELL_SECONDS)
            self._tell()

    def _end_all(self, error: Exception) -> None:
        """Lets all keep what is on its way, for Ray ends them all at the first error."""
        import ray

        if not isinstance(error, FabeError):
            error = RunStopped(f"a worker failed: {type(error).__name__}: {first_line(error)}")
        ray.get(self._task.progress.stop.remote(error))
        deadline = time.monotonic() + DRAIN_SECONDS
        while not ray.get(self._task.progress.idle.remote()) and time.monotonic() < deadline:
            time.sleep(TELL_SECONDS)


def _changed(transform: Transform, rows: pa.Table) -> dict[str, pa.Array]:
    """The columns of the rows that are new, and those that are others now."""
    new = new_columns(transform.targets, rows.schema)
    return {
        name: pa.array(values, new[name] if name in new else rows.schema.field(name).type)
        for name, values in transform.rewritten(rows.to_pydict()).items()
    }


def _with_changes(rows: pa.Table, changed: dict[str, pa.Array]) -> pa.Table:
    for name, column in changed.items():
        if name in rows.column_names:
            place = rows.schema.get_field_index(name)
            rows = rows.set_column(place, rows.schema.field(place), column)
        else:
            rows = rows.append_column(name, column)
    return rows
