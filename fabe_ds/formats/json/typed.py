"""Files -> a Dataset of the records' own columns, each of a type that keeps its values.

The JSON reader of `datasets` makes timestamps of dates that are text and rounds what it cannot
type; here a column that has no one type stays JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from fabe_ds.errors import InputError
from fabe_ds.formats.discover import InputFile
from fabe_ds.formats.json.read import Broken, Tail, read_records
from fabe_ds.formats.json.scan import Fields
from fabe_ds.text import encodable_value

ROWS = 1000
_JSON = pa.json_(pa.string())
_UNTYPED = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)


def typed_records(sources: Sequence[InputFile], records_key: str | None, place: Path) -> None:
    """Writes the records of JSON and JSON-lines files as columns to the Arrow file `place`.

    A key that is missing is null; a line that is no record is left out. Of equal keys the last
    counts. Values of several types, and numbers beyond 64 bits, make their column one of JSON text.

    Raises: InputError (a record that is no object).
    """
    types: dict[str, pa.DataType] = {}
    for rows in _batches(sources, records_key):
        for name in dict.fromkeys(name for row in rows for name in row):
            found = _type([row.get(name) for row in rows])
            types[name] = _merged(types.get(name, pa.null()), found)
    types = {name: _JSON if _has_empty(kind) else kind for name, kind in types.items()}
    schema = pa.schema(list(types.items()))
    with pa.OSFile(str(place), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for rows in _batches(sources, records_key):
            columns = [_column([row.get(name) for row in rows], types[name]) for name in types]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _batches(
    sources: Sequence[InputFile], records_key: str | None
) -> Iterator[list[dict[str, Any]]]:
    rows = (row for source in sources for row in _objects(source, records_key))
    while batch := list(islice(rows, ROWS)):
        yield batch


def _objects(source: InputFile, records_key: str | None) -> Iterator[dict[str, Any]]:
    for item in read_records(source, Fields(()), records_key, keep_broken=True):
        if isinstance(item, Tail):
            return
        if isinstance(item, Broken):  # as a run has copied it
            continue
        try:
            value = json.loads(item.raw)
        except (ValueError, RecursionError) as error:  # a number, or nesting, beyond all use
            raise InputError(source.path, f"cannot be typed: {error}", item.line) from None
        if not isinstance(value, dict):
            raise InputError(source.path, "a record that is no object has no columns", item.line)
        yield value if "\\" not in item.raw else encodable_value(value)


def _type(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except _UNTYPED:
        return _JSON


def _merged(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type of a column that has values of both."""
    if one == other or _JSON in (one, other):
        return one if one == other else _JSON
    schemas = [pa.schema([("", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except _UNTYPED:
        return _JSON


def _has_empty(kind: pa.DataType) -> bool:
    """Whether there is an object without any key in it, which Parquet cannot hold."""
    if pa.types.is_struct(kind):
        return not kind.num_fields or any(_has_empty(field.type) for field in kind)
    return pa.types.is_list(kind) and _has_empty(kind.value_type)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if kind != _JSON:
        return pa.array(values, kind)
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.ExtensionArray.from_storage(_JSON, pa.array(texts, pa.string()))
