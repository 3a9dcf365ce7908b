"""Records as columns: every value comes out as it went in, whatever the types."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabe_ds import InputError
from fabe_ds.formats.discover import InputFile
from fabe_ds.formats.json.typed import typed_records

JSON_TEXT = pa.json_(pa.string())


def typed(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = folder / "typed.arrow"
    typed_records([InputFile(str(path), path.name)], None, place)
    return datasets.Dataset.from_file(str(place))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([1, None], pa.int64()),
        (["2024-01-02", "2024-01-02T03:04:05Z"], pa.string()),
        ([True, 1], JSON_TEXT),
        (["1", 1], JSON_TEXT),
        ([2**63, 1], JSON_TEXT),
        ([{}, {"a": 1}], pa.struct([("a", pa.int64())])),
        ([{}, None], JSON_TEXT),
        ([[], ["a"]], pa.list_(pa.string())),
        ([[{"a": 1}], [{"b": "x"}]], pa.list_(pa.struct([("a", pa.int64()), ("b", pa.string())]))),
        ([None, None], pa.null()),
    ],
)
def test_a_column_has_the_type_of_its_values(tmp_path, values, kind):
    rows = [{"v": values[0]}] * 1500 + [{"v": values[1]}]  # in different batches
    table = typed(tmp_path, rows).data.table
    assert table.schema.field("v").type == kind
    assert len(table) == 1501


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(st.sampled_from("xyz"), _values, min_size=1), min_size=1))
def test_no_value_is_lost(tmp_path_factory, rows):
    table = typed(tmp_path_factory.mktemp("typed"), rows).data.table
    for name in table.column_names:
        column = table.column(name)
        for row, found in zip(rows, column.to_pylist(), strict=True):
            wanted = row.get(name)
            if column.type == JSON_TEXT and found is not None:
                found = json.loads(found)
            assert without_nulls(found) == without_nulls(wanted)


def without_nulls(value):
    """A key that is missing and one that is null are the same to a column."""
    if isinstance(value, dict):
        kept = {key: without_nulls(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def test_a_record_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(InputError, match=r"data\.jsonl:2: a record that is no object"):
        typed_records([InputFile(str(path), path.name)], None, tmp_path / "typed.arrow")


def test_a_surrogate_alone_can_be_held(tmp_path):
    assert typed(tmp_path, [{"a": ["\ud800"]}])["a"][:] == [["\ufffd"]]
