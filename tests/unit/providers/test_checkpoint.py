"""What is found out about a model's folder before and while it is loaded: each fault is one line,
and nothing that was not in the checkpoint ever answers."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fabe_ds.errors import FabeError
from fabe_ds.providers import Endpoint, Request, Requirement, Sampling
from fabe_ds.providers.transformers.checkpoint import at, wanted_files
from fabe_ds.providers.transformers.digests import Digests
from fabe_ds.providers.transformers.hf import HFProvider
from fabe_ds.providers.transformers.threads import granted
from tests.support.hub import Hub, Repo
from tests.support.models import CHAT, scripted_model, tiny_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def provider(path, **options) -> HFProvider:
    return HFProvider(Endpoint(str(path), **{"dtype": "float32", **options}))


def run(box, model, *more, provider="hf", **environment):
    box.lines("data.jsonl", [{"code": "x = 1"}])
    return box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "Do", "--provider", provider),
        *("--model", model, "--dtype", "float32", "--max-new-tokens", 8, *more),
        **environment,
    )


def refused(box, model, *more, provider="hf") -> str:
    """The one line that a run ends with."""
    ended = run(box, model, *more, provider=provider)
    assert ended.code in (1, 2), ended
    assert not (box.path / "outputs").exists()
    lines = [line for line in ended.err.splitlines() if "--model" in line or "error" in line]
    assert len(lines) == 1, ended.err
    return lines[0]


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def tensors(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})


def settings(folder: Path, name="config.json", **values) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# tensors that are missing, left over, of another shape.

TENSORS = {
    "no head": (
        lambda w: {k: v for k, v in w.items() if "lm_head" not in k},
        "lacks 1 of the model's tensors (lm_head.weight)",
    ),
    "another head": (
        lambda w: {k.replace("lm_head", "score"): v for k, v in w.items()},
        "lacks 1 of the model's tensors (lm_head.weight)",
    ),
    "wrapped names": (
        lambda w: {f"base_model.model.{k}": v for k, v in w.items()},
        "as an adapter leaves them",
    ),
    "a layer is missing": (
        lambda w: {k: v for k, v in w.items() if "layers.1." not in k},
        "lacks 9 of the model's tensors (model.layers.1.",
    ),
    "a layer too many": (
        lambda w: {**w, **{k.replace("s.1.", "s.2."): v.clone() for k, v in w.items()}},
        "9 tensors of the checkpoint have no place",
    ),
    "another shape": (
        lambda w: {k: v[:-1].clone() if "lm_head" in k else v for k, v in w.items()},
        "lm_head.weight",
    ),
    "a bias that the architecture lacks": (
        lambda w: {**w, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
        "1 tensors of the checkpoint have no place",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(box, folder, name):
    change, said = TENSORS[name]
    tensors(folder, change)
    assert said in refused(box, folder)


def test_tensors_of_no_use_are_no_fault(box, folder):
    more = {
        "vision_tower.a": torch.zeros(2),
        "v_head.summary.weight": torch.zeros(1, 32),
        "model.decoder.version": torch.zeros(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    tensors(folder, lambda weights: {**weights, **more})
    assert run(box, folder, "--on-truncated", "keep").code == 0


# files that are pointers, cut off, empty, or something else.


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


FILES = {
    "a pointer": (lambda f: f.write_text(POINTER), "git-lfs pointer", "git lfs pull"),
    "cut off": (cut, "cut off", "download it again"),
    "cut in its header": (lambda f: f.write_bytes(f.read_bytes()[:20]), "cut off", "download"),
    "empty": (lambda f: f.write_bytes(b""), "an empty file", "download"),
    "something else": (lambda f: f.write_bytes(b"\0" * 5000), ".safetensors file", "download"),
    "a page": (lambda f: f.write_text("<html>Not found</html>"), ".safetensors file", "download"),
}


@pytest.mark.parametrize("name", FILES)
def test_weights_that_are_not_whole_are_one_line(box, folder, name):
    spoil, said, advice = FILES[name]
    spoil(folder / "model.safetensors")
    line = refused(box, folder)
    assert "model.safetensors" in line
    assert said in line
    assert advice in line


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("spoil", ["a pointer", "empty", "cut"])
def test_settings_that_are_not_whole_are_one_line(box, folder, file, spoil):
    path = folder / file
    if spoil == "cut":
        path.write_text(path.read_text()[:-20])
    else:
        FILES[spoil][0](path)
    assert file in refused(box, folder)


ODD = {
    "a template file without one": ("chat_template.json", "{}", 0),
    "added tokens that are none": ("tokenizer.json", '{"added_tokens": [1]}', 1),
    "added tokens of no number": ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', 1),
    "an index of nothing": ("model.safetensors.index.json", "{}", 1),
}


@pytest.mark.parametrize("name", ODD)
def test_settings_of_another_shape_are_one_line(box, folder, name):
    """JSON, but not what it should be."""
    file, text, code = ODD[name]
    if "index" in file:
        (folder / "model.safetensors").unlink()
    if file == "chat_template.json":
        (folder / "chat_template.jinja").unlink()
    (folder / file).write_text(text)
    if code:
        assert "--model" in refused(box, folder)
    else:
        assert run(box, folder, "--on-truncated", "keep").code == code


def shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    half = len(names) // 2
    places = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_shards_are_loaded_and_a_missing_one_is_said(box, folder):
    shards(folder)
    assert run(box, folder, "--on-truncated", "keep", "--output", "whole").code == 0
    (folder / "model-00002-of-00002.safetensors").unlink()
    line = refused(box, folder)
    assert "1 of 2 files of weights are not there (model-00002-of-00002.safetensors)" in line
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "other")
    (folder / "model.safetensors.index.json").unlink()
    assert "no index of them" in refused(box, folder)


def test_pytorch_weights_are_loaded_and_a_cut_file_is_said(box, folder):
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert run(box, folder, "--on-truncated", "keep", "--output", "whole").code == 0
    cut(folder / "pytorch_model.bin")
    assert "pytorch_model.bin: cut off" in refused(box, folder)


EMPTY = {
    "nothing at all": ([], "no model folder"),
    "Meta's own layout": (["consolidated.00.pth", "params.json"], "Meta's own layout"),
    "checkpoints": (["checkpoint-500/", "checkpoint-900/"], "give one of them (checkpoint-500"),
    "settings alone": (["config.json"], "no weights"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_folder_without_a_model_says_what_it_is(box, tmp_path, name):
    files, said = EMPTY[name]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in files:
        if file.endswith("/"):
            (folder / file).mkdir()
        else:
            (folder / file).write_text('{"model_type": "llama"}')
    assert said in refused(box, folder)


# what is no causal language model.

KINDS = {
    "LlamaForSequenceClassification": "a classifier",
    "BertForMaskedLM": "a model that fills gaps",
    "LlamaForTokenClassification": "a classifier of tokens",
}


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_are_refused_by_name(box, folder, name):
    settings(folder, architectures=[name])
    assert f"{KINDS[name]} ({name})" in refused(box, folder)


@pytest.mark.parametrize("kind", ["vit", "clip", "whisper", "t5"])
def test_models_of_other_things_are_refused(box, folder, kind):
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    line = refused(box, folder)
    assert "causal language model" in line or "encoder-decoder" in line


def test_code_of_the_models_own_names_the_flag(box, folder):
    settings(
        folder, model_type="ours", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
    )
    assert "--trust-remote-code" in refused(box, folder)


def test_a_special_token_beyond_the_embedding_that_nothing_writes_is_no_fault(box, folder):
    """As Gemma 3's <image_soft_token> in the models without eyes."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(folder)
    box.lines("data.jsonl", [{"code": "x <image_soft_token> y"}])
    assert run(box, folder, "--on-truncated", "keep").code == 0


def test_a_tokenizer_that_lowers_letters_is_no_fault(box, folder):
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(folder)
    assert run(box, folder, "--on-truncated", "keep").code == 0


def test_a_home_that_is_not_there_is_one_line(box):
    assert "no such model" in refused(box, "~nobody-of-that-name/model")


def test_tokens_beyond_the_embedding_are_refused_at_load(box, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(9)])
    tokenizer.save_pretrained(folder)
    assert "9 tokens beyond the model's 290 embeddings" in refused(box, folder)


def test_a_pad_token_beyond_the_embedding_is_no_fault(box, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert run(box, folder, "--on-truncated", "keep").code == 0


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_scores_that_are_not_numbers_stop_the_run(box, folder, attention):
    tensors(
        folder,
        lambda w: {k: v.fill_(float("nan")) if "norm.weight" in k else v for k, v in w.items()},
    )
    ended = run(box, folder, "--attn-implementation", attention)
    assert ended.code == 1
    assert "scores are not numbers; try --dtype float32" in ended.err


def test_a_row_whose_scores_are_not_numbers_fails_alone(box):
    """One token of the second record, that no trial of the model takes, has no numbers."""
    model = scripted_model(box.path / "m", ["x=1", "<|im_end|>"])
    weights = load_file(model / "model.safetensors")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tried = {(7 * i * i + 13 * i + 3) % 320 for i in range(64)}
    bad, sign = next(
        (number, chr(code))
        for code in range(33, 127)
        if (number := tokenizer(chr(code))["input_ids"][0]) not in tried
    )
    weights["model.embed_tokens.weight"][bad] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    box.lines("data.jsonl", [{"code": text} for text in ("a", f"b {sign} b", "c")])
    ended = box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "Do", "--provider", "hf"),
        *("--model", model, "--dtype", "float32", "--batch-size", 2),
    )
    assert ended.code == 1
    assert [r["code"] for r in box.read("outputs/data.jsonl")] == ["x=1", f"b {sign} b", "x=1"]
    (failed,) = box.read("outputs.failures.jsonl")
    assert failed["failure"] == "scores"


# adapters.


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """A LoRA adapter of the tiny model, that changes what it writes."""
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], lora_alpha=8)
    config.base_model_name_or_path = str(tiny)
    with warnings.catch_warnings(action="ignore"):  # peft uses names that transformers renames
        wrapped = peft.get_peft_model(model, config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for name, tensor in wrapped.named_parameters():
            if "lora_" in name:
                tensor.normal_(0, 0.5)
    folder = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(folder)
    return folder


def generated(model, tokenizer, texts) -> list[str]:
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(f"Do\n\n{text}")["input_ids"]])
        new = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        found.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return found


TEXTS = ["the fox", "a brown fox is quick", "it is"]


def answered(path, **options) -> list[str]:
    asked = [Request(t, f"Do\n\n{t}", None, Sampling(8), False) for t in TEXTS]
    return [answer.text for answer in provider(path, **options).complete(asked)]


def test_an_adapter_and_its_model_are_loaded(box, tiny, adapter):
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with warnings.catch_warnings(action="ignore"):
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
    expected = generated(wrapped, AutoTokenizer.from_pretrained(tiny), TEXTS)
    assert expected != answered(tiny)
    assert answered(adapter) == expected
    assert run(box, adapter, "--on-truncated", "keep").code in (0, 1)
    assert provider(adapter).identity() != provider(tiny).identity()


def test_the_model_of_an_adapter_may_be_named(tmp_path, tiny, adapter, box):
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    settings(moved, "adapter_config.json", base_model_name_or_path="org/not-here")
    line = refused(box, moved)
    assert "an adapter of org/not-here" in line
    assert "--base-model" in line
    assert answered(moved, base_model=str(tiny)) == answered(adapter)
    ended = run(box, tiny, "--base-model", moved)
    assert ended.code == 2
    assert "--base-model" in ended.err


def test_an_adapter_beside_its_model_is_put_on(tmp_path, tiny, adapter):
    """whether peft is there or not, and under a key of its own."""
    both = Path(shutil.copytree(tiny, tmp_path / "both"))
    before = provider(both).identity()
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, both / file.name)
    assert answered(both) == answered(adapter)
    assert provider(both).identity() != before


def test_an_adapter_with_a_vocabulary_of_its_own(tmp_path, tiny):
    """Tokens were added, and embeddings and head trained whole."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<new1>", "<new2>"])
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    config.base_model_name_or_path = str(tiny)
    with warnings.catch_warnings(action="ignore"):
        wrapped = peft.get_peft_model(model, config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        for name, tensor in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.normal_(0, 0.4)
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="ignore"):
        wrapped.save_pretrained(tmp_path)
        assert answered(tmp_path) == generated(wrapped, tokenizer, TEXTS)


ADAPTERS = {
    "no weights": lambda f: (f / "adapter_model.safetensors").unlink(),
    "a pointer": lambda f: (f / "adapter_model.safetensors").write_text(POINTER),
    "other layers": lambda f: rename(f, "layers.0", "layers.7"),
    "a tensor less": lambda f: drop_one(f),
    "a kind that cannot be merged": lambda f: settings(
        f, "adapter_config.json", peft_type="PROMPT_TUNING", num_virtual_tokens=4
    ),
    "no kind at all": lambda f: settings(f, "adapter_config.json", peft_type="NONESUCH"),
}


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k.replace(old, new): v for k, v in load_file(file).items()}, file)


def drop_one(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[sorted(weights)[0]]
    save_file(weights, file)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_one_line(box, tmp_path, adapter, name):
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    ADAPTERS[name](moved)
    assert "adapter" in refused(box, moved)


# identity.


def big(tmp_path: Path) -> Path:
    """A model whose weights are too large for beginning and end to be all of them."""
    folder = scripted_model(tmp_path / "big", ["x=1", "<|im_end|>"], width=1600)
    assert (folder / "model.safetensors").stat().st_size > 3 << 20
    return folder


def test_a_change_in_the_middle_of_the_weights_is_another_model(tmp_path):
    folder = big(tmp_path)
    before = provider(folder).identity()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert provider(folder).identity() != before


HARMLESS = {
    "a hidden folder": ".cache/huggingface/download/model.safetensors.metadata",
    "a hidden file": ".gitattributes",
    "git": ".git/HEAD",
    "a card": "README.md",
    "a licence": "LICENSE",
    "a trainer's notes": "trainer_state.json",
    "notes": "notes.txt",
    "samples that are no JSON": "train_samples.json",
    "a package's mark": "__init__.py",
    "a picture": "assets/curve.png",
    "another format": "onnx/model.onnx",
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_answer_changes_no_identity(folder, name):
    """a repeated download emptied the cache."""
    before = provider(folder).identity()
    file = folder / HARMLESS[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("anything")
    assert provider(folder).identity() == before


@pytest.mark.parametrize(
    "file",
    ["chat_template.jinja", "generation_config.json", "tokenizer.json", "config.json"],
)
def test_what_changes_answers_changes_the_identity(folder, file):
    before = provider(folder).identity()
    (folder / file).write_text((folder / file).read_text() + " ")
    assert provider(folder).identity() != before


def test_digests_are_remembered_until_the_file_changes(tmp_path):
    folder, cache = big(tmp_path), tmp_path / "cache"
    cache.mkdir()
    first = provider(folder, cache_dir=cache).identity()
    kept = json.loads((cache / "models.json").read_text())
    entry = kept[str(folder / "model.safetensors")]
    entry["sha256"] = "0" * 64  # so that it shows whether the file is read again
    (cache / "models.json").write_text(json.dumps(kept))
    assert provider(folder, cache_dir=cache).identity() != first
    os.utime(folder / "model.safetensors")
    assert provider(folder, cache_dir=cache).identity() == first


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "\0"])
def test_a_spoiled_list_of_digests_is_made_again(tmp_path, content):
    (tmp_path / "models.json").write_text(content)
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 100)
    known = Digests.below(tmp_path)
    assert len(known.digest(file)) == 64
    known.save()
    assert "sha256" in (tmp_path / "models.json").read_text()


def test_answers_under_a_former_key_still_serve(box, tmp_path):
    """What was answered before weights were read whole is not asked again, unless the model's
    files are newer than the answer."""
    import sqlite3

    folder = big(tmp_path)
    time.sleep(0.01)
    assert run(box, folder).code == 0
    cache = box.path / ".cache" / "records.sqlite"
    model = provider(folder)
    request = Request("x = 1", "Do\n\nx = 1", *ASKED)
    former, since = model.former_key(request)
    with sqlite3.connect(cache) as rows:
        assert rows.execute("UPDATE completions SET key = ?", [former]).rowcount == 1
        rows.execute("DELETE FROM limits")
        (created,) = rows.execute("SELECT created FROM completions").fetchone()
    assert since < created
    again = run(box, folder, "--output", "second")
    assert "0 rewritten, 1 from cache" in again.out
    os.utime(folder / "config.json")  # put there anew, perhaps by another model
    shutil.rmtree(box.path / ".cache" / "answers")  # where the finished run is kept
    third = run(box, folder, "--output", "third")
    assert "1 rewritten, 0 from cache" in third.out


ASKED = ("You are a coding assistant. Output only the final code.", Sampling(8))


def test_no_former_key_where_answers_were_wrong(tmp_path):
    made = {
        "ends": {"ends": 0},
        "marks": {"specials": ["[THINK]", "[/THINK]"]},
        "settings": {"suppress_tokens": [5]},
        "opened": {"template": CHAT.replace("assistant\n{% endif %}", "a<think>\n{% endif %}")},
    }
    for name, options in made.items():
        folder = scripted_model(tmp_path / name, ["x=1", "<|im_end|>"], **options)
        assert provider(folder).former_key(Request("x", "Do\n\nx", *ASKED)) is None, name


def test_answers_of_a_model_that_is_refused_now_are_not_used(box, folder):
    """what an earlier version stored of a model whose head was filled at random."""
    assert run(box, folder, "--on-truncated", "keep").code == 0
    (box.path / ".cache" / "models.json").unlink()  # as where this version has not loaded it
    tensors(folder, TENSORS["no head"][0])
    import sqlite3

    request = Request("x = 1", "Do\n\nx = 1", *ASKED)
    with sqlite3.connect(box.path / ".cache" / "records.sqlite") as rows:
        key = provider(folder).key(request)
        assert rows.execute("UPDATE completions SET key = ?", [key]).rowcount == 1
    shutil.rmtree(box.path / "outputs")
    assert "lm_head.weight" in refused(box, folder, "--on-truncated", "keep")


def test_what_an_earlier_version_wrote_in_place_is_known(box, tmp_path):
    """Its marks bear the model's former name."""
    import sqlite3

    from fabe_ds.store.journal import written_mark
    from fabe_ds.transform import Transform

    folder = scripted_model(
        tmp_path / "m",
        ["[THINK]", "h", "[/THINK]", "x=1", "<|im_end|>"],
        specials=["[THINK]", "[/THINK]"],
    )
    assert run(box, folder, "--inplace").code == 0
    made: list[Transform] = []
    data = box.path / "data.jsonl"
    options = {"instruction": "Do", "provider": "hf", "model": str(folder), "dtype": "float32"}
    import fabe_ds

    made.append(fabe_ds.transform_fn(**options, max_new_tokens=8))
    now, former = made[0].jobs()
    assert now != former
    with sqlite3.connect(box.path / ".cache" / "records.sqlite") as rows:
        marks = [mark for (mark,) in rows.execute("SELECT mark FROM written")]
        assert marks == [written_mark(now, str(data.resolve()), 0, "x=1")]
        old = written_mark(former, str(data.resolve()), 0, "x=1")
        rows.execute("UPDATE written SET mark = ?", [old])
    before = data.read_text()
    again = box.fabe(
        *("run", "--input", "data.jsonl", "--instruction", "Do", "--provider", "hf"),
        *("--model", folder, "--dtype", "float32", "--max-new-tokens", 8, "--inplace"),
    )
    assert again.code == 0, again
    assert data.read_text() == before
    assert box.report(".cache/runs/data.jsonl.run.json")["done"] == 0


# .gguf, and hubs.


def test_a_folder_of_one_gguf_file_is_that_file(tmp_path):
    (tmp_path / "m.Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "mmproj-m.gguf").write_bytes(b"GGUF")
    assert at(tmp_path, "m").gguf == tmp_path / "m.Q4_K_M.gguf"
    (tmp_path / "m.Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(FabeError, match=r"2 \.gguf files; give one of them: m/m\.Q4_K_M\.gguf"):
        at(tmp_path, "m")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\0" * 50, b"no", POINTER.encode()])
def test_a_spoiled_gguf_file_is_one_line(box, content):
    file = box.write("m.gguf", content)
    refused(box, file)


def test_a_cut_gguf_file_is_one_line(box, smollm):
    with smollm.open("rb") as whole:
        data = whole.read(8 << 20)
    assert "--model" in refused(box, box.write("m.gguf", data))


SAFE = ["model.safetensors", "config.json", "tokenizer.json", "README.md", "LICENSE"]
OTHERS = [
    *("pytorch_model.bin", "model.onnx", "onnx/model.onnx", "flax_model.msgpack", "tf_model.h5"),
    *("consolidated.safetensors", "original/consolidated.00.pth", "model.Q4.gguf", "a.png"),
]
WANTED = {
    "one of several formats": (
        [*SAFE, *OTHERS],
        ["config.json", "model.safetensors", "tokenizer.json"],
    ),
    "shards": (
        [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "config.json",
            "pytorch_model.bin.index.json",
        ],
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ],
    ),
    "pytorch alone": (
        ["pytorch_model.bin", "config.json", "tf_model.h5", "merges.txt"],
        ["config.json", "merges.txt", "pytorch_model.bin"],
    ),
    "an adapter": (
        ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "training_args.bin"],
        ["adapter_config.json", "adapter_model.safetensors"],
    ),
    "one gguf": (["m.Q4.gguf", "README.md", "config.json"], ["m.Q4.gguf"]),
    "code and vocabularies": (
        [
            "model.safetensors",
            "modeling_x.py",
            "tokenizer.model",
            "vocab.json",
            "x.tiktoken",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
        ],
        [
            "additional_chat_templates/tool_use.jinja",
            "chat_template.jinja",
            "model.safetensors",
            "modeling_x.py",
            "tokenizer.model",
            "vocab.json",
            "x.tiktoken",
        ],
    ),
}


@pytest.mark.parametrize("name", WANTED)
def test_of_a_repository_one_model_is_fetched(name):
    """L20."""
    files, wanted = WANTED[name]
    assert sorted(wanted_files(files, "org/m")) == sorted(wanted)


def test_of_several_gguf_files_one_is_to_be_named():
    files = ["m.Q4.gguf", "m.Q8.gguf", "README.md"]
    with pytest.raises(Requirement, match=r"2 \.gguf files; give one of them: org/m/m\.Q4"):
        wanted_files(files, "org/m")
    assert wanted_files(files, "org/m", "m.Q8.gguf") == ["m.Q8.gguf"]
    with pytest.raises(Requirement, match=r"it has no m\.Q5"):
        wanted_files(files, "org/m", "m.Q5.gguf")
    with pytest.raises(Requirement, match="no weights"):
        wanted_files(["README.md", "rust_model.ot"], "org/m")


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


def put(hub: Hub, name: str, folder: Path, *others: str) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    tree = files | dict.fromkeys(others, b"x" * 10)
    hub.repos[name] = Repo(False, {"main": tree}, ["0" * 40])


def from_hub(box, hub, model):
    return run(box, model, "--no-local-files-only", "--on-truncated", "keep", **hub.environment)


@pytest.mark.slow
def test_a_model_is_fetched_without_its_other_formats(box, hub, tiny):
    put(hub, "org/tiny", tiny, *OTHERS)
    ended = from_hub(box, hub, "org/tiny")
    assert ended.code == 0, ended
    fetched = {path.rpartition("/")[2] for _, path, _ in hub.asked if "/resolve/" in path}
    assert "model.safetensors" in fetched
    assert not fetched & {other.rpartition("/")[2] for other in OTHERS}
    offline = run(box, "org/tiny", "--output", "again", "--on-truncated", "keep", **hub.environment)
    assert "0 rewritten, 1 from cache" in offline.out


@pytest.mark.slow
def test_a_repository_of_one_gguf_file_is_taken_and_one_of_several_is_named(box, hub, smollm):
    data = smollm.read_bytes()
    tree = {"a.Q4.gguf": data, "README.md": b"x", "config.json": b"{}"}
    hub.repos["org/one"] = Repo(False, {"main": tree}, ["0" * 40])
    hub.repos["org/two"] = Repo(False, {"main": {**tree, "a.Q8.gguf": data}}, ["1" * 40])
    ended = from_hub(box, hub, "org/one")
    assert ended.code == 0, ended
    ended = from_hub(box, hub, "org/two")
    assert ended.code == 2
    assert "give one of them: org/two/a.Q4.gguf, org/two/a.Q8.gguf" in ended.err
    ended = from_hub(box, hub, "org/two/a.Q8.gguf")
    assert ended.code == 0, ended


# threads.


def quota(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


GROUPS = {
    "none": ({}, "0::/\n", None),
    "no limit": ({"cpu.max": "max 100000"}, "0::/\n", None),
    "of the container": ({"cpu.max": "100000 100000"}, "0::/\n", 1),
    "of a group around it": ({"a/cpu.max": "100000 100000"}, "0::/a/b/c\n", 1),
    "half a processor": ({"cpu.max": "50000 100000"}, "0::/\n", 1),
    "version 1": (
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
        "4:cpu:/\n",
        1,
    ),
    "version 1, below": (
        {"cpu/d/cpu.cfs_quota_us": "100000", "cpu/d/cpu.cfs_period_us": "100000"},
        "4:cpu:/d\n",
        1,
    ),
    "version 1, none": (
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        "4:cpu:/\n",
        None,
    ),
    "garbage": ({"cpu.max": "many"}, "what\n", None),
}


@pytest.mark.parametrize("name", GROUPS)
def test_processors_are_those_that_the_control_group_grants(tmp_path, name):
    files, own, expected = GROUPS[name]
    for file, text in files.items():
        quota(tmp_path, file, text)
    told = tmp_path / "cgroup"
    told.write_text(own)
    assert granted(tmp_path, told) == (expected or len(os.sched_getaffinity(0)))


def test_the_threads_are_said_and_loading_is_a_phase_of_its_own(box, tiny):
    ended = run(box, tiny, "--on-truncated", "keep")
    assert "on cpu, 1 threads as float32" in ended.err  # OMP_NUM_THREADS of the tests
    assert box.report()["loading"] > 0


def test_a_failed_load_fails_again_and_hangs_nothing(tmp_path, tiny):
    """F1, for local models: the second call of a transform whose model cannot be loaded."""
    import fabe_ds

    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    whole = (folder / "model.safetensors").read_bytes()
    transform = fabe_ds.transform_fn(
        field="code",
        instruction="Do",
        provider="hf",
        model=str(folder),
        dtype="float32",
        cache_dir=tmp_path / "cache",
        max_new_tokens=4,
        on_truncated="keep",
        on_error="keep",
    )
    (folder / "model.safetensors").write_text(POINTER)
    for _ in range(2):
        with pytest.raises(FabeError, match="git-lfs"):
            transform({"code": ["x"]})
    (folder / "model.safetensors").write_bytes(whole)
    assert transform({"code": ["x"]})["original_code"] == ["x"]


def test_short_of_transformers_is_said(monkeypatch, tiny):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.19.2")
    with pytest.raises(Requirement, match=r"5\.20 or later"):
        _ = provider(tiny).chat


def test_a_template_may_be_given_to_a_model_without_one(tmp_path):
    folder = tiny_model(tmp_path / "m", template=None)
    asked = Request("x", "Do x", None, Sampling(4))
    ids = provider(folder, chat_template=CHAT).prompt_ids(asked)
    assert provider(folder).tokenizer.decode(ids).startswith("<|im_start|>user")
    assert provider(folder, chat_template=CHAT).key(asked) != provider(folder).key(asked)
