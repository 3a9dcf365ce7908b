"""A loaded model: its settings, what it may hold, what its own generate is given."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from fabe_ds.errors import first_line
from fabe_ds.providers.transformers.agreement import free
from fabe_ds.providers.transformers.amendments import LEFT, LEFT_SAMPLING
from fabe_ds.providers.transformers.drafts import Speculation
from fabe_ds.request import Sampling

log = logging.getLogger(__name__)

_NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "typical_p": 1.0, "guidance_scale": 1.0}
_NEUTRAL |= {"top_p": 1.0, "temperature": 1.0, "encoder_repetition_penalty": 1.0}
_MEMORY_SHARE = 0.5
_LEAST_TOKENS = 4096
_LOOP = ("repetition_penalty", "no_repeat_ngram_size")


_LOOP_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


KNOWN_SETTINGS = (*_LOOP, *LEFT, *_LOOP_SAMPLING, *LEFT_SAMPLING)
"""Generation settings that are honoured."""


_OF_ALL_IDS = (*_LOOP, "min_length", "encoder_repetition_penalty")
"""Settings that count what stands before the answer, padding too."""


def held(own: dict[str, Any], samples: bool) -> dict[str, Any]:
    """Those of a model's own generation settings that hold here."""
    names = (*_LOOP, *LEFT, *((*_LOOP_SAMPLING, *LEFT_SAMPLING) if samples else ()))
    return {
        name: own[name]
        for name in names
        if own.get(name) and own[name] != _NEUTRAL.get(name, object())
    }


@dataclass
class LoadedModel:
    """A model and all that is needed to go on from token ids.

    `own` holds the model's own generation settings, `ends` the tokens that end an answer; `plain`
    leaves the work to transformers' generate; `most_tokens` limits the tokens of one batch,
    answers included.
    """

    model: Any
    tokenizer: Any
    device: str
    own: dict[str, Any]
    rows: int
    ends: frozenset[int]
    most_tokens: int | None = None
    plain: bool = False
    speculate: Speculation = "auto"

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """The generation settings: the user's, over the model's own."""
        settings = held(self.own, sampling.is_sampling)
        if sampling.is_sampling:
            if sampling.temperature:
                settings["temperature"] = sampling.temperature
            if sampling.top_p is not None:
                settings["top_p"] = sampling.top_p
        return settings


class _Numbers(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
    """Remembers which rows' scores were no numbers, and at which new token first."""

    def __init__(self) -> None:
        self.wrong: dict[int, int] = {}
        self._tokens = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wrong = scores.max(-1).values.isnan()
        if wrong.any():
            for row in wrong.nonzero()[:, 0].tolist():
                self.wrong.setdefault(row, self._tokens)
            scores = torch.where(wrong[:, None], torch.zeros_like(scores), scores)
        self._tokens += 1
        return scores


def _processors(settings: dict[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """transformers' own logits processors: those that look at one row's ids, and the others."""
    each = LogitsProcessorList()
    if settings.get("repetition_penalty"):
        each.append(logits_process.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if settings.get("no_repeat_ngram_size"):
        each.append(logits_process.NoRepeatNGramLogitsProcessor(settings["no_repeat_ngram_size"]))
    every = LogitsProcessorList()
    if settings.get("temperature", 1.0) != 1.0:
        every.append(logits_process.TemperatureLogitsWarper(float(settings["temperature"])))
    if settings.get("top_k"):
        every.append(logits_process.TopKLogitsWarper(settings["top_k"]))
    if settings.get("top_p", 1.0) < 1.0:
        every.append(logits_process.TopPLogitsWarper(settings["top_p"]))
    if settings.get("min_p"):
        every.append(logits_process.MinPLogitsWarper(settings["min_p"]))
    return each, every


def _restore(model: Any, attention: str) -> None:
    """Gives a model an attention of transformers' own: sdpa where it has none of that name."""
    for name in (attention, "sdpa", "eager"):
        try:
            model.set_attn_implementation(name)
        except Exception as error:  # models' own code raises what it likes
            log.debug("attention %s: %s", name, error)
        else:
            return


def _tokens_that_fit(loaded: LoadedModel) -> int:
    """Tokens whose keys and values take half of the memory that is free now."""
    config = loaded.model.config.get_text_config()

    def number(*names: str, otherwise: int) -> int:
        for name in names:
            try:
                value = getattr(config, name, None)
            except Exception:  # transformers', where layers differ in it
                value = None
            value = max(value, default=None) if isinstance(value, list) else value
            if type(value) is int and value > 0:
                return value
        return otherwise

    heads = number("num_attention_heads", "n_head", otherwise=1)  # state-space models have none
    width = number("head_dim", otherwise=number("hidden_size", "n_embd", otherwise=4096) // heads)
    layers = number("num_hidden_layers", "n_layer", otherwise=64)
    keys = number("num_key_value_heads", otherwise=heads)
    size = 2 * layers * keys * max(1, width) * loaded.model.dtype.itemsize
    return max(_LEAST_TOKENS, int(_MEMORY_SHARE * free(loaded.device) / size))


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in text or "can't allocate memory" in text)
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
