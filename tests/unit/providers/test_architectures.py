"""Every architecture: the command line gives what generate gives each prompt alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from tests.support.architectures import PAGE, all_types, loader, made, page, tiny, ways
from tests.support.models import tiny_model

NEW = 6
WORDS = ["the", "quick", "brown", "fox", "of", "in", "that", "it", "is", "a", "user", "to"]


def texts() -> list[str]:
    """Of 5 to 90 tokens, and five of one length."""
    pick = random.Random(1)
    some = [" ".join(pick.choices(WORDS, k=count)) for count in (1, 2, 3, 5, 8, 12, 17, 22)]
    return [*some, *("".join(pick.choices("bcdfgh", k=33)) for _ in range(5))]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return AutoTokenizer.from_pretrained(tiny_model(folder, template=None))


def saved(name: str, folder: Path, tokenizer: Any, **settings: Any) -> Path:
    model = tiny(name, **settings)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def alone(name: str, folder: Path, tokenizer: Any) -> list[str]:
    """What transformers' generate makes of each text, one by one."""
    model = loader(name).from_pretrained(folder, dtype=torch.float32)
    answers = []
    for text in texts():
        ids = torch.tensor([tokenizer(f"Say\n\n{text}")["input_ids"]])
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            new = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        answer = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        if len(new[0]) == ids.shape[1] + NEW and new[0, -1] != 2:  # what is cut of a character
            answer = answer.rstrip("\ufffd")
        answers.append(answer if answer.strip() else text)  # an empty one fails
    return answers


def run(box: Any, name: str, batch_sizes: list[int], tokenizer: Any = None, **settings: Any):
    """How the command line decodes it, and its answers for each size of batch."""
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model(box.path / "t", template=None))
    folder = saved(name, box.path / "model", tokenizer, **settings)
    box.lines("data.jsonl", [{"code": text} for text in texts()])
    answers, way = [], "loop"
    for size, drafts in zip(batch_sizes, (3, "auto", "off"), strict=False):
        ended = box.fabe(
            *("run", "--input", "data.jsonl", "--instruction", "Say", "--provider", "hf"),
            *("--model", folder, "--dtype", "float32", "--batch-size", size, "--no-resume"),
            *("--no-use-chat-template", "--system-prompt", "", "--max-new-tokens", NEW),
            *("--on-truncated", "keep", "--no-strip-fences", "--backup-field", ""),
            *("--speculate", drafts),
        )
        if ended.code == 1 and "looks at the whole text" in ended.err:
            return "refused", []
        assert ended.code in (0, 1), ended  # 1: an answer of nothing
        assert ended.out, ended
        answers.append([record["code"] for record in box.read("outputs/data.jsonl")])
        notes = " ".join(box.report()["notes"])
        if "our own loop does not run" in notes:
            way = "generate"
            if "one by one" in notes:
                way = "alone"
            elif "of one length" in notes:
                way = "equal"
    return way, answers


@pytest.mark.slow
@pytest.mark.parametrize("name", made())
def test_each_prompt_gets_its_own_answer(box, name, tokenizer):
    # What drafts and sizes do is of our own loop.
    sizes = [1, 8, 48] if ways()[name] == "loop" else [1, 48]
    way, answers = run(box, name, sizes, tokenizer)
    assert way == ways()[name]
    expected = alone(name, box.path / "model", tokenizer) if answers else []
    assert all(given == expected for given in answers)


ROPES = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 8.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_long_prompts_change_no_others(box, name, kind, tokenizer):
    """Where rotary positions change their scale with the longest prompt beside (L3)."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    rope["original_max_position_embeddings"] = 32
    settings = {"rope_parameters": rope} | ({"head_dim": 8} if name == "qwen3" else {})
    _, answers = run(box, name, [1, 8, 48], tokenizer, **settings)
    assert answers
    expected = alone(name, box.path / "model", tokenizer)
    assert len(set(expected)) > 6
    assert all(given == expected for given in answers)


def test_every_type_of_transformers_is_known():
    from transformers.models.auto import modeling_auto as mappings

    known = {
        *mappings.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *mappings.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    assert known == set(all_types())
    assert PAGE.read_text() == page(ways())
