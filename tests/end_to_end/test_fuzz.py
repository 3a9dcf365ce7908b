"""Files with anything done to them: one line or an answer, never a traceback, a lost byte, a half
file. `FUZZ=5000 pytest tests/end_to_end/test_fuzz.py` tries that many of each kind."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import Box, Ended

EXAMPLES = int(os.environ.get("FUZZ", "8"))
ROWS = [
    {"id": 1, "code": "x = 1\n", "n": 1.10, "more": {"deep": ["a", None, {"k": "é"}]}},
    {"id": 2, "code": None, "text": 'quoted "\\u00e9" \u2028 \U0001f600'},
    {"id": 3, "code": "", "big": 12345678901234567890},
    {"code": "def f():\n\treturn '\\ud83d'"},
]


def lines(rows: list[dict[str, object]] = ROWS, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table(kind: str) -> bytes:
    data = pa.table(
        {
            "code": ["x", None, "y"],
            "m": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
            "when": pa.array([1, 2, None], pa.timestamp("us", "UTC")),
        }
    )
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(data, sink)
    else:
        data = data.drop_columns("m")
        with pa.ipc.new_stream(sink, data.schema) as writer:
            writer.write_table(data)
    return sink.getvalue()


CSV = '\ufeffid;"code";note\r\n1;"a ""b""\r\nc";x\r\n\r\n2;;"ü"\r\n'.encode()
CONFIG = b"""input_path: d.jsonl
field: code
template-var: {goal: short}
stop: [a, "b"]
max_new_tokens: 64
temperature: 0.5
log_level: debug
provider: echo
"""
SCHEMA = json.dumps(
    {"$defs": {"a": {"type": "string"}}, "properties": {"x": {"$ref": "#/$defs/a"}}}
).encode()
TEMPLATE = (
    b"{% for k in record %}{{ k }}: {{ record[k] | upper }}{% endfor %}\n{{ text }} {{ goal }}"
)
PRICES = b"m: {prompt: 0.15, completion: 0.6}\nother: {prompt: 1, completion: 2}\n"

SPECIALS = [
    *(b"\0", b"\r", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b"\\", b"\\ud800", b"'"),
    *(b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"1e999", b"-", b"null", b"\n\n", b"\x1b[2J"),
    *(b"[" * 2000, b"{{" * 300, b'{"a":' * 3000, b"9" * 5000, b"x" * 70_000, b"!!python/none x"),
    *(b"&a [*a]", b"*a", b"{% include 'x' %}", b"{{ 1 / 0 }}", b"$ref", b"<<: [1]", b"2020-13-45"),
]


@st.composite
def spoiled(draw: st.DrawFn, data: bytes) -> bytes:
    """The data after one to four changes: bytes flipped, cut, doubled, moved, put in."""
    for _ in range(draw(st.integers(1, 4))):
        size = len(data)
        start = draw(st.integers(0, size))
        end = min(size, start + draw(st.sampled_from([0, 1, 2, 8, 64, size])))
        part = data[start:end]
        match draw(st.sampled_from(["flip", "cut", "double", "put", "move", "end"])):
            case "flip" if part:
                mask = draw(st.integers(1, 255))
                data = data[:start] + bytes([part[0] ^ mask]) + data[start + 1 :]
            case "cut":
                data = data[:start] + data[end:]
            case "double":
                data = data[:end] + part + data[end:]
            case "put":
                data = data[:start] + draw(st.sampled_from(SPECIALS)) + data[start:]
            case "move":
                rest = data[:start] + data[end:]
                to = draw(st.integers(0, len(rest)))
                data = rest[:to] + part + rest[to:]
            case "end":
                data = data[:start]
    return data


class Place(Box):
    """A folder of its own for one input."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="fuzz-")))

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def judged(self, *args: object) -> Ended:
        """How the command ended, which is in one line where it is not well."""
        ended = self.fabe(*args, timeout=60)
        assert ended.code in (0, 1, 2), ended
        complaints = [line for line in ended.err.splitlines() if line.startswith("fabe-ds: ")]
        assert len(complaints) <= 1, ended
        assert complaints or ended.code < 2, ended
        assert not any(len(line) > 1200 for line in complaints), ended
        left = list(self.path.rglob(".fabe-ds-*"))
        assert not left, left
        return ended


def fuzzed(data: bytes) -> Callable[[Callable[[bytes], None]], Callable[[], None]]:
    """A test of many inputs that are made of one."""

    def decorate(test: Callable[[bytes], None]) -> Callable[[], None]:
        inner = given(spoiled(data))(test)
        return settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize="FUZZ" not in os.environ,
            suppress_health_check=list(HealthCheck),
            database=None,
        )(inner)

    return decorate


UNANSWERED = ["--provider", "openai", "--model", "m", "--instruction", "x", "--offline"]
"""Nobody is asked, so every record keeps what it has."""


def kept(name: str, data: bytes, *more: str) -> None:
    """A run that answers nothing gives the bytes back, one that answers ends in one line, and both
    do so again with what the first has left in the cache."""
    with Place() as place:
        place.write(name, data)
        for skip in (["--on-bad-input", "skip"], []):
            ended = place.judged("run", "--input", name, *UNANSWERED, *skip, *more)
            written = place.path / "outputs" / name
            if written.exists() and "left out: " not in ended.out:
                got, given = written.read_bytes(), data
                if name.endswith(".gz"):
                    got, given = gzip.decompress(got), gzip.decompress(given)
                assert got == given, ended
            assert (place.path / name).read_bytes() == data
        place.judged("run", "--input", name, "--output", "o", *more)
        place.judged("run", "--input", name, "--inplace", "--on-bad-input", "skip", *more)


@fuzzed(lines())
def test_json_lines(data: bytes) -> None:
    kept("d.jsonl", data)


@fuzzed(lines(end="\r\n \t\r\n"))
def test_json_lines_of_windows(data: bytes) -> None:
    kept("d.ndjson", data, "--also-field", "more.deep.0")


@fuzzed(json.dumps(ROWS, indent=2).encode())
def test_a_json_list(data: bytes) -> None:
    kept("d.json", data)


@fuzzed(json.dumps({"meta": [1], "data": {"rows": ROWS}}).encode())
def test_a_list_inside(data: bytes) -> None:
    kept("d.json", data, "--records-key", "data.rows")


@fuzzed(gzip.compress(lines(), mtime=0))
def test_a_compressed_file(data: bytes) -> None:
    kept("d.jsonl.gz", data)


def table_kept(name: str, data: bytes) -> None:
    with Place() as place:
        place.write(name, data)
        args = ["run", "--input", name, "--field", "code"]
        ended = place.judged(*args, *UNANSWERED, "--backup-field", "")
        if name.endswith("csv") and (place.path / "outputs" / name).exists():
            got = (place.path / "outputs" / name).read_bytes()
            assert got in (data, data + b"\n", data + b"\r\n", data + b"\r"), ended
        place.judged(*args, "--output", "o.jsonl")
        place.judged(*args, "--dry-run", "--on-bad-input", "skip")
        assert (place.path / name).read_bytes() == data


@fuzzed(CSV)
def test_csv(data: bytes) -> None:
    table_kept("d.csv", data)


@fuzzed(table("parquet"))
def test_parquet(data: bytes) -> None:
    table_kept("d.parquet", data)


@fuzzed(table("arrow"))
def test_arrow(data: bytes) -> None:
    table_kept("d.arrow", data)


def configured(name: str, data: bytes, *args: str) -> None:
    with Place() as place:
        place.write("d.jsonl", lines())
        place.write(name, data)
        place.judged("run", "--input", "d.jsonl", "--dry-run", *args)


@fuzzed(CONFIG)
def test_a_configuration(data: bytes) -> None:
    configured("c.yaml", data, "--config", "c.yaml")


@fuzzed(TEMPLATE)
def test_a_template(data: bytes) -> None:
    configured("t.j2", data, "--instruction", "t.j2", "--template-var", "goal=a")


@fuzzed(SCHEMA)
def test_a_schema(data: bytes) -> None:
    configured("s.json", data, "--validate", "json-schema:s.json")


@fuzzed(PRICES)
def test_prices(data: bytes) -> None:
    configured("p.yaml", data, "--prices", "p.yaml", "--model", "m")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which runs have ended: one whole, one of a table, one with failures."""
    box = Box(tmp_path_factory.mktemp("finished"))
    box.write("d.jsonl", lines([row for row in ROWS if row.get("code")]))
    box.write("t.csv", CSV)
    for source, more in (("d.jsonl", []), ("t.csv", []), ("d.jsonl", UNANSWERED)):
        box.fabe("run", "--input", source, "--output", f"o{len(more)}{source[0]}", *more)
    return box.path


@pytest.mark.parametrize("kind", ["cache", "reports"])
def test_what_runs_have_left(finished: Path, kind: str) -> None:
    """Any one file of the cache, or beside an output, spoiled: what follows is right, or says so."""
    choose = random.Random(7)
    files = [
        path.relative_to(finished)
        for path in sorted(finished.rglob("*"))
        if path.is_file() and (".cache" in path.parts) == (kind == "cache")
    ]
    files = [path for path in files if "lock" not in path.name and path.stem not in ("d", "t")]
    assert len(files) >= 5
    good = {name: (finished / name).read_bytes() for name in ("o0d/d.jsonl", "o0t/t.csv")}
    for number in range(2 * EXAMPLES):
        with Place() as place:
            shutil.copytree(finished, place.path, dirs_exist_ok=True)
            victim = place.path / files[number % len(files)]
            data = bytearray(victim.read_bytes())
            for _ in range(choose.randint(1, 3)):
                at = choose.randrange(len(data)) if data else 0
                match choose.randrange(4):
                    case 0:
                        del data[at:]
                    case 1 if data:
                        data[at] ^= choose.randint(1, 255)
                    case 2:
                        data[at:at] = choose.choice(SPECIALS)
                    case 3:
                        data[at : at + 64] = b""
            victim.write_bytes(data)
            if kind == "reports":
                for report in sorted(place.path.glob("*.run.json")):
                    place.judged("report", report.name)
                    place.judged("retry", report.name)
                    place.judged("cache", "explain", report.name)
                continue
            for name in good:
                (place.path / name).unlink()
            first = place.judged("run", "--input", "d.jsonl", "--output", "o0d")
            second = place.judged("run", "--input", "t.csv", "--output", "o0t")
            assert (first.code, second.code) == (0, 0), (victim, first, second)
            assert {name: (place.path / name).read_bytes() for name in good} == good, victim
            place.judged("cache", "stats")
