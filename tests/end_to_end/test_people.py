"""What a person reads and writes: the line that says what goes on, settings in any spelling, advice,
and a notebook that stays as it was."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import subprocess
import time
from collections.abc import Callable
from typing import Any

import datasets
import pytest

import fabe_ds
from fabe_ds.report.course import ANSWERING, LOADING, WRITING, Course
from fabe_ds.report.progress import describe
from tests.conftest import COMMAND
from tests.support.server import Behaviour, Call, ModelServer, completion, error

# The line.


def at(phase: str, done: int, total: int, seconds: float) -> Course:
    course = Course()
    course.begin(phase, total)
    course.tick(done)
    course.began = time.monotonic() - seconds
    return course


@pytest.mark.parametrize(
    ("course", "line"),
    [
        ((LOADING, 0, 0, 1), "loading"),
        ((LOADING, 0, 2_000_000_000, 1), "loading, 0 B of 2.0 GB"),
        ((LOADING, 500_000_000, 2_000_000_000, 10), "loading, 500 MB of 2.0 GB, 0:30 left"),
        ((LOADING, 999, 999, 10), "loading, 999 B of 999 B"),
        ((WRITING, 50, 200, 10), "writing, 50 of 200 records, 0:30 left"),
        ((WRITING, 0, 200, 10), "writing, 0 of 200 records"),
    ],
)
def test_each_phase_has_a_progress_of_its_own(course, line):
    assert describe(at(*course)) == line


def test_the_rate_of_answers_begins_with_them():
    course = at(LOADING, 5, 10, 100)
    course.begin(ANSWERING, 40)
    course.began = time.monotonic() - 10
    course.stats.done = 20
    assert describe(course) == "20/40, 20 done, 2.0 records/s, 0:10 left"


def test_a_narrow_terminal_is_told_what_matters():
    course = at(ANSWERING, 0, 40, 10)
    course.stats.done, course.stats.cached, course.stats.failed = 18, 4, 2
    course.stats.prompt_tokens = 100
    assert describe(course, brief=True) == "24/40, 2 failed, 2.0 records/s, 0:08 left"
    course.stats.state = "stopping: 4 requests are on their way"
    assert describe(course, brief=True) == "24/40; stopping: 4 requests are on their way"


def test_all_phases_are_shown_and_lines_become_fewer(monkeypatch, caplog, tmp_path):
    """The phases of a real run, each seen; the lines' distances, read off the table."""
    from fabe_ds.report import progress
    from fabe_ds.report.progress import _line_seconds

    monkeypatch.setattr(progress, "LINE_SECONDS", ((float("inf"), 0.005),))
    caplog.set_level(logging.INFO, "fabe_ds")
    lines = "".join(json.dumps({"code": f"x = {i}" + "y" * 300}) + "\n" for i in range(40_000))
    (tmp_path / "d.jsonl").write_text(lines)
    places = {"output": tmp_path / "o", "cache_dir": tmp_path / "c"}
    fabe_ds.run(input=tmp_path / "d.jsonl", **places)
    said = [record.getMessage() for record in caplog.records]
    kinds = ["loading, " if "loading, " in line else "writing, " if "writing, " in line else
             "records/s" if "records/s" in line else "" for line in said]  # fmt: skip
    assert [kind for n, kind in enumerate(kinds) if kind and kind not in kinds[:n]] == [
        "loading, ",
        "records/s",
        "writing, ",
    ]
    monkeypatch.undo()
    waits = [_line_seconds(seconds) for seconds in (0, 59, 61, 179, 181, 100_000)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (5.0, 60.0)


def test_debug_shows_retries_and_waits(box, server):
    server.behaviour = answering(lambda call: error(503, "busy") if call.number < 3 else None)
    box.lines("d.jsonl", [{"code": "x"}])
    ended = box.fabe(*asked(server, "d.jsonl"), "--log-level", "debug")
    assert ended.code == 0
    assert "retry (busy): " in ended.err or "retry (server): " in ended.err, ended.err
    assert " again in " in ended.err
    assert all(line[2] == ":" for line in ended.err.splitlines())  # the time of day


def answering(answer: Callable[[Call], Any]) -> Behaviour:
    async def behaviour(call: Call) -> Any:
        return answer(call)

    return behaviour


def asked(server: ModelServer, source: str, *more: object) -> list[object]:
    flags = ["--provider", "openai", "--model", "m", "--base-url", server.url, "--instruction", "f"]
    return ["run", "--input", source, *flags, *more]


# Settings.

SPELLINGS = {
    "with dashes": "input: d.jsonl\nalso-field: [more]\ntemplate-var: {goal: short}\n",
    "with underscores": "input: d.jsonl\nalso_field: more\ntemplate_var: [goal=short]\n",
    "as flags": "--input: d.jsonl\n--also-field: more\n--template-var: goal=short\n",
    "by their names": "input_path: d.jsonl\nalso_fields: [more]\ntemplate_vars: {goal: short}\n",
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_yaml_takes_what_flags_take(box, text):
    box.lines("d.jsonl", [{"code": "x", "more": "y"}])
    box.write("c.yaml", text + "log_level: debug\nstop: END\ninstruction: 'be {{ goal }}'\n")
    ended = box.fabe("run", "--config", "c.yaml")
    assert ended.code == 0, ended
    (row,) = box.read("outputs/d.jsonl")
    assert row["more"].startswith("# echo")
    assert box.report()["config"]["template_vars"] == {"goal": "short"}
    assert box.report()["config"]["stop"] == ["END"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("field: a\nfield: b\n", "c.yaml:2:1: 'field' is there twice"),
        ("also-field: a\nalso_fields: b\n", "also_fields is there twice, under two names"),
        ("stopp: a\n", "unknown setting 'stopp'; did you mean 'stop'?"),
        ("more_body: {}\n", "unknown setting 'more_body'\n"),
        ("template-var: goal\n", "write name: value, or name=value"),
        ("temperature: !!float x\n", "c.yaml: could not convert string to float"),
        ("timeout: 2020-13-45\n", "c.yaml: month must be in 1..12"),
        ("a: " + "[" * 5000, "c.yaml"),
        (f"temperature: {'9' * 500}x\n", "..."),
        ("strip_fences: maybe\n", "c.yaml: strip_fences"),
    ],
)
def test_wrong_yaml_is_one_line(box, text, said):
    box.write("c.yaml", text)
    ended = box.fabe("run", "--config", "c.yaml")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert said in ended.err
    assert len(ended.err) < 400


def test_a_schema_in_yaml_is_beside_it_and_found_from_elsewhere(box, server):
    server.behaviour = answering(lambda call: completion(call, '{"a": 1}'))
    box.write("deep/s.json", '{"$ref": "defs.json#/$defs/a"}')
    box.write("deep/defs.json", '{"$defs": {"a": {"required": ["a"]}}}')
    box.lines("deep/d.jsonl", [{"code": "x"}])
    settings = {"input": "d.jsonl", "output": "o", "validate": "json-schema:s.json"}
    settings |= {"provider": "openai", "model": "m", "base_url": server.url, "instruction": "f"}
    box.write("deep/c.yaml", json.dumps(settings))
    ended = box.fabe("run", "--config", "deep/c.yaml")
    assert ended.code == 0, ended
    (box.path / "other").mkdir()
    again = subprocess.run(
        [*COMMAND, "retry", "../deep/o.run.json"], cwd=box.path / "other", env=box.environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ('{"$ref": "http://127.0.0.1:9/x.json"}', "$ref 'http://127.0.0.1:9/x.json' is not in it"),
        ('{"$ref": "file:///etc/passwd"}', "$ref 'file:///etc/passwd' is not in it"),
        ('{"$ref": "../d.jsonl"}', "$ref '../d.jsonl' is not in it"),
        ('{"properties": {"a": {"$ref": "#/nope"}}}', "is not in it"),
        ("[" * 3000, "json-schema:s.json: "),
        ('{"type": 3}', "json-schema:s.json: "),
    ],
)
def test_schemas_fetch_nothing(box, schema, said):
    box.write("s.json", schema)
    box.lines("d.jsonl", [{"code": "x"}])
    ended = box.fabe("run", "--input", "d.jsonl", "--validate", "json-schema:s.json")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert said in ended.err


@pytest.mark.parametrize(
    "text",
    [
        *("{{" * 1000, "{{ " + "(" * 500 + " }}", "{{ " + "1+" * 5000 + "1 }}"),
        *("{% for a in b %}" * 25 + "{% endfor %}" * 25, f"{{{{ {'1' * 31}**99999 }}}}"),
    ],
)
def test_templates_that_python_cannot_compile_are_one_line(box, text):
    box.lines("d.jsonl", [{"code": "x"}])
    box.write("t.j2", text)
    ended = box.fabe("run", "--input", "d.jsonl", "--instruction", "t.j2", "--dry-run")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert "t.j2" in ended.err


# Advice.

REMARKS = {
    "workers": (["--workers", "2"], "--workers has no effect without --runner ray"),
    "public": (["--public"], "--public has no effect without --push-to-hub"),
    "glob of a file": (["--glob", "*.jsonl"], "--glob has no effect: d.jsonl is one file"),
    "twice": (["--batch-size", "2", "--batch-size", "3"], "--batch-size is given 2 times"),
}


@pytest.mark.parametrize(("flags", "said"), REMARKS.values(), ids=REMARKS)
def test_what_has_no_effect_is_said(box, flags, said):
    box.lines("d.jsonl", [{"code": "x"}])
    for dry in ([], ["--dry-run"]):
        ended = box.fabe("run", "--input", "d.jsonl", *flags, *dry)
        assert ended.code == 0
        assert ended.err.count(said) == 1, ended


def test_a_flag_that_is_given_twice_is_not_silently_the_last(box, server):
    box.lines("d.jsonl", [{"code": "x"}])
    ended = box.fabe(*asked(server, "d.jsonl", "--retry", 1, "--retry", 2))
    assert "--retry is given 2 times; the last one holds" in ended.err
    ended = box.fabe(*asked(server, "d.jsonl", "--base-url", server.url))
    assert (ended.code, ended.err) == (2, "fabe-ds: --base-url: one is given twice\n")


@pytest.mark.parametrize(
    ("flag", "near"),
    [("--extra-body", None), ("--concurency", "--concurrency"), ("--modle", "--model")],
)
def test_only_very_near_flags_are_suggested(box, flag, near):
    ended = box.fabe("run", flag, "x")
    assert ended.code == 2
    assert ("ossible options" in ended.err) == (near is not None), ended
    assert near is None or near in ended.err


def test_the_prompt_for_code_is_remarked_where_it_may_not_be_meant(box, server):
    box.lines("d.jsonl", [{"review": "good", "source_code": "x"}])
    said = "the system prompt is the default, for code"
    for field, more, count in [
        ("review", [], 1),
        ("source_code", [], 0),
        ("review", ["--system-prompt", ""], 0),
        ("review", ["--dry-run"], 1),
    ]:
        ended = box.fabe(*asked(server, "d.jsonl", "--field", field, *more))
        assert ended.code == 0
        assert ended.err.count(said) == count, (field, more, ended)


def test_a_dry_run_refuses_what_the_run_refuses(box, server):
    box.lines("d.jsonl", [{"code": "x"}])
    for more in (["--batch-api", "--max-requests", "1"], ["--max-cost", "1"]):
        for dry in ([], ["--dry-run"]):
            ended = box.fabe(*asked(server, "d.jsonl", *more, *dry))
            assert (ended.code, ended.err.count("\n")) == (2, 1), ended
    assert not server.calls


def test_the_models_that_are_there_are_named(box, server):
    server.models = ["llama-3", "qwen-3"]
    gone = "The model `m` does not exist"
    server.behaviour = answering(lambda call: error(404, gone))
    box.lines("d.jsonl", [{"code": "x"}])
    ended = box.fabe(*asked(server, "d.jsonl"))
    assert ended.code == 1
    assert "it has llama-3, qwen-3" in ended.err


def test_doctor_looks_at_a_configuration(box, server):
    box.lines("d.jsonl", [{"code": "x"}])
    settings = {"input": "d.jsonl", "provider": "openai", "model": "m", "base_url": server.url}
    box.write("c.yaml", json.dumps({**settings, "instruction": "f"}))
    ended = box.fabe("doctor", "--config", "c.yaml")
    assert ended.code == 0, ended
    assert "settings           openai, model m" in ended.out
    assert "input              " in ended.out
    assert "server             " in ended.out
    for wrong, said in [
        ({"input": "no.jsonl"}, "no such file"),
        ({"prices": "no.yaml"}, "no.yaml"),
    ]:
        box.write("c.yaml", json.dumps({**settings, "instruction": "f", **wrong}))
        ended = box.fabe("doctor", "--config", "c.yaml")
        assert ended.code == 1
        assert f"bad   {'input' if 'input' in wrong else 'settings'}" in ended.out
        assert said in ended.out


# A notebook.


def test_the_settings_are_in_the_signatures():
    for function in (fabe_ds.run, fabe_ds.transform_fn):
        parameters = inspect.signature(function).parameters
        assert parameters["max_new_tokens"].default == 128
        assert parameters["instruction"].annotation == str | None
        assert parameters["provider"].kind is inspect.Parameter.KEYWORD_ONLY
    assert "input_path" in inspect.signature(fabe_ds.run).parameters


def test_run_takes_settings_by_either_name(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"code": "x"}\n')
    places = {"output": tmp_path / "o", "cache_dir": tmp_path / "c"}
    assert fabe_ds.run(input=tmp_path / "d.jsonl", **places).done == 1
    assert fabe_ds.run(input_path=tmp_path / "d.jsonl", **places).cached == 1
    config = fabe_ds.RunConfig(input_path=tmp_path / "d.jsonl", cache_dir=tmp_path / "c")
    assert fabe_ds.run(config, output_path=tmp_path / "p").outputs == [tmp_path / "p/d.jsonl"]
    with pytest.raises(fabe_ds.UsageError, match="unknown setting 'inputs'; did you mean 'input"):
        fabe_ds.run(inputs="x")
    with pytest.raises(fabe_ds.UsageError, match="under two names"):
        fabe_ds.run(input="x", input_path="y")


def test_kept_failures_do_not_stop_a_map(server, tmp_path):
    server.behaviour = answering(lambda call: error(400, "no"))
    data = datasets.Dataset.from_list([{"code": f"x = {i}"} for i in range(60)])
    rewrite = fabe_ds.transform_fn(
        provider="openai", base_url=server.url, model="m", instruction="f", on_error="keep",
        cache_dir=str(tmp_path / "c"), status_field="how",
    )  # fmt: skip
    mapped = data.map(rewrite, batched=True)
    assert {row["state"] for row in mapped["how"]} == {"failed"}
    assert mapped["code"] == data["code"]


def host_state() -> list[object]:
    root = logging.getLogger()
    names = ("fabe_ds", "datasets", "transformers", "huggingface_hub")
    return [
        root.level,
        list(root.handlers),
        *((logging.getLogger(n).level, list(logging.getLogger(n).handlers)) for n in names),
        datasets.are_progress_bars_disabled(),
        datasets.logging.get_verbosity(),
    ]


def test_the_host_process_is_left_as_it_was(tmp_path, tiny):
    import transformers

    transformers.logging.set_verbosity_info()
    before = host_state()
    (tmp_path / "d.jsonl").write_text('{"code": "x"}\n')
    (tmp_path / "d.csv").write_text("code\nx\n")
    for name in ("d.jsonl", "d.csv"):
        fabe_ds.run(input=tmp_path / name, output=tmp_path / "o", cache_dir=tmp_path / "c")
    data = datasets.Dataset.from_list([{"code": "x"}])
    rewrite = fabe_ds.transform_fn(
        provider="hf", model=str(tiny), instruction="f", max_new_tokens=2, on_error="keep",
        cache_dir=str(tmp_path / "c"),
    )  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):
        data.map(rewrite, batched=True)
    after = host_state()
    bars = transformers.logging.is_progress_bar_enabled()
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    assert after == before
    assert bars
    assert level == transformers.logging.INFO
