"""Tables: what was not asked about comes back as it was, whatever a Dataset can hold of it."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabe_ds.formats.csv_text import load_csv, read_head, read_rows, write_csv_like

ECHO = "# echo: local\n"

# CSV.

EXCEL = {
    "semicolons": ('\ufeffid;"code"\r\n1;"ä"\r\n', '\ufeffid;"code"\r\n1;"# echo: local\nä"\r\n'),
    "all quoted": (
        '\ufeff"id","code"\r\n"1","ä"\r\n"2",""\r\n',
        '\ufeff"id","code"\r\n"1","# echo: local\nä"\r\n"2",""\r\n',
    ),
    "sep line": ("sep=;\r\nid;code\r\n1;x\r\n", 'sep=;\r\nid;code\r\n1;"# echo: local\nx"\r\n'),
    "sep line, mark": ("\ufeffsep=|\ncode|b\nx|\n", '\ufeffsep=|\ncode|b\n"# echo: local\nx"|\n'),
    "decimal commas": (
        "id;code;price\n1;x;1,50\n2;y;2\n",
        'id;code;price\n1;"# echo: local\nx";1,50\n2;"# echo: local\ny";2\n',
    ),
    "commas in a name": (
        "id;price, net;code\n1;1,5;x\n2;2;y\n",
        'id;price, net;code\n1;1,5;"# echo: local\nx"\n2;2;"# echo: local\ny"\n',
    ),
    "no last line end": ("id,code\n1,x", 'id,code\n1,"# echo: local\nx"\n'),
    "blank lines": ("id,code\n\n1,x\n\n\n2,y\n\n", 'id,code\n\n1,"# echo: local\nx"\n\n\n2,"# echo: local\ny"\n\n'),
    "one column": ('code\nx\n\n""\ny\n', 'code\n"# echo: local\nx"\n\n""\n"# echo: local\ny"\n'),
    "old Mac": ("id,code\r1,x\r", 'id,code\r1,"# echo: local\nx"\r'),
    "needless quotes": ('"id",code,"n"\n"1",x,"2"\n', '"id",code,"n"\n"1","# echo: local\nx","2"\n'),
    "quotes inside": ('id,code\na"b,x\n', 'id,code\na"b,"# echo: local\nx"\n'),
    "tabs in .csv": ("id\tcode\n1\tx\n", 'id\tcode\n1\t"# echo: local\nx"\n'),
    "spaces": ("id , code,code\n 1 , y , x \n", 'id , code,code\n 1 , y ,"# echo: local\n x "\n'),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after"), EXCEL.values(), ids=EXCEL)
def test_a_csv_file_is_the_same_but_for_the_field(box, before, after):
    box.write("d.csv", before)
    ended = box.fabe("run", "--input", "d.csv", "--backup-field", "")
    assert ended.code == 0, ended
    expected = after if before.endswith(("\n", "\r")) else after.removesuffix("\n")
    assert (box.path / "outputs/d.csv").read_bytes().decode() == expected


def test_new_columns_are_written_in_the_manner_of_the_field(box):
    box.write("d.csv", '\ufeffid;"code"\r\n1;"ä"\r\n2;\r\n')
    ended = box.fabe("run", "--input", "d.csv", "--status-field", "how")
    assert ended.code == 0, ended
    text = (box.path / "outputs/d.csv").read_bytes().decode("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=";"))
    assert [row["original_code"] for row in rows] == ["ä", ""]
    assert text.startswith('id;"code";original_code;how\r\n1;"# echo: local\nä";"ä";"{')
    assert text.endswith('}"\r\n')


def test_csv_files_of_a_folder_become_one(box):
    box.write("in/a.csv", "\ufeffid,code\r\n1,x")
    box.write("in/b.csv", "id,code\n2,y\n")
    assert box.fabe("run", "--input", "in", "--backup-field", "", "--output", "o.csv").code == 0
    assert (box.path / "o.csv").read_bytes().decode() == (
        '\ufeffid,code\r\n1,"# echo: local\nx"\r\n2,"# echo: local\ny"\n'
    )


def test_csv_files_with_other_separators_become_one(box):
    box.write("in/a.csv", "id,code\n1,x\n")
    box.write("in/b.csv", "id;code\n2;y,z\n")
    assert box.fabe("run", "--input", "in", "--backup-field", "", "--output", "o.csv").code == 0
    assert (box.path / "o.csv").read_bytes().decode() == (
        'id,code\n1,"# echo: local\nx"\n2,"# echo: local\ny,z"\n'
    )


def test_csv_as_something_else(box):
    box.write("d.csv", "id;code\n1;x\n")
    for name in ("o.tsv", "o.parquet", "o.jsonl"):
        ended = box.fabe("run", "--input", "d.csv", "--backup-field", "", "--output", name)
        assert ended.code == 0, ended
    assert (box.path / "o.tsv").read_text() == 'id\tcode\n1\t"# echo: local\nx"\n'
    assert pq.read_table(box.path / "o.parquet").to_pylist() == [{"id": "1", "code": f"{ECHO}x"}]
    assert box.read("o.jsonl") == [{"id": "1", "code": f"{ECHO}x"}]


FIELD = st.text(st.sampled_from('ab"\n\r,; é'), max_size=6)


@st.composite
def csv_texts(draw: st.DrawFn) -> tuple[str, list[list[str]]]:
    """A CSV file's text in any manner of quoting, and its fields."""
    end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    width = draw(st.integers(2, 4))
    rows = draw(st.lists(st.lists(FIELD, min_size=width, max_size=width), max_size=6))
    lines = []
    for row in [[f"n{n}" for n in range(width)], *rows]:
        parts = []
        for field in row:
            must = any(mark in field for mark in ',"\n\r')
            quoted = must or draw(st.booleans())
            parts.append('"' + field.replace('"', '""') + '"' if quoted else field)
        lines.append(",".join(parts))
    blank = draw(st.sampled_from(["", end]))
    text = "".join(line + end + blank for line in lines)
    return draw(st.sampled_from(["", "\ufeff"])) + text, rows


@given(csv_texts(), st.integers(0, 3), FIELD)
@settings(max_examples=300, deadline=None)
def test_any_csv_comes_back_and_only_what_changes_changes(tmp_path_factory, made, column, new):
    text, rows = made
    folder = tmp_path_factory.mktemp("csv")
    path = folder / "d.csv"
    path.write_bytes(text.encode())
    head = read_head(path, ",")
    read = list(read_rows(path, head))
    assert [list(row[:-1]) for row in read] == rows

    def written(values: list[list[str]]) -> str:
        sink = io.BytesIO()
        texts = ((row[-1], fields) for row, fields in zip(read, values, strict=True))
        write_csv_like(head, head.names, texts, sink)
        return sink.getvalue().decode()

    assert written(rows) == text
    column %= len(head.names)
    changed = [[*row[:column], new, *row[column + 1 :]] for row in rows]
    path.write_bytes(written(changed).encode())
    assert [list(row[:-1]) for row in read_rows(path, read_head(path, ","))] == changed
    assert len(load_csv([path], ",", folder)) == len(rows)


# Parquet.

DAY = datetime.date(2020, 1, 2)
TYPES = {
    "map": pa.array([[("k", "v")], None], pa.map_(pa.string(), pa.string())),
    "map in a struct": pa.array(
        [{"m": [("k", 1)]}, None], pa.struct([("m", pa.map_(pa.string(), pa.int64()))])
    ),
    "list of maps": pa.array([[[("k", 1)]], []], pa.list_(pa.map_(pa.string(), pa.int64()))),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"a" * 16, None], pa.binary(16))),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1.10}', None])),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "dictionary of numbers": pa.array([1, 2]).dictionary_encode(),
    "nanoseconds": pa.array([1, None], pa.timestamp("ns")),
    "time zone": pa.array([1, None], pa.timestamp("us", "Europe/Berlin")),
    "date": pa.array([DAY, None], pa.date32()),
    "time": pa.array([datetime.time(1, 2, 3), None], pa.time64("us")),
    "duration": pa.array([datetime.timedelta(1), None], pa.duration("ms")),
    "decimal": pa.array([decimal.Decimal("1.20"), None], pa.decimal128(10, 2)),
    "wide decimal": pa.array([decimal.Decimal("1.20"), None], pa.decimal256(50, 2)),
    "half": pa.array([1.5, None], pa.float16()),
    "fixed": pa.array([b"abc", None], pa.binary(3)),
    "large text": pa.array(["a", None], pa.large_string()),
    "text view": pa.array(["a", None], pa.string_view()),
    "fixed list": pa.array([[1, 2], None], pa.list_(pa.int32(), 2)),
    "nothing": pa.array([None, None], pa.null()),
    "unsigned": pa.array([2**64 - 1, None], pa.uint64()),
    "not a number": pa.array([float("nan"), -0.0]),
}


@pytest.mark.parametrize("column", TYPES.values(), ids=TYPES)
def test_columns_of_any_type_come_back(box, column):
    table = pa.table({"a": column, "code": ["x", None], "z": [1, 2]})
    pq.write_table(table, box.path / "d.parquet")
    before = pq.read_table(box.path / "d.parquet")
    ended = box.fabe("run", "--input", "d.parquet")
    assert ended.code == 0, ended
    after = pq.read_table(box.path / "outputs/d.parquet")
    assert after.column_names == ["a", "code", "z", "original_code"]
    for name in ("a", "z"):
        assert after.schema.field(name).type == before.schema.field(name).type
        assert after.column(name).equals(before.column(name)) or name == "a"
    assert str(after.column("a").to_pylist()) == str(before.column("a").to_pylist())
    assert after["code"].to_pylist() == [f"{ECHO}x", None]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_the_field_keeps_its_type(box, kind):
    pq.write_table(pa.table({"code": pa.array(["x"], kind)}), box.path / "d.parquet")
    assert box.fabe("run", "--input", "d.parquet").code == 0
    before, after = (pq.read_schema(box.path / p) for p in ("d.parquet", "outputs/d.parquet"))
    assert after.field("code").type == before.field("code").type


def frames(path: Path) -> dict[str, pd.DataFrame]:
    named = pd.DataFrame({"code": ["x", "y"], "n": [1, 2]}, index=pd.Index(["a", "b"], name="key"))
    return {
        "named": named,
        "without a name": named.rename_axis(None),
        "of days": named.set_index(pd.DatetimeIndex(["2020-01-01", "2020-01-02"], name="day")),
        "two levels": named.set_index("n", append=True),
        "of numbers": named.reset_index(drop=True),
        "categories": named.astype({"n": "category"}),
    }


@pytest.mark.parametrize("kind", frames(Path()))
def test_an_index_of_pandas_comes_back(box, kind):
    before = frames(box.path)[kind]
    before.to_parquet(box.path / "d.parquet")
    ended = box.fabe("run", "--input", "d.parquet", "--backup-field", "")
    assert ended.code == 0, ended
    after = pd.read_parquet(box.path / "outputs/d.parquet")
    expected = pd.read_parquet(box.path / "d.parquet").assign(code=[f"{ECHO}x", f"{ECHO}y"])
    pd.testing.assert_frame_equal(after, expected)


def test_what_is_kept_beside_the_columns_comes_back(box):
    schema = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False, metadata={"PARQUET:field_id": "7"}),
            pa.field("code", pa.string()),
        ],
        metadata={"org.apache.spark.sql.parquet.row.metadata": '{"type": "struct"}'},
    )
    table = pa.table({"id": [1], "code": ["x"]}, schema=schema)
    pq.write_table(table, box.path / "d.parquet", compression="zstd")
    assert box.fabe("run", "--input", "d.parquet").code == 0
    written = pq.ParquetFile(box.path / "outputs/d.parquet")
    assert written.schema_arrow.field("id") == schema.field("id")
    assert written.schema_arrow.metadata.items() >= schema.metadata.items()
    assert written.metadata.row_group(0).column(0).compression == "ZSTD"


def test_parts_of_several_parquet_files(box):
    for name, first in (("a", 0), ("b", 3)):
        ids = list(range(first, first + 3))
        column = pa.array([[(str(i), i)] for i in ids], pa.map_(pa.string(), pa.int64()))
        table = pa.table({"id": ids, "m": column, "code": [f"c{i}" for i in ids]})
        (box.path / "in").mkdir(exist_ok=True)
        pq.write_table(table, box.path / f"in/{name}.parquet", row_group_size=2)
    ended = box.fabe("run", "--input", "in", "--split", "train[1:5]", "--output", "o.parquet")
    assert ended.code == 0, ended
    rows = pq.read_table(box.path / "o.parquet").to_pylist()
    assert rows == [
        {"id": i, "m": [(str(i), i)], "code": f"{ECHO}c{i}", "original_code": f"c{i}"}
        for i in range(1, 5)
    ]
    ended = box.fabe("run", "--input", "in", "--split", "train[9:]", "--output", "none.parquet")
    assert ended.code == 0, ended
    assert pq.read_table(box.path / "none.parquet").num_rows == 0


def test_a_column_that_only_parquet_holds_is_named(box):
    column = TYPES["map"]
    pq.write_table(pa.table({"code": ["x", "y"], "m": column}), box.path / "d.parquet")
    for name in ("o.csv", "o.jsonl"):
        ended = box.fabe("run", "--input", "d.parquet", "--output", name)
        assert ended.code == 2
        assert "column 'm' is of type map<string, string" in ended.err
        assert not (box.path / name).exists()


def test_a_field_of_a_dataset_of_the_hub_keeps_its_features(box):
    import datasets

    features = datasets.Features(
        {"code": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    data = datasets.Dataset.from_dict({"code": ["x"], "label": [1]}, features=features)
    data.to_parquet(str(box.path / "d.parquet"))
    assert box.fabe("run", "--input", "d.parquet").code == 0
    back = datasets.Dataset.from_parquet(
        str(box.path / "outputs/d.parquet"), cache_dir=str(box.path / "hf")
    )
    assert back.features["label"] == features["label"]
    assert back[0] == {"code": f"{ECHO}x", "label": 1, "original_code": "x"}


# What cannot be read.


def broken_parquet(path: Path) -> None:
    data = (path / "in/a.parquet").read_bytes()
    (path / "in/b.parquet").write_bytes(data[: len(data) // 2])


def broken_csv(path: Path) -> None:
    (path / "in/b.csv").write_text("id,code\n1\n")


@pytest.mark.parametrize(
    ("kind", "spoil", "said"),
    [
        ("parquet", broken_parquet, "in/b.parquet: cannot be read: "),
        ("csv", broken_csv, "in/b.csv:2: 1 fields, where the first line has 2"),
    ],
)
def test_a_broken_table_is_named_or_left_out(box, kind, spoil, said):
    box.write("in/a.csv", "id,code\n1,x\n")
    if kind == "parquet":
        (box.path / "in/a.csv").unlink()
        pq.write_table(pa.table({"id": [1], "code": ["x"]}), box.path / "in/a.parquet")
    spoil(box.path)
    ended = box.fabe("run", "--input", "in")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert said in ended.err
    ended = box.fabe("run", "--input", "in", "--on-bad-input", "skip")
    assert ended.code == 1
    assert f"left out: {said}" in ended.out
    assert ended.out.startswith("1 records: 1 rewritten")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("d.parquet", b""), ("d.parquet", b"PAR1"), ("d.arrow", b"x"), ("d.arrow", b""),
        ("d.csv", b"\0"), ("d.csv", b"id,code\n1,\xff\n"), ("d.csv", "id,code\n".encode("utf-16")),
    ],
)  # fmt: skip
def test_what_is_no_table_is_one_line(box, name, data):
    box.write(name, data)
    ended = box.fabe("run", "--input", name)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert name in ended.err


@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["preview"]])
def test_a_column_that_is_not_there(box, command):
    box.write("d.csv", "a.b,code\n1,x\n")
    ended = box.fabe(*command, "--input", "d.csv", "--field", "no")
    assert ended.code == 2
    assert "no column 'no'; there are a.b, code" in ended.err
    assert box.fabe(*command, "--input", "d.csv", "--field", "a.b").code == 0
