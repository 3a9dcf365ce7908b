"""Token ids in, answers out, with a model that transformers has loaded in this process."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from fabe_ds.errors import RecordFailed, RunStopped
from fabe_ds.providers.transformers.agreement import (
    NO_NUMBERS,
    Limits,
    Stretch,
    Together,
    attention_of,
    loop_agrees,
    padded,
    takes_together,
)
from fabe_ds.providers.transformers.amendments import LEFT, LEFT_SAMPLING
from fabe_ds.providers.transformers.attention import ATTENTION, Answer, DecodingRules, Prompt
from fabe_ds.providers.transformers.checkpoint import context
from fabe_ds.providers.transformers.decoder import Decoder, Room, Work
from fabe_ds.providers.transformers.drafts import Drafts
from fabe_ds.providers.transformers.grammar import GrammarProcessor
from fabe_ds.providers.transformers.loaded_model import (
    _OF_ALL_IDS,
    LoadedModel,
    _Numbers,
    _out_of_memory,
    _processors,
    _restore,
    _said,
    _tokens_that_fit,
)
from fabe_ds.providers.transformers.packing import Packing
from fabe_ds.providers.transformers.stops import stop_tokens, stopper
from fabe_ds.request import Sampling

log = logging.getLogger(__name__)

Given = tuple[int, Answer | RecordFailed]
"""The index of a prompt, and what became of it."""

"""Values beside None, 0 and False that say the same as no value."""
_EQUAL = "padding changes this model's answers: prompts of one length are answered together"
_ALONE = "what stands beside changes this model's answers: prompts are answered one by one"
_FEW = 8  # rows
_HOPELESS = 3  # records that fail in the model's own code before anything is answered


class Generation:
    """Answers prompts; runs out of memory at most once for each size of batch."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.work = Work()
        self.room = Room(loaded.rows, loaded.most_tokens or _tokens_that_fit(loaded))
        if loaded.device.startswith("cuda"):
            self.room.prefill = 16384
        self.limits = Limits.of(loaded.model.config)
        self._packing = Packing(loaded.model, loaded.device)
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
                        yield [(answer.number, self.sound(answer)) for answer in answers]
                except RunStopped:
                    raise
                except Exception as error:  # models' own code raises what it likes
                    first = next(iter(waiting.values()))
                    if _out_of_memory(error):
                        self.free_memory()
                        rows = self.rows_at_once(first, sampling)
                        if rows > 1:
                            log.warning("out of memory with %d records at once; trying half", rows)
                            self.room = replace(self.room, rows=rows // 2)
                            continue
                        failure = RecordFailed("memory", "out of memory with this record alone")
                    elif not alone and len(waiting) > 1:
                        log.warning("decoding went wrong (%s); trying one by one", _said(error))
                        alone = True
                        self.free_memory()
                        continue
                    else:
                        failure = self.failed(error)
                    del waiting[first.number]
                    yield [(first.number, failure)]

    def sound(self, answer: Answer) -> Answer | RecordFailed:
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

    def failed(self, error: Exception) -> RecordFailed:
        self._broken += 1
        if not self._answered and self._broken >= _HOPELESS:
            raise RunStopped(f"the model fails at whatever it is asked: {_said(error)}")
        return RecordFailed("model", f"the model failed: {_said(error)}")

    def rows_at_once(self, longest: Prompt, sampling: Sampling) -> int:
        fitting = self.room.tokens // (len(longest.ids) + sampling.max_new_tokens)
        return max(1, min(self.room.rows, fitting))

    def _run(self, prompts: list[Prompt], sampling: Sampling) -> Iterator[list[Answer]]:
        stretches = {p.number: self.stretch(p, sampling) for p in prompts}
        settings = self.loaded.settings(sampling)
        left = [name for name in settings if name in (*LEFT, *LEFT_SAMPLING)]
        loops = not left and self.own_loop
        if loops:
            short = [p for p in prompts if stretches[p.number].kind == "short"]
            if short:
                yield from self.decoding(sampling).run(short)
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

    def stretch(self, prompt: Prompt, sampling: Sampling) -> Stretch:
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

    def notes(self) -> list[str]:
        """A line for each reason for which records were not answered by our own loop, with how
        many there were, or not many at once."""
        left = [
            f"{count} records were answered by transformers' generate: {why}"
            for why, count in self._left.items()
        ]
        return [*left, *self._notes]

    def decoding(self, sampling: Sampling) -> Decoder:
        loaded = self.loaded
        plan = DecodingRules(
            sampling.max_new_tokens,
            loaded.ends | stop_tokens(loaded.tokenizer, sampling.stop),
            sampling.is_sampling,
            *_processors(loaded.settings(sampling)),
            stopper(loaded.tokenizer, sampling.stop),
        )
        if self._decoder is None:
            pad = loaded.tokenizer.pad_token_id
            self._packing.pack(self.room.rows)
            # Few rows leave a processor waiting for memory; many keep it busy without drafts.
            drafts = Drafts(loaded.speculate, _FEW if loaded.device == "cpu" else 1 << 30)
            self._decoder = Decoder(
                loaded.model, plan, self.room, pad, loaded.device, self.work, drafts
            )
        self._decoder.plan, self._decoder.room = plan, self.room
        return self._decoder

    def free_memory(self) -> None:
        if self._decoder is not None:
            self._decoder.release()
        gc.collect()
        if self.loaded.device.startswith("cuda"):
            torch.cuda.empty_cache()

    # Where our own loop does not serve: transformers' generate, one batch after another.

    def _generated(
        self, prompts: list[Prompt], sampling: Sampling, stretch: Stretch
    ) -> Iterator[list[Answer]]:
        together = self.may_go_together(stretch, sampling)
        start = 0
        while start < len(prompts):
            first = prompts[start]
            # generate() has one random state for all rows; a row of its own has its own seed.
            alone = sampling.is_sampling or together == "alone"
            size = 1 if alone else self.rows_at_once(first, sampling)
            batch = prompts[start : start + size]
            if together == "equal":
                batch = [p for p in batch if len(p.ids) == len(first.ids)]
            yield self.generate(batch, sampling)
            start += len(batch)

    def may_go_together(self, stretch: Stretch, sampling: Sampling) -> Together:
        if self.room.rows == 1 or sampling.is_sampling:
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
            with self._packing.undone(self.room.rows):
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
        if sampling.is_sampling:
            torch.manual_seed(prompts[0].seed)
        settings = loaded.settings(sampling)
        if sampling.is_sampling:
            settings = {"top_k": 0, **settings}
        if least := settings.pop("min_length", None):  # prompt and answer; all prompts are as long
            settings["min_new_tokens"] = max(least - longest, settings.get("min_new_tokens") or 0)
        if settings.get("min_new_tokens", 0) > sampling.max_new_tokens:
            settings["min_new_tokens"] = sampling.max_new_tokens
        numbers = _Numbers()
        processors = LogitsProcessorList([numbers])
        if any(prompt.grammar is not None for prompt in prompts):
            matchers = [p.grammar.fresh() if p.grammar is not None else None for p in prompts]
            processors.append(GrammarProcessor(matchers, longest))
        output = loaded.model.generate(
            input_ids=ids.to(loaded.device),
            attention_mask=mask.to(loaded.device),
            generation_config=GenerationConfig(
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
                max_new_tokens=sampling.max_new_tokens,
                do_sample=sampling.is_sampling,
                **settings,
            ),
            logits_processor=processors,
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
