"""A map over a cluster's workers."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.answers import features
from fabe_ds.config.rules import check_workers
from fabe_ds.config.settings import RunConfig
from fabe_ds.errors import RunStopped, first_line
from fabe_ds.executors.base import Work
from fabe_ds.executors.ray.cluster import cluster
from fabe_ds.executors.ray.driver_node import DriverNode, progress_actor
from fabe_ds.executors.ray.pool import BLOCK_ROWS, Pool, pool_for, share
from fabe_ds.executors.ray.shards import (
    shards_folder,
    with_sample_numbers,
    write_in_order,
    write_shards,
)
from fabe_ds.executors.ray.worker import DRAIN_SECONDS, TELL_SECONDS, WorkerTask
from fabe_ds.executors.worker_counts import followed

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

SHARDS_EACH = 4
PATIENCE_SECONDS = 60.0


class RayExecutor:
    """Maps over the actors of a cluster, or of one that is started on this machine."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def map(self, work: Work, finished: bool) -> Dataset:
        """The answers, written in the records' order to the work's file. The runtime's stats follow
        the workers' counts. Raises: FabeError."""
        from datasets import Dataset

        if finished and work.path.exists():
            return Dataset.from_file(str(work.path))
        config, transform, total = self._config, work.transform, len(work.dataset)
        check_workers(transform.config)
        with cluster(config), shards_folder(config.cache_dir) as folder:
            pool = pool_for(config, transform, total)
            rows = min(BLOCK_ROWS, -(-total // (SHARDS_EACH * pool.workers)))
            tables = with_sample_numbers(work) if transform.is_sampling else work.tables()
            shards = write_shards(tables, rows, folder)
            node = DriverNode.here(config)
            progress = progress_actor(node)
            part = share(transform, pool.workers, pool.gpus)
            task = WorkerTask(part, transform.texts, node, progress, work.kind)
            blocks = _Blocks(pool, shards, task)
            schema = features(transform.targets).arrow_schema
            with (
                followed(blocks.counts, transform.stats),
                contextlib.closing(blocks.arriving()) as arriving,
            ):
                write_in_order(arriving, total, schema, work.path)
        return Dataset.from_file(str(work.path))


class _Blocks:
    """The blocks that come back, in the order in which they do."""

    def __init__(self, pool: Pool, shards: list[Path], task: WorkerTask) -> None:
        self._pool, self._shards, self._task = pool, shards, task
        self._arrived: queue.Queue[pa.Table | BaseException | None] = queue.Queue(maxsize=8)
        self._counts: list[Mapping[str, Any]] = []
        # In a thread of its own: Ctrl-C inside Ray's iteration would end the workers at once.
        self._thread = threading.Thread(target=self._execute, daemon=True)

    def counts(self) -> list[Mapping[str, Any]]:
        """The workers' counts so far."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone
            self._counts = ray.get(self._task.progress.counts.remote())
        return [counts for counts in self._counts if counts]

    def arriving(self) -> Generator[pa.Table, None, None]:
        self._thread.start()
        try:
            yield from iter(self._next, None)
        except BaseException:
            self._drain()
            raise

    def _next(self) -> pa.Table | None:
        import ray

        began = time.monotonic()
        while True:
            try:
                block = self._arrived.get(timeout=PATIENCE_SECONDS)
                break
            except queue.Empty:
                if not self.counts():
                    log.warning(
                        "no worker of %d has begun after %.0f s; free in the cluster: %s",
                        self._pool.workers,
                        time.monotonic() - began,
                        {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")},
                    )
        if isinstance(block, BaseException):
            cause = ray.get(self._task.progress.cause.remote())
            raise cause or RunStopped(f"ray: {first_line(block)}") from None
        return block

    def _drain(self) -> None:
        """Lets the workers end, each with what it has on its way kept."""
        import ray

        ray.get(self._task.progress.stop.remote())
        deadline = time.monotonic() + DRAIN_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                self._arrived.get(timeout=TELL_SECONDS)

    def _execute(self) -> None:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        try:
            # Not read_parquet: it makes one block of all files that are small (2.60), and its
            # tasks wait for processors that the workers have.
            listed = ray.data.from_items(
                [{"shard": str(shard)} for shard in self._shards],
                override_num_blocks=len(self._shards),
            )
            blocks = self._pool.map(listed, self._task)
            for block in blocks.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                self._arrived.put(block)
            self._arrived.put(None)
        except BaseException as error:
            self._arrived.put(error)
