"""Linear layers whose weights are laid out once for the processor's matrix products.

torch lays a bfloat16 weight out anew in every product, which takes a third of the time where a
decoding step has few rows. oneDNN's own layout, which torch.compile uses for frozen weights, has
the same size and takes the place of the weight.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fabe_ds.providers.transformers.agreement import attention_as, distance
from fabe_ds.providers.transformers.devices import cpu_has_bf16

log = logging.getLogger(__name__)

_LEAST = 64  # of both sides of a weight; a product with a smaller one costs little
_FAR = 0.2  # standard deviations that scores may differ by: bfloat16 rounds otherwise


class PackedLinear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A linear layer with its weight packed, for `rows` rows at once mostly."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """The weight as it was, made anew."""
        dense: torch.Tensor = self.packed.to_dense()
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, "none", [], ""
        )
        return product


class Packing:
    """Packs a model's linear layers, and takes that back bit by bit."""

    def __init__(self, model: Any, device: str) -> None:
        self._model = model
        compiled = getattr(model, "_compiled_call_impl", None) is not None  # which may pack itself
        fits = device == "cpu" and cpu_has_bf16() and model.dtype == torch.bfloat16
        self._wanted = fits and not compiled
        self._plain: list[tuple[nn.Module, str, Any]] = []

    def pack(self, rows: int) -> None:
        """Packs the weights of a bfloat16 model on the CPU, once; `rows`: of a step. Where torch
        has no such products, or they give the model other scores, nothing changes."""
        if not self._wanted:
            return
        self._wanted = False
        words = self._model.get_input_embeddings().num_embeddings
        ids = (torch.arange(8) * 37 + 3)[None] % words
        with torch.inference_mode():
            try:
                with attention_as(self._model, "eager"):
                    before = self._model(input_ids=ids, use_cache=False).logits
                    self._replace(rows)
                    after = self._model(input_ids=ids, use_cache=False).logits
                if distance([after], [before]) <= _FAR:
                    return
                log.debug("packed weights give other scores")
            except Exception as error:  # models' own code raises what it likes
                log.debug("packed weights: %s: %s", type(error).__name__, error)
            self._restore()

    @contextmanager
    def undone(self, rows: int) -> Iterator[None]:
        """The model with its weights as they were while the block runs."""
        packed = bool(self._plain)
        self._restore()
        try:
            yield
        finally:
            if packed:
                self._replace(rows)

    def _replace(self, rows: int) -> None:
        tied = self._model.get_input_embeddings().weight
        made: dict[nn.Module, PackedLinear] = {}  # a layer may stand in several places
        for parent in list(self._model.modules()):
            for name, layer in list(parent.named_children()):
                if layer not in made:
                    if type(layer) is not nn.Linear or not _is_worth_it(layer):
                        continue
                    made[layer] = PackedLinear(layer, rows)
                    if layer.weight is not tied:
                        layer.weight = nn.Parameter(layer.weight.new_empty(0), False)
                self._plain.append((parent, name, layer))
                setattr(parent, name, made[layer])

    def _restore(self) -> None:
        while self._plain:
            parent, name, layer = self._plain.pop()
            packed = getattr(parent, name)
            if layer.weight.numel() == 0:
                layer.weight = nn.Parameter(packed.weight, False)
            setattr(parent, name, layer)


def _is_worth_it(layer: nn.Linear) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook")
    weight = layer.weight
    return weight.dtype == torch.bfloat16 and min(weight.shape) >= _LEAST and not hooked
