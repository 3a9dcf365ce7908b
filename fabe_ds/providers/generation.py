"""Token ids in, answers out, with a model that transformers has loaded in this process."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process

from fabe_ds.errors import RecordFailed
from fabe_ds.providers.base import Sampling
from fabe_ds.providers.decode import ATTENTION, Answer, Decoder, Plan, Prompt, Room, Work, agrees

log = logging.getLogger(__name__)

Given = tuple[int, Answer | RecordFailed]
"""The index of a prompt, and what became of it."""

_OWN = ("repetition_penalty", "no_repeat_ngram_size")
_OWN_SAMPLING = ("top_p", "top_k", "min_p")
_MEMORY_SHARE = 0.5
_LEAST_TOKENS = 4096


@dataclass
class Loaded:
    """A model and all that is needed to go on from token ids.

    `own` holds the model's own generation settings; `plain` leaves the work to transformers'
    generate; `most_tokens` limits the tokens of one batch, answers included.
    """

    model: Any
    tokenizer: Any
    device: str
    own: dict[str, Any]
    rows: int
    most_tokens: int | None = None
    plain: bool = False

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end an answer: the model's own, else the tokenizer's."""
        ends = self.own.get("eos_token_id")
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """The generation settings: the user's, over the model's own."""
        names = (*_OWN, *_OWN_SAMPLING) if sampling.samples else _OWN
        settings = {name: self.own.get(name) for name in names}
        if sampling.samples:
            settings["temperature"] = sampling.temperature or None
            if sampling.top_p is not None:
                settings["top_p"] = sampling.top_p
        return {name: value for name, value in settings.items() if value is not None}


class Generation:
    """Answers prompts; runs out of memory at most once for each size of batch."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.work = Work()
        self.room = Room(loaded.rows, loaded.most_tokens or _tokens_that_fit(loaded))
        if loaded.device.startswith("cuda"):
            self.room.prefill = 16384
        self._decoder: Decoder | None = None
        self._length = _longest_attended(loaded.model.config)

    @cached_property
    def own_loop(self) -> bool:
        """Whether our own decoding loop runs this model, and gives what its forward gives."""
        loaded = self.loaded
        config = loaded.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if loaded.plain or not kinds <= {"full_attention", "sliding_attention"}:
            return False
        before = loaded.model.config._attn_implementation
        try:
            loaded.model.set_attn_implementation(ATTENTION)
        except (ValueError, AttributeError, NotImplementedError):
            return False
        if agrees(loaded.model, loaded.device, loaded.tokenizer.pad_token_id):
            return True
        loaded.model.set_attn_implementation(before)
        log.info("%s: decoded by transformers' generate", type(loaded.model).__name__)
        return False

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[list[Given]]:
        """What became of each prompt, as it ends; longest first, so that a lack of memory shows
        at once. Where memory is short, the batches become smaller, for good."""
        waiting = {p.number: p for p in sorted(prompts, key=lambda p: len(p.ids), reverse=True)}
        with torch.inference_mode():
            while waiting:
                try:
                    for given in self._run(list(waiting.values()), sampling):
                        for answer in given:
                            del waiting[answer.number]
                        yield [(answer.number, answer) for answer in given]
                except RuntimeError as error:
                    if not _out_of_memory(error):
                        raise
                    rows = self._rows_at_once(next(iter(waiting.values())), sampling)
                    self._free_memory()
                    if rows > 1:
                        log.warning("out of memory with %d records at once; trying half", rows)
                        self.room = replace(self.room, rows=rows // 2)
                        continue
                    index = next(iter(waiting))
                    del waiting[index]
                    yield [(index, RecordFailed("memory", "out of memory with this record alone"))]

    def _rows_at_once(self, longest: Prompt, sampling: Sampling) -> int:
        fitting = self.room.tokens // (len(longest.ids) + sampling.max_new_tokens)
        return max(1, min(self.room.rows, fitting))

    def _run(self, prompts: list[Prompt], sampling: Sampling) -> Iterator[list[Answer]]:
        if self.own_loop:
            limit = self._length or max(len(p.ids) for p in prompts) + sampling.max_new_tokens
            short = [p for p in prompts if len(p.ids) + sampling.max_new_tokens <= limit]
            long = [p for p in prompts if len(p.ids) + sampling.max_new_tokens > limit]
            if short:
                yield from self._decoding(sampling).run(short)
            prompts = long
            if not prompts:
                return
            self.loaded.model.set_attn_implementation("sdpa")
            try:
                yield from self._padded(prompts, sampling)
            finally:
                self.loaded.model.set_attn_implementation(ATTENTION)
            return
        yield from self._padded(prompts, sampling)

    def _decoding(self, sampling: Sampling) -> Decoder:
        loaded = self.loaded
        plan = Plan(
            sampling.max_new_tokens,
            frozenset(loaded.ends),
            sampling.samples,
            *_processors(loaded.settings(sampling)),
            _stopper(loaded.tokenizer, sampling.stop) if sampling.stop else None,
        )
        if self._decoder is None:
            pad = loaded.tokenizer.pad_token_id
            self._decoder = Decoder(loaded.model, plan, self.room, pad, loaded.device, self.work)
        self._decoder.plan, self._decoder.room = plan, self.room
        return self._decoder

    def _free_memory(self) -> None:
        if self._decoder is not None:
            self._decoder.release()
        gc.collect()
        if self.loaded.device.startswith("cuda"):
            torch.cuda.empty_cache()

    # Where our own loop does not serve: transformers' generate, one padded batch after another.

    def _padded(self, prompts: list[Prompt], sampling: Sampling) -> Iterator[list[Answer]]:
        start = 0
        while start < len(prompts):
            # generate() has one random state for all rows; a row of its own has its own seed.
            size = 1 if sampling.samples else self._rows_at_once(prompts[start], sampling)
            yield self.generate(prompts[start : start + size], sampling)
            start += size

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Answer]:
        """One batch, padded on the left."""
        loaded = self.loaded
        longest = max(len(prompt.ids) for prompt in prompts)
        pad = loaded.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p.ids)) + p.ids for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts])
        extra: dict[str, Any] = {}
        if sampling.stop:
            extra = {"stop_strings": list(sampling.stop), "tokenizer": loaded.tokenizer}
        if sampling.samples:
            torch.manual_seed(prompts[0].seed)
        settings = {"top_k": 0, **loaded.settings(sampling)} if sampling.samples else {}
        output = loaded.model.generate(
            input_ids=ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            generation_config=GenerationConfig(
                eos_token_id=loaded.ends or None,
                pad_token_id=pad,
                max_new_tokens=sampling.max_new_tokens,
                do_sample=sampling.samples,
                **(settings or loaded.settings(sampling)),
            ),
            **extra,
        )
        new = output[:, longest:].tolist()
        answers = [
            self._answer(p.number, row, sampling) for p, row in zip(prompts, new, strict=True)
        ]
        self.work.prompt += int(mask.sum())
        self.work.padding += mask.numel() - int(mask.sum())
        self.work.new += sum(len(answer.tokens) for answer in answers)
        self.work.steps += len(new[0])
        self.work.row_steps += len(new[0]) * len(new)
        return answers

    def _answer(self, index: int, fresh: list[int], sampling: Sampling) -> Answer:
        ends = set(self.loaded.ends)
        stop = next((place for place, token in enumerate(fresh) if token in ends), None)
        tokens = fresh if stop is None else fresh[:stop]
        if sampling.stop:
            text = _stopper(self.loaded.tokenizer, sampling.stop)(tokens)
            if text is not None:
                return Answer(index, tokens, "stop", text)
        return Answer(index, tokens, "length" if stop is None else "stop")


def _processors(settings: dict[str, Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """transformers' own logits processors: those that look at one row's ids, and the others."""
    each = LogitsProcessorList()
    if settings.get("repetition_penalty", 1.0) != 1.0:
        each.append(logits_process.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if settings.get("no_repeat_ngram_size", 0) > 0:
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


def _stopper(tokenizer: Any, stops: Sequence[str]) -> Callable[[list[int]], str | None]:
    def stopped(tokens: list[int]) -> str | None:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None

    return stopped


def _longest_attended(config: Any) -> int | None:
    """Tokens up to which a sliding window is no window yet; None where there is none."""
    return getattr(config.get_text_config(), "sliding_window", None)


def _tokens_that_fit(loaded: Loaded) -> int:
    """Tokens whose keys and values take half of the memory that is free now."""
    config = loaded.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * loaded.model.dtype.itemsize
    if loaded.device.startswith("cuda"):
        free = torch.cuda.mem_get_info(loaded.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(_LEAST_TOKENS, int(_MEMORY_SHARE * free / size))


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text
