"""Token ids in, answers out, with a model that transformers has loaded in this process."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from fabe_ds.errors import RecordFailed, RunStopped, first_line
from fabe_ds.providers.transformers.agreement import (
    NO_NUMBERS,
    Limits,
    Stretch,
    Together,
    attention_of,
    free,
    loop_agrees,
    padded,
    takes_together,
)
from fabe_ds.providers.transformers.checkpoint import LEFT, LEFT_SAMPLING, context
from fabe_ds.providers.transformers.decoder import (
    ATTENTION,
    Answer,
    Decoder,
    Plan,
    Prompt,
    Room,
    Work,
)
from fabe_ds.providers.transformers.stops import stop_tokens, stopper
from fabe_ds.request import Sampling

log = logging.getLogger(__name__)

Given = tuple[int, Answer | RecordFailed]
"""The index of a prompt, and what became of it."""

_NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "typical_p": 1.0, "guidance_scale": 1.0}
_NEUTRAL |= {"top_p": 1.0, "temperature": 1.0, "encoder_repetition_penalty": 1.0}
"""Values beside None, 0 and False that say the same as no value."""
_LOOP = ("repetition_penalty", "no_repeat_ngram_size")
_LOOP_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_OF_ALL_IDS = (*_LOOP, "min_length", "encoder_repetition_penalty")
"""Settings that count what stands before the answer, padding too."""
_EQUAL = "padding changes this model's answers: prompts of one length are answered together"
_ALONE = "what stands beside changes this model's answers: prompts are answered one by one"
_MEMORY_SHARE = 0.5
_LEAST_TOKENS = 4096
_HOPELESS = 3  # records that fail in the model's own code before anything is answered


def held(own: dict[str, Any], samples: bool) -> dict[str, Any]:
    """Those of a model's own generation settings that hold here."""
    names = (*_LOOP, *LEFT, *((*_LOOP_SAMPLING, *LEFT_SAMPLING) if samples else ()))
    return {
        name: own[name]
        for name in names
        if own.get(name) and own[name] != _NEUTRAL.get(name, object())
    }


@dataclass
class Loaded:
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

    def settings(self, sampling: Sampling) -> dict[str, Any]:
        """The generation settings: the user's, over the model's own."""
        settings = held(self.own, sampling.samples)
        if sampling.samples:
            if sampling.temperature:
                settings["temperature"] = sampling.temperature
            if sampling.top_p is not None:
                settings["top_p"] = sampling.top_p
        return settings


class Generation:
    """Answers prompts; runs out of memory at most once for each size of batch."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.work = Work()
        self.room = Room(loaded.rows, loaded.most_tokens or _tokens_that_fit(loaded))
        if loaded.device.startswith("cuda"):
            self.room.prefill = 16384
        self.limits = Limits.of(loaded.model.config)
        self._decoder: Decoder | None = None
        self._together: dict[Stretch, Together] = {}
        self._left: Counter[str] = Counter()
        self._notes: list[str] = []
        self._answered = self._broken = 0

    @cached_property
    def own_loop(self) -> bool:
        """Whether our own decoding loop runs this model, and gives what its forward gives."""
        loaded = self.loaded
        config = loaded.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if loaded.plain or not kinds <= {"full_attention", "sliding_attention"}:
            return False
        before = attention_of(loaded.model)
        try:
            loaded.model.set_attn_implementation(ATTENTION)
            if attention_of(loaded.model) != ATTENTION:
                return False
            longest = min(filter(None, (self.limits.first, context(config))), default=None)
            if loop_agrees(loaded.model, loaded.device, loaded.tokenizer.pad_token_id, longest):
                return True
        except Exception as error:  # models' own code raises what it likes
            log.debug("our own loop: %s: %s", type(error).__name__, error)
        _restore(loaded.model, before)
        return False

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[list[Given]]:
        """What became of each prompt, as it ends; longest first, so that a lack of memory shows
        at once. Where memory is short, the batches become smaller, for good.

        Raises: RunStopped where the model gives no numbers, or fails at all that it is given.
        """
        waiting = {p.number: p for p in sorted(prompts, key=lambda p: len(p.ids), reverse=True)}
        alone = False
        with torch.inference_mode():
            while waiting:
                first = next(iter(waiting.values()))
                try:
                    for answers in self._run([first] if alone else [*waiting.values()], sampling):
                        for answer in answers:
                            del waiting[answer.number]
                        yield [(answer.number, self._sound(answer)) for answer in answers]
                except RunStopped:
                    raise
                except Exception as error:  # models' own code raises what it likes
                    first = next(iter(waiting.values()))
                    if _out_of_memory(error):
                        self._free_memory()
                        rows = self._rows_at_once(first, sampling)
                        if rows > 1:
                            log.warning("out of memory with %d records at once; trying half", rows)
                            self.room = replace(self.room, rows=rows // 2)
                            continue
                        failure = RecordFailed("memory", "out of memory with this record alone")
                    elif not alone and len(waiting) > 1:
                        log.warning("decoding went wrong (%s); trying one by one", _said(error))
                        alone = True
                        self._free_memory()
                        continue
                    else:
                        failure = self._failed(error)
                    del waiting[first.number]
                    yield [(first.number, failure)]

    def _sound(self, answer: Answer) -> Answer | RecordFailed:
        """The answer, or what it failed of. Raises: RunStopped where no scores were numbers yet."""
        if answer.reason != "not numbers":
            self._answered += 1
            return answer
        self._broken += 1
        sound = self._answered or answer.tokens or (self._decoder and self._decoder.sound)
        if not sound and self._broken >= _HOPELESS:
            raise RunStopped(NO_NUMBERS)
        return RecordFailed(
            "scores", "the model's scores are not numbers; --dtype float32 may help"
        )

    def _failed(self, error: Exception) -> RecordFailed:
        self._broken += 1
        if not self._answered and self._broken >= _HOPELESS:
            raise RunStopped(f"the model fails at whatever it is asked: {_said(error)}")
        return RecordFailed("model", f"the model failed: {_said(error)}")

    def _rows_at_once(self, longest: Prompt, sampling: Sampling) -> int:
        fitting = self.room.tokens // (len(longest.ids) + sampling.max_new_tokens)
        return max(1, min(self.room.rows, fitting))

    def _run(self, prompts: list[Prompt], sampling: Sampling) -> Iterator[list[Answer]]:
        stretches = {p.number: self._stretch(p, sampling) for p in prompts}
        settings = self.loaded.settings(sampling)
        left = [name for name in settings if name in (*LEFT, *LEFT_SAMPLING)]
        loops = not left and self.own_loop
        if loops:
            short = [p for p in prompts if stretches[p.number].kind == "short"]
            if short:
                yield from self._decoding(sampling).run(short)
            prompts = [p for p in prompts if stretches[p.number].kind != "short"]
            if not prompts:
                return
            self._tell(
                len(prompts),
                f"longer than {self.limits.first} tokens, where the model computes otherwise",
            )
        elif left:
            self._tell(len(prompts), f"the model's own settings ({', '.join(left)}) ask for it")
        elif not self.loaded.plain:
            self._tell(
                len(prompts), f"our own loop does not run {type(self.loaded.model).__name__}"
            )
        if loops:
            _restore(self.loaded.model, "sdpa")
        try:
            # Stable, so the longest of each stretch is first still.
            prompts.sort(key=lambda p: stretches[p.number])
            for stretch, group in groupby(prompts, key=lambda p: stretches[p.number]):
                yield from self._generated(list(group), sampling, stretch)
        finally:
            if loops and self.own_loop:
                self.loaded.model.set_attn_implementation(ATTENTION)

    def _stretch(self, prompt: Prompt, sampling: Sampling) -> Stretch:
        return self.limits.stretch(len(prompt.ids), sampling.max_new_tokens)

    def _tell(self, records: int, why: str) -> None:
        """Says once, for each reason, that transformers' generate answers; counts the records."""
        if why not in self._left:
            log.info("%d records answered by transformers' generate: %s", records, why)
        self._left[why] += records

    def _note(self, line: str) -> None:
        if line not in self._notes:
            self._notes.append(line)
            log.info("%s", line)

    def told(self) -> list[str]:
        """A line for each reason for which records were not answered by our own loop, with how
        many there were, or not many at once."""
        left = [
            f"{count} records were answered by transformers' generate: {why}"
            for why, count in self._left.items()
        ]
        return [*left, *self._notes]

    def _decoding(self, sampling: Sampling) -> Decoder:
        loaded = self.loaded
        plan = Plan(
            sampling.max_new_tokens,
            loaded.ends | stop_tokens(loaded.tokenizer, sampling.stop),
            sampling.samples,
            *_processors(loaded.settings(sampling)),
            stopper(loaded.tokenizer, sampling.stop),
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

    # Where our own loop does not serve: transformers' generate, one batch after another.

    def _generated(
        self, prompts: list[Prompt], sampling: Sampling, stretch: Stretch
    ) -> Iterator[list[Answer]]:
        together = self._may_go_together(stretch, sampling)
        start = 0
        while start < len(prompts):
            first = prompts[start]
            # generate() has one random state for all rows; a row of its own has its own seed.
            alone = sampling.samples or together == "alone"
            size = 1 if alone else self._rows_at_once(first, sampling)
            batch = prompts[start : start + size]
            if together == "equal":
                batch = [p for p in batch if len(p.ids) == len(first.ids)]
            yield self.generate(batch, sampling)
            start += len(batch)

    def _may_go_together(self, stretch: Stretch, sampling: Sampling) -> Together:
        if self.room.rows == 1 or sampling.samples:
            return "alone"
        if stretch.kind == "apart":
            self._note(_EQUAL)
            return "equal"
        if stretch not in self._together:
            loaded = self.loaded
            config = loaded.model.config.get_text_config()
            longest = self.limits.first if stretch.kind == "short" else None
            longest = min(filter(None, (longest, context(config))), default=1 << 30)
            pad = loaded.tokenizer.pad_token_id
            found = takes_together(loaded.model, loaded.device, pad, longest, stretch.limit)
            self._together[stretch] = found
            if found != "padded":
                self._note(_EQUAL if found == "equal" else _ALONE)
        found = self._together[stretch]
        if found == "padded" and any(n in _OF_ALL_IDS for n in self.loaded.settings(sampling)):
            return "equal"
        return found

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[Answer]:
        """One batch, padded on the left."""
        loaded = self.loaded
        longest = max(len(prompt.ids) for prompt in prompts)
        pad = loaded.tokenizer.pad_token_id
        ids, mask = padded([prompt.ids for prompt in prompts], pad)
        ends = loaded.ends | stop_tokens(loaded.tokenizer, sampling.stop)
        stopped = stopper(loaded.tokenizer, sampling.stop)
        extra: dict[str, Any] = {}
        if stopped is not None:
            extra = {"stop_strings": list(sampling.stop)}
            extra["tokenizer"] = loaded.tokenizer
        if sampling.samples:
            torch.manual_seed(prompts[0].seed)
        settings = loaded.settings(sampling)
        if sampling.samples:
            settings = {"top_k": 0, **settings}
        if least := settings.pop("min_length", None):  # prompt and answer; all prompts are as long
            settings["min_new_tokens"] = max(least - longest, settings.get("min_new_tokens") or 0)
        if settings.get("min_new_tokens", 0) > sampling.max_new_tokens:
            settings["min_new_tokens"] = sampling.max_new_tokens
        numbers = _Numbers()
        output = loaded.model.generate(
            input_ids=ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            generation_config=GenerationConfig(
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
                max_new_tokens=sampling.max_new_tokens,
                do_sample=sampling.samples,
                **settings,
            ),
            logits_processor=LogitsProcessorList([numbers]),
            **extra,
        )
        new = output[:, longest:].tolist()
        answers = [
            _read(prompt.number, row, ends, stopped, numbers.wrong.get(place))
            for place, (prompt, row) in enumerate(zip(prompts, new, strict=True))
        ]
        self.work.prompt += int(mask.sum())
        self.work.padding += mask.numel() - int(mask.sum())
        self.work.new += sum(len(answer.tokens) for answer in answers)
        self.work.steps += len(new[0])
        self.work.row_steps += len(new[0]) * len(new)
        return answers


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


def _read(
    number: int,
    fresh: list[int],
    ends: frozenset[int],
    stopped: Callable[[list[int]], str | None] | None,
    wrong: int | None,
) -> Answer:
    """What a row of generate's new tokens says; `wrong`: the first whose scores are no numbers."""
    stop = next((place for place, token in enumerate(fresh) if token in ends), None)
    tokens = fresh if stop is None else fresh[:stop]
    if wrong is not None and wrong <= len(tokens):
        return Answer(number, tokens[:wrong], "not numbers")
    if stopped is not None:
        for count in range(1, len(tokens) + 1):  # what follows, the row's neighbours went on for
            if (text := stopped(tokens[:count])) is not None:
                return Answer(number, tokens[:count], "stop", text)
    return Answer(number, tokens, "length" if stop is None else "stop")


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


def _tokens_that_fit(loaded: Loaded) -> int:
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
