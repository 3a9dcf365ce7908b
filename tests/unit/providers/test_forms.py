"""Forms of answers in a local model: choices by its scores, JSON that a schema constrains."""

from __future__ import annotations

import json
import math
import random
from functools import lru_cache

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fabe_ds.confidence import confidence
from fabe_ds.providers import Completion, Endpoint, Request, Sampling
from fabe_ds.providers.transformers.choosing import Tree
from fabe_ds.providers.transformers.hf import HFProvider
from fabe_ds.request import AnswerForm
from tests.support.functions import functions

CHOICES = [
    ("good", "bad"),
    ("good", "good enough", "goo", "bad"),
    ("very good", "very bad", "very", "x", "xylophone", "é"),
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "lines": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["math", "text"]},
        "pure": {"type": ["boolean", "null"]},
        "more": {"type": "array", "items": {"$ref": "#/$defs/pair"}, "maxItems": 2},
    },
    "required": ["name", "lines", "kind", "pure", "more"],
    "additionalProperties": False,
    "$defs": {
        "pair": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}},
            "required": ["a"],
            "additionalProperties": False,
        }
    },
}


def provider(path, rows: int = 6, **options) -> HFProvider:
    return HFProvider(Endpoint(str(path), dtype="float32", batch_size=rows, **options))


def asked(texts, form: AnswerForm, tokens: int = 120, **sampling) -> list[Request]:
    settings = Sampling(tokens, **sampling)
    return [Request(text, f"Say:\n\n{text}", None, settings, form=form) for text in texts]


def texts(count: int) -> list[str]:
    pick = random.Random(1)
    words = ["the", "quick", "brown", "fox", "of", "in", "that", "it", "is"]
    return [" ".join(pick.choices(words, k=pick.randint(1, 40))) for _ in range(count)]


@lru_cache(1)
def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def by_definition(path, model: HFProvider, request: Request) -> dict[str, float]:
    """The probability of each choice, out of the model's scores at every token of every choice."""
    plain = loaded(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompt = model.prompt_ids(request)
    end = tokenizer.eos_token_id
    ways = {
        c: [*tokenizer(c, add_special_tokens=False)["input_ids"], end] for c in request.form.choices
    }
    chances = {}
    for choice, ids in ways.items():
        with torch.inference_mode():
            scores = plain(torch.tensor([[*prompt, *ids[:-1]]])).logits[0, len(prompt) - 1 :]
        total = 0.0
        for place, token in enumerate(ids):
            others = {way[place] for way in ways.values() if way[:place] == ids[:place]}
            logs = scores[place].log_softmax(0)
            total += float(logs[token] - torch.logsumexp(logs[sorted(others)], 0))
        chances[choice] = math.exp(total)
    return chances


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_a_choice_is_scored_as_its_definition_says(tiny, choices, attention):
    model = provider(tiny, attn_implementation=attention)
    requests = asked(texts(12), AnswerForm(choices=choices))
    for request, answer in zip(requests, model.complete(requests), strict=True):
        assert isinstance(answer, Completion)
        expected = by_definition(tiny, model, request)
        assert sum(expected.values()) == pytest.approx(1, abs=1e-4)
        assert answer.text == max(expected, key=expected.__getitem__)
        assert confidence(answer, answer.text) == pytest.approx(expected[answer.text], abs=1e-3)
    assert model.generation.own_loop == (attention == "auto")
    assert model.generation.work.new == 0  # nothing was generated


def test_choices_are_drawn_by_their_probabilities(tiny):
    model = provider(tiny)
    choices = CHOICES[1]
    requests = [
        request._replace(sample=number)
        for number, request in enumerate(
            asked(["fox"] * 400, AnswerForm(choices=choices), temperature=1.0, seed=3)
        )
    ]
    answers = model.complete(requests)
    expected = by_definition(tiny, model, requests[0])
    for choice in choices:
        share = sum(answer.text == choice for answer in answers) / len(answers)
        assert share == pytest.approx(expected[choice], abs=0.1)
    assert [a.text for a in model.complete(requests)] == [a.text for a in answers]


@pytest.mark.parametrize("attention", ["auto", "eager"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 1}])
def test_answers_follow_the_schema(tiny, attention, sampling):
    """A model of random weights, which knows nothing of JSON."""
    model = provider(tiny, attn_implementation=attention)
    answers = model.complete(asked(texts(12), AnswerForm(SCHEMA), **sampling))
    for answer in answers:
        assert isinstance(answer, Completion)
        assert answer.finish_reason == "stop", answer
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert model.generation.own_loop == (attention == "auto")


def test_rows_without_a_form_are_as_without_neighbours_that_have_one(tiny):
    model = provider(tiny)
    free = model.complete(asked(texts(6), AnswerForm(), 12))
    model.complete(asked(texts(6), AnswerForm(SCHEMA)))
    assert model.complete(asked(texts(6), AnswerForm(), 12)) == free


def test_keywords_that_cannot_be_enforced_are_left_to_the_check(tiny):
    schema = {
        **SCHEMA,
        "if": {"properties": {"kind": {"const": "math"}}},
        "not": {"required": ["z"]},
    }
    model = provider(tiny)
    (answer,) = model.complete(asked(["fox"], AnswerForm(schema)))
    jsonschema.validate(json.loads(answer.text), SCHEMA)


def test_the_form_is_part_of_the_key_only_where_there_is_one(tiny):
    model = provider(tiny)
    (free,) = asked(["fox"], AnswerForm())
    keys = {
        model.key(request._replace(form=form))
        for request in [free]
        for form in (AnswerForm(), AnswerForm(SCHEMA), AnswerForm(choices=("a", "b")))
    }
    assert len(keys) == 3
    assert not {"choices", "schema"} & model.body(free).keys()


@pytest.mark.slow
def test_a_real_model_follows_the_schema_for_all_of_48_records(smollm_folder):
    model = provider(smollm_folder, 48)
    codes = [str(function["code"]) for function in functions(48, longest=500)]
    answers = model.complete(asked(codes, AnswerForm(SCHEMA)))
    for answer in answers:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert model.generation.own_loop


def test_a_model_without_an_end_takes_no_choice_that_a_longer_one_begins_with():
    tree = Tree({"good": [1], "good enough": [1, 2], "bad": [3]}, ends=())
    chances = tree.chances((1,), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert chances == {2: 0.0}
