"""Memory-mapped tables that are passed over once."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from datasets import Dataset

_MADV_PAGEOUT = 21  # Linux 5.4: take the pages back now; nothing is lost, they are read again
_madvise = ctypes.CDLL(None, use_errno=True).madvise if sys.platform == "linux" else None


def passed_over(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables, each given back to the system when the next is asked for.

    Otherwise every page of a mapped file that was ever read counts as this process's memory.
    """
    for table in tables:
        yield table
        if _madvise is not None:
            for column in table.columns:
                for chunk in column.chunks:
                    for buffer in filter(None, chunk.buffers()):
                        _page_out(buffer.address, buffer.size)


def _page_out(address: int, size: int) -> None:
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0 and _madvise is not None:
        with contextlib.suppress(OSError):
            _madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_PAGEOUT)


def row_table(dataset: Dataset, number: int) -> pa.Table:
    """One row of a Dataset. A slice of the Dataset itself takes a millisecond."""
    if dataset._indices is None:
        row: pa.Table = dataset.data.fast_slice(number, 1)
        return row
    return dataset.with_format("arrow")[number : number + 1]
