"""Keys are promises: what was paid for once is answered from the cache by every later version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fabe_ds.prompts.form import choice_schema
from fabe_ds.providers import Endpoint, Request, Sampling
from fabe_ds.providers.echo import EchoProvider
from fabe_ds.providers.ollama import OllamaProvider
from fabe_ds.providers.openai import OpenAIProvider
from fabe_ds.providers.transformers.hf import HFProvider
from fabe_ds.providers.transformers.modelscope import ModelScopeProvider
from fabe_ds.request import AnswerForm

OLD = Path(__file__).parents[1] / "support" / "data" / "cache-0.1.0"
"""A cache folder that version 0.1.0 made, the records, and what its runs wrote."""

GREEDY, SAMPLED = Sampling(), Sampling(64, 0.5, 0.9, None, 7, ("END",))


def asked(sampling=GREEDY, **more):
    given = {"chat": True, "system_prompt": "sys", **more}
    return Request("x", "Do\n\nx", sampling=sampling, **given)


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
CHOICE = AnswerForm(choice_schema(["a", "b"]), ("a", "b"), logprobs=True)
PINNED = {
    "openai": (
        OpenAIProvider(Endpoint("m", "http://h/v1")),
        asked(),
        "07fbb4c7e0ef53495cc80bf2a7d6a2df07622b9e595edf48359c33adcdcfc13a",
    ),
    "openai, a user in the address": (
        OpenAIProvider(Endpoint("m", "http://u:p@h/v1")),
        asked(),
        "07fbb4c7e0ef53495cc80bf2a7d6a2df07622b9e595edf48359c33adcdcfc13a",
    ),
    "openai, sampled": (
        OpenAIProvider(Endpoint("m", "http://h/v1/")),
        asked(SAMPLED, sample=2),
        "f1b5a702022f0b4543d531a2329435338ab20ea51ada85506eb969b121bcc86c",
    ),
    "openai, plain": (
        OpenAIProvider(Endpoint("m", "http://h/v1")),
        asked(chat=False),
        "ed0fc9a0dad2c53567dbdda341e0396ebd12d978f6f6b1257110fba010147edb",
    ),
    "openai, asked again": (
        OpenAIProvider(Endpoint("m", "http://h/v1")),
        asked(turns=(("a", "b"),)),
        "ef7b061d170d190c66157b3315357efb4ff49dc2d59646db2b83a5fd8a65425a",
    ),
    "openai itself": (
        OpenAIProvider(Endpoint("m")),
        asked(),
        "d77d96ac3af775e1e48ca9c58275ae8dd8f501d26ff78d27c87f98171a052049",
    ),
    "ollama": (
        OllamaProvider(Endpoint("m")),
        asked(),
        "0442aea12679c5d33867fd7b54c02dd42fd6bdae7600268983ef5f80320397ac",
    ),
    "ollama, sampled": (
        OllamaProvider(Endpoint("m")),
        asked(SAMPLED),
        "e52ce534c5bcb2006b6584691db56d766cb85a65d14045a18a9a66a24aef054d",
    ),
    "ollama, plain": (
        OllamaProvider(Endpoint("m")),
        asked(chat=False, system_prompt=None),
        "f6fc722ceda22892af64501219cbca4f8527e2b3cff809a56d59498ceb4c0ff5",
    ),
    "openai, of a schema": (
        OpenAIProvider(Endpoint("m", "http://h/v1")),
        asked(form=AnswerForm(SCHEMA)),
        "8278a6107ab2dc3aee49ff80ed5346eeeb29313b7bc4186c236a5cd7a09a2c13",
    ),
    "openai, a choice with its probability": (
        OpenAIProvider(Endpoint("m", "http://h/v1")),
        asked(form=CHOICE),
        "dbc47b748e28f6389f724e3ea87b559bc0640c3e73f9ff5c35b59ebf9bfb3389",
    ),
    "openai, behind turns": (
        OpenAIProvider(Endpoint("m", "http://h/v1")),
        asked(before=(("user", "u"), ("assistant", "a"))),
        "32ed2081333fcdf6170e0c1000100ca51b8ae1f7d243ebee9c56ad3fed356571",
    ),
    "openai, parameters of the user": (
        OpenAIProvider(Endpoint("m", "http://h/v1", params={"top_k": 5})),
        asked(),
        "3f7024f3e4f203e9bec29e3b38094c2f67cb5bc0d82a774ff23d9d2a8905f626",
    ),
    "openai, told to think": (
        OpenAIProvider(Endpoint("m", "http://h/v1", thinking="off")),
        asked(),
        "010be677327d4c089fec572d381e8eb2e8fef96ae5db6e2b9907127796fb7abc",
    ),
    "ollama, of a schema": (
        OllamaProvider(Endpoint("m")),
        asked(form=AnswerForm(SCHEMA)),
        "537c8c2b02fcdd976b6d80abc99582c4d950891a11209858da338b86162546c6",
    ),
    "ollama, a choice with its probability": (
        OllamaProvider(Endpoint("m")),
        asked(form=CHOICE),
        "beb1ffaaeb221b8c1b594d878ca4fcdfaf950477da54e0cc35094b85148ea20f",
    ),
    "ollama, told to think": (
        OllamaProvider(Endpoint("m", thinking="low")),
        asked(),
        "d52cc6b5fd40da73a91f895be6d5847380292ada32a2f2b86de73c7963e3e192",
    ),
    "echo": (
        EchoProvider(Endpoint("m")),
        asked(),
        "a157d62425e6e093706b241d9aae191a8f5bbd19aa51c66950a3f24e8c67e45c",
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_the_keys_of_unchanged_requests_are_unchanged(name):
    provider, request, key = PINNED[name]
    assert provider.key(request).hex() == key


@pytest.mark.parametrize("name", ["openai", "plain", "sampled", "ollama"])
def test_a_cache_folder_of_an_earlier_version_answers(box, name):
    """No server is there: one request would fail the run."""
    run = json.loads((OLD / "runs.json").read_text())[name]
    (box.path / ".cache").mkdir(mode=0o700)
    shutil.copy(OLD / "records.sqlite", box.path / ".cache" / "records.sqlite")
    shutil.copy(OLD / "data.jsonl", box.path / "data.jsonl")
    ended = box.fabe("run", "--input", "data.jsonl", "--instruction", "Up", *run["flags"])
    assert ended.code == 0, ended
    assert box.read("outputs/data.jsonl") == run["records"]
    assert box.report()["requests"] == 0


# A local model is named by its files; these are made of fixed bytes, and never loaded.


def model_folder(folder: Path, weights: int) -> Path:
    folder.mkdir()
    files = {
        "config.json": '{"model_type": "llama", "eos_token_id": 2}',
        "generation_config.json": '{"eos_token_id": 2, "temperature": 0.6}',
        "tokenizer.json": '{"added_tokens": [{"id": 2, "content": "</s>", "special": true}]}',
        "tokenizer_config.json": '{"eos_token": "</s>", "chat_template": "{{ messages }}</s>"}',
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    data = (b"0123456789" * (weights // 10 + 1))[:weights]
    (folder / "model.safetensors").write_bytes(data)
    return folder


LOCAL = {
    "hf": (HFProvider, asked(), 1_000),
    "hf, sampled": (HFProvider, asked(SAMPLED), 1_000),
    "hf, plain": (HFProvider, asked(chat=False), 1_500_000),
    "modelscope": (ModelScopeProvider, asked(), 1_000),
    "hf, large": (HFProvider, asked(), 5_000_000),
}
LOCAL_KEYS = {
    "hf": "c8e03d301ed36f9c4b91501830b3ee47042d7b70760e29099dc815645e2207a0",
    "hf, sampled": "66046a236d10c6b8c83d591d0e6a197f8fe6de7b067cd46d00a2f970d762d71f",
    "hf, plain": "d7b2ba7a4cc8f062efc4f73b55a5f60ad5feb81d9da4f3d4a609f50eb3ac31a9",
    "modelscope": "8fe92a50357b934e6a5271ad1c5bfb01a311378305be7c45d048c40bba1f6511",
    "hf, large": "adb4f08fc75705b7c1b51a7f2a130fe43edd49d08ab9c10fabd40ed448451d40",
}


@pytest.mark.parametrize("name", LOCAL)
def test_the_keys_of_local_models_are_unchanged_or_known(name, tmp_path):
    """Large weights are read whole now; what was stored under their former key still serves."""
    kind, request, size = LOCAL[name]
    provider = kind(Endpoint(str(model_folder(tmp_path / "m", size))))
    former = provider.former_key(request)
    key = provider.key(request) if former is None else former[0]
    assert key.hex() == LOCAL_KEYS[name]
    assert (former is None) == (size < 2_000_000)
