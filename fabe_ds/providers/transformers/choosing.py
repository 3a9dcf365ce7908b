"""A choice of a local model: scored, not generated.

The choices' tokens are a tree; where it branches, the model's probabilities of the branches are
made to add up to one, and the probability of a choice is the product along its way. It is what
decoding that can only give a choice would give, and needs no step of decoding: mostly the scores
behind the prompt are enough.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from fabe_ds.providers.transformers.attention import Prompt

Way = tuple[int, ...]
"""The tokens that lead to a node of the tree."""
_END = -1
"""Stands, among the branches of a node, for the end of the answer."""


class Scores(NamedTuple):
    """Scores of the next token behind a prompt and some tokens of the tree, [vocabulary] each."""

    number: int
    at: Mapping[Way, torch.Tensor]


class Tree:
    """The choices as token ids."""

    def __init__(self, choices: Mapping[str, Sequence[int]], ends: Collection[int]) -> None:
        self.tokens = {choice: tuple(ids) for choice, ids in choices.items()}
        self._ends = sorted(ends)
        branches: dict[Way, dict[int, None]] = {}
        for ids in self.tokens.values():
            for length, token in enumerate((*ids, _END)):
                branches.setdefault(ids[:length], {})[token] = None
        self.branches = {way: list(next_) for way, next_ in branches.items() if len(next_) > 1}
        """The nodes at which there is something to choose, each with its tokens."""

    @property
    def ways(self) -> list[Way]:
        """The longest ways to branching nodes, on which all the others lie; shortest first."""
        inner = {way[:length] for way in self.branches for length in range(len(way))}
        return sorted((way for way in self.branches if way not in inner), key=len)

    def chances(self, node: Way, scores: torch.Tensor) -> dict[int, float]:
        """The logarithm of each branch's probability among those of a node."""
        # A model that has no end token cannot end where a longer choice goes on.
        tokens = [token for token in self.branches[node] if token != _END or self._ends]
        picked = [
            torch.logsumexp(scores[self._ends].float(), 0) if token == _END else scores[token]
            for token in tokens
        ]
        logs = torch.log_softmax(torch.stack([score.float() for score in picked]), 0)
        return dict(zip(tokens, logs.tolist(), strict=True))

    def totals(
        self, known: Mapping[Way, Mapping[int, float]]
    ) -> tuple[dict[str, float], dict[str, list[Way]]]:
        """The logarithm of each choice's probability as far as nodes are known, which is a bound
        where they are not; and the unknown nodes on the way of each choice."""
        totals: dict[str, float] = {}
        unknown: dict[str, list[Way]] = {}
        for choice, ids in self.tokens.items():
            total, missing = 0.0, []
            for length, token in enumerate((*ids, _END)):
                node = ids[:length]
                if node not in self.branches:
                    continue
                if node in known:
                    total += known[node].get(token, -math.inf)
                else:
                    missing.append(node)
            totals[choice], unknown[choice] = total, missing
        return totals, unknown


class Choice(NamedTuple):
    """What was chosen for a prompt: the logarithms of the choices' probabilities, the likeliest
    choice or one drawn by them."""

    number: int
    choice: str
    logprobs: dict[str, float]


def draw(logprobs: Mapping[str, float], temperature: float, seed: int) -> str:
    """One of the choices, at random by their probabilities. `seed`: the row's own."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.softmax(torch.tensor(list(logprobs.values())) / max(temperature, 1e-6), 0)
    return list(logprobs)[int(torch.multinomial(weights, 1, generator=generator))]


class Rounds:
    """Asks for scores until each prompt's choice is known. A round has one way for each prompt."""

    def __init__(self, tree: Tree, prompts: Sequence[Prompt], temperature: float | None) -> None:
        """`temperature`: of drawing; None takes the likeliest choice."""
        self._tree, self._temperature = tree, temperature
        self._prompts = {prompt.number: prompt for prompt in prompts}
        self._known: dict[int, dict[Way, dict[int, float]]] = {n: {} for n in self._prompts}
        first = tree.ways[0] if tree.ways else ()
        self.wanted = dict.fromkeys(self._prompts, first)
        """For each prompt that is not decided, the way behind it to score next."""

    def take(self, scores: Scores) -> Choice | None:
        """The prompt's choice, where it is known now; else another way of it is wanted.

        Raises: ValueError where scores are not numbers.
        """
        number, tree = scores.number, self._tree
        known = self._known[number]
        known |= {
            node: tree.chances(node, found)
            for node, found in scores.at.items()
            if node in tree.branches
        }
        if any(math.isnan(chance) for node in known.values() for chance in node.values()):
            raise ValueError("scores are not numbers")
        totals, unknown = tree.totals(known)
        ahead = max(totals, key=totals.__getitem__)
        missing = unknown[ahead]
        if self._temperature is not None:
            missing = [node for node in tree.branches if node not in known]
        if missing:
            node = missing[-1]
            self.wanted[number] = next(w for w in tree.ways if w[: len(node)] == node)
            return None
        del self.wanted[number]
        choice = ahead
        if self._temperature is not None:
            choice = draw(totals, self._temperature, self._prompts[number].seed)
        # The others are known as bounds only, where it was not worth while to know more.
        exact = {name: total for name, total in totals.items() if not unknown[name]}
        return Choice(number, choice, exact)

    def sequences(self) -> Iterator[tuple[Prompt, Way]]:
        """The prompts that are not decided, each with the way to score."""
        for number, way in self.wanted.items():
            yield self._prompts[number], way
