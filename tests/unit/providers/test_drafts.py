"""Drafts copied from a row's own tokens, and what they cost."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabe_ds.providers import Completion, Endpoint, Request, Sampling
from fabe_ds.providers.transformers.decoder import Decoder
from fabe_ds.providers.transformers.drafts import LONGEST, Copies, Drafts, StepCosts
from fabe_ds.providers.transformers.hf import HFProvider
from tests.unit.providers.test_decode import KINDS as OTHER_KINDS
from tests.unit.providers.test_decode import WORDS, prompts, requests, saved, texts_of
from tests.unit.providers.test_forms import SCHEMA


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 20))
def test_a_draft_follows_the_longest_match(tokens, count):
    copies = Copies(tokens)
    place = copies.find()
    lengths = {}
    for other in range(1, len(tokens)):
        length = 0
        while length < min(other, 16) and tokens[other - 1 - length] == tokens[-1 - length]:
            length += 1
        lengths[other] = length
    longest = max(lengths.values(), default=0)
    if longest == 0:
        assert place == 0
        return
    assert copies.matched == longest
    assert place == max(other for other, length in lengths.items() if length == longest)
    endless = [*tokens[place:], *[None] * count]
    for at in range(len(tokens) - place, len(endless)):  # past the end, the copy copies itself
        endless[at] = endless[at - (len(tokens) - place)]
    assert copies.copied(place, count) == endless[:count]


def test_a_number_is_drafted_wherever_something_matches():
    drafts = Drafts(3)
    row = Copies([1, 2, 3, 4, 5, 1])
    assert drafts.draft([row, Copies([7, 8])], [10, 10]) == [[2, 3, 4], []]
    assert drafts.draft([row, row], [2, 0]) == [[2, 3], []]
    assert Drafts("off").draft([row], [10]) == [[]]


def drafted(drafts: Drafts, row: Copies) -> int:
    return len(drafts.draft([row], [100])[0])


def test_longer_drafts_where_more_matches_and_where_a_position_costs_less():
    short, long = Copies([*range(40), 5]), Copies([*range(40), *range(10)])
    lengths = {}
    for least in (0.02, 0.2, 0.5, 0.95):
        drafts = Drafts()
        drafts.costs.least_chance = least
        lengths[least] = drafted(drafts, short), drafted(drafts, long)
    assert all(one <= two for one, two in lengths.values())
    for place in (0, 1):
        by_cost = [pair[place] for pair in lengths.values()]
        assert by_cost == sorted(by_cost, reverse=True)
    assert lengths[0.02] == (LONGEST, LONGEST)
    assert lengths[0.95] == (0, 0)
    assert 0 == lengths[0.5][0] < lengths[0.5][1]


def test_a_row_that_is_not_copied_is_drafted_less():
    drafts = Drafts()
    tokens = [*range(40), *range(10)]
    bad, good, fresh = Copies(tokens), Copies(tokens), Copies(tokens)
    for _ in range(8):
        for row, right in ((bad, 0), (good, 16)):
            drafts.draft([row], [100])
            drafts.learn(row, 16, right)
    assert drafted(drafts, bad) < drafted(drafts, fresh) <= drafted(drafts, good)


def test_what_matches_are_worth_is_learned_from_all_rows():
    """Where unchanged words are the exception, as in a translation, drafts end."""
    drafts = Drafts()
    row = Copies([*range(40), 5])
    drafts.costs.least_chance = 0.2
    assert drafted(drafts, row)
    for _ in range(100):
        other = Copies([*range(40), 5])
        drafts.draft([other], [100])
        drafts.learn(other, 1, 0)
    assert not drafted(drafts, row)


def steps(costs: StepCosts, count: int, plain: Any, wide: Any, kept: float = 0.4) -> list[bool]:
    """Which of so many steps of 32 to 64 rows had drafts: as many as rows, `kept` of them right.
    `plain`, `wide`: fixed seconds of a step and those of each position."""
    pick, chosen = random.Random(0), []
    for _ in range(count):
        rows = pick.randint(32, 64)
        drafting = costs.pays(rows)
        fixed, each = wide if drafting else plain
        width = rows * (1 + drafting)
        seconds = (fixed + each * width) * pick.uniform(0.95, 1.05)
        costs.took(rows, width, int(rows * (1 + kept * drafting)), seconds)
        chosen.append(drafting)
    return chosen


@pytest.mark.parametrize(
    ("plain", "wide", "drafting"),
    [
        ((0.05, 0.0001), (0.05, 0.0001), True),  # a GPU: a step costs what it costs
        ((0.001, 0.002), (0.001, 0.002), False),  # each position costs the same
        ((0.05, 0.0001), (0.10, 0.0001), False),  # what drafts cost by themselves
    ],
)
def test_a_step_has_drafts_where_they_pay(plain, wide, drafting):
    costs = StepCosts()
    chosen = steps(costs, 200, plain, wide)
    late = chosen[20:]
    assert late.count(drafting) > 0.9 * len(late)
    assert late.count(not drafting) > 0.02 * len(late)  # what seems worse is tried still


def test_where_drafts_promise_little_they_are_tried_rarely():
    costs = StepCosts(promising=8)
    assert costs.pays(8)
    assert steps(costs, 60, (0.05, 0.002), (0.25, 0.006)).count(True) <= 4
    assert steps(costs, 500, (0.05, 0.0001), (0.05, 0.0001))[300:].count(False) < 20


def test_what_pays_is_found_out_anew_where_it_changes():
    costs = StepCosts()
    steps(costs, 100, (0.05, 0.0001), (0.05, 0.0001))
    assert steps(costs, 400, (0.05, 0.0001), (0.20, 0.0001))[200:].count(True) < 20


def test_many_rows_after_a_few_are_measured_anew():
    """A window's last rows take short steps: what they give says little of 64."""
    costs = StepCosts()
    for step in range(60):
        costs.took(2, 2 + step % 2 * 4, 2 + step % 2 * 2, 0.05)
    assert costs.pays(2)
    chosen = steps(costs, 60, (0.05, 0.002), (0.25, 0.006))
    assert chosen[20:].count(True) <= 4


@pytest.mark.parametrize(("fixed", "each", "share"), [(0.05, 0.0002, 0.25), (0.001, 0.002, 0.95)])
def test_a_token_is_worth_a_place_that_costs_less(fixed, each, share):
    costs = StepCosts()
    pick = random.Random(0)
    for _ in range(60):
        width = pick.randint(40, 120)
        costs.took(32, width, width // 2, (fixed + each * width) * pick.uniform(0.97, 1.03))
    assert costs.least_chance == pytest.approx(share / 2, abs=0.12)


def answers_with(path, speculate, asked, rows=6, **options):
    model = HFProvider(
        Endpoint(str(path), dtype="float32", batch_size=rows, speculate=speculate, **options)
    )
    answers = model.complete(asked)
    assert model.generation.own_loop
    return answers, model.generation.work


SAMPLINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.7, "seed": 4},
    "sampled, top_p": {"temperature": 1.3, "top_p": 0.8, "seed": 4},
    "stop string": {"stop": ("e",)},
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("speculate", [1, 2, 7, 64, "auto"])
def test_drafts_change_no_token(talkative, speculate, sampling):
    """a sampled token is drawn as without drafts, by its row's own generator."""
    asked = requests(prompts(20), 40, **SAMPLINGS[sampling])
    plain, work = answers_with(talkative, "off", asked)
    assert work.drafted == 0
    found, faster = answers_with(talkative, speculate, asked)
    assert found == plain
    assert faster.drafted > 0
    if sampling == "greedy" and speculate != "auto":
        assert faster.row_steps < work.row_steps
        assert faster.new == work.new


@pytest.mark.parametrize("speculate", ["off", 3])
def test_as_on_a_gpu_each_row_has_the_shared_beginning(talkative, monkeypatch, speculate):
    """where attention is one call over all of a row's tokens."""
    asked = requests(prompts(20), 40)
    plain, work = answers_with(talkative, "off", asked)
    monkeypatch.setattr(Decoder, "_on_cpu", False)
    found, faster = answers_with(talkative, speculate, asked)
    assert found == plain
    assert faster.prefix == work.prefix > 0
    short = requests(["fox", "the quick brown fox"], 20)  # nothing is shared with one alone
    assert [answers_with(talkative, speculate, [one])[0][0] for one in short] == answers_with(
        talkative, "off", short
    )[0]


@pytest.mark.parametrize("kind", [kind for kind, (_, _, ours) in OTHER_KINDS.items() if ours])
def test_other_architectures(kind, tiny, tmp_path):
    model_class, config, _ = OTHER_KINDS[kind]
    path = saved(model_class, config, tiny, tmp_path)
    asked = requests(prompts(12, 8), 20)
    plain, work = answers_with(path, "off", asked)
    found, faster = answers_with(path, 5, asked)
    assert found == plain
    assert 0 < faster.row_steps < work.row_steps


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 3}])
def test_limits_of_repetition_hold_within_a_draft(talkative, params):
    asked = requests(prompts(12), 30)
    plain, _ = answers_with(talkative, "off", asked, params=params)
    found, work = answers_with(talkative, 4, asked, params=params)
    assert found == plain
    assert work.drafted > 0


def test_a_schema_holds_within_a_draft(tiny):
    from fabe_ds.request import AnswerForm

    asked = [
        Request(text, f"Say {text}", "", Sampling(60), form=AnswerForm(SCHEMA))
        for text in prompts(8)
    ]
    plain, _ = answers_with(tiny, "off", asked)
    found, work = answers_with(tiny, 4, asked)
    assert found == plain
    assert any(isinstance(answer, Completion) for answer in found)
    assert work.drafted > 0


@pytest.mark.slow
def test_a_real_model_copies_what_it_rewrites(smollm_folder):
    text = "def add(first, second):\n    return first + second\n"
    asked = [
        Request(text, f"Repeat this code exactly:\n{text.replace('add', word)}", "", Sampling(40))
        for word in WORDS
    ]
    plain, work = answers_with(smollm_folder, "off", asked, 8)
    found, faster = answers_with(smollm_folder, 8, asked, 8)
    assert texts_of(found) == texts_of(plain)
    assert faster.row_steps < 0.8 * work.row_steps


@pytest.mark.parametrize(("given_", "code"), [("off", 0), ("4", 0), ("often", 2), ("0", 2)])
def test_the_flag(box, tiny, given_, code):
    box.lines("data.jsonl", [{"code": text} for text in prompts(3)])
    command = ["run", "--input", "data.jsonl", "--instruction", "Say", "--provider", "hf"]
    command += ["--model", tiny, "--on-truncated", "keep", "--max-new-tokens", 6]
    ended = box.fabe(*command, "--speculate", given_)
    assert ended.code == code, ended
    if code:
        assert "--speculate" in ended.err
        assert ended.err.strip().endswith(", or 'auto' or 'off'")
        assert len(ended.err.strip().splitlines()) == 1
        return
    box.write("fabe.yaml", "speculate: off\n")
    again = box.fabe(*command, "--config", "fabe.yaml")
    assert again.code == 0, again
    assert "3 from cache" in again.out
