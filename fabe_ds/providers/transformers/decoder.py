"""Decodes many prompts at once: a loop of our own around a transformers model's forward.

What generate() does for one padded batch, this does for a stream of prompts: the beginning they
share is computed once, the rest in small groups of like length, and then all rows take their
steps together, several tokens at once where these are copied (see drafts). Rows that end leave, and
blocks of new ones take their places.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fabe_ds.providers.transformers.attention import (
    ALIGN,
    ATTENTION,
    NOT_NUMBERS,
    Answer,
    DecodingRules,
    Prompt,
    _Attended,
    _attention,
    _Block,
    _Part,
    _Row,
)
from fabe_ds.providers.transformers.choosing import Scores, Way
from fabe_ds.providers.transformers.drafts import Copies, Drafts
from fabe_ds.providers.transformers.grammar import constrained

BLOCK = 16  # rows, on a CPU: fewer are less padding, more are fewer and larger products
EVEN = 8  # tokens of a step with drafts, on a CPU: each new shape of a product is compiled anew
ALIKE = 0.7  # a block's shortest row takes at least this much of what its longest takes


@dataclass
class Room:
    """What fits: rows at once, and tokens of all of them together, answers included."""

    rows: int
    tokens: int
    prefill: int = 1024
    """Tokens of one group of new prompts; more of them is more padding, fewer is slower."""


@dataclass
class Work:
    """What was computed, for the benchmark: counts of tokens, and steps."""

    prefix: int = 0
    prompt: int = 0
    padding: int = 0
    new: int = 0
    steps: int = 0
    row_steps: int = 0
    drafted: int = 0


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


@dataclass
class Decoder:
    """Runs one model. Kept from one stream of prompts to the next: `shared`, the ids of the
    beginning that was computed last, `work` and `sound`."""

    model: Any
    plan: DecodingRules
    room: Room
    pad: int
    device: Any
    work: Work = field(default_factory=Work)
    drafts: Drafts = field(default_factory=Drafts)
    sound: bool = False
    """Whether any row's scores were numbers yet."""
    _attended: _Attended = field(default_factory=_Attended)
    _shared: list[int] = field(default_factory=list)
    _cache_name: str = ""  # of forward's parameter

    def __post_init__(self) -> None:
        # transformers 5.24 renamed it and warns of the old name, which a model's own code may keep.
        takes = inspect.signature(self.model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"

    def run(self, prompts: Iterable[Prompt]) -> Iterator[list[Answer]]:
        """The answers, as rows end. Longest prompts first shows at once whether memory is short.

        Raises: RuntimeError where it is; what was not answered can be run again.
        """
        waiting = list(prompts)[::-1]
        if not waiting:
            return
        self._begin(_common_prefix([prompt.ids for prompt in waiting]))
        blocks: list[_Block] = []
        while waiting or blocks:
            while waiting and (group := self._fitting(waiting, blocks)):
                blocks.append(self._new_block(group))
                if ended := self._leave(blocks[-1:]):
                    yield ended
            blocks = [block for block in blocks if block.rows]
            if blocks:
                self._step(blocks)
                if ended := self._leave(blocks):
                    yield ended
                blocks = [block for block in blocks if block.rows]

    def release(self) -> None:
        """Gives the memory up that is kept from one run to the next."""
        self._attended, self._shared = _Attended(), []

    def _begin(self, prefix: list[int]) -> None:
        """Computes the shared beginning, where it is another one than before."""
        if prefix == self._shared:
            return
        self.release()
        if prefix:
            self._attended.begins = True
            ids = torch.tensor([prefix], device=self.device)
            self._forward(ids, torch.arange(len(prefix), device=self.device)[None], 1)
            self._attended.begins = False
            self.work.prefix += len(prefix)
        self._shared = prefix

    def _length(self, prompt: Prompt) -> int:
        """Places that a prompt and its answer take after the shared beginning."""
        own = len(prompt.ids) - len(self._shared)
        return -(-(own + self.plan.most_new) // ALIGN) * ALIGN

    def _fitting(self, waiting: list[Prompt], blocks: list[_Block]) -> list[Prompt]:
        """Takes the prompts of the next block out of those that wait: none while there is too
        little room for one worth its while."""
        most = min(self.room.rows // 2 or 1, len(waiting))
        if self._on_cpu:
            most = min(most, BLOCK)
        free = self.room.rows - sum(len(block.rows) for block in blocks)
        length = self._length(waiting[-1])
        tokens = self.room.tokens - len(self._shared) - sum(block.tokens for block in blocks)
        fitting = tokens // (length + self._copied)
        if not blocks:
            fitting = max(1, fitting)
        if free < most or fitting < (most if blocks else 1):
            return []
        group: list[Prompt] = []
        while waiting and len(group) < min(most, fitting):
            if self._length(waiting[-1]) < ALIKE * length and len(group) > 1:
                break
            group.append(waiting.pop())
        return group

    @property
    def _copied(self) -> int:
        """Tokens of the shared beginning that each row has a copy of: on a GPU, where a step takes
        as long as it takes to start what it consists of, attention is one call so."""
        return 0 if self._on_cpu else len(self._shared)

    @property
    def _on_cpu(self) -> bool:
        return str(self.device) == "cpu"

    def _block(self, rows: list[_Row], length: int) -> _Block:
        copied = None if self._on_cpu else self._copied
        return _Block(rows, length, self.model.dtype, self.device, copied)

    def _new_block(self, prompts: list[Prompt]) -> _Block:
        """Computes prompts, a few of like length at a time, and their first new tokens."""
        rows = [_Row(prompt, self.plan, self.device) for prompt in prompts]
        length = max(map(self._length, prompts))
        block = self._block(rows, length)
        first = 0
        while first < len(rows):
            widths = [len(row.prompt.ids) - len(self._shared) for row in rows[first:]]
            most = max(1, self.room.prefill // widths[0])
            count = sum(width > ALIKE * widths[0] for width in widths[:most])
            part = rows[first : first + count]
            scores = self._prefill(block, first, part)
            self._take(scores, [[number] for number in range(len(part))], part)
            first += len(part)
        if self.drafts.most:
            for row in rows:
                row.copies = Copies([*row.prompt.ids, *row.new])
        return block

    def _prefill(self, block: _Block, first: int, rows: list[_Row]) -> torch.Tensor:
        """Scores of each row's first new token, [rows, vocabulary]."""
        behind = [[len(row.prompt.ids) - 1] for row in rows]
        return torch.stack(
            [scores[0] for scores in self._scores_behind(block, first, rows, behind)]
        )

    def _scores_behind(
        self, block: _Block, first: int, rows: list[_Row], behind: list[list[int]]
    ) -> list[torch.Tensor]:
        """Scores of what follows some tokens of each row's prompt, [tokens, vocabulary] a row."""
        shared = len(self._shared)
        parts = [row.prompt.ids[shared:] for row in rows]
        width = max(map(len, parts))
        ids = torch.full((len(parts), width), self.pad)
        for number, part in enumerate(parts):  # padding stands behind, where nothing looks at it
            ids[number, : len(part)] = torch.tensor(part)
        lengths = torch.tensor([len(part) for part in parts])
        self.work.prompt += int(lengths.sum())
        self.work.padding += ids.numel() - int(lengths.sum())
        self._attended.block, self._attended.first = block, first
        positions = torch.arange(shared, shared + width, device=self.device)[None]
        wanted = sorted({token - shared for tokens in behind for token in tokens})
        keep = torch.tensor(wanted, device=self.device)
        logits = self._forward(ids.to(self.device), positions, keep)
        places = {token: place for place, token in enumerate(wanted)}
        return [
            logits[number, [places[token - shared] for token in tokens]]
            for number, tokens in enumerate(behind)
        ]

    def scored(self, prompts: Sequence[Prompt], ways: Sequence[Way]) -> Iterator[list[Scores]]:
        """For each prompt with the tokens of a way behind it, the scores behind the prompt and
        behind each token of the way. Nothing is decoded."""
        given = sorted(zip(prompts, ways, strict=True), key=lambda pair: -len(pair[0].ids))
        self._begin(_common_prefix([prompt.ids for prompt in prompts]))
        while given:
            widest = len(given[0][0].ids) - len(self._shared) + len(given[0][1])
            most = max(1, min(self.room.rows, self.room.prefill // widest))
            alike = [len(p.ids) - len(self._shared) > ALIKE * widest for p, _ in given[:most]]
            group, given = given[: max(1, sum(alike))], given[max(1, sum(alike)) :]
            whole = [Prompt(p.number, [*p.ids, *way]) for p, way in group]
            rows = [_Row(prompt, self.plan, self.device) for prompt in whole]
            length = max(map(self._length, whole))
            block = self._block(rows, length)
            behind = [list(range(len(p.ids) - 1, len(p.ids) + len(way))) for p, way in group]
            scores = self._scores_behind(block, 0, rows, behind)
            yield [
                Scores(p.number, {way[:n]: found[n] for n in range(len(way) + 1)})
                for (p, way), found in zip(group, scores, strict=True)
            ]

    def _step(self, blocks: list[_Block]) -> None:
        """The next token of every row, and more where its draft was right."""
        started, rows = time.perf_counter(), [row for block in blocks for row in block.rows]
        copies = [row.copies for row in rows if row.copies is not None]
        room = [self.plan.most_new - len(row.new) - 1 for row in rows]
        if copies:
            for row, draft in zip(rows, self.drafts.draft(copies, room), strict=True):
                row.draft = draft
        drafted, before = [len(row.draft) for row in rows], [len(row.new) for row in rows]
        self._take(*self._scores(blocks), rows)
        new = [len(row.new) - had for row, had in zip(rows, before, strict=True)]
        for row, count, more in zip(rows, drafted, new, strict=True):
            if row.copies is not None and row.answer is None:
                self.drafts.learn(row.copies, count, more - 1)
        self.work.steps += 1
        self.work.row_steps += len(rows)
        self.work.drafted += sum(drafted)
        seconds = time.perf_counter() - started
        self.drafts.costs.took(len(rows), len(rows) + sum(drafted), sum(new), seconds)

    def _scores(self, blocks: list[_Block]) -> tuple[torch.Tensor, list[list[int]]]:
        """Scores of what follows each token of the rows' step, [tokens, vocabulary], and where
        those of each row are."""
        shared = len(self._shared)
        parts: list[_Part] = []
        where: list[list[int]] = []
        for block in blocks:
            start = sum(len(part.places) for part in parts)
            more, places = block.step(shared)
            parts += more
            where += [[start + place for place in row] for row in places]
        ids = [0] * sum(map(len, where))
        rows = [row for block in blocks for row in block.rows]
        for row, at in zip(rows, where, strict=True):
            for place, token in zip(at, [row.new[-1], *row.draft], strict=True):
                ids[place] = token
        self._attended.parts, self._attended.block = parts, None
        positions = torch.cat([part.places for part in parts]) + shared - self._copied
        spare = -len(ids) % EVEN if self._on_cpu and len(ids) > len(rows) else 0
        given = torch.tensor(ids + [self.pad] * spare, device=self.device)
        positions = torch.nn.functional.pad(positions, (0, spare))
        return self._forward(given[:, None], positions[:, None], 1)[: len(ids), -1], where

    def _forward(self, ids: Any, positions: Any, logits_to_keep: Any) -> torch.Tensor:
        _Attended.active = self._attended
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, for half a step
        try:
            output = self.model(
                input_ids=ids,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=logits_to_keep,
                **{self._cache_name: self._attended},
            )
        finally:
            _Attended.active = None
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
        logits: torch.Tensor = output.logits
        return logits

    def _choose(self, scores: torch.Tensor, rows: list[_Row]) -> list[int]:
        """The next token of each row."""
        plan = self.plan
        if plan.each or plan.samples:
            scores = scores.float()
        if any(row.matcher is not None for row in rows):
            scores = constrained(scores, [row.matcher for row in rows])
        if plan.each:
            for number, row in enumerate(rows):
                assert row.ids is not None
                ids = torch.cat([row.ids, torch.tensor(row.new, device=self.device).long()])
                for process in plan.each:
                    scores[number : number + 1] = process(ids[None], scores[number : number + 1])
        best, tokens = scores.max(-1)  # a score that is no number is the largest
        chosen: list[int] = tokens.tolist()
        wrong = best.isnan().tolist()
        self.sound = self.sound or not all(wrong)
        if plan.samples:
            for process in plan.all:
                scores = process(None, scores)
            chances = scores.softmax(-1)
            for number, row in enumerate(rows):
                if not wrong[number]:
                    token = torch.multinomial(chances[number], 1, generator=row.generator)
                    chosen[number] = int(token)
        return [NOT_NUMBERS if wrong[n] else token for n, token in enumerate(chosen)]

    def _take(self, scores: torch.Tensor, where: list[list[int]], rows: list[_Row]) -> None:
        """Takes in each row's next token, and those after it for as long as its draft has them too.

        `scores`: [tokens, vocabulary]; `where`: those of each row, behind its newest token and each
        token of its draft.
        """
        plan = self.plan
        free = not (plan.each or plan.samples or any(row.matcher is not None for row in rows))
        every = self._choose(scores, rows) if free else []
        going, depth = list(zip(rows, where, strict=True)), 0
        while going:
            # What a row chooses may depend on what it has taken in: one token after another.
            places = [at[depth] for _, at in going]
            if free:
                chosen = [every[place] for place in places]
            else:
                those = scores if len(places) == len(scores) else scores[places]
                chosen = self._choose(those, [row for row, _ in going])
            for (row, _), token in zip(going, chosen, strict=True):
                row.answer = self._ended(row, token)
            going = [
                (row, at)
                for (row, at), token in zip(going, chosen, strict=True)
                if row.answer is None and row.draft[depth : depth + 1] == [token]
            ]
            depth += 1
        for row in rows:
            row.draft = []

    def _leave(self, blocks: list[_Block]) -> list[Answer]:
        """Takes the rows out that have ended."""
        ended = []
        for block in blocks:
            for place in range(len(block.rows) - 1, -1, -1):
                row = block.rows[place]
                if row.answer is not None:
                    ended.append(row.answer)
                    self.work.new += len(row.new)
                    block.remove(place)
        return ended

    def _ended(self, row: _Row, token: int) -> Answer | None:
        """Takes a row's next token in; its answer, where it ends by it."""
        plan, number = self.plan, row.prompt.number
        if token in plan.ends:
            return Answer(number, row.new, "stop")
        if token == NOT_NUMBERS:
            return Answer(number, row.new, "not numbers")
        row.new.append(token)
        if row.copies is not None:
            row.copies.take(token)
        if row.matcher is not None:
            row.matcher.take(token)
            if row.matcher.is_over:
                return Answer(number, row.new, "stop")
        if plan.stopped is not None and (text := plan.stopped(row.new)) is not None:
            return Answer(number, row.new, "stop", text)
        if len(row.new) >= plan.most_new:
            return Answer(number, row.new, "length")
        return None


def seed_of(seed: int | None, sample: int, ids: Sequence[int]) -> int:
    """The seed of one row: the run's, which sample of the prompt it is, and the prompt."""
    text = f"{seed} {sample} {' '.join(map(str, ids))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def _common_prefix(rows: list[list[int]]) -> list[int]:
    """The ids that all rows begin with; each row has at least one more."""
    least, most = min(rows), max(rows)
    length = min(map(len, rows)) - 1
    for place in range(length):
        if least[place] != most[place]:
            return least[:place]
    return least[: max(0, length)]
