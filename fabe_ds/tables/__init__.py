"""Tables <-> Dataset, and a run over one."""

from fabe_ds.tables.load import is_table, load_table
from fabe_ds.tables.run import check_columns, run_table, table_items

__all__ = ["check_columns", "is_table", "load_table", "run_table", "table_items"]
