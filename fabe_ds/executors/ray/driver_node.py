"""What the workers of a cluster have in common: one record cache, one place for their counts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fabe_ds.config.settings import TransformConfig
from fabe_ds.request import Completion
from fabe_ds.store.completions import Completions, RecordCache, Row

SILENT_SECONDS = 10.0


class ProgressActor:
    """An actor's class: the workers' counts, and whether they are to stop."""

    def __init__(self) -> None:
        self._counts: dict[str, Mapping[str, Any]] = {}
        self._busy: dict[str, float] = {}
        self._stopping = False
        self._cause: Exception | None = None

    def report(self, worker: str, counts: Mapping[str, Any], busy: bool) -> bool:
        """A worker's counts so far. True where it is to stop."""
        self._counts[worker] = counts
        self._busy[worker] = time.monotonic() if busy else 0.0
        return self._stopping

    def counts(self) -> list[Mapping[str, Any]]:
        return list(self._counts.values())

    def stop(self, cause: Exception | None = None) -> None:
        """Lets all workers send no more. The first to say so says why."""
        if not self._stopping:
            self._stopping, self._cause = True, cause

    def cause(self) -> Exception | None:
        return self._cause

    def idle(self) -> bool:
        """Whether nothing is on its way any more, but with workers that are dead."""
        now = time.monotonic()
        return all(not at or now - at > SILENT_SECONDS for at in self._busy.values())


class CacheActor(RecordCache):
    """An actor's class, one for each worker that is on another node than the driver.

    It is what only the driver's node has: the record cache, and the shards. Ray ends it with the
    worker that made it, and with it the claims it held for that worker.
    """

    def read(self, shard: str) -> pa.Table:
        return pq.read_table(shard)


class RemoteCache:
    """The record cache on another node, by way of a `CacheActor` there (a Ray actor's handle)."""

    def __init__(self, actor: Any) -> None:
        self._actor_handle = actor

    def get(self, keys: Sequence[bytes], since: float = 0.0) -> dict[bytes, Completion]:
        found: dict[bytes, Completion] = _result(self._actor_handle.get.remote(keys, since))
        return found

    def put(self, rows: Iterable[Row]) -> None:
        _result(self._actor_handle.put.remote(list(rows)))

    def other_limits(self, max_tokens: int) -> bool:
        return bool(_result(self._actor_handle.other_limits.remote(max_tokens)))

    def under_other_limits(
        self, bases: Sequence[bytes]
    ) -> dict[bytes, list[tuple[int, Completion]]]:
        found: dict[bytes, list[tuple[int, Completion]]]
        found = _result(self._actor_handle.under_other_limits.remote(bases))
        return found

    def learned(self, endpoint: str, model: str) -> dict[str, str]:
        found: dict[str, str] = _result(self._actor_handle.learned.remote(endpoint, model))
        return found

    def learn(self, endpoint: str, model: str, name: str, value: str) -> None:
        _result(self._actor_handle.learn.remote(endpoint, model, name, value))

    def claim(self, keys: Sequence[bytes]) -> set[bytes]:
        held: set[bytes] = _result(self._actor_handle.claim.remote(keys))
        return held

    def release(self, keys: Sequence[bytes]) -> None:
        _result(self._actor_handle.release.remote(keys))

    def close(self) -> None:
        """The actor ends with its worker."""


@dataclass(frozen=True, slots=True)
class DriverNode:
    """The driver's node, where the record cache and the shards are."""

    node: str
    cache_dir: Path
    after: int
    """What the record cache holds up to here is not seen (--no-resume)."""

    @classmethod
    def here(cls, config: TransformConfig) -> DriverNode:
        after = 0
        if not config.resume:
            with contextlib.closing(RecordCache(config.cache_dir)) as cache:
                after = cache.newest()
        return cls(_node(), config.cache_dir.resolve(), after)

    def link(self) -> CacheLink:
        """The way there from this process."""
        if _node() == self.node:
            return CacheLink(self, None)
        handle = _actor(CacheActor, self.node).remote(self.cache_dir, self.after)
        return CacheLink(self, handle)


@dataclass(frozen=True, slots=True)
class CacheLink:
    """A worker's way to what the driver's node has; `actor` is None on that node itself."""

    driver: DriverNode
    actor: Any

    def cache(self) -> Completions:
        if self.actor is None:
            return RecordCache(self.driver.cache_dir, self.driver.after)
        return RemoteCache(self.actor)

    def read(self, shard: str) -> pa.Table:
        if self.actor is None:
            return pq.read_table(shard)
        return _result(self.actor.read.remote(shard))


def progress_actor(node: DriverNode) -> Any:
    """A new `ProgressActor` on the driver's node; the handle of its actor."""
    return _actor(ProgressActor, node.node).remote()


def _actor(kind: type, node: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pinned = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(kind).options(num_cpus=0, scheduling_strategy=pinned)


def _node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _result(reference: Any) -> Any:
    import ray

    return ray.get(reference)
