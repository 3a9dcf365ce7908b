"""Files through load and export: every byte that is not the field or its backup comes back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabe_ds import InputError, UsageError, export_records, load_records
from fabe_ds.errors import ExportError
from tests.support.zoo import BROKEN, JSON, LINES

ZOO = [("d.json", name) for name in JSON] + [("d.jsonl", name) for name in LINES]
FEATURES = datasets.Features({"completion": datasets.Value("large_string")})


def content(file: str, name: str) -> bytes:
    text = (JSON if file.endswith(".json") else LINES)[name]
    return text if isinstance(text, bytes) else text.encode()


def rewritten(records: datasets.Dataset, change=None) -> datasets.Dataset:
    """The carrier as a map leaves it; `change` makes the new value, default the old one."""
    change = change or (lambda text: text)
    values = [None if text is None else change(text) for text in records["text"]]
    result = datasets.Dataset.from_dict({"completion": values}, features=FEATURES)
    return datasets.concatenate_datasets([records, result], axis=1)


def test_the_zoo_is_large_enough():
    assert len(ZOO) + len(BROKEN) >= 60


@pytest.mark.parametrize(("file", "name"), ZOO)
def test_untouched_records_come_back_byte_for_byte(tmp_path, file, name):
    source = tmp_path / file
    source.write_bytes(content(file, name))
    records = load_records(source, cache_dir=tmp_path / "cache")
    kept = rewritten(records, lambda _: None)
    export_records(kept, tmp_path / "out")
    if len(records):
        assert (tmp_path / "out" / file).read_bytes() == content(file, name)


@pytest.mark.parametrize(("file", "name"), ZOO)
def test_only_the_field_and_its_backup_change(tmp_path, file, name):
    source = tmp_path / file
    source.write_bytes(content(file, name))
    records = load_records(source, cache_dir=tmp_path / "cache")
    if not len(records):
        return
    export_records(rewritten(records, lambda _: "NEW \u00e9"), tmp_path / "out")
    after = (tmp_path / "out" / file).read_bytes().decode()
    at = 0
    for row in records:
        before = row["before"] + row["raw"]
        start = after.index(row["before"], at)
        assert start == at
        if row["text"] is None:
            assert after.startswith(before, at)
            at += len(before)
            continue
        head = row["before"] + row["raw"][: row["start"]]
        assert after.startswith(head, at)
        at += len(head)
        value, end = json.JSONDecoder().raw_decode(after[at:])
        assert value == "NEW \u00e9"
        at += end
        tail = row["joint"] + row["raw"][row["start"] if row["joint"] else row["end"] :]
        assert after.startswith(tail, at)
        at += len(tail)
    assert after[at:] == records[-1]["after"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_is_one_line_with_file_line_and_column(tmp_path, name):
    file, text, says = BROKEN[name]
    source = tmp_path / file
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        load_records(source, cache_dir=tmp_path / "cache")
    assert str(error.value).startswith(f"{source}{says}")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "datasets").iterdir())


def test_a_record_of_50_mb(tmp_path):
    source = tmp_path / "d.json"
    source.write_text('[{"pad": "' + "p" * 50_000_000 + '", "code": "x"}, {"code": "y"}]')
    records = load_records(source, cache_dir=tmp_path / "cache")
    assert records["text"] == ["x", "y"]
    export_records(rewritten(records), tmp_path / "out")
    after = (tmp_path / "out" / "d.json").read_text()
    assert after.endswith(
        'p", "code": "x", "original_code": "x"}, {"code": "y", "original_code": "y"}]'
    )


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize(("file", "name"), [z for z in ZOO if len(content(*z)) < 5000])
def test_where_a_file_is_cut_into_chunks_does_not_matter(tmp_path, monkeypatch, chunk, file, name):
    source = tmp_path / file
    source.write_bytes(content(file, name))
    whole = load_records(source, cache_dir=tmp_path / "whole").to_list()
    monkeypatch.setattr("fabe_ds.formats.json.read.CHUNK", chunk)
    assert load_records(source, cache_dir=tmp_path / "cut").to_list() == whole


def test_wrapped_records(tmp_path):
    text = (
        '{"version": 1, "data": {"x": [], "items": [ {"code": "a"},{"code": "b"} ]}, "n": 1e-12}\n'
    )
    source = tmp_path / "d.json"
    source.write_text(text)
    records = load_records(source, records_key="data.items", cache_dir=tmp_path / "cache")
    assert records["text"] == ["a", "b"]
    export_records(rewritten(records, str.upper), tmp_path / "out")
    assert (tmp_path / "out" / "d.json").read_text() == (
        text.replace('"a"', '"A", "original_code": "a"').replace('"b"', '"B", "original_code": "b"')
    )


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("nothing", "no key 'nothing'"),
        ("version", "'version' is not a list"),
        ("data", "not a list"),
    ],
)
def test_a_wrong_records_key_is_named(tmp_path, key, says):
    source = tmp_path / "d.json"
    source.write_text('{"version": 1, "data": {"items": []}}')
    with pytest.raises(InputError, match=says):
        load_records(source, records_key=key, cache_dir=tmp_path / "cache")


def test_the_new_value_is_escaped_in_the_records_own_manner(tmp_path):
    source = tmp_path / "d.jsonl"
    source.write_text('{"code": "gr\\u00f6\\u00dfe"}\n{"code": "größe"}\n{"code": "x"}\n')
    records = load_records(source, backup_field=None, cache_dir=tmp_path / "cache")
    export_records(rewritten(records, lambda _: 'é\u2028"\n'), tmp_path / "out")
    assert (tmp_path / "out" / "d.jsonl").read_text().split("\n")[:3] == [
        '{"code": "\\u00e9\\u2028\\"\\n"}',
        '{"code": "é\u2028\\"\\n"}',
        '{"code": "é\u2028\\"\\n"}',
    ]


def test_gzip_goes_out_as_gzip(tmp_path):
    source = tmp_path / "d.jsonl.gz"
    source.write_bytes(gzip.compress(LINES["plain"].encode()))
    records = load_records(source, cache_dir=tmp_path / "cache")
    export_records(rewritten(records, lambda _: None), tmp_path / "out")
    assert (
        gzip.decompress((tmp_path / "out" / "d.jsonl.gz").read_bytes()).decode() == LINES["plain"]
    )


def test_a_folder_is_mirrored(tmp_path):
    for name in ("a.jsonl", "sub/b.jsonl", "sub/deep/c.json"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"code": "x"}\n')
    everything = load_records(tmp_path / "in", cache_dir=tmp_path / "cache")
    assert everything["file"] == ["a.jsonl", "sub/b.jsonl", "sub/deep/c.json"]
    some = load_records(
        tmp_path / "in", glob=["*.jsonl", "**/*.json"], cache_dir=tmp_path / "cache"
    )
    assert some["file"] == ["a.jsonl", "sub/deep/c.json"]
    export_records(rewritten(everything), tmp_path / "out")
    written = {
        p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.json*")
    }
    assert written == {"a.jsonl", "sub/b.jsonl", "sub/deep/c.json"}


def test_unchanged_files_are_not_read_again_and_changed_ones_are(tmp_path):
    source = tmp_path / "d.jsonl"
    source.write_text('{"code": "x"}\n')
    first = load_records(source, cache_dir=tmp_path / "cache")
    stamp = source.stat()
    source.touch()
    again = load_records(source, cache_dir=tmp_path / "cache")
    assert again._fingerprint == first._fingerprint
    assert again.cache_files == first.cache_files
    source.write_text('{"code": "y"}\n')
    import os

    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    changed = load_records(source, cache_dir=tmp_path / "cache")
    assert changed["text"] == ["y"]
    assert changed._fingerprint != first._fingerprint


def test_export_wants_all_records_in_order(tmp_path):
    source = tmp_path / "d.jsonl"
    source.write_text('{"code": "x"}\n{"code": "y"}\n{"code": "z"}\n')
    records = rewritten(load_records(source, cache_dir=tmp_path / "cache"))
    for wrong in ([0, 1], [1, 0, 2], [0, 2]):
        with pytest.raises(ExportError, match="missing or out of order"):
            export_records(records.select(wrong), tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())
    with pytest.raises(UsageError, match="either"):
        export_records(records)


def test_in_place_keeps_mode_and_follows_links(tmp_path):
    real = tmp_path / "real.jsonl"
    real.write_text('{"code": "x"}\n')
    real.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(real)
    records = rewritten(load_records(link, cache_dir=tmp_path / "cache"), str.upper)
    export_records(records, inplace=True, root=link)
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"code": "X", "original_code": "x"}
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "link.jsonl", "real.jsonl"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)
records_strategy = st.lists(
    st.dictionaries(st.sampled_from(["code", "a", "b", "é"]), json_values, max_size=4), max_size=6
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60
)
@given(
    records=records_strategy,
    indent=st.sampled_from([None, 0, 2, "\t"]),
    ascii_only=st.booleans(),
    lines=st.booleans(),
    newline=st.sampled_from(["\n", "\r\n"]),
)
def test_any_records_come_back(tmp_path_factory, records, indent, ascii_only, lines, newline):
    folder: Path = tmp_path_factory.mktemp("any")
    if lines:
        text = "".join(json.dumps(r, ensure_ascii=ascii_only) + "\n" for r in records)
    else:
        text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    source = folder / ("d.jsonl" if lines else "d.json")
    original = text.replace("\n", newline).encode("utf-8", "replace")
    source.write_bytes(original)
    loaded = load_records(source, cache_dir=folder / "cache")
    assert len(loaded) == len(records)
    if not records:
        return
    export_records(rewritten(loaded, lambda _: None), folder / "out")
    assert (folder / "out" / source.name).read_bytes() == original
