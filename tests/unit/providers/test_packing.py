"""Packed weights: the model's own scores, in the same memory, and the way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from fabe_ds.providers import Endpoint
from fabe_ds.providers.transformers.devices import cpu_has_bf16
from fabe_ds.providers.transformers.hf import HFProvider
from fabe_ds.providers.transformers.packing import PackedLinear, Packing
from tests.unit.providers.test_decode import prompts, requests, texts_of

pytestmark = pytest.mark.skipif(not cpu_has_bf16(), reason="the processor has no bfloat16 products")
IDS = torch.arange(3, 40)[None]


class Twice(nn.Module):
    """A model in miniature, with one layer in two places, and one tied to its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(96, 64)
        self.one = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))
        self.two = nn.Sequential(self.one[0], nn.SiLU(), self.one[2])
        self.small = nn.Linear(64, 8)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.words.weight
        self.dtype = torch.bfloat16
        self.config = PreTrainedConfig(attn_implementation="eager")
        self.bfloat16()

    def get_input_embeddings(self):
        return self.words

    def set_attn_implementation(self, name):
        self.config._attn_implementation = name

    def forward(self, input_ids, use_cache=False):
        states = self.words(input_ids)
        states = states + self.two(self.one(states))
        scores = self.head(states) + self.small(states).sum(-1, keepdim=True)
        return type("Output", (), {"logits": scores})()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_packed_model_gives_the_same_scores_and_comes_back_bit_by_bit():
    torch.manual_seed(0)
    model = Twice()
    before, scores = weights(model), model(IDS).logits
    packing = Packing(model, "cpu")
    packing.pack(8)
    assert isinstance(model.one[0], PackedLinear)
    assert model.two[0] is model.one[0]
    assert isinstance(model.head, PackedLinear)
    assert type(model.small) is nn.Linear
    with torch.inference_mode():
        for rows in (1, 8, 37):
            packed = model(IDS[:, :rows]).logits
            assert torch.allclose(packed.float(), scores[:, :rows].float(), atol=0.05, rtol=0.05)
        with packing.undone(8):
            assert torch.equal(model(IDS).logits, scores)
            after = weights(model)
        assert isinstance(model.one[0], PackedLinear)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_weight_is_held_once():
    model = Twice()
    Packing(model, "cpu").pack(8)
    held = sum(parameter.numel() for parameter in model.parameters())
    assert held == 96 * 64 + 128 + 64 + 64 * 8 + 8  # embeddings, biases, and the small layer


@pytest.mark.parametrize("fault", ["other scores", "no such products"])
def test_what_does_not_work_is_taken_back(monkeypatch, fault):
    def wrong(self, x):
        if fault == "other scores":
            return x @ self.weight.T + 1
        raise NotImplementedError

    monkeypatch.setattr(PackedLinear, "forward", wrong)
    model = Twice()
    before, scores = weights(model), model(IDS).logits
    packing = Packing(model, "cpu")
    packing.pack(8)
    assert type(model.one[0]) is nn.Linear
    assert all(torch.equal(weights(model)[name], tensor) for name, tensor in before.items())
    assert model.config._attn_implementation == "eager"
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, scores)
    packing.pack(8)  # it is tried once
    assert type(model.one[0]) is nn.Linear


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_types_are_left_alone(tiny, dtype):
    model = HFProvider(Endpoint(str(tiny), dtype=dtype, batch_size=4))
    texts_of(model.complete(requests(prompts(3))))
    assert not any(isinstance(layer, PackedLinear) for layer in model.model.modules())


def test_a_real_models_answers_are_of_packed_weights(smollm_folder):
    model = HFProvider(Endpoint(str(smollm_folder), dtype="bfloat16", batch_size=4))
    asked = requests(prompts(4), 8)
    found = texts_of(model.complete(asked))
    packed = [layer for layer in model.model.modules() if isinstance(layer, PackedLinear)]
    assert len(packed) == 30 * 7 + 1
    with torch.inference_mode(), model.generation._packing.undone(4):
        assert not any(isinstance(layer, PackedLinear) for layer in model.model.modules())
    assert len(set(found)) == 4
