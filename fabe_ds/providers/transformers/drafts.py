"""Drafts of a row's next tokens, copied from where its newest tokens stood before.

Rewriting copies: what the record and the answer so far went on with, where they had the same
tokens, is often what the model says next. All drafted tokens are verified in one forward, as in
prompt lookup decoding and in speculative decoding (Leviathan et al. 2023, arXiv:2211.17192); a
token is kept only where the model chose it too, so that answers are what they are without drafts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

LONGEST = 16  # drafted tokens
_LOOK = 32  # earlier places of a token that are looked at, newest first
_MATCH = 16  # tokens of a match that are told apart
_PRIOR = (0.3, 0.55, 0.7, 0.75, 0.8, 0.85, 0.85, 0.9)
"""Chances that the next token is copied where so many tokens match, 1 first: of a model of 135M
that rewrites functions. What a run finds out soon counts for more."""
_PRIOR_WEIGHT = 8.0
_ROW_WEIGHT = 2.0
_FORGETS = 0.9
_SHARE = 0.5
"""What a position more costs, as a share of a position's mean cost, before it is known."""
_STEP_FORGETS = 0.97
_KNOWN = 3  # steps of a kind whose cost is known
_TRIES = 24  # steps after which the kind is tried that seems worse

Speculation = Literal["auto", "off"] | int


class Copies:
    """One row's tokens, and where each stood. `expected`, `missed`: how surely drafts of this row
    were to be right, and how many were wrong, lately."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._places: dict[int, list[int]] = {}
        self.expected = self.missed = 0.0
        self.matched = 0  # tokens that the newest draft follows
        for token in ids:
            self.take(token)

    def take(self, token: int) -> None:
        """Takes the row's next token in."""
        self._places.setdefault(token, []).append(len(self._tokens))
        self._tokens.append(token)

    def find(self) -> int:
        """The place after the longest match of the newest tokens, the newest of these; 0 where
        there is none. `matched` becomes its length."""
        tokens, last = self._tokens, len(self._tokens) - 1
        best = found = 0
        for place in self._places[tokens[last]][-2 : -_LOOK - 2 : -1]:
            length = 1
            while (
                length < _MATCH
                and length <= place
                and tokens[place - length] == tokens[last - length]
            ):
                length += 1
            if length > best:
                best, found = length, place + 1
        self.matched = best
        return found

    def copied(self, place: int, count: int) -> list[int]:
        """What follows from a place on; a copy that reaches the end goes on with itself."""
        tokens, draft = self._tokens, self._tokens[place : place + count]
        while len(draft) < count:
            draft.append(draft[place + len(draft) - len(tokens)])
        return draft


class Drafts:
    """How many tokens are drafted: by how likely they are kept, and what they cost here.

    `most`: a number drafts as many wherever something matches; "auto" as many as pay: a token is
    worth its place in a step where its chance of being kept is above what a place more in a step
    costs, as a share of what a token costs now; and a step has drafts where they give more tokens
    a second than none.
    """

    def __init__(self, most: Speculation = "auto") -> None:
        self.most = 0 if most == "off" else LONGEST if most == "auto" else most
        self._learns = most == "auto"
        self._hits = [_PRIOR_WEIGHT * chance for chance in (*_PRIOR, *[0.92] * _MATCH)[:_MATCH]]
        self._tries = [_PRIOR_WEIGHT] * _MATCH
        self.costs = StepCosts()

    def draft(self, rows: Sequence[Copies], room: Sequence[int]) -> list[list[int]]:
        """What each row may go on with, `room` tokens at most, in the next step."""
        found = [self._of(*given) for given in zip(rows, room, strict=True)]
        drafts = [draft for draft, _ in found]
        if self._learns and any(drafts):
            kept = sum(expected for _, expected in found)
            if not self.costs.pays(len(rows), sum(map(len, drafts)), kept):
                return [[] for _ in rows]
        return drafts

    def _of(self, row: Copies, room: int) -> tuple[list[int], float]:
        """A row's draft, and how many of it will be kept on average."""
        most, expected = min(self.most, room), 0.0
        if most <= 0 or not (place := row.find()):
            return [], 0.0
        if self._learns:
            least, lean = self.costs.least_chance, self._lean(row)
            chance, worth = 1.0, 0
            while worth < most:
                chance *= self._chance(row.matched + worth) ** lean
                if chance < least:
                    break
                expected += chance
                worth += 1
            most = worth
        return row.copied(place, most) if most else [], expected

    def learn(self, row: Copies, drafted: int, kept: int) -> None:
        """What became of a draft."""
        for token in range(min(kept + 1, drafted)):
            length = min(row.matched + token, _MATCH)
            row.expected = _FORGETS * row.expected - math.log(self._chance(length))
            row.missed = _FORGETS * row.missed + (token >= kept)
            self._tries[length - 1] += 1
            self._hits[length - 1] += token < kept

    def _chance(self, length: int) -> float:
        """That one more token is copied where so many match."""
        length = min(length, _MATCH) - 1
        return min(0.99, max(0.01, self._hits[length] / self._tries[length]))

    @staticmethod
    def _lean(row: Copies) -> float:
        """The power of all chances that is right for one row: above 1 where it copies less."""
        return (row.missed + _ROW_WEIGHT) / (row.expected + _ROW_WEIGHT)


class _Line:
    """Seconds of a step by its positions: a line through the steps lately taken, whose slope counts
    for more the more their widths differ."""

    def __init__(self) -> None:
        self.steps = 0
        self._sums = [0.0] * 5  # of 1, positions, seconds, and products with positions

    def took(self, positions: int, seconds: float) -> bool:
        """Whether the step counts: not one beside which the machine did something else."""
        count, _, total, _, _ = self._sums
        if self.steps > 4 and seconds > 4 * total / count:
            return False
        self.steps += 1
        new = (1.0, positions, seconds, positions * positions, positions * seconds)
        self._sums = [_STEP_FORGETS * old + more for old, more in zip(self._sums, new, strict=True)]
        return True

    @property
    def slope(self) -> float:
        """Seconds that a position more takes."""
        count, width, total, squares, products = self._sums
        spread = max(0.0, squares / count - (width / count) ** 2)
        found = (products / count - width * total / count**2) / spread if spread > 1e-9 else 0.0
        trust = spread * count / (spread * count + (0.3 * width / count) ** 2)
        share = trust * found * width / total + (1 - trust) * _SHARE
        return min(0.95, max(0.02, share)) * total / width

    def at(self, positions: int) -> float:
        """Seconds that a step of so many takes."""
        count, width, total, _, _ = self._sums
        return total / count + self.slope * (positions - width / count)


class StepCosts:
    """What steps cost here, with drafts and without, which take other ways through attention."""

    def __init__(self) -> None:
        self.least_chance = 0.5 * _SHARE
        """Of a token that is worth a place."""
        self._plain, self._wide = _Line(), _Line()
        self._steps = 0
        self._kept = self._seconds = 0.0  # lately: new tokens, and what they took

    def took(self, rows: int, positions: int, tokens: int, seconds: float) -> None:
        """A step of so many rows, at so many positions, gave so many tokens."""
        self._steps += 1
        if not (self._plain if positions == rows else self._wide).took(positions, seconds):
            return
        self._kept = _STEP_FORGETS * self._kept + tokens
        self._seconds = _STEP_FORGETS * self._seconds + seconds
        if self._wide.steps:
            rate = self._kept / self._seconds
            self.least_chance = min(0.9, max(0.02, self._wide.slope * rate))

    def pays(self, rows: int, drafted: int, kept: float) -> bool:
        """Whether drafts that will give so many tokens more are worth their step; now and then what
        seems worse is tried, to know."""
        if min(self._plain.steps, self._wide.steps) < _KNOWN:
            return self._wide.steps <= self._plain.steps
        plain, wide = max(1e-9, self._plain.at(rows)), max(1e-9, self._wide.at(rows + drafted))
        better = (rows + kept) / wide > rows / plain
        return better if self._steps % _TRIES else not better
