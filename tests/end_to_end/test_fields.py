"""Several fields of JSON records in one run."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.server import ModelServer, error, openai_run

TEXT = """[
  {"output": "o\\u00e9", "id": 1.10, "instruction":"i1", "n": {"output" : "deep"}},
  {"instruction": "i2",
   "id": 2
  },
  {"id": 1e400, "output":"", "instruction": "i3", "original_output": "mine"}
]
"""
EXPECTED = """[
  {"output": "O\\u00c9", "original_output": "o\\u00e9", "id": 1.10, "instruction":"I1", "original_code":"i1", "n": {"output" : "DEEP", "original_output" : "deep"}},
  {"instruction": "I2",
   "original_code": "i2",
   "id": 2
  },
  {"id": 1e400, "output":"", "instruction": "I3", "original_code": "i3", "original_output": "mine"}
]
"""
BOTH = ("--field", "instruction", "--also-field", "output", "--also-field", "n.output")


def run_of(server, *more, source="data.json"):
    command = openai_run(server, *more)
    command[2] = source
    return command


def test_only_the_fields_change(box, server):
    box.write("data.json", TEXT)
    ended = box.fabe(*run_of(server, *BOTH))
    assert ended.code == 0, ended
    assert (box.path / "outputs/data.json").read_text() == EXPECTED
    assert ended.out.startswith("3 records: 3 rewritten, 0 from cache;")
    assert len(server.calls) == 5
    again = box.fabe(*run_of(server, *BOTH))
    assert again.out.startswith("3 records: 0 rewritten, 3 from cache;")
    one = box.fabe(*run_of(server, "--field", "instruction"))
    assert one.out.startswith("3 records: 0 rewritten, 3 from cache;")
    assert len(server.calls) == 5
    assert json.loads((box.path / "outputs/data.json").read_text())[0]["output"] == "oé"


def test_a_template_sees_each_field_by_its_name_and_the_record_as_it_was(box, server):
    box.lines("data.jsonl", [{"q": "ask", "a": "say", "id": 7}])
    box.write("t.j2", "{{ record.id }} {{ record.q }} {{ record.a }}: {{ text }}")
    more = ("--instruction", "t.j2", "--field", "q", "--also-field", "a", "--backup-field", "")
    assert box.fabe(*run_of(server, *more, source="data.jsonl")).code == 0
    assert sorted(call.prompt for call in server.calls) == ["7 ask say: ask", "7 ask say: say"]
    assert set(box.read("outputs/data.jsonl")[0]) == {"q", "a", "id"}


def test_one_field_fails_and_the_other_does_not(box):
    async def behave(call):
        return error(400, "too rude") if call.prompt.endswith("a 3") else None

    box.lines("data.jsonl", [{"q": f"q {i}", "a": f"a {i}"} for i in range(6)])
    more = ("--field", "q", "--also-field", "a")
    with ModelServer(behave) as server:
        ended = box.fabe(*run_of(server, *more, source="data.jsonl"))
        assert ended.code == 1
        assert "6 records: 5 rewritten, 0 from cache, 1 failed" in ended.out
        record = box.read("outputs/data.jsonl")[3]
        assert (record["q"], record["a"]) == ("Q 3", "a 3")
        (failure,) = box.read("outputs.failures.jsonl")
        assert (failure["record"], failure["field"], failure["text"]) == (3, "a", "a 3")
    with ModelServer(port=int(server.root.rsplit(":", 1)[1])) as server:
        ended = box.fabe(*run_of(server, *more, source="data.jsonl"))
        assert ended.code == 0
        assert len(server.calls) == 1
    assert box.read("outputs/data.jsonl")[3]["a"] == "A 3"


def test_in_place_each_field_is_done_once(box):
    async def behave(call):
        return error(400, "no") if len(behaved.calls) <= 4 and "hello!" in call.prompt else None

    box.lines("data.jsonl", [{"q": "hello", "a": "HELLO"}, {"q": "hello!", "a": "x"}])
    more = ("--field", "q", "--also-field", "a", "--inplace", "--backup-field", "")
    with ModelServer(behave) as behaved:
        assert box.fabe(*run_of(behaved, *more, source="data.jsonl")).code == 1
        ended = box.fabe(*run_of(behaved, *more, source="data.jsonl"))
        assert ended.code == 0, ended
        assert len(behaved.calls) == 5
    assert box.read("data.jsonl") == [{"q": "HELLO", "a": "HELLO"}, {"q": "HELLO!", "a": "X"}]


def test_a_dry_run_a_preview_and_why(box, server):
    box.write("data.json", TEXT)
    dry = box.fabe(*run_of(server, *BOTH, "--dry-run"))
    assert "dry run: 3 records, 5 to do; 4 skipped (1 empty, 3 missing)" in dry.out
    assert not server.calls
    seen = box.fabe("preview", "-n", 2, *run_of(server, *BOTH)[1:])
    assert seen.code == 0, seen
    assert "+ I1" in seen.out
    assert "+ OÉ" in seen.out
    assert box.fabe(*run_of(server, *BOTH)).code == 0
    why = box.fabe("cache", "explain", "outputs.run.json", "--record", 2)
    assert why.out.count("record 2: ") == 3
    assert "not sent: the field is empty" in why.out


@pytest.mark.parametrize(
    ("first", "other"), [("n", "n.output"), ("n.output", "n"), ("output", "output")]
)
def test_fields_that_hold_one_another_are_refused(box, server, first, other):
    box.write("data.json", TEXT)
    ended = box.fabe(*run_of(server, "--field", first, "--also-field", other))
    assert (ended.code, ended.err) == (
        2,
        f"fabe-ds: --also-field {other}: another field is the same, or inside it\n",
    )


@pytest.mark.parametrize(
    "more",
    [
        ("--field", "instruction", "--also-field", "code"),
        ("--field", "a", "--also-field", "b", "--backup-field", "original_b"),
    ],
)
def test_backups_that_would_meet_are_refused(box, server, more):
    box.write("data.json", TEXT)
    ended = box.fabe(*run_of(server, *more))
    assert ended.code == 2
    assert "two fields would be kept there; give another" in ended.err


@pytest.mark.parametrize("command", [(), ("--dry-run",)])
def test_a_field_that_no_record_has_is_named(box, server, command):
    box.write("data.json", TEXT)
    ended = box.fabe(*run_of(server, "--field", "instuction", *command))
    said = "fabe-ds: --field instuction: no record has it; the first one has output, id, instruction, n\n"
    assert (ended.code, ended.err) == (2, said)
    box.write("wrapped.json", '{"version": 1, "data": [{"code": "x"}]}')
    ended = box.fabe(*run_of(server, *command, source="wrapped.json"))
    assert ended.err.endswith("(--records-key data, if the records are there)\n")
    assert not server.calls


def test_a_backup_that_is_there_already_is_told_of(box, server):
    box.write("data.json", TEXT)
    ended = box.fabe(*run_of(server, "--field", "instruction", "--backup-field", "id"))
    assert ended.code == 0
    assert "3 records hold 'id' already: it stays as it is" in ended.err


def test_what_is_skipped_is_told_to_who_asks(box, server):
    box.write("data.json", TEXT)
    ended = box.fabe(*run_of(server, "--field", "output"), LOG_LEVEL="DEBUG")
    told = re.sub(r"^\d\d:\d\d:\d\d ", "", ended.err, flags=re.MULTILINE)
    assert "data.json:3: 'output' skipped: missing\ndata.json:6: 'output' skipped: empty\n" in told


WRONG_SHAPES = {
    "a list in one line": ("d.jsonl", '[{"code": "x"}, {"code": "y"}]', "code", "name it .json"),
    "a list over several lines": ("d.jsonl", '[\n{"code": "x"}\n]', "code", "name it .json"),
    "a key for each record": (
        "d.json",
        json.dumps({f"task/{i}": {"code": "x"} for i in range(3000)}),
        "code",
        "and 2980 more",
    ),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_a_field_that_is_not_found_says_what_is_there(box, name):
    """B2, B3."""
    file, text, field, said = WRONG_SHAPES[name]
    box.write(file, text)
    ended = box.fabe(
        *("run", "--input", file, "--instruction", "x", "--provider", "echo", "--field", field)
    )
    assert ended.code in (1, 2)
    assert said in ended.err
    assert len(ended.err) < 1000


@pytest.mark.parametrize(
    ("text", "field", "after"),
    [
        ('{"meta.code": "x"}', "meta.code", '{"meta.code": "# echo: m\\nx", "o": "x"}'),
        ('{"a.b": {"c.d": "x"}}', "a.b.c.d", '{"a.b": {"c.d": "# echo: m\\nx", "o": "x"}}'),
        (
            '{"meta.code": "no", "meta": {"code": "x"}}',
            "meta.code",
            '{"meta.code": "no", "meta": {"code": "# echo: m\\nx", "o": "x"}}',
        ),
        (
            '{"meta.code": "x", "meta": {"other": 1}}',
            "meta.code",
            '{"meta.code": "# echo: m\\nx", "o": "x", "meta": {"other": 1}}',
        ),
    ],
)
def test_a_literal_key_with_a_dot_is_taken_where_no_path_is_found(box, text, field, after):
    """B2."""
    box.write("d.jsonl", text)
    command = ("run", "--input", "d.jsonl", "--provider", "echo", "--model", "m")
    assert box.fabe(*command, "--field", field, "--backup-field", "o").code == 0
    assert (box.path / "outputs/d.jsonl").read_text() == after


def test_a_column_whose_name_holds_a_dot_is_taken(box):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"meta.code": ["x = 1"]}), box.path / "d.parquet")
    command = ("run", "--input", "d.parquet", "--instruction", "x", "--provider", "echo")
    for field in ("meta.code", r"meta\.code"):
        assert box.fabe(*command, "--field", field).code == 0
        (row,) = pq.read_table(box.path / "outputs/d.parquet").to_pylist()
        assert row["meta.code"].endswith("x = 1")
        assert row["original_code"] == "x = 1"
