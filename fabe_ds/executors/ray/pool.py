"""How many workers, and what each is given."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from fabe_ds.config.load import in_folder
from fabe_ds.config.rules import check_workers
from fabe_ds.config.settings import JUDGE_FILE, SCHEMA_FILE, RunConfig, TransformConfig
from fabe_ds.errors import UsageError
from fabe_ds.executors.ray.driver_node import DriverNode
from fabe_ds.executors.ray.worker import Worker, WorkerTask
from fabe_ds.providers import HttpProvider
from fabe_ds.transform import Transform, transform_fn

if TYPE_CHECKING:
    import ray.data

log = logging.getLogger(__name__)

BLOCK_ROWS = 1000
"""Maximum rows in a Ray block or shard file."""


def transform(
    dataset: ray.data.Dataset,
    *,
    workers: int = 1,
    gpus_per_worker: float = 0,
    cpus_per_worker: float = 0.25,
    **options: Any,
) -> ray.data.Dataset:
    """A Ray Dataset with one field of every row rewritten, by a pool of `workers` actors.

    Takes the options of `fabe_ds.transform_fn`; its columns come out as they do there. Lazy, as
    Ray Datasets are. The record cache is in `cache_dir` on the node that this is called on, for
    all workers; concurrency and rates are divided among them. A model on processors has as many
    threads as `cpus_per_worker`.

    Raises: UsageError. The execution raises where records failed; with on_error="keep" they keep
    their originals.
    """
    whole = transform_fn(**options)
    check_workers(whole.config)
    if isinstance(whole.config.concurrency, int) and isinstance(whole.provider, HttpProvider):
        workers = min(workers, whole.config.concurrency)
    node = DriverNode.here(whole.config)
    task = WorkerTask(share(whole, workers, gpus_per_worker), whole.texts, node)
    local = not isinstance(whole.provider, HttpProvider)
    return Pool(workers, cpus_per_worker, gpus_per_worker, local).map(dataset, task)


@dataclass(frozen=True, slots=True)
class Pool:
    """So many actors, and what each takes of its node. `local`: a model runs in each."""

    workers: int
    cpus: float
    gpus: float
    local: bool

    def map(self, dataset: ray.data.Dataset, task: WorkerTask) -> ray.data.Dataset:
        from ray.data import ActorPoolStrategy

        # Two blocks at once in each: the second keeps the endpoint busy while the first waits for
        # its slowest record.
        both = {} if self.local else {"max_concurrent_calls_per_actor": 2}
        # Ray wants a number where there are GPUs; a run's rows are shards, of many records each.
        rows = None if not self.gpus else BLOCK_ROWS if task.progress is None else 1
        return dataset.map_batches(
            Worker,
            fn_constructor_args=(task,),
            batch_size=rows,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=self.workers, enable_true_multi_threading=not self.local, **both
            ),
            num_cpus=self.cpus,
            num_gpus=self.gpus or None,
        )


def pool_for(config: RunConfig, transform: Transform, total: int) -> Pool:
    """How many workers, and what each takes, by the flags and by what the cluster has."""
    import ray

    has = ray.cluster_resources()
    cpus, gpus = has.get("CPU", 1.0), has.get("GPU", 0.0)
    local = not isinstance(transform.provider, HttpProvider)
    each = config.gpus_per_worker
    if each is None:
        on_gpu = config.device.startswith("cuda") or (config.device == "auto" and gpus > 0)
        each = float(local and on_gpu)
    nodes = sum(node["Alive"] for node in ray.nodes())
    workers = config.workers or (max(1, int(gpus // each)) if each else nodes)
    if not local and config.concurrency != "auto":
        workers = min(workers, config.concurrency)
    workers = min(workers, total)
    if workers * each > gpus:
        if not config.ray_address and not os.environ.get("RAY_ADDRESS"):
            raise UsageError(
                f"--gpus-per-worker {each:g}: this machine has {gpus:g} GPUs, too few for "
                f"{workers} workers"
            )
        log.warning(
            "%d workers want %g GPUs and the cluster has %g; the others wait for more",
            workers,
            workers * each,
            gpus,
        )
    if each:
        share = 1.0
    elif local and transform.provider.cached:
        share = float(cpus // workers)  # the model's threads
        if not share:
            raise UsageError(f"--workers {workers}: the cluster has {cpus:g} processors")
    else:
        share = min(1.0, int(100 * cpus / workers) / 100)
    log.info("ray: %d workers on %d nodes", workers, nodes)
    return Pool(workers, share, each, local)


def share(transform: Transform, workers: int, gpus: float) -> TransformConfig:
    """The configuration of one of so many workers. What stands in files here goes along."""
    config = transform.config
    changed: dict[str, Any] = {
        "cache_dir": config.cache_dir.resolve(),
        "rpm": config.rpm and config.rpm / workers,
        "tpm": config.tpm and config.tpm / workers,
    }
    if config.concurrency != "auto":
        changed["concurrency"] = max(1, config.concurrency // workers)
    for name, key in transform.providers.keys.items():
        changed[name] = SecretStr(key)
    if config.model and Path(config.model).exists():
        changed["model"] = str(Path(config.model).resolve())
    here = Path.cwd()
    changed["validate_with"] = [in_folder(c, SCHEMA_FILE, here) for c in config.validate_with]
    changed["pick"] = in_folder(config.pick, JUDGE_FILE, here)
    if gpus:
        changed["device"] = "cuda"  # Ray shows each worker its own GPUs alone
    return config.model_copy(update=changed)
