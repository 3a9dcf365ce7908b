"""How requests are sent, whatever the provider: cache, limits, retries, order."""

from fabe_ds.engine.cache import RecordCache
from fabe_ds.engine.intake import Accept, Item, Outcome, Stats
from fabe_ds.engine.local import LocalEngine

__all__ = ["Accept", "Item", "LocalEngine", "Outcome", "RecordCache", "Stats"]
