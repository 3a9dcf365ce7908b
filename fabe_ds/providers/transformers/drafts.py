"""Drafts of a row's next tokens, copied from where its newest tokens stood before.

Rewriting copies: what the record and the answer so far went on with, where they had the same
tokens, is often what the model says next. All drafted tokens are verified in one forward, as in
prompt lookup decoding and in speculative decoding (Leviathan et al. 2023, arXiv:2211.17192); a
token is kept only where the model chose it too, so that answers are what they are without drafts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
_RATE_FORGETS = 0.7
_ODD = 3.0  # a step that took so many times what was expected counts as that
_KNOWN = 2  # steps of a kind whose rate is known
_TRIES, _MOST_TRIES = 24, 768
"""Steps after which the kind is tried that seems worse: twice as many each time that it is worse
again. A try costs more than a step: of a shape that is new, it is made ready first."""

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

    def __init__(self, most: Speculation = "auto", promising: int = 1 << 30) -> None:
        """`promising`: rows up to which drafts are expected to pay, before it is known."""
        self.most = 0 if most == "off" else LONGEST if most == "auto" else most
        self._learns = most == "auto"
        self._hits = [_PRIOR_WEIGHT * chance for chance in (*_PRIOR, *[0.92] * _MATCH)[:_MATCH]]
        self._tries = [_PRIOR_WEIGHT] * _MATCH
        self.costs = StepCosts(promising)

    def draft(self, rows: Sequence[Copies], room: Sequence[int]) -> list[list[int]]:
        """What each row may go on with, `room` tokens at most, in the next step."""
        if self._learns and not self.costs.pays(len(rows)):
            return [[] for _ in rows]
        return [self._of(*given) for given in zip(rows, room, strict=True)]

    def _of(self, row: Copies, room: int) -> list[int]:
        most = min(self.most, room)
        if most <= 0 or not (place := row.find()):
            return []
        if self._learns:
            least, lean = self.costs.least_chance, self._lean(row)
            chance, worth = 1.0, 0
            while worth < most:
                chance *= self._chance(row.matched + worth) ** lean
                if chance < least:
                    break
                worth += 1
            most = worth
        return row.copied(place, most) if most else []

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


class _Rate:
    """Tokens a second of the steps of one kind, lately."""

    def __init__(self) -> None:
        self.steps = 0
        self._tokens = self._seconds = 0.0

    @property
    def known(self) -> float:
        return self._tokens / self._seconds

    def took(self, tokens: int, seconds: float) -> None:
        if self.steps >= _KNOWN:  # beside an odd step the machine did something else
            seconds = min(seconds, _ODD * tokens / self.known)
        self.steps += 1
        self._tokens = _RATE_FORGETS * self._tokens + tokens
        self._seconds = _RATE_FORGETS * self._seconds + seconds


@dataclass(slots=True)
class _Trial:
    """When the kind of step that seems worse is tried next, by the number of steps."""

    due: int
    better: bool
    pause: int = _TRIES


class StepCosts:
    """What steps give here, with drafts and without, by how many rows they have."""

    def __init__(self, promising: int = 1 << 30) -> None:
        self.promising = promising
        self.least_chance = 0.5 * _SHARE
        """Of a token that is worth a place."""
        self._rates: dict[tuple[int, bool], _Rate] = {}  # by the binary digits of rows; with drafts
        self._trials: dict[int, _Trial] = {}
        self._sums = [0.0] * 6  # of 1, positions, seconds, tokens, and products with positions
        self._steps = 0

    def took(self, rows: int, positions: int, tokens: int, seconds: float) -> None:
        """A step of so many rows, at so many positions, gave so many tokens."""
        self._steps += 1
        drafting = positions > rows
        self._surprise(rows, drafting, tokens / max(seconds, 1e-9))
        self._rate(rows, drafting).took(tokens, seconds)
        if drafting:
            self._weigh(positions, tokens, seconds)

    def pays(self, rows: int) -> bool:
        """Whether a step of so many rows gives more tokens a second with drafts; now and then what
        seems worse is tried, to know."""
        plain, drafting = self._rate(rows, False), self._rate(rows, True)
        if min(plain.steps, drafting.steps) >= _KNOWN:
            better = drafting.known > plain.known
        elif rows <= self.promising:
            return drafting.steps <= plain.steps
        else:
            better = False
        return better != self._is_try(rows, better)

    def _surprise(self, rows: int, drafting: bool, rate: float) -> None:
        """Where a step of the kind that seemed worse gave more, it is tried again at once."""
        trial = self._trials.get(rows.bit_length())
        if trial is None or drafting == trial.better:
            return
        best = self._rate(rows, trial.better)
        if best.steps >= _KNOWN and rate > best.known:
            trial.pause, trial.due = _TRIES, self._steps + 1

    def _is_try(self, rows: int, better: bool) -> bool:
        """Whether the next step is of the kind that seems worse, to know. `better`: that with
        drafts seems to give more."""
        trial = self._trials.setdefault(rows.bit_length(), _Trial(self._steps + _TRIES, better))
        if trial.better != better:  # something has changed, and may change again
            trial.better, trial.pause = better, _TRIES
            trial.due = self._steps + _TRIES
        if self._steps < trial.due:
            return False
        known = min(self._rate(rows, drafting).steps for drafting in (False, True)) >= _KNOWN
        trial.pause = min(2 * trial.pause, _MOST_TRIES) if known else _TRIES
        trial.due = self._steps + trial.pause
        return True

    def _rate(self, rows: int, drafting: bool) -> _Rate:
        return self._rates.setdefault((rows.bit_length(), drafting), _Rate())

    def _weigh(self, positions: int, tokens: int, seconds: float) -> None:
        """Fits a line to what steps with drafts took by their positions: one position more costs
        its slope, which counts for more the more the positions differ."""
        new = (1, positions, seconds, tokens, positions * positions, positions * seconds)
        self._sums = [_STEP_FORGETS * old + more for old, more in zip(self._sums, new, strict=True)]
        count, width, total, kept, squares, products = self._sums
        spread = max(0.0, squares / count - (width / count) ** 2)
        slope = (products / count - width * total / count**2) / spread if spread > 1e-9 else 0.0
        trust = spread * count / (spread * count + (0.3 * width / count) ** 2)
        share = trust * slope * width / total + (1 - trust) * _SHARE
        self.least_chance = min(0.9, max(0.02, share)) * min(1.0, kept / width)
