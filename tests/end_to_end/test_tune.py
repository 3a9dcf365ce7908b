"""fabe-ds tune: the size of a local model's batches, tried out on the user's own records."""

from __future__ import annotations

import pytest

from fabe_ds.errors import FabeError
from fabe_ds.tools.tune import write_settings
from tests.unit.providers.test_decode import prompts

YAML = """\
# Ours, and it stays as it is.
input_path: data.jsonl
instruction: "Say it: {{ text }}"   # short
provider: hf
model: {model}
dtype: float32
batch_size: 3   # a guess
max_new_tokens: 6
on_truncated: keep
system_prompt: ""
"""


def project(box, tiny, records=120):
    box.lines("data.jsonl", [{"code": f"{n} {text}"} for n, text in enumerate(prompts(records))])
    text = YAML.replace("{model}", str(tiny))
    box.write("fabe.yaml", text)
    return text


def test_the_best_size_is_written_and_every_answer_kept(box, tiny):
    text = project(box, tiny)
    ended = box.fabe("tune", "--config", "fabe.yaml", "-n", 100)
    assert ended.code == 0, ended
    rows = [line.split() for line in ended.out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[:2] for row in rows[:3]] == [["2", "8"], ["4", "16"], ["8", "32"]]
    best = next(row[0] for row in rows if "best" in row)
    written = (box.path / "fabe.yaml").read_text()
    expected = text.replace("batch_size: 3 ", f"batch_size: {best} ") + "concurrency: 4\n"
    assert written == expected
    assert f"written to fabe.yaml: batch_size: {best}, concurrency: 4" in ended.out
    answered = 4 + sum(int(row[2]) for row in rows)
    run = box.fabe("run", "--config", "fabe.yaml")
    assert run.code == 0, run
    assert (box.report()["cached"], box.report()["done"]) == (answered, 120 - answered)


def test_without_a_file_the_flags_are_said(box, tiny):
    project(box, tiny)
    ended = box.fabe(
        *("tune", "--input", "data.jsonl", "--instruction", "Say", "--provider", "hf"),
        *("--model", tiny, "--max-new-tokens", 4, "--on-truncated", "keep", "--concurrency", 2),
    )
    assert ended.code == 0, ended
    assert "use it: --batch-size " in ended.out
    assert "--concurrency 2" in ended.out
    assert "more would want more records (-n)" in ended.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("-n", 20), "20 records are left to answer, and 88 are the least to compare 3 sizes with"),
        (("--provider", "openai", "--model", "m"), "--concurrency auto"),
        (("--provider", "echo"), "tune is for local models"),
        (("--dry-run",), "tune asks the model"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(box, tiny, flags, said):
    text = project(box, tiny)
    ended = box.fabe("tune", "--config", "fabe.yaml", *flags)
    assert ended.code == 2, ended
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert (box.path / "fabe.yaml").read_text() == text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "batch_size: 8\n"),
        ("a: 1", "a: 1\nbatch_size: 8\n"),
        ("batch_size: 16", "batch_size: 8"),
        ("batch_size:   16   # mine\na: 1\n", "batch_size:   8   # mine\na: 1\n"),
        ("# batch_size: 2\nbatch_size: 16\n", "# batch_size: 2\nbatch_size: 8\n"),
        ("max_batch_size: 2\n", "max_batch_size: 2\nbatch_size: 8\n"),
        ("batch-size: 2\n", "batch-size: 8\n"),
        ("a: 1\r\nbatch_size: 2\r\n", "a: 1\r\nbatch_size: 8\r\n"),
        ("a: 1\r\n", "a: 1\r\nbatch_size: 8\r\n"),
    ],
)
def test_a_setting_is_set_and_nothing_else(tmp_path, before, after):
    path = tmp_path / "fabe.yaml"
    path.write_bytes(before.encode())
    write_settings(path, {"batch_size": 8})
    assert path.read_bytes() == after.encode()


@pytest.mark.parametrize("text", ["{a: 1}\n", "batch_size:\n", "a: 1\n...\n", '"batch_size": 2\n'])
def test_a_file_of_another_layout_is_left_alone(tmp_path, text):
    path = tmp_path / "fabe.yaml"
    path.write_text(text)
    with pytest.raises(FabeError, match="put in batch_size: 8"):
        write_settings(path, {"batch_size": 8})
    assert path.read_text() == text
