"""Decodes many prompts at once: a loop of our own around a transformers model's forward.

What generate() does for one padded batch, this does for a stream of prompts: the beginning they
share is computed once, the rest in small groups of like length, and then all rows take their
steps together. Rows that end leave at once, and blocks of new ones take their places.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "fabe_ds"
ALIGN = 16  # tokens; kernels read masks in blocks
BLOCK = 16  # rows, on a CPU: fewer are less padding, more are fewer and larger products
NOT_NUMBERS = -1  # instead of a token, where its scores are not
ALIKE = 0.7  # a block's shortest row takes at least this much of what its longest takes


class Unsupported(Exception):
    """The model's attention is not of the kind that this loop computes."""


class Prompt(NamedTuple):
    """Token ids to go on from. `number` comes back with the answer; `seed` is the row's own."""

    number: int
    ids: list[int]
    seed: int = 0


class Answer(NamedTuple):
    """New token ids, the ending token left out. `reason`: stop, length, or not numbers, where the
    scores of its next token were none."""

    number: int
    tokens: list[int]
    reason: str
    text: str | None = None
    """The text, where a stop string ended it before its last token did."""


@dataclass(frozen=True)
class Plan:
    """How tokens are chosen and when a row ends.

    `each` looks at one row's tokens so far (repetition limits), `all` at all rows' scores at once
    (temperature, top-k, top-p): callables of (ids, scores) as in transformers' logits processors.
    """

    most_new: int
    ends: frozenset[int]
    samples: bool = False
    each: Sequence[Callable[[Any, Any], Any]] = ()
    all: Sequence[Callable[[Any, Any], Any]] = ()
    stopped: Callable[[list[int]], str | None] | None = None
    """Given the tokens so far: the text before a stop string, or None."""


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


class _Row:
    __slots__ = ("generator", "ids", "last", "new", "prompt")

    def __init__(self, prompt: Prompt, plan: Plan, device: Any) -> None:
        self.prompt = prompt
        self.new: list[int] = []
        self.last = -1  # the newest token, not yet taken in
        self.ids = torch.tensor(prompt.ids, device=device) if plan.each else None
        self.generator = None
        if plan.samples:
            self.generator = torch.Generator(device)
            self.generator.manual_seed(prompt.seed)


class _Block:
    """A few rows of like length, and their keys and values after the shared beginning.

    `stored` has a pair of [rows, key heads, length, width] for each layer; the rows in use come
    first. `mask` is zero where a row has a token: it is added to scores.
    """

    def __init__(self, rows: list[_Row], length: int, dtype: Any, device: Any) -> None:
        self.rows, self.size, self.length = rows, len(rows), length
        self.mask = torch.full((len(rows), length), float("-inf"), dtype=dtype, device=device)
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.places: torch.Tensor | None = None  # in a step, where each row's token goes

    @property
    def tokens(self) -> int:
        return self.size * self.length

    def add(self, layer: int, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The keys and values of new prompts, from row `first` on."""
        if layer not in self.stored:
            heads, width = keys.shape[1], (keys.shape[3], values.shape[3])
            self.stored[layer] = (
                keys.new_zeros(self.size, heads, self.length, width[0]),
                values.new_zeros(self.size, heads, self.length, width[1]),
            )
        for kept, given in zip(self.stored[layer], (keys, values), strict=True):
            kept[first : first + len(given), :, : given.shape[2]] = given

    def remove(self, place: int) -> None:
        """Takes a row out; the last one moves to its place."""
        last = len(self.rows) - 1
        if place != last:
            self.mask[place] = self.mask[last]
            for pair in self.stored.values():
                for kept in pair:
                    kept[place] = kept[last]
            self.rows[place] = self.rows[last]
        self.rows.pop()

    def attend(
        self, layer: int, query: torch.Tensor, beginning: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Query [rows, key heads, queries, width] -> what its rows' own tokens add to the output,
        and the weights of the shared beginning, whose scores are given."""
        keys, values = self.stored[layer]
        rows, heads, queries, width = query.shape
        # Products of whole, contiguous matrices: others would be copied first.
        own = torch.bmm(
            keys[:rows].view(rows * heads, self.length, -1),
            query.reshape(rows * heads, queries, width).transpose(1, 2),
        ).view(rows, heads, self.length, queries)
        shared = 0 if beginning is None else beginning.shape[3]
        scores = query.new_empty(rows, heads, queries, shared + self.length)
        mask = self.mask[:rows, None, None].to(query.device)
        torch.add(own.transpose(2, 3), mask, out=scores[..., shared:])
        if beginning is not None:
            scores[..., :shared] = beginning
        weights = scores.softmax(3)
        output = torch.bmm(
            weights[..., shared:].reshape(rows * heads, queries, self.length),
            values[:rows].view(rows * heads, self.length, -1),
        ).view(rows, heads, queries, -1)
        return output, None if beginning is None else weights[..., :shared]


class _Attended(Cache):  # type: ignore[misc]  # transformers is untyped here
    """What a forward attends to: the shared beginning, kept once, and blocks of rows."""

    active: _Attended | None = None
    """That of the forward that is running: a model's attention is not given its cache."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.beginning: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.begins = False  # the forward computes the shared beginning
        self.blocks: list[_Block] = []  # those that take a step; or the one that new rows are for
        self.first: int | None = None  # the first new row; None in a step

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.begins:
            self.beginning[layer] = (keys[0].clone(), values[0].clone())
        elif self.first is not None:
            self.blocks[0].add(layer, self.first, keys, values)
            if layer in self.beginning:
                keys, values = (
                    torch.cat([shared.expand(len(new), -1, -1, -1), new], dim=2)
                    for shared, new in zip(self.beginning[layer], (keys, values), strict=True)
                )
        else:
            start = 0
            for block in self.blocks:
                end = start + len(block.rows)
                assert block.places is not None
                places = block.places.to(keys.device)
                numbers = torch.arange(end - start, device=keys.device)
                for kept, given in zip(block.stored[layer], (keys, values), strict=True):
                    kept[numbers, :, places] = given[start:end, :, 0]
                start = end
        return keys, values

    def get_seq_length(self, layer_idx: int = 0, *_: Any) -> int:
        return 0

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attention of one token a row: [rows, key heads, queries, width], queries being the
        query heads that share a key head, already scaled.

        The scores of all rows with the shared beginning are one product; those with the rows' own
        tokens go by blocks. One call to torch's own attention, as wide as the longest row of all,
        takes three times as long on a CPU.
        """
        rows, heads, queries, width = query.shape
        scores: torch.Tensor | None = None
        if layer in self.beginning:
            keys, values = self.beginning[layer]
            flat = query.transpose(0, 1).reshape(heads, rows * queries, width)
            scores = torch.bmm(flat, keys.transpose(1, 2)).view(heads, rows, queries, -1)
            scores = scores.transpose(0, 1)
        parts, weights, start = [], [], 0
        for block in self.blocks:
            end = start + len(block.rows)
            shared = None if scores is None else scores[start:end]
            part, weight = block.attend(layer, query[start:end], shared)
            parts.append(part)
            weights.append(weight)
            start = end
        output = torch.cat(parts)
        if scores is not None:
            flat = torch.cat(weights).transpose(0, 1).reshape(heads, rows * queries, -1)
            output += torch.bmm(flat, values).view(heads, rows, queries, -1).transpose(0, 1)
        return output


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, [rows, heads, tokens, width] -> [rows, tokens, heads, width].

    The query heads that share a key head are put below one another as more queries of that head:
    the same numbers, and keys and values are never expanded (14 times faster on a CPU, for a step
    of 48 rows with three query heads a key head).
    """
    attended = _Attended.active
    if softcap is not None or s_aux is not None or attended is None:
        raise Unsupported("attention with soft caps or sinks")
    rows, heads, tokens, width = query.shape
    groups = key.shape[1]
    if scaling is None:
        scaling = width**-0.5
    if attended.first is None and not attended.begins:
        grouped = query.reshape(rows, groups, heads // groups, width) * scaling
        return attended.attend(module.layer_idx, grouped).reshape(rows, 1, heads, -1), None
    reach = key.shape[2]
    seen = torch.ones(tokens, reach, dtype=torch.bool, device=query.device).tril(reach - tokens)
    output = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(rows, groups, heads // groups * tokens, width),
        key,
        value,
        attn_mask=seen.repeat(heads // groups, 1),
        scale=scaling,
    )
    return output.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


@dataclass
class Decoder:
    """Runs one model. Kept from one stream of prompts to the next: `shared`, the ids of the
    beginning that was computed last, `work` and `sound`."""

    model: Any
    plan: Plan
    room: Room
    pad: int
    device: Any
    work: Work = field(default_factory=Work)
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
        most = max(1, min(BLOCK, self.room.rows // 3)) if self._on_cpu else self.room.rows // 2 or 1
        most = min(most, len(waiting))
        free = self.room.rows - sum(len(block.rows) for block in blocks)
        length = self._length(waiting[-1])
        tokens = self.room.tokens - len(self._shared) - sum(block.tokens for block in blocks)
        fitting = tokens // length
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
    def _on_cpu(self) -> bool:
        return str(self.device) == "cpu"

    def _new_block(self, prompts: list[Prompt]) -> _Block:
        """Computes prompts, a few of like length at a time, and their first new tokens."""
        rows = [_Row(prompt, self.plan, self.device) for prompt in prompts]
        length = max(map(self._length, prompts))
        block = _Block(rows, length, self.model.dtype, self.device)
        first = 0
        while first < len(rows):
            widths = [len(row.prompt.ids) - len(self._shared) for row in rows[first:]]
            most = max(1, self.room.prefill // widths[0])
            count = sum(width > ALIKE * widths[0] for width in widths[:most])
            part = rows[first : first + count]
            tokens = self._choose(self._prefill(block, first, part), part)
            for row, token in zip(part, tokens, strict=True):
                row.last = token
            first += len(part)
        return block

    def _prefill(self, block: _Block, first: int, rows: list[_Row]) -> torch.Tensor:
        """Scores of each row's first new token, [rows, vocabulary]."""
        shared = len(self._shared)
        parts = [row.prompt.ids[shared:] for row in rows]
        width = max(map(len, parts))
        ids = torch.full((len(parts), width), self.pad)
        for number, part in enumerate(parts):  # padding stands behind, where nothing looks at it
            ids[number, : len(part)] = torch.tensor(part)
            block.mask[first + number, : len(part)] = 0
        lengths = torch.tensor([len(part) for part in parts])
        self.work.prompt += int(lengths.sum())
        self.work.padding += ids.numel() - int(lengths.sum())
        self._attended.blocks, self._attended.first = [block], first
        positions = torch.arange(shared, shared + width, device=self.device)[None]
        wanted, places = (lengths - 1).unique(return_inverse=True)
        logits = self._forward(ids.to(self.device), positions, wanted.to(self.device))
        return logits[torch.arange(len(parts)), places]

    def _step(self, blocks: list[_Block]) -> None:
        """The next token of every row."""
        rows = [row for block in blocks for row in block.rows]
        self.work.steps += 1
        self.work.row_steps += len(rows)
        for row, token in zip(rows, self._choose(self._scores(blocks), rows), strict=True):
            row.last = token

    def _scores(self, blocks: list[_Block]) -> torch.Tensor:
        """Scores of each row's token after its newest, [rows, vocabulary]."""
        shared = len(self._shared)
        self._attended.blocks, self._attended.first = blocks, None
        for block in blocks:
            lengths = [len(row.prompt.ids) - shared + len(row.new) for row in block.rows]
            block.places = torch.tensor(lengths, device=self.device).sub_(1)
            block.mask[torch.arange(len(lengths), device=self.device), block.places] = 0
        places = torch.cat([block.places for block in blocks if block.places is not None])
        ids = torch.tensor([row.last for block in blocks for row in block.rows], device=self.device)
        return self._forward(ids[:, None], (places + shared)[:, None], 1)[:, -1]

    def _forward(self, ids: Any, positions: Any, logits_to_keep: Any) -> torch.Tensor:
        _Attended.active = self._attended
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
        logits: torch.Tensor = output.logits
        return logits

    def _choose(self, scores: torch.Tensor, rows: list[_Row]) -> list[int]:
        """The next token of each row."""
        plan = self.plan
        if plan.each or plan.samples:
            scores = scores.float()
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

    def _leave(self, blocks: list[_Block]) -> list[Answer]:
        """Takes in the newest token of each row; rows that end by it leave."""
        ended = []
        for block in blocks:
            for place in range(len(block.rows) - 1, -1, -1):
                row = block.rows[place]
                if (answer := self._ended(row)) is not None:
                    ended.append(answer)
                    self.work.new += len(row.new)
                    block.remove(place)
        return ended

    def _ended(self, row: _Row) -> Answer | None:
        plan, number, token = self.plan, row.prompt.number, row.last
        if token in plan.ends:
            return Answer(number, row.new, "stop")
        if token == NOT_NUMBERS:
            return Answer(number, row.new, "not numbers")
        row.new.append(token)
        if plan.stopped is not None and (text := plan.stopped(row.new)) is not None:
            return Answer(number, row.new, "stop", text)
        if len(row.new) >= plan.most_new:
            return Answer(number, row.new, "length")
        return None


def scores_of_two(
    model: Any, device: Any, pad: int, ids: list[int], shared: int, short: int
) -> list[torch.Tensor]:
    """The loop's scores of two rows that begin alike, for a trial.

    One row is the ids without those from `shared` to `short`, the other the first `short` of them,
    each with one more as its first new token. Scores: of both prompts' next token, then of both
    rows' token after the new one.
    """
    prompts = [Prompt(0, [*ids[:shared], *ids[short:-1]]), Prompt(1, ids[:short])]
    decoder = Decoder(model, Plan(1, frozenset()), Room(2, 1 << 20), pad, device)
    decoder._begin(ids[:shared])
    rows = [_Row(prompt, decoder.plan, device) for prompt in prompts]
    block = _Block(rows, len(ids) + ALIGN, model.dtype, device)
    first = decoder._prefill(block, 0, rows)
    for row, token in zip(rows, (ids[-1], ids[short]), strict=True):
        row.new, row.last = [token], token
    second = decoder._scores([block])
    return [*first, *second]


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
