"""The transform on several machines: Ray Data's actor pool, with one record cache for all."""

from fabe_ds.distributed.pool import transform

__all__ = ["transform"]
