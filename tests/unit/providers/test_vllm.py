"""The two pure halves of the vLLM adapter; scripts/bench/vllm_engine.py runs the engine itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fabe_ds.errors import RecordFailed
from fabe_ds.providers import Endpoint, Sampling
from fabe_ds.providers.transformers.attention import Answer
from fabe_ds.providers.transformers.vllm import engine_arguments, read_output, sampling_arguments


def output(reason="stop", tokens=(5, 6, 2), stop_reason=None, text="five six"):
    best = SimpleNamespace(
        finish_reason=reason, token_ids=tokens, stop_reason=stop_reason, text=text
    )
    return SimpleNamespace(request_id="3", outputs=[best], finished=True)


def test_greedy_arguments_name_no_seed():
    assert sampling_arguments(Sampling(64), 9) == {"max_tokens": 64, "temperature": 0.0}


def test_sampling_arguments():
    sampling = Sampling(8, temperature=0.7, top_p=0.9, stop=("END",))
    assert sampling_arguments(sampling, 9) == {
        "max_tokens": 8,
        "temperature": 0.7,
        "seed": 9,
        "top_p": 0.9,
        "stop": ["END"],
    }


def test_do_sample_without_a_temperature_samples_at_one():
    assert sampling_arguments(Sampling(8, do_sample=True), 1)["temperature"] == 1.0


def test_an_ending_token_is_no_part_of_the_answer():
    assert read_output(output()) == (3, Answer(3, [5, 6], "stop"))


def test_an_answer_that_was_cut():
    assert read_output(output("length")) == (3, Answer(3, [5, 6, 2], "length"))


def test_a_stop_string_gives_the_text_before_it():
    given = read_output(output(stop_reason="END"))
    assert given == (3, Answer(3, [5, 6, 2], "stop", "five six"))


@pytest.mark.parametrize("reason", ["abort", None])
def test_any_other_end_fails_the_record(reason):
    number, failed = read_output(output(reason))
    assert number == 3
    assert isinstance(failed, RecordFailed)
    assert "vLLM ended it" in str(failed)


def test_code_that_comes_with_a_model_is_not_run_unless_asked(tmp_path):
    assert engine_arguments(tmp_path, Endpoint("m"))["trust_remote_code"] is False


def test_an_engine_that_is_not_installed_is_one_line(box, tiny):
    box.lines("data.jsonl", [{"code": "x"}])
    ended = box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "I", "--provider", "hf"),
        *("--model", tiny, "--engine", "vllm"),
    )
    assert ended.code == 2
    assert ended.err.strip() == (
        "fabe-ds: --engine vllm: not installed; pip install 'fabe-ds[vllm]'"
    )
