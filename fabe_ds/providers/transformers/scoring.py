"""Choices of a loaded model: the scores of what may follow prompts, and no decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from fabe_ds.errors import RecordFailed, RunStopped
from fabe_ds.providers.transformers.attention import Answer, Prompt
from fabe_ds.providers.transformers.choosing import Choice, Rounds, Scores, Tree, Way
from fabe_ds.providers.transformers.generation import Generation
from fabe_ds.providers.transformers.loaded_model import _out_of_memory
from fabe_ds.request import Sampling

_ONE_TOKEN = Sampling(max_new_tokens=1)
Sequences = Sequence[tuple[Prompt, Way]]
"""Prompts, each with tokens of choices behind it."""


class Scoring:
    """Chooses for prompts; where memory is short, for fewer at once."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def chosen(
        self, prompts: Sequence[Prompt], tree: Tree, temperature: float | None
    ) -> Iterator[list[tuple[int, Choice | RecordFailed]]]:
        """The choice for each prompt. `temperature`: of drawing; None takes the likeliest.

        Raises: RunStopped where the model gives no numbers, or fails at all that it is given.
        """
        rounds = Rounds(tree, prompts, temperature)
        with torch.inference_mode():
            while rounds.wanted:
                try:
                    for scores in self._scores(list(rounds.sequences())):
                        yield list(filter(None, (self._choice(rounds, each) for each in scores)))
                except RunStopped:
                    raise
                except Exception as error:  # models' own code raises what it likes
                    if not self._takes_fewer(error):
                        number = next(iter(rounds.wanted))
                        del rounds.wanted[number]
                        yield [(number, self._generation.failed(error))]

    def _takes_fewer(self, error: Exception) -> bool:
        """Whether memory was short, and fewer prompts are tried at once from now on."""
        generation = self._generation
        if not _out_of_memory(error):
            return False
        generation.free_memory()
        room = generation.room
        if room.rows == 1:
            return False
        generation.room = replace(room, rows=room.rows // 2, prefill=max(1, room.prefill // 2))
        return True

    def _choice(self, rounds: Rounds, scores: Scores) -> tuple[int, Choice | RecordFailed] | None:
        try:
            choice = rounds.take(scores)
        except ValueError:
            del rounds.wanted[scores.number]
            failed = self._generation.sound(Answer(scores.number, [], "not numbers"))
            assert isinstance(failed, RecordFailed)
            return scores.number, failed
        return None if choice is None else (scores.number, choice)

    def _scores(self, given: Sequences) -> Iterator[list[Scores]]:
        """Scores behind prompts, and behind each token of the ways behind them."""
        generation = self._generation
        if not generation.loaded.plain and generation.own_loop and self._are_short(given):
            prompts, ways = [prompt for prompt, _ in given], [way for _, way in given]
            yield from generation.decoding(_ONE_TOKEN).scored(prompts, ways)
            return
        stretch = generation.stretch(given[0][0], _ONE_TOKEN)
        together = generation.may_go_together(stretch, _ONE_TOKEN)
        # Of one length alone: nothing is padded.
        ordered = sorted(given, key=_length)
        for _, group in groupby(ordered, key=_length):
            alike = list(group)
            size = 1
            if together != "alone":
                size = generation.rows_at_once(alike[0][0], _ONE_TOKEN)
            for start in range(0, len(alike), size):
                yield self._forwarded(alike[start : start + size])

    def _are_short(self, given: Sequences) -> bool:
        """Whether our own loop computes all of these as the model does."""
        limits = self._generation.limits
        return all(limits.stretch(len(p.ids), len(way) + 1).kind == "short" for p, way in given)

    def _forwarded(self, given: Sequences) -> list[Scores]:
        """Scores of sequences of one length, by the model's own forward."""
        loaded = self._generation.loaded
        ids = torch.tensor([[*prompt.ids, *way] for prompt, way in given], device=loaded.device)
        logits = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = []
        for number, (prompt, way) in enumerate(given):
            first = len(prompt.ids) - 1
            at = {way[:n]: logits[number, first + n] for n in range(len(way) + 1)}
            found.append(Scores(prompt.number, at))
        return found


def _length(pair: tuple[Prompt, Way]) -> int:
    return len(pair[0].ids) + len(pair[1])
