"""Parquet files, of which all that was not asked about comes back as it was.

`datasets` knows fewer types than Parquet (no maps), and nothing of what other tools keep beside the
columns: an index of pandas, Spark's types. So these columns never go through a Dataset: they are
read again when the rows are written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from fabe_ds.errors import InputError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 10_000


def held_columns(schema: pa.Schema) -> pa.Schema:
    """The columns whose types `datasets` knows."""
    import datasets

    held = []
    for name in schema.names:
        try:
            datasets.Features.from_arrow_schema(pa.schema([schema.field(name)]))
        except (ValueError, TypeError, NotImplementedError):
            continue
        held.append(schema.field(name))
    return pa.schema(held, schema.metadata)


def refuse_other_columns(files: Sequence[Path]) -> None:
    """Raises: InputError where a file has other columns than the first, or of other types."""
    first = pq.read_schema(files[0])
    for file in files[1:]:
        schema = pq.read_schema(file)
        if set(schema.names) != set(first.names):
            raise InputError(file, f"other columns than {files[0]} has")
        for name in schema.names:
            here, there = schema.field(name).type, first.field(name).type
            if here != there and not (_is_text(here) and _is_text(there)):
                raise InputError(file, f"column {name!r} is {here}, and {there} in {files[0]}")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def refuse_unheld(file: Path, kind: str) -> None:
    """Raises: UsageError where a column of a Parquet file cannot be written as anything else."""
    schema = pq.read_schema(file)
    held = held_columns(schema).names
    for name in schema.names:
        if name not in held:
            raise UsageError(
                f"column {name!r} is of type {schema.field(name).type}, which {kind} cannot hold; "
                "write Parquet (--output-format parquet), or leave the column out of the input"
            )


def write_parquet_like(
    dataset: Dataset,
    files: Sequence[Path],
    ranges: Sequence[tuple[int, int]],
    changed: Collection[str],
    file: IO[bytes],
    tick: Callable[[int], None],
) -> None:
    """Writes rows of Parquet files with the columns of `dataset` in place of those `changed`, and
    with its new ones. Types, compression, and what is kept beside the columns are the first file's.

    `ranges`: which rows of all the files, counted through, those of `dataset` are.
    """
    first = pq.ParquetFile(files[0])
    target = schema_with(first.schema_arrow, dataset, changed)
    kept = [name for name in first.schema_arrow.names if name not in changed]
    others = dataset.select_columns([name for name in target.names if name not in kept])
    arrow = others.with_format("arrow")
    done = 0
    with pq.ParquetWriter(file, target, compression=_compression(first)) as writer:
        for batch in _batches(files, ranges, kept):
            columns = {name: batch.column(name) for name in kept}
            if len(dataset):
                part = arrow[done : done + batch.num_rows]
                columns |= {name: part.column(name) for name in part.column_names}
            done += batch.num_rows
            writer.write_table(
                pa.table([columns[each.name].cast(each.type) for each in target], schema=target)
            )
            tick(batch.num_rows)


def schema_with(source: pa.Schema, dataset: Dataset, changed: Collection[str]) -> pa.Schema:
    """A file's schema, with the types of `dataset` for the columns that change, if they must have
    them, and with its new columns. What stands beside the columns is the file's."""
    ours = dataset.data.schema
    fields = [
        field if field.name not in changed else _as_before(field, ours.field(field.name))
        for field in source
    ]
    fields += [ours.field(name) for name in dataset.column_names if name not in source.names]
    return pa.schema(fields, _metadata(source, fields))


def _as_before(before: pa.Field, now: pa.Field) -> pa.Field:
    """The field as it was, if its new values can be of its type."""
    try:
        pa.nulls(1, now.type).cast(before.type)
    except pa.ArrowException:
        return before.with_type(now.type)
    return before if _has_all_fields(before.type, now.type) else before.with_type(now.type)


def _has_all_fields(before: pa.DataType, now: pa.DataType) -> bool:
    """Whether a nested type has all the fields that another has: a cast drops others."""
    if pa.types.is_struct(now):
        return pa.types.is_struct(before) and all(
            (at := before.get_field_index(field.name)) >= 0
            and _has_all_fields(before.field(at).type, field.type)
            for field in now
        )
    if pa.types.is_list(now) or pa.types.is_large_list(now):
        return not hasattr(before, "value_type") or _has_all_fields(
            before.value_type, now.value_type
        )
    return True


def _metadata(source: pa.Schema, fields: list[pa.Field]) -> dict[bytes, bytes]:
    import datasets

    metadata = dict(source.metadata or {})
    if metadata.pop(b"huggingface", None):  # it names all the columns, and some are new
        features = datasets.Features.from_arrow_schema(pa.schema(fields, source.metadata))
        metadata |= features.arrow_schema.metadata or {}
    return metadata


def _compression(file: pq.ParquetFile) -> str:
    """The compression of a file, as a writer calls it."""
    if not file.metadata.num_row_groups or not file.metadata.num_columns:
        return "snappy"
    name = str(file.metadata.row_group(0).column(0).compression).lower()
    return {"uncompressed": "none", "lz4_raw": "lz4"}.get(name, name)


def _batches(
    files: Sequence[Path], ranges: Sequence[tuple[int, int]], names: list[str]
) -> Iterator[pa.RecordBatch]:
    """The columns `names` of the rows, in the order of the ranges."""
    for first, end in ranges:
        position = 0
        for file in files:
            opened = pq.ParquetFile(file)
            size = opened.metadata.num_rows
            if position < end and position + size > first:
                # Of no column at all, the number of rows would not be known.
                columns = names or opened.schema_arrow.names[:1]
                for batch in opened.iter_batches(ROWS, columns=columns):
                    begin = max(first - position, 0)
                    part = batch.slice(begin, max(min(end - position, len(batch)) - begin, 0))
                    position += len(batch)
                    if len(part):
                        yield part
            else:
                position += size
