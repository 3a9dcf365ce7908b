"""Public door of the Ray Data transform: `fabe_ds.distributed.transform(dataset, ...)`."""

from fabe_ds.executors.ray.pool import transform

__all__ = ["transform"]
