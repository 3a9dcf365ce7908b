"""The two pure halves of the vLLM adapter; scripts/bench/vllm_engine.py runs the engine itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fabe_ds.errors import RecordFailed, UsageError
from fabe_ds.providers import Endpoint, Sampling
from fabe_ds.providers.transformers.attention import Answer
from fabe_ds.providers.transformers.vllm import (
    engine_arguments,
    read_output,
    sampling_arguments,
    without_machine,
)


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


def test_the_engine_plans_its_places_unless_it_is_told(tmp_path):
    """vLLM's own plan is for 256 sequences at least: ours are only named above it."""
    assert "max_num_seqs" not in engine_arguments(tmp_path, Endpoint("m", batches=4))
    many = Endpoint("m", batch_size=128, batches=4)
    assert engine_arguments(tmp_path, many)["max_num_seqs"] == 512
    assert engine_arguments(tmp_path, many)["enable_prefix_caching"] is True


def test_arguments_of_the_engine_go_through(tmp_path):
    params = {"engine.tensor_parallel_size": 2, "engine.max_model_len": 4096, "min_tokens": 3}
    params |= {"engine.quantization": "awq", "engine.max_num_seqs": 16}
    given = engine_arguments(tmp_path, Endpoint("m", batch_size=512, params=params))
    assert given["tensor_parallel_size"] == 2
    assert given["max_model_len"] == 4096
    assert given["quantization"] == "awq"
    assert given["max_num_seqs"] == 16
    assert "min_tokens" not in given
    with pytest.raises(UsageError, match=r"engine\.NAME=VALUE"):
        engine_arguments(tmp_path, Endpoint("m", params={"engine": 3}))


def test_a_key_does_not_know_the_machine():
    machine = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "max_num_seqs": 9}
    assert without_machine({"engine": machine, "min_tokens": 3}) == {"min_tokens": 3}
    assert without_machine({"engine": {**machine, "quantization": "awq"}}) == {
        "engine": {"quantization": "awq"}
    }
    assert without_machine({"min_tokens": 3}) == {"min_tokens": 3}


@pytest.mark.parametrize(("speculate", "drafts"), [("auto", None), ("off", None), (5, 5)])
def test_drafts_of_the_engine(tmp_path, speculate, drafts):
    given = engine_arguments(tmp_path, Endpoint("m", speculate=speculate))
    config = given.get("speculative_config", {})
    assert config.get("num_speculative_tokens") == drafts
    assert config.get("method") == ("ngram" if drafts else None)


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
