"""What holds for every format alike: samples, states, in place, several devices, finished runs."""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from aiohttp import web

from tests.support.server import Call, ModelServer, error

CODES = ["x = 1", "x = 2", None, "", "x = 5"]
ROWS = [{"id": i, "code": code, "note": f"n{i}"} for i, code in enumerate(CODES)]


def json_lines(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def json_list(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2))


def csv(path: Path) -> None:
    lines = [f'{row["id"]},{row["code"] or ""},"{row["note"]}"' for row in ROWS]
    path.write_text("\n".join(["id,code,note", *lines, ""]))


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def saved(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The records of a file or folder of any kind, as they stand on the disk."""
    if path.is_dir():
        return datasets.Dataset.load_from_disk(str(path)).to_list()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as source:
            try:
                return pa.ipc.open_stream(source).read_all().to_pylist()
            except pa.ArrowInvalid:
                return pa.ipc.open_file(source).read_all().to_pylist()
    import csv

    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@dataclass
class Kind:
    """A kind of input: its name, how it is made, and what a run writes beside the input."""

    name: str
    make: Callable[[Path], None]
    output: str


KINDS = [
    Kind("d.jsonl", json_lines, "d.jsonl"),
    Kind("d.json", json_list, "d.json"),
    Kind("d.csv", csv, "d.csv"),
    Kind("d.parquet", parquet, "d.parquet"),
    Kind("s.arrow", arrow_stream, "s.parquet"),
    Kind("f.arrow", arrow_file, "f.parquet"),
    Kind("saved", saved, "saved"),
]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind.name} {kind.make.__name__}")
def kind(request, box) -> Kind:
    request.param.make(box.path / request.param.name)
    return request.param


def asking(server: ModelServer, name: str, *more: Any) -> list[Any]:
    """The command line of a run with the server's model, which answers in capitals."""
    how = ("--provider", "openai", "--model", "m", "--base-url", server.url)
    instruction = () if "--instruction" in more else ("--instruction", "Up")
    return ["run", "--input", name, *instruction, *how, *more]


def value(found: Any) -> Any:
    """A value that CSV has as JSON."""
    return json.loads(found) if isinstance(found, str) else found


def test_a_state_and_samples_for_every_format(box, kind):
    more = ["--status-field", "state", "--samples", 2, "--temperature", 1]
    ended = box.fabe("run", "--input", kind.name, *more)
    assert ended.code == 0, ended
    rows = rows_of(box.path / "outputs" / kind.output)
    assert [str(row["id"]) for row in rows] == list("01234")
    assert rows[0]["note"] == "n0"
    assert rows[0]["code"] == "# echo: local\nx = 1"
    assert rows[0]["original_code"] == "x = 1"
    assert value(rows[0]["samples"]) == ["# echo: local\nx = 1"] * 2
    assert [value(row["state"])["state"] for row in rows] == [
        *("done", "done", "skipped", "skipped", "done")
    ]
    taken = box.fabe("run", "--input", f"outputs/{kind.output}", *more, "--output", "second")
    assert taken.code == 2
    assert "name another" in taken.err
    assert len(taken.err.splitlines()) == 1


def test_in_place_for_every_format(box, kind):
    with ModelServer() as server:
        command = asking(server, kind.name, "--inplace", "--status-field", "state")
        ended = box.fabe(*command)
        assert ended.code == 0, ended
        sent = len(server.calls)
        first = rows_of(box.path / kind.name)
        assert [row["code"] or None for row in first] == ["X = 1", "X = 2", None, None, "X = 5"]
        assert first[0]["original_code"] == "x = 1"
        assert value(first[0]["state"])["state"] == "done"
        assert "5 records, 0 to do" in box.fabe(*command, "--dry-run").out
        again = box.fabe(*command)
        assert again.code == 0, again
        assert "3 done before" in again.out
        assert rows_of(box.path / kind.name) == first
        assert len(server.calls) == sent
        apart = box.fabe(*asking(server, kind.name, "--status-field", "state2"))
        assert apart.code == 0, apart  # what is done in place is not done elsewhere
        assert len(server.calls) == 2 * sent
        assert rows_of(box.path / "outputs" / kind.output)[0]["code"] == "X = 1"
        other = asking(server, kind.name, "--inplace", "--instruction", "Otherwise")
        assert box.fabe(*other).code == 0
        third = rows_of(box.path / kind.name)
        assert third[0]["original_code"] == "x = 1"
        assert len(server.calls) == 3 * sent


def test_what_failed_in_place_is_healed_by_the_next_run(box, kind):
    more = ["--inplace", "--status-field", "state", "--samples", 2, "--temperature", 1]

    async def refusing_twos(call: Call) -> web.Response | None:
        return error(400, "no twos") if "2" in call.prompt else None

    with ModelServer(refusing_twos) as server:
        ended = box.fabe(*asking(server, kind.name, *more))
        assert ended.code == 1, ended
        broken = rows_of(box.path / kind.name)
        assert broken[1]["code"] == "x = 2"
        assert value(broken[1]["state"])["state"] == "failed"
        assert value(broken[0]["samples"]) == ["X = 1", "X = 1"]
        sent, server.behaviour = len(server.calls), None
        healed = box.fabe(*asking(server, kind.name, *more))
        assert healed.code == 0, healed
        assert len(server.calls) == sent + 2
        rows = rows_of(box.path / kind.name)
        assert rows[1]["code"] == "X = 2"
        assert value(rows[1]["samples"]) == ["X = 2", "X = 2"]
        assert value(rows[1]["state"])["state"] == "done"
        assert value(rows[0]["samples"]) == ["X = 1", "X = 1"]
        other = box.fabe(*asking(server, kind.name, *more, "--instruction", "Otherwise"))
        assert other.code == 0, other
    assert [row["id"] for row in rows_of(box.path / kind.name)] == [row["id"] for row in rows]


def test_a_field_of_the_users_own_is_never_replaced(box, kind):
    before = rows_of(box.path / kind.name)
    for more in (["--inplace"], []):
        for names in (["--status-field", "note"], ["--samples-field", "note", "--samples", 2]):
            ended = box.fabe("run", "--input", kind.name, "--temperature", 1, *names, *more)
            assert ended.code == 2, ended
            assert "note: " in ended.err
            assert len(ended.err.splitlines()) == 1
    assert rows_of(box.path / kind.name) == before


@pytest.mark.parametrize("name", ["meta", "code", "original_code"])
def test_no_field_is_added_in_anothers_place(box, name):
    box.lines("d.jsonl", [{"meta": {"code": "a"}, "z": 1}])
    field = ["--field", "meta.code" if name == "meta" else "code"]
    ended = box.fabe("run", "--input", "d.jsonl", *field, "--status-field", name, "--inplace")
    assert (ended.code, "another field has that name" in ended.err) == (2, True), ended


def test_several_devices_for_every_format(box, kind):
    alone = box.fabe("run", "--input", kind.name, "--output", "alone")
    assert alone.code == 0, alone
    both = box.fabe(
        *("run", "--input", kind.name, "--output", "both", "--device", "cpu,cpu"),
        *("--cache-dir", "cache-of-both"),
    )
    assert both.code == 0, both
    whole, halves = (rows_of(box.path / name / kind.output) for name in ("alone", "both"))
    assert whole == halves
    assert box.report("both.run.json")["done"] == 3


def test_a_finished_run_of_every_format_is_answered_at_once(box, kind):
    with ModelServer() as server:
        command = asking(server, kind.name)
        assert box.fabe(*command).code == 0
        output = box.path / "outputs" / kind.output
        before = output.stat().st_mtime_ns
    again = box.fabe(*command)  # with no server to ask
    assert again.code == 0, again
    assert "0 rewritten, 3 from cache" in again.out
    assert box.report()["requests"] == 0
    if output.is_file():
        assert output.stat().st_mtime_ns == before  # what is there is as it should be


def test_every_format_is_shown_explained_and_previewed(box, kind):
    with ModelServer() as server:
        command = asking(server, kind.name)
        dry = box.fabe(*command, "--dry-run")
        assert (dry.code, "5 records, 3 to do" in dry.out) == (0, True), dry
        assert not server.calls
        assert sorted(path.name for path in box.path.iterdir()) == [kind.name]
        seen = box.fabe("preview", *command[1:], "-n", 2)
        assert seen.code == 0, seen
        assert "2 records in" in seen.out
        assert len(server.calls) == 2
        assert box.fabe(*command).code == 0
        assert len(server.calls) == 3
    explained = box.fabe("cache", "explain", "outputs.run.json", "--record", 1)
    assert "record 1: hit" in explained.out
    assert "not sent" in box.fabe("cache", "explain", "outputs.run.json", "--record", 2).out


def test_members_are_put_in_in_the_records_own_layout(box):
    lines = {
        '{"code": "x", "a": 1.10}': '{"code": "X", "a": 1.10, "all": ["X", "X"]}',
        '{"code":"x","a":[]}': '{"code":"X","a":[],"all":["X","X"]}',
        '{ "code" : "x" }': '{ "code" : "X", "all": ["X", "X"] }',
        '{"a": "\\u00e9", "code": "x"}': '{"a": "\\u00e9", "code": "X", "all": ["X", "X"]}',
        '{"a": "é", "code": "é"}': '{"a": "é", "code": "É", "all": ["É", "É"]}',
        '{"a": "\\u00e9", "code": "é"}': '{"a": "\\u00e9", "code": "É", "all": ["É", "É"]}',
        '{"a": 1}': '{"a": 1, "all": [null, null]}',
    }
    box.write("d.jsonl", "\n".join(lines))
    box.write("d.json", '[\n  {\n    "code": "x",\n    "a": {}\n  },\n  {}\n]\n')
    with ModelServer() as server:
        more = ["--backup-field", "", "--samples", 2, "--samples-field", "all", "--temperature", 1]
        for name in ("d.jsonl", "d.json"):
            ended = box.fabe(*asking(server, name, *more))
            assert ended.code == 0, ended
    assert (box.path / "outputs/d.jsonl").read_text().split("\n") == list(lines.values())
    assert (box.path / "outputs/d.json").read_text() == (
        '[\n  {\n    "code": "X",\n    "a": {},\n    "all": ["X", "X"]\n  },\n'
        '  {"all": [null, null]}\n]\n'
    )


def test_several_fields_of_json_are_asked_about_record_by_record(box):
    box.lines("d.jsonl", [{"a": f"a{i}", "b": f"b{i}"} for i in range(4)])
    with ModelServer() as server:
        command = asking(server, "d.jsonl", "--field", "a", "--also-field", "b")
        capped = box.fabe(*command, "--concurrency", 1, "--max-requests", 5)
        assert capped.code == 1
        asked = [call.body["messages"][-1]["content"][-2:] for call in server.calls]
        assert asked == ["a0", "b0", "a1", "b1", "a2"]
        written = box.fabe(*command, "--offline")
        assert written.code == 1
    rows = box.read("outputs/d.jsonl")
    assert [(row["a"], row["b"]) for row in rows[:2]] == [("A0", "B0"), ("A1", "B1")]
    assert rows[3] == {"a": "a3", "b": "b3"}
    (loaded,) = (box.path / ".cache/datasets").iterdir()
    carrier = datasets.Dataset.from_file(str(loaded / "records.arrow"))
    assert len(carrier) == 4  # each record's text is there once


PACKED = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.ZstdCompressor().compress}
UNPACKED = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".zst": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_compressed_files(box, name, suffix):
    data = json.dumps([{"code": "x", "n": 1.10}]).encode()
    data = data if name == "d.json" else data[1:-1] + b"\n"
    packed = PACKED[suffix](data[: len(data) // 2]) + PACKED[suffix](data[len(data) // 2 :])
    box.write(f"in/{name}{suffix}", packed)  # of two parts, as of files that were joined
    ended = box.fabe("run", "--input", "in", "--backup-field", "")
    assert ended.code == 0, ended
    written = (box.path / f"outputs/{name}{suffix}").read_bytes()
    assert UNPACKED[suffix](written) == data.replace(b'"x"', b'"# echo: local\\nx"')
    plain = box.fabe("run", "--input", f"in/{name}{suffix}", "--output", f"plain/{name}")
    assert plain.code == 0, plain
    assert (box.path / f"plain/{name}").read_bytes().startswith(data[:4])


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("damage", ["cut", "spoilt", "plain"])
def test_a_damaged_compressed_file_is_one_line(box, suffix, damage):
    packed = PACKED[suffix]("".join(json.dumps(row) + "\n" for row in ROWS * 300).encode())
    data = {
        "cut": packed[:-20],
        "spoilt": packed[:30] + bytes(40) + packed[70:],
        "plain": b'{"code": "x"}\n',
    }[damage]
    box.write(f"d.jsonl{suffix}", data)
    ended = box.fabe("run", "--input", f"d.jsonl{suffix}")
    assert ended.code == 2, ended
    assert f"d.jsonl{suffix}: cannot be read: " in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not (box.path / "outputs").exists()


KILLING = """
import os
from fabe_ds.__main__ import main
replace, done = os.replace, []
def killing(old, new):
    if "/in/" in str(new):
        done.append(new)
        if len(done) == 2:
            os._exit(137)
    replace(old, new)
os.replace = killing
main()
"""


@pytest.mark.parametrize("kind", [KINDS[2], KINDS[3], KINDS[4]], ids=lambda kind: kind.name)
def test_a_folder_of_tables_is_replaced_whole_whenever_a_run_is_killed(box, kind):
    """Killed between the replacing of two files: one has a new column, and the other has not."""
    names = [f"in/{letter}{Path(kind.name).suffix}" for letter in "abc"]
    for name in names:
        (box.path / "in").mkdir(exist_ok=True)
        kind.make(box.path / name)
    killed = subprocess.run(
        [sys.executable, "-c", KILLING, "run", "--input", "in", "--inplace"],
        cwd=box.path,
        env=box.environment,
        capture_output=True,
    )
    assert killed.returncode == 137, killed
    widths = {len(rows_of(box.path / name)[0]) for name in names}
    assert widths == {3, 4}
    again = box.fabe("run", "--input", "in", "--inplace")
    assert again.code == 0, again
    for name in names:
        assert rows_of(box.path / name)[0]["code"] == "# echo: local\nx = 1"
        assert rows_of(box.path / name)[0]["original_code"] == "x = 1"
    assert "9 done before" in again.out
    assert not list((box.path / "in").glob(".fabe-ds-*"))
