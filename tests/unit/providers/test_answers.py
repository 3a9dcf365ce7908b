"""What local models with their own marks write, and what becomes of it: tiny models of known
answers, asked through the command line."""

from __future__ import annotations

import json
import shutil

import pytest

from fabe_ds.errors import RecordFailed
from tests.support.models import CHAT, scripted_model, tiny_model

THINKS = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
HARMONY = (
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    "{# <|channel|> <|return|> #}"
)
CHANNELS = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>"]
GEMMA = (
    "{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def ask(box, model, *more, texts=("old",), code=0):
    box.lines("data.jsonl", [{"code": text} for text in texts])
    ended = box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "Do it", "--provider", "hf"),
        *("--model", model, "--dtype", "float32", "--max-new-tokens", 24, *more),
    )
    assert ended.code == code, ended
    if code not in (0, 1):
        return ended
    return [record["code"] for record in box.read("outputs/data.jsonl")]


# name: what the model writes, the special tokens, the chat template, and the value
MARKED = {
    "think tags that are special": (
        ["<think>", "hmw", "</think>", "x=1", "<|im_end|>"],
        ["<think>", "</think>"],
        CHAT,
        "x=1",
    ),
    "Magistral": (
        ["[THINK]", "hmw", "[/THINK]", "x=1", "<|im_end|>"],
        ["[THINK]", "[/THINK]"],
        CHAT,
        "x=1",
    ),
    "Apertus": (
        ["<|inner_prefix|>", "hmw", "<|inner_suffix|>", "x=1", "<|im_end|>"],
        ["<|inner_prefix|>", "<|inner_suffix|>"],
        CHAT,
        "x=1",
    ),
    "Command A": (
        ["<|START_THINKING|>", "hmw", "<|END_THINKING|>", "x=1", "<|im_end|>"],
        ["<|START_THINKING|>", "<|END_THINKING|>"],
        CHAT,
        "x=1",
    ),
    "Gemma 4": (
        ["<|channel>", "thouqv", "<channel|>", "x=1", "<turn|>"],
        ["<|channel>", "<channel|>", "<|turn>", "<turn|>"],
        GEMMA,
        "x=1",
    ),
    "harmony, reasoning first": (
        ["<|channel|>", "analysi", "<|message|>", "hmwk", "<|end|>"],
        CHANNELS,
        HARMONY,
        None,
    ),
    "harmony, final at once": (
        ["<|channel|>", "final", "<|message|>", "x=1", "<|return|>"],
        CHANNELS,
        HARMONY,
        "x=1",
    ),
    "a closing mark alone": (
        ["hmw", "[/THINK]", "x=1", "<|im_end|>"],
        ["[THINK]", "[/THINK]"],
        CHAT,
        "x=1",
    ),
    "opened by the template, closed by a special token": (
        ["hmw", "</think>", "x=1", "<|im_end|>"],
        ["<think>", "</think>"],
        THINKS,
        "x=1",
    ),
    "opened by the template, closed in plain text": (
        ["hmw", "</", "t", "<|im_end|>"],
        [],
        THINKS,
        None,
    ),
    "no marks at all": (["x=1", "<|im_end|>"], ["[THINK]", "[/THINK]"], CHAT, "x=1"),
}


@pytest.mark.parametrize("name", MARKED)
def test_reasoning_is_taken_out_by_ids(box, name):
    """None where nothing but reasoning came, which fails the record."""
    written, specials, template, value = MARKED[name]
    model = scripted_model(box.path / "m", written, template=template, specials=specials)
    found = ask(box, model, code=0 if value else 1)
    assert found == [value or "old"]
    if value is None:
        (failed,) = box.read("outputs.failures.jsonl")
        assert failed["failure"] == "empty" or "still thinking" in failed["message"]


def test_a_record_that_holds_the_mark_itself_is_answered_all_the_same(box):
    written, specials, template, value = MARKED["think tags that are special"]
    model = scripted_model(box.path / "m", written, template=template, specials=specials)
    assert ask(box, model, texts=("a <think> tag",)) == [value]


@pytest.mark.parametrize("keep", [True, False])
def test_thoughts_that_were_cut_are_never_the_value(box, keep):
    """and the message says that the model was thinking still."""
    model = scripted_model(box.path / "m", ["abcdefghijklmnopqrstuv"], template=THINKS)
    more = ["--on-truncated", "keep"] if keep else []
    assert ask(box, model, "--max-new-tokens", 8, *more, code=1) == ["old"]
    (failed,) = box.read("outputs.failures.jsonl")
    assert failed["failure"] == ("empty" if keep else "truncated")
    assert keep or "still thinking" in failed["message"]


def test_the_reasoning_is_kept_with_the_answer(box):
    import sqlite3

    written, specials, template, _ = MARKED["Magistral"]
    ask(box, scripted_model(box.path / "m", written, template=template, specials=specials))
    with sqlite3.connect(box.path / ".cache" / "records.sqlite") as cache:
        assert cache.execute("SELECT text, reasoning FROM completions").fetchall() == [
            ("x=1", "hmw")
        ]


# name: the end tokens of generation_config.json, the text that ends the answer, the flags
ENDS = {
    "the tokenizer's, not the model's": (0, "<|im_end|>", []),
    "both": ([0, 2], "<|im_end|>", []),
    "the template's alone": (0, "<|eot_id|>", []),
    "a stop string that is a special token": (0, "[STOP]", ["--stop", "[STOP]"]),
    "generate's, by the same": (0, "[STOP]", ["--stop", "[STOP]", "--attn-implementation", "sdpa"]),
    "generate's, the tokenizer's": (0, "<|im_end|>", ["--attn-implementation", "sdpa"]),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_end_that_is_known_ends_an_answer(box, name):
    """folders name one end in generation_config.json and another in the tokenizer."""
    ends, mark, flags = ENDS[name]
    template = CHAT.replace("<|im_end|>", mark) if mark == "<|eot_id|>" else CHAT
    written = ["x=1", mark, "user", "go"]
    model = scripted_model(
        box.path / "m", written, template=template, specials=["[STOP]", "<|eot_id|>"], ends=ends
    )
    assert ask(box, model, *flags) == ["x=1"]
    assert box.report()["completion_tokens"] == 4


def test_a_stop_string_of_an_added_token_may_be_written_in_ordinary_ones(box):
    model = scripted_model(box.path / "m", ["x=1", "[S", "TOP]", "go"], specials=["[STOP]"], ends=0)
    assert ask(box, model, "--stop", "[STOP]") == ["x=1"]


def test_stop_strings_of_the_models_own_hold(box):
    model = scripted_model(box.path / "m", ["x=1", "END", "go"], ends=0, stop_strings=["END"])
    assert ask(box, model) == ["x=1"]


@pytest.mark.parametrize(
    ("written", "text", "value"),
    [
        (["a=", "<think>", "bc", "<|im_end|>"], 'x = "<think>"', "a=<think>bc"),
        (["a=", "</think>", "bc", "<|im_end|>"], "x = </think>", "a=</think>bc"),
        (
            ["a=", "<think>", "bc", "</think>", "d", "<|im_end|>"],
            "x <think>",
            "a=<think>bc</think>d",
        ),
        (["a=", "<think>", "bc", "<|im_end|>"], "none", "a=<think>bc"),
        (["a=", "<think>", "bc", "</think>", "d", "<|im_end|>"], "none", "a=d"),
    ],
)
def test_a_mark_inside_an_ordinary_answer_cuts_nothing(box, written, text, value):
    model = scripted_model(box.path / "m", written, specials=["<think>", "</think>"])
    assert ask(box, model, texts=(text,)) == [value]


def test_a_stop_string_may_span_special_tokens(box):
    written = ["x=1", "[SEP]", "user", "go"]
    model = scripted_model(box.path / "m", written, specials=["[SEP]"], ends=0)
    assert ask(box, model, "--stop", "[SEP]us") == ["x=1"]


def test_a_character_that_is_cut_is_left_out(box):
    """the answer is cut after the first two of three bytes."""
    tokens = "é€".encode()
    assert len(tokens) == 5
    model = scripted_model(box.path / "m", ["aé€b"])
    assert ask(box, model, "--max-new-tokens", 5, "--on-truncated", "keep") == ["aé"]


# What the model's folder asks for (L8), and what the dry run says of it.

HELD = {
    "suppress_tokens": {"suppress_tokens": [300]},
    "bad_words_ids": {"bad_words_ids": [[300]]},
    "min_new_tokens": {"min_new_tokens": 6},
    "min_length": {"min_length": 16},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "sequence_bias": {"sequence_bias": [[[300], -5.0]]},
}


@pytest.mark.parametrize("name", HELD)
def test_the_models_own_settings_hold(box, name, tiny):
    """The tokens that transformers' generate gives with them, which without them are others."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    texts = ["the fox", "a brown fox is quick", "it is", "and that is it of the user"]
    end = 2

    def made(**given):
        found = []
        for text in texts:
            settings = dict(given)
            ids = torch.tensor([tokenizer(f"Do it\n\n{text}")["input_ids"]])
            if least := settings.get("min_length"):
                settings = {"min_new_tokens": least - ids.shape[1]}
            config = GenerationConfig(
                eos_token_id=[2, end], pad_token_id=0, max_new_tokens=8, **settings
            )
            new = model.generate(ids, generation_config=config)[0, ids.shape[1] :]
            found.append(new.tolist())
        return found

    end = made()[0][3]  # so that some end early, if they may
    plain = made()
    settings = HELD[name]
    if "300" in str(settings):  # a token that is written, so that keeping it out shows
        common = next(token for row in plain for token in row if token not in (2, end))
        settings = json.loads(json.dumps(settings).replace("300", str(common)))
    expected = made(**settings)
    assert expected != plain
    folder = shutil.copytree(tiny, box.path / "m")
    model.generation_config = GenerationConfig(eos_token_id=[2, end], **settings)
    model.save_pretrained(folder)
    flags = ("--no-use-chat-template", "--system-prompt", "", "--max-new-tokens", 8)
    more = (*flags, "--on-truncated", "keep", "--no-strip-fences", "--validate", "regex:(?s).*")
    ask(box, folder, *more, texts=texts, code=ask_code(expected, tokenizer, end))
    import sqlite3

    with sqlite3.connect(box.path / ".cache" / "records.sqlite") as cache:
        answers = {text for (text,) in cache.execute("SELECT text FROM completions")}
    rows = [row[: row.index(end)] if end in row else row for row in expected]
    assert answers == {tokenizer.decode(row, skip_special_tokens=True) for row in rows}
    shown = box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "Do it", "--provider", "hf"),
        *("--model", folder, "--dry-run"),
    )
    assert name in shown.out


def ask_code(rows, tokenizer, end) -> int:
    rows = [row[: row.index(end)] if end in row else row for row in rows]
    blank = any(not tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows)
    return 1 if blank else 0


def test_the_dry_run_lists_what_holds_and_nothing_else(box):
    model = scripted_model(
        box.path / "m", ["x=1", "<|im_end|>"], num_beams=4, repetition_penalty=1.1
    )
    box.lines("data.jsonl", [{"code": "x"}])
    shown = box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "Do", "--provider", "hf", "--dry-run"),
        *("--model", model),
    )
    assert "'repetition_penalty': 1.1" in shown.out
    assert "'num_beams'" not in shown.out
    assert "num_beams is not used" in shown.out


def test_do_sample_alone_takes_the_models_temperature(box):
    model = scripted_model(box.path / "m", ["x=1", "<|im_end|>"], temperature=0.25, do_sample=True)
    box.lines("data.jsonl", [{"code": "x"}])
    dry = ("run", "--input", "data.jsonl", "--instruction", "Do", "--provider", "hf", "--dry-run")
    assert "'temperature': 0.25" in box.fabe(*dry, "--model", model, "--do-sample").out
    assert "'temperature': 0.7" in box.fabe(*dry, "--model", model, "--temperature", 0.7).out
    assert "temperature" not in box.fabe(*dry, "--model", model).out


# Prompts.


def test_a_value_is_cut_and_the_instruction_is_not(box, tiny_folder_of_64):
    """truncate-left took the instruction first."""
    from fabe_ds.providers import Endpoint, Request, Sampling
    from fabe_ds.providers.transformers.hf import HFProvider

    model = HFProvider(
        Endpoint(str(tiny_folder_of_64), dtype="float32", on_long_prompt="truncate-left")
    )
    text = "".join(map(chr, [*range(33, 127), *range(0xA1, 0xD0)]))
    asked = Request(text, f"Keep this\n\n{text}", None, Sampling(6))
    ids = model._fitting(asked)
    assert len(ids) <= 128 - 6
    shown = model.tokenizer.decode(ids)
    assert "Keep this" in shown
    assert text[-20:] in shown
    assert text[:5] not in shown
    short = Request("abc", "Keep this\n\nabc", None, Sampling(6))
    assert "cut" not in model.body(short)
    assert model.body(asked)["cut"] == "value"


@pytest.fixture
def tiny_folder_of_64(tmp_path):
    return tiny_model(tmp_path / "short", longest=128)


def test_more_new_tokens_than_the_context_is_one_line(box, tiny):
    ended = ask(box, tiny, "--max-new-tokens", 5000, code=2)
    assert "--max-new-tokens 5000: the context of" in ended.err


def test_a_value_that_stands_twice_is_cut_in_both_places(tiny_folder_of_64):
    from fabe_ds.providers import Endpoint, Request, Sampling
    from fabe_ds.providers.transformers.hf import HFProvider

    model = HFProvider(
        Endpoint(str(tiny_folder_of_64), dtype="float32", on_long_prompt="truncate-left")
    )
    text = "".join(map(chr, [*range(33, 127), *range(0xA1, 0xD0)]))
    asked = Request(text, f"First {text} then {text} end", None, Sampling(6), False)
    ids = model._fitting(asked)
    assert 100 < len(ids) <= 128 - 6
    shown = model.tokenizer.decode(ids)
    assert shown.startswith("First ")
    assert shown.count(text[-20:]) == 2


def test_a_plain_record_that_ends_in_a_mark_is_answered(box):
    """Without a template nothing has opened reasoning."""
    model = scripted_model(box.path / "m", ["x=1", "<|im_end|>"], template=None)
    assert ask(box, model, texts=("what is <think>",)) == ["x=1"]


PLAIN = {
    "the record's alone": ("Say", "go <|im_end|> on", 0),
    "the instruction's alone": ("<|im_start|>Say", "go on", 1),
    "both": ("<|im_start|>Say", "go <|im_end|> <|im_start|> on", 1),
}


@pytest.mark.parametrize("name", PLAIN)
def test_records_never_become_control_tokens_of_plain_prompts(tiny, name):
    """L10."""
    from fabe_ds.providers import Endpoint, Request, Sampling
    from fabe_ds.providers.transformers.hf import HFProvider

    instruction, text, count = PLAIN[name]
    model = HFProvider(Endpoint(str(tiny), dtype="float32"))
    asked = Request(text, f"{instruction}\n\n{text}", None, Sampling(4), chat=False)
    ids = model.prompt_ids(asked)
    assert model.tokenizer.decode(ids) == f"{instruction}\n\n{text}"
    assert sum(number in (1, 2) for number in ids) == count


@pytest.mark.parametrize(
    ("instruction", "count"),
    [
        ("Title {{ record.title }}: {{ code }}", 0),
        ("{{ code | trim }} of it", 0),
        ("<|im_start|> {{ code | trim }}", None),
    ],
)
def test_no_field_of_a_record_becomes_a_control_token(box, tiny, instruction, count):
    """Whatever the template makes of it; where it cannot be told apart, the record fails."""
    from fabe_ds.formats.base import Row
    from fabe_ds.providers import Endpoint
    from fabe_ds.providers.transformers.hf import HFProvider
    from fabe_ds.transform import Transform, TransformConfig

    transform = Transform(
        TransformConfig(
            instruction=instruction,
            provider="hf",
            model=str(tiny),
            use_chat_template=False,
            system_prompt="",
        )
    )
    text = " go <|im_start|> on\n"
    row = Row((text,), {"title": "A <|im_end|> B", "code": text})
    (asked,) = transform.items([row])
    provider = transform.provider
    if count is None:
        with pytest.raises(RecordFailed, match="cannot be told apart"):
            provider.prompt_ids(asked)
    else:
        ids = provider.prompt_ids(asked)
        assert sum(number in (1, 2) for number in ids) == count
        assert "control" in provider.body(asked)
    assert isinstance(provider, HFProvider)
    assert Endpoint("m").instruction is None


def test_a_missing_chat_template_is_said_before_the_first_record(box):
    """D4."""
    model = scripted_model(box.path / "m", ["x=1", "<|im_end|>"], template=None)
    box.lines("data.jsonl", [{"code": "x"}])
    command = ["run", "--input", "data.jsonl", "--instruction", "Do", "--provider", "hf"]
    ended = box.fabe(*command, "--model", model, "--dtype", "float32")
    assert ended.code == 0
    assert "no chat template" in ended.err
    assert any("no chat template" in note for note in box.report()["notes"])
    again = box.fabe(*command, "--model", model, "--dtype", "float32", "--no-use-chat-template")
    assert "no chat template" not in again.err
    template = box.write("chat.jinja", CHAT)
    shown = box.fabe(*command, "--model", model, "--chat-template", template, "--dry-run")
    assert "<|im_start|>user\nDo" in shown.out


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m['role'", "chat template"),
        ("{{ messages[0].content.nothing.there }}", "chat template"),
        ("{{ raise_exception('not for you') }}", "not for you"),
        ("{% if add_generation_prompt %}assistant{% endif %}", "leaves out what it is asked"),
    ],
)
def test_a_broken_chat_template_stops_the_run(box, template, said):
    model = scripted_model(box.path / "m", ["x=1", "<|im_end|>"], template=template)
    box.lines("data.jsonl", [{"code": "x"}] * 30)
    command = ["run", "--input", "data.jsonl", "--instruction", "Do", "--provider", "hf"]
    ended = box.fabe(*command, "--model", model, "--dtype", "float32")
    assert ended.code == 1
    assert said in ended.err
    assert "--chat-template" in ended.err
    assert not (box.path / "outputs").exists()


def test_a_template_that_takes_lists_of_parts_gets_them(box):
    """as those of models that see images."""
    parts = CHAT.replace(
        "{{ m['content'] }}", "{% for part in m['content'] %}{{ part.text }}{% endfor %}"
    )
    model = scripted_model(box.path / "m", ["x=1", "<|im_end|>"], template=parts)
    box.lines("data.jsonl", [{"code": "y = 2"}])
    dry = ("run", "--input", "data.jsonl", "--instruction", "Do", "--provider", "hf", "--dry-run")
    assert "y = 2<|im_end|>" in box.fabe(*dry, "--model", model).out


def test_thinking_is_switched_by_the_templates_own_variable(box):
    """L15."""
    switched = CHAT.replace(
        "assistant\n{% endif %}",
        "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}",
    )
    model = scripted_model(box.path / "m", ["x=1", "<|im_end|>"], template=switched)
    box.lines("data.jsonl", [{"code": "y"}])
    dry = ("run", "--input", "data.jsonl", "--instruction", "Do", "--provider", "hf", "--dry-run")
    assert "<think></think>" not in box.fabe(*dry, "--model", model, "--thinking", "on").out
    assert "<think></think>" in box.fabe(*dry, "--model", model, "--thinking", "off").out
    none = scripted_model(box.path / "n", ["x=1", "<|im_end|>"])
    ended = box.fabe(*dry, "--model", none, "--thinking", "off")
    assert ended.code == 2
    assert "has no switch" in ended.err
