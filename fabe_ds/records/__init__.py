"""Files <-> Dataset: find them, load them, write them back."""

from fabe_ds.records.discover import Source, discover
from fabe_ds.records.export import export_records
from fabe_ds.records.load import Loaded, load, load_records

__all__ = ["Loaded", "Source", "discover", "export_records", "load", "load_records"]
