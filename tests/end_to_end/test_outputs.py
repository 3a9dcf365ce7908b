"""Where answers go: new fields, keys of structured answers, turns of chats; for every format alike."""

from __future__ import annotations

import json
import re
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.end_to_end.test_all_formats import CODES, KINDS, Kind, asking, rows_of, value
from tests.support.server import Call, answer_to, completion, error, openai_run
from tests.support.zoo import JSON, LINES

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "size": {"type": "integer"},
        "score": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "size", "score", "tags"],
    "additionalProperties": False,
}
ANSWER = '{"name": "é", "size": 3, "score": 1.50, "tags": ["a", "b"]}'
ASKED = [index for index, code in enumerate(CODES) if code]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind.name} {kind.make.__name__}")
def kind(request, box) -> Kind:
    request.param.make(box.path / request.param.name)
    return request.param


def written(box, kind: Kind) -> list[dict[str, Any]]:
    return rows_of(box.path / "outputs" / kind.output)


async def structured(call: Call):
    return completion(call, ANSWER)


async def labels(call: Call):
    """A label with probabilities, in the object that was asked for."""
    answer = '{"choice": "good"}'
    parts = [('{"choice": "', -0.0), ("go", -0.25), ("od", -0.05), ('"}', -1.0)]
    logprobs = {"content": [{"token": token, "logprob": p, "bytes": None} for token, p in parts]}
    choice = {"message": {"content": answer}, "finish_reason": "stop", "logprobs": logprobs}
    from aiohttp import web

    return web.json_response({"choices": [choice]})


async def thinking(call: Call):
    return completion(call, f"<think>hm {call.prompt[-1]}</think>\n\nNEW")


# Every feature in every format.


def test_an_answer_goes_into_a_new_field(box, server, kind):
    ended = box.fabe(*asking(server, kind.name, "--output-field", "summary"))
    assert ended.code == 0, ended
    rows = written(box, kind)
    assert [row["code"] or None for row in rows] == [code or None for code in CODES]
    assert [row.get("summary") or None for row in rows] == [
        code.upper() if code else None for code in CODES
    ]
    assert not any("original_code" in row for row in rows)
    again = box.fabe(*asking(server, kind.name, "--output-field", "summary"))
    assert "3 from cache" in again.out
    assert written(box, kind) == rows


def test_a_field_that_is_there_is_overwritten_or_skipped(box, server, kind):
    done = asking(server, kind.name, "--output-field", "note", "--instruction", "Now")
    assert box.fabe(*done, "--on-existing", "skip").code == 0
    assert server.calls == []
    assert [row["note"] for row in written(box, kind)] == [f"n{i}" for i in range(5)]
    assert box.fabe(*done).code == 0
    assert [row["note"] for row in written(box, kind)] == [
        code.upper() if code else f"n{i}" for i, code in enumerate(CODES)
    ]


def test_in_place_a_file_gains_the_field_and_keeps_it(box, server, kind):
    run = asking(server, kind.name, "--output-field", "summary", "--inplace")
    assert box.fabe(*run).code == 0
    first = rows_of(box.path / kind.name)
    assert [first[index]["summary"] for index in ASKED] == [CODES[i].upper() for i in ASKED]
    sent = len(server.calls)
    assert box.fabe(*run).code == 0
    assert rows_of(box.path / kind.name) == first
    assert len(server.calls) == sent


def test_keys_of_an_answer_become_typed_fields(box, server, kind):
    box.write("schema.json", json.dumps(SCHEMA))
    server.behaviour = structured
    fields = [part for name in SCHEMA["properties"] for part in ("--output-field", name)]
    ended = box.fabe(*asking(server, kind.name, "--response-format", "schema.json", *fields))
    assert ended.code == 0, ended
    row = written(box, kind)[0]
    assert row["name"] == "é"
    assert value(row["size"]) == 3
    assert value(row["score"]) == 1.5
    assert value(row["tags"]) == ["a", "b"]
    sent = server.calls[0].body["response_format"]
    assert sent["type"] == "json_schema"
    assert sent["json_schema"]["schema"] == SCHEMA
    assert sent["json_schema"]["strict"] is True


def test_a_choice_with_its_confidence(box, server, kind):
    server.behaviour = labels
    more = ["--output-field", "label", "--choices", "good,bad", "--confidence-field", "sure"]
    ended = box.fabe(*asking(server, kind.name, *more))
    assert ended.code == 0, ended
    rows = written(box, kind)
    assert [row.get("label") or None for row in rows] == [
        "good" if code else None for code in CODES
    ]
    assert float(rows[0]["sure"]) == pytest.approx(0.7408, abs=1e-4)  # e ** -0.3
    assert server.calls[0].body["logprobs"] is True


def test_reasoning_is_kept(box, server, kind):
    server.behaviour = thinking
    ended = box.fabe(*asking(server, kind.name, "--reasoning-field", "why"))
    assert ended.code == 0, ended
    rows = written(box, kind)
    assert rows[0]["code"] == "NEW"
    assert rows[0]["why"] == "hm 1"
    assert rows[0]["original_code"] == "x = 1"


def test_some_records_are_chosen(box, server, kind):
    more = ["--where", "'5' in text or record.id|string == '0'", "--status-field", "state"]
    ended = box.fabe(*asking(server, kind.name, *more))
    assert ended.code == 0, ended
    assert [row["code"] or None for row in written(box, kind)] == [
        "X = 1",
        "x = 2",
        None,
        None,
        "X = 5",
    ]
    states = [value(row["state"])["state"] for row in written(box, kind)]
    assert states == ["done", "not chosen", "skipped", "skipped", "done"]
    assert "1 not chosen" in ended.out


def test_the_first_so_many_are_done(box, server, kind):
    ended = box.fabe(*asking(server, kind.name, "--limit", 2))
    assert ended.code == 0, ended
    assert [row["code"] or None for row in written(box, kind)] == [
        "X = 1",
        "X = 2",
        None,
        None,
        "x = 5",
    ]
    assert len(server.calls) == 2
    assert box.fabe(*asking(server, kind.name)).code == 0
    assert len(server.calls) == 3
    assert [row["code"] or None for row in written(box, kind)][-1] == "X = 5"


def test_what_failed_is_null_or_as_it_was(box, server, kind):
    async def failing(call: Call):
        return error(400, "no") if "x = 2" in call.prompt else None

    server.behaviour = failing
    for how, expected in (("keep", "x = 2"), ("null", None)):
        ended = box.fabe(*asking(server, kind.name, "--on-failure", how, "--retry", 0))
        assert ended.code == 1
        rows = written(box, kind)
        assert [row["code"] or None for row in rows][:2] == ["X = 1", expected]
    assert rows[1]["original_code"] == "x = 2"


def test_votes_among_several_answers(box, server, kind):
    async def voting(call: Call):
        given = ["A", "B", "B"]
        seen = sum(1 for other in server.calls[: call.number] if other.prompt == call.prompt)
        return completion(call, given[seen % 3])

    server.behaviour = voting
    more = ["--samples", 3, "--temperature", 1, "--pick", "vote", "--concurrency", 1]
    assert box.fabe(*asking(server, kind.name, *more)).code == 0
    rows = written(box, kind)
    assert rows[0]["code"] == "B"
    assert sorted(value(rows[0]["samples"])) == ["A", "B", "B"]


def test_a_judge_picks_the_answer_of_the_highest_score(box, server, kind):
    box.write("judge.j2", "Rate {{ answer }} for {{ text }}")

    async def judged(call: Call):
        if call.prompt.startswith("Rate "):
            return completion(call, f"Score: {call.prompt.split()[1]}/10")
        seen = sum(1 for other in server.calls[: call.number] if other.prompt == call.prompt)
        return completion(call, str([3, 9, 4][seen % 3]))

    server.behaviour = judged
    more = ["--samples", 3, "--temperature", 1, "--pick", "judge:judge.j2", "--concurrency", 1]
    run = asking(server, kind.name, *more, "--judge-model", "other")
    ended = box.fabe(*run)
    assert ended.code == 0, ended
    rows = written(box, kind)
    assert rows[0]["code"] == "9"
    assert sorted(value(rows[0]["samples"])) == ["3", "4", "9"]
    rating = [call for call in server.calls if call.prompt.startswith("Rate ")]
    assert {call.body["model"] for call in rating} == {"other"}
    sent = len(server.calls)
    assert box.fabe(*run).code == 0
    assert len(server.calls) == sent


def test_what_failed_is_no_answer_to_who_skips_those_that_are_there(box, server, kind):
    async def failing(call: Call):
        return error(400, "no") if "x = 2" in call.prompt else None

    server.behaviour = failing
    more = ["--output-field", "ans", "--on-existing", "skip", "--on-failure", "null"]
    run = asking(server, kind.name, *more, "--inplace", "--retry", 0)
    assert box.fabe(*run, "--limit", 1).code == 0
    assert box.fabe(*run).code == 1
    sent = len(server.calls)
    server.behaviour = None
    assert box.fabe(*run).code == 0
    assert len(server.calls) == sent + 1
    rows = rows_of(box.path / kind.name)
    assert [rows[index]["ans"] for index in ASKED] == [CODES[index].upper() for index in ASKED]


@pytest.mark.parametrize("more", [["--status-field", "st"], ["--samples-field", "all"]])
def test_records_that_take_no_fields_stay_where_bad_input_is_skipped(box, more):
    box.write("data.jsonl", '{"code":"x"}\n[1,2]\n{"code":"y"}\n3\n')
    command = ["run", "--input", "data.jsonl", "--provider", "echo", *more]
    command += ["--samples", 2] if "all" in more else []
    ended = box.fabe(*command)
    assert ended.code == 2
    assert "--on-bad-input skip" in ended.err
    ended = box.fabe(*command, "--on-bad-input", "skip")
    assert ended.code == 0, ended
    lines = (box.path / "outputs/data.jsonl").read_text().splitlines()
    assert (lines[1], lines[3]) == ("[1,2]", "3")
    assert all(more[1] in json.loads(line) for line in lines[::2])


def test_a_name_that_is_nearly_a_key_is_said(box, server):
    box.lines("data.jsonl", [{"code": "x"}])
    box.write("s.json", json.dumps({"type": "object", "properties": {"summary": {}}}))
    more = ["--response-format", "s.json", "--output-field", "sumary", "--dry-run"]
    ended = box.fabe(*openai_run(server, *more))
    assert "did you mean summary?" in ended.err


def test_a_system_prompt_that_turns_pass_over_is_said(box, server):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    box.lines("data.jsonl", [{"messages": turns}])
    more = ["--field", "messages[role=assistant].content", "--context", "turns", "--dry-run"]
    ended = box.fabe(*openai_run(server, *more, "--system-prompt", "Be brief"))
    assert "--system-prompt has no effect with --context turns" in ended.err


def test_caps_count_what_the_judge_is_asked(box, server):
    box.write("judge.j2", "Rate {{ answer }}")

    async def judged(call: Call):
        is_judge = "Rate" in call.prompt
        return completion(call, "7") if is_judge else completion(call, answer_to(call.prompt))

    server.behaviour = judged
    box.lines("data.jsonl", [{"code": f"x = {i}"} for i in range(20)])
    more = ["--samples", 2, "--temperature", 1, "--pick", "judge:judge.j2"]
    ended = box.fabe(*openai_run(server, *more, "--max-requests", 50))
    assert ended.code == 1
    assert "the budget is used up (--max-requests 50)" in ended.err
    assert len(server.calls) == 50


def test_a_judge_that_gives_no_score_fails_the_record(box, server, kind):
    box.write("judge.j2", "Rate {{ answer }}")

    async def judged(call: Call):
        if not call.prompt.startswith("Rate "):
            return None
        return completion(call, "7") if "X = 1" in call.prompt else error(400, "no judge")

    server.behaviour = judged
    more = ["--samples", 2, "--temperature", 1, "--pick", "judge:judge.j2", "--retry", 0]
    ended = box.fabe(*asking(server, kind.name, *more))
    assert ended.code == 1
    failures = box.read("outputs.failures.jsonl")
    assert [failure["failure"] for failure in failures] == ["judge"] * 2
    assert "no judge" in failures[0]["message"]
    assert box.report()["requests"] == len(server.calls)
    assert [row["code"] or None for row in written(box, kind)][:2] == ["X = 1", "x = 2"]


# JSON, byte for byte.

LAYOUTS = {
    "a line": ('{"a": 1, "code": "x", "z": 1e-12}', '{"a": 1, "code": "x", "s": "X", "z": 1e-12}'),
    "tight": ('{"a":1,"code":"x"}', '{"a":1,"code":"x","s":"X"}'),
    "first": ('{"code": "x", "z": 0.10}', '{"code": "x", "s": "X", "z": 0.10}'),
    "alone": ('{"code":"x"}', '{"code":"x","s":"X"}'),
    "pretty": (
        '{\n    "a": 1,\n    "code": "x",\n    "z": []\n}',
        '{\n    "a": 1,\n    "code": "x",\n    "s": "X",\n    "z": []\n}',
    ),
    "tabs, CRLF": ('{\r\n\t"code" : "x"\r\n}', '{\r\n\t"code" : "x",\r\n\t"s" : "X"\r\n}'),
    "there": ('{"s": null, "code": "x"}', '{"s": "X", "code": "x"}'),
    "there, another kind": ('{"code": "x", "s" :{"a": [1]} }', '{"code": "x", "s" :"X" }'),
    "there twice": ('{"s": 1, "code": "x", "s": 2}', '{"s": 1, "code": "x", "s": "X"}'),
    "code twice": ('{"code": "w", "code": "x"}', '{"code": "w", "code": "x", "s": "X"}'),
    "escaped": ('{"a": "\\u00e9", "code": "x"}', '{"a": "\\u00e9", "code": "x", "s": "X"}'),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_byte_but_the_output_field_stays(box, server, name):
    before, after = LAYOUTS[name]
    path = box.write("d.json", before)
    ended = box.fabe(*asking(server, "d.json", "--output-field", "s"))
    assert ended.code == 0, ended
    assert (box.path / "outputs/d.json").read_bytes().decode() == after
    assert path.read_bytes().decode() == before


@pytest.mark.parametrize("name", sorted({**JSON, **LINES}))
def test_no_byte_of_the_zoo_changes_but_for_what_is_added(box, name):
    """What was added is found again by its own text, and taken out."""
    suffix = "json" if name in JSON else "jsonl"
    text = JSON[name] if name in JSON else LINES[name]
    before = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    box.write(f"d.{suffix}", before)
    run = ("run", "--input", f"d.{suffix}", "--provider", "echo", "--model", "m")
    ended = box.fabe(*run, "--output-field", "answer", "--choices", "aye,nay")
    if "no record has it" in ended.err:
        return
    assert ended.code == 0, ended
    after = (box.path / f"outputs/d.{suffix}").read_bytes()
    member = rb',[ \t\r\n]*"answer"[ \t\r\n]*:[ \t\r\n]*"aye"'
    assert re.sub(member, b"", after) == before
    count = int(ended.out.partition(" rewritten")[0].split()[-1])
    assert len(re.findall(member, after)) == count
    again = box.fabe(*run, "--output-field", "answer", "--choices", "nay,aye")
    assert again.code == 0
    after = (box.path / f"outputs/d.{suffix}").read_bytes()
    assert re.sub(member.replace(b"aye", b"nay"), b"", after) == before


DOTTED = {
    "inside": ('{"code": "x", "m": {"a": 1}}', '{"code": "x", "m": {"a": 1, "s": "X"}}'),
    "there": ('{"m": {"s": 0, "a": 1}, "code": "x"}', '{"m": {"s": "X", "a": 1}, "code": "x"}'),
    "empty": ('{"code":"x","m":{}}', '{"code":"x","m":{"s":"X"}}'),
    "missing": ('{"code": "x"}', '{"code": "x", "m": {"s": "X"}}'),
    "null": ('{"m": null, "code": "x"}', '{"m": {"s": "X"}, "code": "x"}'),
    "pretty": (
        '{\n  "m": {\n    "a": 1\n  },\n  "code": "x"\n}',
        '{\n  "m": {\n    "a": 1,\n    "s": "X"\n  },\n  "code": "x"\n}',
    ),
}


@pytest.mark.parametrize("name", DOTTED)
def test_a_dotted_output_field_goes_inside(box, server, name):
    before, after = DOTTED[name]
    box.write("d.json", before)
    ended = box.fabe(*asking(server, "d.json", "--output-field", "m.s"))
    assert ended.code == 0, ended
    assert (box.path / "outputs/d.json").read_text() == after


def test_a_field_that_has_no_place_fails_that_record_alone(box, server):
    box.write("d.jsonl", '{"m": "text", "code": "x"}\n{"m": {}, "code": "y"}\n')
    ended = box.fabe(*asking(server, "d.jsonl", "--output-field", "m.s"))
    assert ended.code == 1
    text = (box.path / "outputs/d.jsonl").read_text()
    assert text == '{"m": "text", "code": "x"}\n{"m": {"s": "Y"}, "code": "y"}\n'
    (failure,) = box.read("outputs.failures.jsonl")
    assert failure["failure"] == "no room"
    assert "m is no object" in failure["message"]


@pytest.mark.parametrize("place", ["null", "7", '"text"', "[]", '{"q": 1}'])
def test_what_has_no_place_keeps_what_it_has_and_who_is_not_chosen_does_not_fail(
    box, server, place
):
    line = f'{{"code": "a", "ans": {place}}}\n'
    box.write("d.jsonl", line + '{"code": "b"}\n')
    run = asking(server, "d.jsonl", "--output-field", "ans.q.z", "--on-failure", "null")
    ended = box.fabe(*run, "--where", "text == 'b'")
    assert ended.code == 0, ended
    text = (box.path / "outputs/d.jsonl").read_text()
    assert text == line + '{"code": "b", "ans": {"q": {"z": "B"}}}\n'
    if place != "null":
        assert box.fabe(*run).code == 1
        assert (box.path / "outputs/d.jsonl").read_text() == text


def test_a_nested_field_has_its_output_beside_it(box, server):
    box.write("d.jsonl", '{"m": {"code": "x", "b": 1}, "c": 2.0}\n')
    run = asking(server, "d.jsonl", "--field", "m.code", "--output-field", "s")
    assert box.fabe(*run).code == 0
    text = (box.path / "outputs/d.jsonl").read_text()
    assert text == '{"m": {"code": "x", "s": "X", "b": 1}, "c": 2.0}\n'


def test_an_answer_is_spliced_as_its_own_json(box, server):
    """Numbers as the model wrote them; no line end, which would part a line of JSON lines."""
    server.behaviour = structured

    async def pretty(call: Call):
        return completion(call, '```json\n{\n  "name": "é\\n",\n  "size": 1e2\n}\n```')

    schema = {"type": "object", "properties": {"name": {"type": "string"}, "size": {}}}
    box.write("s.json", json.dumps(schema))
    box.write("d.jsonl", '{"code": "x"}\n{"code": "y", "z": "\\u00fc"}\n')
    server.behaviour = pretty
    more = ["--response-format", "s.json"]
    assert box.fabe(*asking(server, "d.jsonl", *more, "--output-field", "whole")).code == 0
    assert (box.path / "outputs/d.jsonl").read_text() == (
        '{"code": "x", "whole": {"name": "é\\n","size": 1e2}}\n'
        '{"code": "y", "whole": {"name": "\\u00e9\\n","size": 1e2}, "z": "\\u00fc"}\n'
    )
    fields = ("--output-field", "name", "--output-field", "size")
    assert box.fabe(*asking(server, "d.jsonl", *more, *fields)).code == 0
    assert (box.path / "outputs/d.jsonl").read_text().splitlines()[0] == (
        '{"code": "x", "name": "é\\n", "size": 1e2}'
    )
    assert box.fabe(*asking(server, "d.jsonl", *more)).code == 0
    (first, _) = box.read("outputs/d.jsonl")
    assert json.loads(first["code"]) == {"name": "é\n", "size": 100.0}
    assert first["original_code"] == "x"


# Turns of chats.

CHAT = (
    '{"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},\n'
    ' {"from": "human", "value": "c"}, {"value": "d", "from": "gpt"}]}'
)


def test_every_turn_of_a_kind_is_asked_about(box, server):
    """B4."""
    box.write("d.json", f'[{CHAT}, {{"conversations": []}}]')
    field = ("--field", "conversations[from=gpt].value", "--backup-field", "before")
    ended = box.fabe(*asking(server, "d.json", *field))
    assert ended.code == 0, ended
    assert "2 records: 1 rewritten" in ended.out
    expected = CHAT.replace('"b"', '"B", "before": "b"')
    expected = expected.replace('{"value": "d",', '{"value": "D", "before": "d",')
    text = (box.path / "outputs/d.json").read_text()
    assert text == f'[{expected}, {{"conversations": []}}]'
    assert box.fabe(*asking(server, "d.json", "--field", "conversations.*.value")).code == 0
    assert len(server.calls) == 4
    nobody = box.fabe(*asking(server, "d.json", "--field", "conversations[from=bot].value"))
    assert nobody.code == 2
    assert "no record has it" in nobody.err


def test_turns_before_are_sent_as_turns(box, server):
    box.write("d.json", CHAT)
    field = ("--field", "conversations[from=gpt].value", "--output-field", "new")
    run = asking(server, "d.json", *field, "--context", "turns", "--instruction", "Be kind")
    assert box.fabe(*run).code == 0
    system = {"role": "system", "content": "Be kind"}
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": text} for role, text in turns]
    sent = sorted((call.body["messages"] for call in server.calls), key=len)
    assert sent == [[system, messages[0]], [system, *messages]]
    expected = CHAT.replace('"b"', '"b", "new": "A"').replace('"d"', '"d", "new": "C"')
    assert (box.path / "outputs/d.json").read_text() == expected


def test_a_failed_turn_leaves_the_others(box, server):
    async def failing(call: Call):
        return error(400, "no") if call.prompt.endswith("d") else None

    server.behaviour = failing
    box.write("d.json", CHAT)
    run = asking(server, "d.json", "--field", "conversations[from=gpt].value", "--retry", 0)
    ended = box.fabe(*run, "--backup-field", "")
    assert ended.code == 1
    assert (box.path / "outputs/d.json").read_text() == CHAT.replace('"b"', '"B"')
    (failure,) = box.read("outputs.failures.jsonl")
    assert failure["text"] == "d"
    assert failure["place"] == 1
    server.behaviour = None
    assert box.fabe(*run, "--backup-field", "").code == 0
    assert len(server.calls) == 3


def test_turns_of_a_table(box, server):
    rows = [
        {
            "id": 1,
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        },
        {"id": 2, "messages": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), box.path / "d.parquet")
    field = ("--field", "messages[role=assistant].content")
    assert box.fabe(*asking(server, "d.parquet", *field)).code == 0
    after = pq.read_table(box.path / "outputs/d.parquet").to_pylist()
    assert after[0]["messages"] == [
        {"role": "user", "content": "a", "original_code": None},
        {"role": "assistant", "content": "B", "original_code": "b"},
    ]
    assert after[1]["messages"] == []
    out = ("--output-field", "new", "--context", "turns")
    assert box.fabe(*asking(server, "d.parquet", *field, *out)).code == 0
    after = pq.read_table(box.path / "outputs/d.parquet").to_pylist()
    assert after[0]["messages"][1] == {"role": "assistant", "content": "b", "new": "A"}


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_all_answers_to_each_turn_are_kept(box, server, name):
    rows = [json.loads(CHAT), {"id": 2, "conversations": []}]
    if name == "d.jsonl":
        box.lines(name, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), box.path / name)
    run = asking(server, name, "--field", "conversations[from=gpt].value", "--output-field", "new")
    ended = box.fabe(*run, "--samples", 2, "--temperature", 1, "--pick", "first-valid")
    assert ended.code == 0, ended
    rows = rows_of(box.path / "outputs" / name)
    assert rows[0]["samples"] == [["B", "B"], ["D", "D"]]
    assert not rows[1]["samples"]


@pytest.mark.parametrize("more", [[], ["--output-field", "p", "--output-field", "q"]])
def test_several_fields_that_are_there_several_times(box, server, more):
    line = '{"a": [{"b": "x"}, {"b": "y"}], "c": {"d": [{"e": "z"}]}}\n'
    box.write("d.jsonl", line)
    fields = ("--field", "a.*.b", "--also-field", "c.d.*.e")
    assert box.fabe(*asking(server, "d.jsonl", *fields, *more)).code == 0
    after = line
    for key, old, kept in (("b", "x", "code"), ("b", "y", "code"), ("e", "z", "e")):
        new = f'"{key}": "{old.upper()}", "original_{kept}": "{old}"'
        if more:
            new = f'"{key}": "{old}", "{"p" if key == "b" else "q"}": "{old.upper()}"'
        after = after.replace(f'"{key}": "{old}"', new)
    assert (box.path / "outputs/d.jsonl").read_text() == after


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_the_items_of_a_list_of_texts(box, server, name):
    rows = [{"tags": ["a", "b"]}, {"tags": []}]
    if name == "d.jsonl":
        box.lines(name, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), box.path / name)
    assert box.fabe(*asking(server, name, "--field", "tags.*")).code == 0
    assert rows_of(box.path / "outputs" / name) == [{"tags": ["A", "B"]}, {"tags": []}]


def test_turns_in_place_are_asked_about_once(box, server):
    box.write("d.json", CHAT)
    run = asking(server, "d.json", "--field", "conversations[from=gpt].value", "--inplace")
    assert box.fabe(*run).code == 0
    text = (box.path / "d.json").read_text()
    again = box.fabe(*run)
    assert again.code == 0
    assert "1 done before" in again.out
    assert (box.path / "d.json").read_text() == text
    assert len(server.calls) == 2


# Prompts.


def test_examples_and_a_system_prompt_that_is_a_template(box, server):
    box.lines("d.jsonl", [{"code": "x", "lang": "C"}])
    box.lines("shots.jsonl", [{"input": "1 + 1", "output": "2"}, {"input": "2", "output": "2"}])
    box.write("system.j2", "You know {{ record.lang }}.")
    run = asking(server, "d.jsonl", "--examples", "shots.jsonl", "--system-prompt", "system.j2")
    assert box.fabe(*run).code == 0
    said = [(turn["role"], turn["content"]) for turn in server.calls[0].body["messages"]]
    assert said == [
        ("system", "You know C."),
        ("user", "Up\n\n1 + 1"),
        ("assistant", "2"),
        ("user", "Up\n\n2"),
        ("assistant", "2"),
        ("user", "Up\n\nx"),
    ]


# Servers that do not do what they are asked.

REFUSALS = {
    "of the type": (
        400,
        "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
    ),
    "DeepSeek": (400, "This response_format type is unavailable now"),
    "DeepSeek, 2025": (
        422,
        "Failed to deserialize the JSON body into the target type: response_format: response_format.type `json_schema` is unavailable now at line 1 column 5",
    ),
    "Groq": (400, "This model does not support response format `json_schema`."),
    "of the schema": (
        400,
        "Invalid schema for response_format 'answer': In context=(), 'additionalProperties' is required to be supplied and to be false.",
    ),
    "vLLM": (400, "The provided JSON schema contains features not supported by xgrammar."),
    "OpenRouter": (404, "No endpoints found that can handle the requested parameters."),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_schema_goes_into_the_prompt(box, server, name):
    status, message = REFUSALS[name]

    async def refusing(call: Call):
        if "response_format" in call.body:
            return error(status, message)
        return completion(call, ANSWER)

    server.behaviour = refusing
    box.write("schema.json", json.dumps(SCHEMA))
    box.lines("d.jsonl", [{"code": f"x = {i}"} for i in range(8)])
    more = ("--response-format", "schema.json", "--output-field", "size", "--concurrency", 1)
    ended = box.fabe(*asking(server, "d.jsonl", *more))
    assert ended.code == 0, ended
    assert ended.err.count("so that goes into the prompt") == 1
    assert len(server.calls) == 9
    assert '"required": ["name"' in server.calls[-1].prompt
    assert [row["size"] for row in box.read("outputs/d.jsonl")] == [3] * 8
    box.lines("d.jsonl", [{"code": "other"}])
    assert box.fabe(*asking(server, "d.jsonl", *more)).code == 0
    assert len(server.calls) == 10


def test_refused_probabilities_are_left_out(box, server):
    async def refusing(call: Call):
        if "logprobs" in call.body:
            return error(403, "You are not allowed to request logprobs from this model")
        return completion(call, '{"choice": "good"}')

    server.behaviour = refusing
    box.lines("d.jsonl", [{"code": "x"}])
    more = ("--choices", "good,bad", "--output-field", "label", "--confidence-field", "sure")
    ended = box.fabe(*asking(server, "d.jsonl", *more))
    assert ended.code == 0, ended
    assert box.read("outputs/d.jsonl") == [{"code": "x", "label": "good", "sure": None}]


def test_what_does_not_follow_is_asked_again(box, server):
    async def learning(call: Call):
        if len(call.body["messages"]) > 2:
            return completion(call, "Bad.")
        return completion(call, "I would say it is rather bad")

    server.behaviour = learning
    box.lines("d.jsonl", [{"code": "x"}])
    box.write("labels.txt", "good\nbad\n")
    run = asking(server, "d.jsonl", "--choices", "labels.txt", "--output-field", "label")
    assert box.fabe(*run).code == 0
    assert box.read("outputs/d.jsonl")[0]["label"] == "bad"
    assert "not one of: good, bad" in server.calls[1].prompt


def test_a_schema_whose_own_keys_are_those_of_a_body_goes_into_the_prompt_whole(box, server):
    async def older(call: Call):
        if "format" in call.body:
            return error(400, "invalid format: expected json")
        return completion(call, '"2026-01-01"')

    server.behaviour = older
    # `format` is a word of JSON schemas, and of Ollama's bodies.
    schema = {"type": "string", "format": "date", "json_schema": 1, "schema": 2}
    box.write("s.json", json.dumps(schema))
    box.lines("data.jsonl", [{"code": "today"}])
    ended = box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "When", "--provider", "ollama"),
        *("--model", "llama3", "--base-url", server.root, "--response-format", "s.json"),
    )
    assert ended.code == 0, ended
    assert json.dumps(schema) in server.calls[-1].prompt
    assert len(server.calls) == 2


def test_ollama_is_given_the_schema_and_asked_for_probabilities(box, server):
    async def answering(call: Call):
        choice = call.body["format"]["properties"]["choice"]["enum"][1]
        message = json.dumps({"choice": choice})
        answer = completion(call, message, thinking="because")
        body = json.loads(answer.text)
        parts = [('{"choice": "', 0.0), ("bad", -0.5), ('"}', 0.0)]
        body["logprobs"] = [{"token": token, "logprob": p} for token, p in parts]
        from aiohttp import web

        return web.json_response(body)

    server.behaviour = answering
    box.lines("d.jsonl", [{"code": "x"}])
    more = ("--choices", "good,bad", "--output-field", "label", "--confidence-field", "sure")
    ended = box.fabe(
        *("run", "--input", "d.jsonl", "--instruction", "Label", "--provider", "ollama"),
        *("--model", "llama3", "--base-url", server.root, *more, "--reasoning-field", "why"),
    )
    assert ended.code == 0, ended
    (row,) = box.read("outputs/d.jsonl")
    assert row["label"] == "bad"
    assert row["why"] == "because"
    assert row["sure"] == pytest.approx(0.6065, abs=1e-4)


REASONING = {
    "DeepSeek": {"reasoning_content": "hm"},
    "vLLM, OpenRouter, Groq": {"reasoning": "hm"},
    "Ollama": {"thinking": "hm"},
    "in the text": None,
}


@pytest.mark.parametrize("name", REASONING)
def test_reasoning_is_found_where_servers_put_it(box, server, name):
    async def reasoning(call: Call):
        extra = REASONING[name]
        return completion(call, "NEW", **extra) if extra else completion(call, "hm</think>NEW")

    server.behaviour = reasoning
    box.lines("d.jsonl", [{"code": "x"}])
    run = asking(server, "d.jsonl", "--output-field", "new", "--reasoning-field", "why")
    assert box.fabe(*run).code == 0
    assert box.read("outputs/d.jsonl") == [{"code": "x", "new": "NEW", "why": "hm"}]


# Checks.

KEEPING = {
    "urls": ("see https://a.b/c, and http://d.e", "see http://d.e.", "https://a.b/c"),
    "placeholders": (
        "Hi {name}, %s and %(n)d, ${x}, {{ y }}",
        "Hi {name} {{ y }} %(n)d ${x}",
        "%s",
    ),
    "numbers": ("1,000.5 of 3", "1.000,5 von drei", "3"),
    "code": ("use `f(x)` here", "use it", "f(x)"),
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_the_original_holds_is_kept(box, server, name):
    original, lossy, lost = KEEPING[name]

    async def lossily(call: Call):
        return completion(call, original if "lacking" in call.prompt else lossy)

    server.behaviour = lossily
    box.lines("d.jsonl", [{"code": original}])
    checks = ("--validate", f"keeps:{name}", "--validate", "max-length-ratio:2")
    ended = box.fabe(*asking(server, "d.jsonl", *checks, "--output-field", "new"))
    assert ended.code == 0, ended
    assert box.read("outputs/d.jsonl")[0]["new"] == original
    assert server.calls[1].prompt.count(lost) == 1


def test_another_language_is_asked_again(box, server):
    english = "This is a short text about the weather of the coming days."
    german = "Das ist ein kurzer Text über das Wetter der nächsten Tage."

    async def translating(call: Call):
        return completion(call, english if "another language" in call.prompt else german)

    server.behaviour = translating
    box.lines("d.jsonl", [{"code": english}, {"code": "x = 1"}])
    run = asking(server, "d.jsonl", "--validate", "same-language", "--output-field", "new")
    assert box.fabe(*run).code == 0
    assert [row["new"] for row in box.read("outputs/d.jsonl")] == [english, german]
    assert any("(de) than the original (en)" in prompt for prompt in server.prompts)


# In Python.


def test_a_map_takes_the_same(server, tmp_path):
    from pydantic import BaseModel

    import fabe_ds

    class Thing(BaseModel):
        name: str
        size: int

    server.behaviour = structured
    transform = fabe_ds.transform_fn(
        provider="openai",
        model="m",
        base_url=server.url,
        instruction="Up",
        response_format=Thing,
        output_field=["name", "size"],
        where="text != 'x = 2'",
        cache_dir=tmp_path / "cache",
    )
    rows = [{"code": "x = 2"}, {"code": "x = 1"}, {"code": None}]
    dataset = datasets.Dataset.from_list(rows)
    features = transform.features(dataset.features)
    after = dataset.map(transform, batched=True, features=features)
    assert after.to_list() == [
        {"code": "x = 2", "name": None, "size": None},
        {"code": "x = 1", "name": "é", "size": 3},
        {"code": None, "name": None, "size": None},
    ]
    streamed = dataset.to_iterable_dataset().map(transform, batched=True)
    assert list(streamed) == after.to_list()


def test_worker_processes_have_the_same_templates(server, tmp_path):
    import fabe_ds

    (tmp_path / "system.j2").write_text("You know {{ record.lang }}.")
    (tmp_path / "judge.j2").write_text("Rate {{ answer }}")
    transform = fabe_ds.transform_fn(
        provider="openai",
        model="m",
        base_url=server.url,
        instruction="Up",
        system_prompt=str(tmp_path / "system.j2"),
        examples=[{"input": "a", "output": "b"}],
        choices=["X", "Y"],
        output_field="label",
        cache_dir=tmp_path / "cache",
    )
    rows = [{"code": "x", "lang": "C"}, {"code": "y", "lang": "D"}]
    after = datasets.Dataset.from_list(rows).map(transform, batched=True, num_proc=2)
    assert after["label"] == ["X", "Y"]
    said = {call.body["messages"][0]["content"] for call in server.calls}
    assert said == {"You know C.", "You know D."}
    assert {len(call.body["messages"]) for call in server.calls} == {4}


WRONG = {
    "two outputs, one answer": (
        ["--output-field", "a", "--output-field", "b"],
        "--response-format",
    ),
    "the field itself": (["--output-field", "code"], "--output-field code"),
    "a choice that YAML reads as another": (["--config", "c.yaml"], "in quotes"),
    "a wildcard as a place": (["--output-field", "a.*"], "no place for an answer"),
    "a condition as a place": (["--output-field", "n[a=b]"], "no place for an answer"),
    "no name": (["--output-field", ""], "empty step"),
    "an empty step": (["--output-field", "a..b"], "empty step"),
    "a wildcard for reasoning": (["--reasoning-field", "a.*"], "no place for an answer"),
    "a field that begins with no key": (["--field", "*"], "begins with a key"),
    "a judge who is not there": (
        ["--samples", "2", "--temperature", "1", "--pick", "judge:none"],
        "no such file",
    ),
    "one choice": (["--choices", "a"], "two choices"),
    "no schema": (["--response-format", "none.json"], "--response-format"),
    "confidence of nothing": (["--confidence-field", "c"], "--choices"),
    "a wrong expression": (["--where", "text =="], "--where text =="),
    "an unknown name": (["--where", "language == 'C'"], "no 'language'"),
    "a vote of one": (["--pick", "vote"], "--samples"),
    "skip what": (["--on-existing", "skip"], "--output-field"),
    "no turn": (["--context", "turns"], "no turn of a chat"),
    "no examples": (["--examples", "none.jsonl"], "--examples"),
    "keeps what": (["--validate", "keeps:names"], "keeps what"),
    "no ratio": (["--validate", "max-length-ratio:x"], "max-length-ratio"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_said_in_one_line(box, name):
    more, said = WRONG[name]
    box.write("c.yaml", "choices: [yes, no]\n")
    box.write("j.j2", "Rate {{ answer }}")
    box.lines("d.jsonl", [{"code": "x"}])
    command = ("run", "--input", "d.jsonl", "--provider", "openai", "--model", "m")
    ended = box.fabe(*command, "--instruction", "Up", *more)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1


# Real models.


@pytest.mark.slow
def test_a_real_server_holds_to_a_schema_and_tells_probabilities(box, llama_server):
    """llama.cpp."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "lines": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "lines"],
        "additionalProperties": False,
    }
    box.write("schema.json", json.dumps(schema))
    box.lines("d.jsonl", [{"code": f"def f{i}(a):\n  return a+{i}"} for i in range(6)])
    how = ("--provider", "openai", "--model", "smollm2", "--base-url", llama_server)
    run = ("run", "--input", "d.jsonl", "--instruction", "Describe it as JSON.", *how)
    fields = ("--output-field", "name", "--output-field", "lines", "--max-reasks", 0)
    ended = box.fabe(*run, "--response-format", "schema.json", *fields)
    assert ended.code == 0, ended
    for row in box.read("outputs/d.jsonl"):
        assert isinstance(row["name"], str)
        assert 0 <= row["lines"] <= 99
    choices = ("--choices", "math,text", "--output-field", "kind", "--confidence-field", "sure")
    ended = box.fabe(*run, *choices, "--max-reasks", 0)
    assert ended.code == 0, ended
    for row in box.read("outputs/d.jsonl"):
        assert row["kind"] in ("math", "text")
        # llama.cpp tells the probabilities from before its grammar: none, where they cannot be right.
        assert row["sure"] is None or 1e-4 <= row["sure"] <= 1


@pytest.mark.slow
def test_a_local_model_labels_and_answers_anew(box, smollm):
    run = ("run", "--provider", "hf", "--model", smollm, "--instruction", "Look at this.")
    box.lines("d.jsonl", [{"code": f"def f{i}(a):\n  return a+{i}"} for i in range(4)])
    choices = ("--choices", "math,text", "--output-field", "kind", "--confidence-field", "sure")
    ended = box.fabe(*run, "--input", "d.jsonl", *choices)
    assert ended.code == 0, ended
    rows = box.read("outputs/d.jsonl")
    assert all(row["kind"] in ("math", "text") and 0.5 <= row["sure"] <= 1 for row in rows)
    box.write("chat.json", CHAT)
    turns = ("--field", "conversations[from=gpt].value", "--context", "turns")
    more = ("--output-field", "new", "--max-new-tokens", 8, "--on-truncated", "keep")
    ended = box.fabe(*run, "--input", "chat.json", *turns, *more)
    assert ended.code == 0, ended
    answered = json.loads((box.path / "outputs/chat.json").read_text())
    assert [("new" in turn) for turn in answered["conversations"]] == [False, True, False, True]
