"""The decoding loop: the very tokens that transformers' generate gives, one prompt at a time."""

from __future__ import annotations

import inspect
import itertools
import json
import random
import time
from collections import Counter

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fabe_ds.errors import RecordFailed
from fabe_ds.providers import Completion, Endpoint, Request, Sampling
from fabe_ds.providers.transformers import decoder as decoding
from fabe_ds.providers.transformers.decoder import Decoder
from fabe_ds.providers.transformers.hf import HFProvider
from tests.support.functions import functions

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "of",
    "in",
    "that",
    "it",
    "is",
    "a",
    "user",
    "system",
    "and",
    "to",
]


def provider(path, batch_size=6, **options) -> HFProvider:
    return HFProvider(Endpoint(str(path), dtype="float32", batch_size=batch_size, **options))


def prompts(count: int, longest: int = 30, seed: int = 0) -> list[str]:
    pick = random.Random(seed)
    return [" ".join(pick.choices(WORDS, k=pick.randint(1, longest))) for _ in range(count)]


def requests(texts, tokens=10, **sampling) -> list[Request]:
    return [Request(t, f"Say it:\n\n{t}", "You help.", Sampling(tokens, **sampling)) for t in texts]


def generated(path, model: HFProvider, asked: list[Request], **settings) -> list[str]:
    """What transformers' generate makes of each, alone."""
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = []
    for request in asked:
        ids = torch.tensor([model.prompt_ids(request)])
        new = plain.generate(
            ids,
            max_new_tokens=request.sampling.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            **settings,
        )
        texts.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def texts_of(answers) -> list[str]:
    assert all(isinstance(answer, Completion) for answer in answers), answers
    return [answer.text for answer in answers]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_every_answer_is_generates_own(tiny, batch_size):
    model = provider(tiny, batch_size)
    asked = requests(prompts(40))
    assert texts_of(model.complete(asked)) == generated(tiny, model, asked)
    assert model.generation.own_loop


@pytest.mark.slow
def test_every_answer_of_a_real_model_is_generates_own(smollm_folder):
    model = provider(smollm_folder, 8)
    asked = requests([str(f["code"]) for f in functions(12, longest=500)], 16)
    assert texts_of(model.complete(asked)) == generated(smollm_folder, model, asked)
    assert model.generation.own_loop
    assert model.generation.work.prefix > 0


def test_the_shared_beginning_changes_nothing(tiny, monkeypatch):
    asked = requests(prompts(20))
    model = provider(tiny)
    shared = model.complete(asked)
    assert model.generation.work.prefix > 10
    monkeypatch.setattr(decoding, "_common_prefix", lambda rows: [])
    without = provider(tiny)
    assert without.complete(asked) == shared
    assert without.generation.work.prefix == 0
    assert without.generation.work.prompt > model.generation.work.prompt


def test_the_order_of_the_records_changes_nothing(tiny):
    texts = prompts(25)
    ordered = dict(zip(texts, provider(tiny, 5).complete(requests(texts)), strict=True))
    shuffled = random.Random(1).sample(texts, len(texts))
    again = provider(tiny, 3).complete(requests(shuffled))
    assert again == [ordered[text] for text in shuffled]


def test_rows_that_end_leave_and_others_take_their_place(talkative):
    """With answers of very different lengths, no step is taken for a row that has ended."""
    said = Counter("".join(texts_of(provider(talkative).complete(requests(prompts(60), 40)))))
    model = provider(talkative, 12)
    asked = requests(prompts(60), 40, stop=(said.most_common(12)[-1][0],))
    lengths = [answer.completion_tokens for answer in model.complete(asked)]
    assert len(set(lengths)) > 3
    work = model.generation.work
    one_batch_after_another = sum(
        max(lengths[start : start + 12]) for start in range(0, len(lengths), 12)
    )
    assert work.row_steps <= sum(lengths)
    assert work.steps < one_batch_after_another


def test_no_more_tokens_are_held_than_allowed(tiny, monkeypatch):
    held = []
    step = Decoder._step

    def watched(self, blocks):
        held.append(sum(block.tokens for block in blocks))
        step(self, blocks)

    asked = requests(prompts(30))
    expected = provider(tiny).complete(asked)
    monkeypatch.setattr(Decoder, "_step", watched)
    model = provider(tiny, 16, max_batch_tokens=400)
    assert model.complete(asked) == expected
    assert max(held[1:]) <= 400  # the first is the model's trial
    assert model.generation.work.row_steps > model.generation.work.steps


def test_a_seed_belongs_to_its_record(tiny):
    sampling = {"temperature": 1.0, "seed": 7}
    asked = requests(prompts(20), **sampling)
    together = provider(tiny, 16).complete(asked)
    assert [provider(tiny).complete([one])[0] for one in asked[:5]] == together[:5]
    assert provider(tiny, 3).complete(asked[::-1])[::-1] == together
    other = provider(tiny, 16).complete(requests(prompts(20), temperature=1.0, seed=8))
    assert other != together
    second_sample = provider(tiny).complete([asked[0]._replace(sample=1)])
    assert second_sample != together[:1]


def test_sampling_follows_the_scores(tiny):
    """At a temperature near zero, or with the likeliest token alone, sampling is greedy."""
    asked = prompts(10)
    greedy = texts_of(provider(tiny).complete(requests(asked)))
    cold = provider(tiny).complete(requests(asked, temperature=1e-4, seed=1))
    narrow = provider(tiny).complete(requests(asked, temperature=1.0, top_p=1e-6, seed=1))
    assert texts_of(cold) == texts_of(narrow) == greedy


def test_a_stop_string_ends_the_answer(talkative):
    model = provider(talkative)
    asked = requests(prompts(6), 30)
    whole = texts_of(model.complete(asked))
    stop = whole[0][5:7]
    stopped = model.complete(requests(prompts(6), 30, stop=(stop,)))
    for text, answer in zip(whole, stopped, strict=True):
        assert answer.text == text.split(stop)[0]
        assert answer.finish_reason == ("stop" if stop in text else "length")
    assert stopped[0].completion_tokens < 30
    by_transformers = provider(talkative, attn_implementation="sdpa")
    again = by_transformers.complete(requests(prompts(6), 30, stop=(stop,)))
    assert texts_of(again) == texts_of(stopped)


def test_the_models_own_repetition_limits_hold(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    limits = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id, **limits
    )
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    limited = provider(tmp_path)
    asked = requests(prompts(8), 20)
    answers = texts_of(limited.complete(asked))
    assert answers == generated(tiny, limited, asked, **limits)
    assert answers != texts_of(provider(tiny).complete(asked))
    assert "repetition_penalty" in limited.shown(asked[0])


def saved(model_class, config, tiny, folder):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = model_class(config)
    model.generation_config = GenerationConfig(eos_token_id=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.4,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
GPT = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4}
GPT |= {"eos_token_id": 2, "bos_token_id": 1}
KINDS = {
    "mistral, window of 64": (
        MistralForCausalLM,
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=64),
        True,
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=16), True),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT), True),
    "gemma2, soft caps": (
        Gemma2ForCausalLM,
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=5.0),
        False,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures(kind, tiny, tmp_path):
    """Where our attention is not the model's, transformers' generate does the work."""
    model_class, config, ours = KINDS[kind]
    path = saved(model_class, config, tiny, tmp_path)
    model = provider(path)
    asked = requests(prompts(12))
    answers = texts_of(model.complete(asked))
    assert model.generation.own_loop == ours
    assert answers == generated(path, model, asked)


def test_prompts_beyond_a_window_are_told_with_their_number(box, tiny, tmp_path):
    """what our own loop leaves to generate."""
    path = saved(*KINDS["mistral, window of 64"][:2], tiny, tmp_path / "m")
    texts = ["fox", "the fox", " ".join(WORDS * 4), " ".join(WORDS * 5)]
    box.lines("data.jsonl", [{"code": text} for text in texts])
    ended = box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "Say it", "--provider", "hf"),
        *("--model", path, "--dtype", "float32", "--on-truncated", "keep", "--max-new-tokens", 8),
        *("--system-prompt", ""),
    )
    assert ended.code == 0, ended
    said = "2 records were answered by transformers' generate: longer than 64 tokens"
    assert said in ended.out
    assert any(note.startswith(said) for note in box.report()["notes"])
    assert box.fabe("report", "outputs.run.json").code == 0
    assert said in (box.path / "outputs.html").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_trial_in_float32_leaves_the_model_as_it_was(tiny, dtype):
    """in half precision the model's own implementations may differ by more than a fault."""
    model = HFProvider(Endpoint(str(tiny), dtype=dtype, batch_size=4))
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    assert model.generation.own_loop
    after = model.model.state_dict()
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.model.dtype == getattr(torch, dtype)
    texts_of(model.complete(requests(prompts(6))))


@pytest.mark.slow
def test_a_gguf_file_is_parsed_once(smollm, monkeypatch):
    """config, tokenizer and weights, each by a parse of its own, took 16 seconds."""
    import gguf

    parsed = []
    build = gguf.GGUFReader._build_fields
    monkeypatch.setattr(
        gguf.GGUFReader, "_build_fields", lambda *a: (parsed.append(1), build(*a))[1]
    )
    model = HFProvider(Endpoint(str(smollm), dtype="float32"))
    _ = model.generation
    assert len(parsed) == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_own_attention_can_be_had(tiny, attention):
    asked = requests(prompts(12))
    theirs = provider(tiny, attn_implementation=attention)
    assert theirs.complete(asked) == provider(tiny).complete(asked)
    assert not theirs.generation.own_loop


def test_a_long_prompt_can_be_cut_at_its_beginning(tmp_path):
    from tests.support.models import tiny_model

    path = tiny_model(tmp_path / "m", longest=64)
    long = requests([" ".join(WORDS * 10)])
    (failed,) = provider(path).complete(long)
    assert isinstance(failed, RecordFailed)
    assert "more than the model's 64" in str(failed)
    cutting = provider(path, on_long_prompt="truncate-left")
    (answer,) = cutting.complete(long)
    assert isinstance(answer, Completion)
    assert answer.prompt_tokens == 54
    assert cutting.key(long[0]) != provider(path).key(long[0])


@pytest.mark.slow
def test_a_killed_run_loses_what_was_in_the_batch_at_most(box, talkative):
    box.lines("data.jsonl", [{"code": text} for text in prompts(400, 12)])
    command = [
        *("run", "--input", "data.jsonl", "--instruction", "Say it", "--provider", "hf"),
        *("--model", talkative, "--dtype", "float32", "--on-truncated", "keep"),
        *("--max-new-tokens", 60),
    ]
    process = box.start(*command)
    store = box.path / ".cache" / "answers"
    deadline = time.monotonic() + 60
    while not (known := box.fabe("cache", "stats").out) or "0 answers" in known:
        assert time.monotonic() < deadline, (known, store)
    box.kill(process)
    assert box.fabe(*command).code == 0
    report = box.report()
    assert report["cached"] > 0
    assert report["done"] + report["cached"] == 400
    undisturbed = box.fabe(*command, "--cache-dir", "fresh", "--output", "fresh-outputs")
    assert undisturbed.code == 0
    first, second = box.read("outputs/data.jsonl"), box.read("fresh-outputs/data.jsonl")
    assert first == second


def test_a_common_prefix_leaves_each_row_something():
    for rows in itertools.product([[1], [1, 2], [1, 2, 3], [1, 4], [5]], repeat=2):
        shared = decoding._common_prefix([list(row) for row in rows])
        assert all(row[: len(shared)] == shared and len(row) > len(shared) for row in rows)
    assert decoding._common_prefix([[1, 2, 3, 4], [1, 2, 3, 5]]) == [1, 2, 3]


def test_settings_are_shown_by_the_dry_run(box, tiny):
    box.lines("data.jsonl", [{"code": "the fox"}])
    shown = box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "Say", "--provider", "hf", "--dry-run"),
        *("--model", tiny, "--temperature", 0.5, "--top-p", 0.9, "--stop", "END", "--seed", 3),
    )
    assert shown.code == 0, shown.err
    for part in ("'temperature': 0.5", "'top_p': 0.9", "'stop': ['END']", "'seed': 3"):
        assert part in shown.out
    assert json.dumps("eos_token_id").strip('"') in shown.out


@pytest.mark.slow
def test_several_devices_have_a_process_each(box, talkative):
    box.lines("data.jsonl", [{"code": text} for text in prompts(60, 12)])
    command = [
        *("run", "--input", "data.jsonl", "--instruction", "Say it", "--provider", "hf"),
        *("--model", talkative, "--dtype", "float32", "--on-truncated", "keep"),
        *("--max-new-tokens", 8, "--log-level", "DEBUG"),
    ]
    both = box.fabe(*command, "--device", "cpu,cpu")
    assert both.code == 0, both
    report = box.report()
    assert (report["done"], report["cached"]) == (60, 0)
    assert report["completion_tokens"] > 0
    alone = box.fabe(*command, "--output", "alone", "--cache-dir", "alone-cache")
    assert alone.code == 0
    assert box.read("outputs/data.jsonl") == box.read("alone/data.jsonl")
    again = box.fabe(*command)
    assert "60 from cache" in again.out
    whole = box.read("outputs/data.jsonl")
    replaced = box.fabe(*command, "--device", "cpu,cpu", "--inplace")
    assert (replaced.code, box.read("data.jsonl")) == (0, whole)
    twice = box.fabe(*command, "--device", "cpu,cpu", "--inplace")
    assert "60 skipped (60 done before)" in twice.out
    assert box.read("data.jsonl") == whole


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_record_that_the_model_fails_at_fails_alone(tiny, monkeypatch, attention):
    """Whatever a model's own code raises."""
    model = provider(tiny, attn_implementation=attention)
    asked = requests([*prompts(3), "the ~ fox", *prompts(3, seed=1)])
    expected = model.complete(asked)
    forward = type(model.model).forward
    bad = model.tokenizer("~")["input_ids"][0]

    def failing(self, input_ids=None, **more):
        if input_ids.shape[1] > 1 and (input_ids == bad).any():
            raise IndexError("index out of range in self")
        return forward(self, input_ids=input_ids, **more)

    failing.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model.model), "forward", failing)
    again = model.complete(asked)
    assert isinstance(again[3], RecordFailed)
    assert "IndexError" in str(again[3])
    assert [*again[:3], *again[4:]] == [*expected[:3], *expected[4:]]
