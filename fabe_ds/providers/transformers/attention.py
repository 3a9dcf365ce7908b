"""Attention over blocks of rows of one length: the key-value cache of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, islice
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache

from fabe_ds.providers.transformers.drafts import Copies
from fabe_ds.providers.transformers.grammar import Matcher

ATTENTION = "fabe_ds"


ALIGN = 16  # tokens; kernels read masks in blocks


APART = 0.5  # of a block's rows: where fewer have drafts, these go by themselves on a CPU


EVEN_ROWS = 4  # those with drafts are made up to a multiple, with copies of the last


NOT_NUMBERS = -1  # instead of a token, where its scores are not


class Prompt(NamedTuple):
    """Token ids to go on from. `number` comes back with the answer; `seed` is the row's own.
    `grammar` is what the answer must follow, at its beginning."""

    number: int
    ids: list[int]
    seed: int = 0
    grammar: Matcher | None = None


class Answer(NamedTuple):
    """New token ids, the ending token left out. `reason`: stop, length, or not numbers, where the
    scores of its next token were none."""

    number: int
    tokens: list[int]
    reason: str
    text: str | None = None
    """The text, where a stop string ended it before its last token did."""


@dataclass(frozen=True)
class DecodingRules:
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


class _Row:
    __slots__ = ("answer", "copies", "draft", "generator", "ids", "matcher", "new", "prompt")

    def __init__(self, prompt: Prompt, plan: DecodingRules, device: Any) -> None:
        self.prompt = prompt
        self.new: list[int] = []  # the last of them is not yet in the cache
        self.draft: list[int] = []  # what may follow: computed in the same step
        self.copies: Copies | None = None  # where drafts are looked up
        self.answer: Answer | None = None  # once it has ended
        self.ids = torch.tensor(prompt.ids, device=device) if plan.each else None
        self.matcher = prompt.grammar.fresh() if prompt.grammar is not None else None
        self.generator = None
        if plan.samples:
            self.generator = torch.Generator(device)
            self.generator.manual_seed(prompt.seed)


class _Block:
    """A few rows of like length, and their keys and values after the shared beginning.

    `stored` has a pair of [rows, key heads, length, width] for each layer; the rows in use come
    first, and a row's tokens stand one behind another. The first `copied` places are those of the
    shared beginning, where each row has a copy of it; None where it is kept apart, once.
    """

    def __init__(
        self, rows: list[_Row], length: int, dtype: Any, device: Any, copied: int | None = None
    ) -> None:
        self.rows, self.size = rows, len(rows)
        self.is_whole, self.copied = copied is not None, copied or 0
        self.length = -(-(self.copied + length) // ALIGN) * ALIGN
        self.dtype, self.device = dtype, device
        self.stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def tokens(self) -> int:
        return self.size * self.length

    def add(
        self,
        layer: int,
        first: int,
        new: tuple[torch.Tensor, torch.Tensor],
        beginning: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """The keys and values of new prompts, from row `first` on; `beginning`: those before."""
        keys, values = new
        if layer not in self.stored:
            heads, width = keys.shape[1], (keys.shape[3], values.shape[3])
            self.stored[layer] = (
                keys.new_zeros(self.size, heads, self.length, width[0]),
                values.new_zeros(self.size, heads, self.length, width[1]),
            )
            for kept, copy in zip(self.stored[layer], beginning or (), strict=False):
                kept[:, :, : self.copied] = copy[:, : self.copied]
        for kept, given in zip(self.stored[layer], new, strict=True):
            end = self.copied + given.shape[2]
            kept[first : first + len(given), :, self.copied : end] = given

    def remove(self, place: int) -> None:
        """Takes a row out; the last one moves to its place."""
        last = len(self.rows) - 1
        if place != last:
            for pair in self.stored.values():
                for kept in pair:
                    kept[place] = kept[last]
            self.rows[place] = self.rows[last]
        self.rows.pop()

    def step(self, shared: int) -> tuple[list[_Part], list[list[int]]]:
        """The parts of a step, and where each row's tokens stand among those of all parts.
        `shared`: tokens of the shared beginning."""
        rows = self.rows
        before = self.copied - shared
        first = [len(r.prompt.ids) + before + len(r.new) - 1 for r in rows]
        drafting = [number for number, row in enumerate(rows) if row.draft]
        if not drafting or len(drafting) > APART * len(rows) or str(self.device) != "cpu":
            counts = [1 + len(row.draft) for row in rows]
            ends = list(accumulate(counts))
            where = [list(range(e - c, e)) for e, c in zip(ends, counts, strict=True)]
            return [_Part(self, range(len(rows)), first, counts)], where
        counts = [len(rows[number].draft) for number in drafting]
        parts = [
            _Part(self, range(len(rows)), first, [1] * len(rows)),
            _Part(self, drafting, [first[number] + 1 for number in drafting], counts),
        ]
        where = [[number] for number in range(len(rows))]
        behind = count(len(rows))
        for number in drafting:
            where[number] += islice(behind, len(rows[number].draft))
        return parts, where


class _Part:
    """Some tokens of a block's rows that take a step together: `counts` of each row of `rows`, from
    its place `first` on. Attention is computed as if all rows had as many as the one with most.

    `mask` is zero where a token of a row sees a place: it is added to scores. A part of all rows
    of a block uses its keys and values where they are; another copies those of its rows. On a CPU,
    rows and tokens are made up to few numbers: each new shape of a product is compiled anew.
    """

    def __init__(
        self, block: _Block, rows: Sequence[int], first: Sequence[int], counts: Sequence[int]
    ) -> None:
        self.block, self.most, device = block, max(counts), block.device
        self._all = len(rows) == len(block.rows)
        self._mask: torch.Tensor | None = None
        more = 0
        if (str(device) == "cpu" and self.most > 1) or not self._all:
            self.most = 1 << (self.most - 1).bit_length()
            more = 0 if self._all else -len(rows) % EVEN_ROWS
        self.rows = len(rows) + more
        of = [place for place, count in enumerate(counts) for _ in range(count)]
        nth = [token for count in counts for token in range(count)]
        at = [first[place] + token for place, token in zip(of, nth, strict=True)]
        numbers = [rows[place] for place in of]
        self.places, self._of, self._nth, self._numbers = torch.tensor(
            [at, of, nth, numbers], device=device
        )
        self._chosen = torch.tensor([*rows, *[rows[-1]] * more], device=device)
        starts = torch.tensor([*first, *[first[-1]] * more], device=device)
        last = starts[:, None] + torch.arange(self.most, device=device)
        places = torch.arange(block.length, device=device)
        self.mask = torch.zeros(
            self.rows, self.most, block.length, dtype=block.dtype, device=device
        )
        self.mask.masked_fill_(places > last[..., None], float("-inf"))

    def _mask_of(self, queries: int) -> torch.Tensor:
        """The mask of all query heads that share a key head, [rows, 1, queries, length]."""
        if self._mask is None or self._mask.shape[2] != queries:
            self._mask = self.mask.repeat(1, queries // self.most, 1)[:, None]
        return self._mask

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The keys and values of the tokens: [tokens, key heads, 1, width]."""
        numbers, places = self._numbers.to(keys.device), self.places.to(keys.device)
        for kept, given in zip(self.block.stored[layer], (keys, values), strict=True):
            kept[numbers, :, places] = given[:, :, 0]

    def spread(self, query: torch.Tensor) -> torch.Tensor:
        """[tokens, key heads, queries, width] -> [rows, key heads, queries of all tokens of a row,
        width]; rows with fewer tokens have zeros."""
        if self.most == 1 and self.rows == len(query):
            return query
        _, heads, queries, width = query.shape
        each = query.new_zeros(self.rows, heads, queries, self.most, width)
        each[self._of.to(query.device), :, :, self._nth.to(query.device)] = query
        return each.view(self.rows, heads, queries * self.most, width)

    def gather(self, output: torch.Tensor) -> torch.Tensor:
        """The inverse of spread."""
        if self.most == 1:
            return output[: len(self.places)]
        rows, heads, queries, width = output.shape
        each = output.view(rows, heads, queries // self.most, self.most, width)
        return each[self._of.to(output.device), :, :, self._nth.to(output.device)]

    def attend(
        self, layer: int, query: torch.Tensor, beginning: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Query [rows, key heads, queries, width] -> what its rows' own tokens add to the output,
        and the weights of the shared beginning, whose scores are given."""
        keys, values = (
            kept[: self.rows] if self._all else kept.index_select(0, self._chosen.to(kept.device))
            for kept in self.block.stored[layer]
        )
        rows, heads, queries, width = query.shape
        length = self.block.length
        if self.block.is_whole:
            mask = self._mask_of(queries).to(query.device)
            return scaled_dot_product_attention(query, keys, values, mask, scale=1.0), None
        # Products of whole, contiguous matrices: others would be copied first.
        own = torch.bmm(
            keys.view(rows * heads, length, -1),
            query.reshape(rows * heads, queries, width).transpose(1, 2),
        ).view(rows, heads, length, queries)
        shared = 0 if beginning is None else beginning.shape[3]
        scores = query.new_empty(rows, heads, queries, shared + length)
        each = (rows, heads, queries // self.most, self.most, -1)
        mask = self.mask[:, None, None].to(query.device)
        torch.add(own.transpose(2, 3).view(each), mask, out=scores.view(each)[..., shared:])
        if beginning is not None:
            scores[..., :shared] = beginning
        weights = scores.softmax(3)
        output = torch.bmm(
            weights[..., shared:].reshape(rows * heads, queries, length),
            values.view(rows * heads, length, -1),
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
        self.parts: list[_Part] = []  # of a step
        self.block: _Block | None = None  # the one that new rows are for; None in a step
        self.first = 0  # the first new row of it

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.begins:
            self.beginning[layer] = (keys[0].clone(), values[0].clone())
        elif self.block is not None:
            self.block.add(layer, self.first, (keys, values), self.beginning.get(layer))
            if layer in self.beginning:
                keys, values = (
                    torch.cat([shared.expand(len(new), -1, -1, -1), new], dim=2)
                    for shared, new in zip(self.beginning[layer], (keys, values), strict=True)
                )
        else:
            for part, span in self._spans():
                part.write(layer, keys[span], values[span])
        return keys, values

    def get_seq_length(self, layer_idx: int = 0, *_: Any) -> int:
        return 0

    def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """Attention of a step's tokens: [tokens, key heads, queries, width], queries being the
        query heads that share a key head, already scaled.

        The scores of all rows with the shared beginning are one product; those with the rows' own
        tokens go by blocks. One call to torch's own attention, as wide as the longest row of all,
        takes three times as long on a CPU.
        """
        spread = [part.spread(query[span]) for part, span in self._spans()]
        scores: Sequence[torch.Tensor | None] = [None] * len(spread)
        if layer in self.beginning and not self.parts[0].block.is_whole:
            keys, values = self.beginning[layer]
            scores = _product(spread, keys.transpose(1, 2))
        outputs, weights = [], []
        for part, asked, score in zip(self.parts, spread, scores, strict=True):
            output, weight = part.attend(layer, asked, score)
            outputs.append(output)
            if weight is not None:
                weights.append(weight)
        if weights:
            for output, more in zip(outputs, _product(weights, values), strict=True):
                output += more
        given = [p.gather(out) for p, out in zip(self.parts, outputs, strict=True)]
        more = len(query) - sum(map(len, given))  # tokens that only make the step's shape up
        return torch.cat([*given, query.new_zeros(more, *given[0].shape[1:])] if more else given)

    def _spans(self) -> Iterator[tuple[_Part, slice]]:
        """The parts, each with where its tokens are among those of a step."""
        start = 0
        for part in self.parts:
            end = start + len(part.places)
            yield part, slice(start, end)
            start = end


def _product(parts: Sequence[torch.Tensor], matrix: torch.Tensor) -> list[torch.Tensor]:
    """Each [rows, heads, queries, width] by a matrix that is the same for all rows, [heads, width,
    size], in one product: [rows, heads, queries, size]."""
    heads = len(matrix)
    flat = [part.transpose(0, 1).reshape(heads, -1, part.shape[3]) for part in parts]
    product = torch.bmm(torch.cat(flat, 1), matrix).split([part.shape[1] for part in flat], 1)
    return [
        found.reshape(heads, len(part), part.shape[2], -1).transpose(0, 1)
        for found, part in zip(product, parts, strict=True)
    ]


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

    In a step, each token is a row of its own. The query heads that share a key head are put below
    one another as more queries of that head: the same numbers, and keys and values are never
    expanded (14 times faster on a CPU, for a step of 48 rows with three query heads a key head).
    """
    attended = _Attended.active
    if softcap is not None or s_aux is not None or attended is None:
        raise Unsupported("attention with soft caps or sinks")
    rows, heads, tokens, width = query.shape
    groups = key.shape[1]
    if scaling is None:
        scaling = width**-0.5
    if attended.block is None and not attended.begins:
        grouped = query.reshape(rows, groups, heads // groups, width) * scaling
        return attended.attend(module.layer_idx, grouped).reshape(rows, 1, heads, -1), None
    reach = key.shape[2]
    seen = torch.ones(tokens, reach, dtype=torch.bool, device=query.device).tril(reach - tokens)
    output = scaled_dot_product_attention(
        query.reshape(rows, groups, heads // groups * tokens, width),
        key,
        value,
        attn_mask=seen.repeat(heads // groups, 1),
        scale=scaling,
    )
    return output.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


class Unsupported(Exception):
    """The model's attention is not of the kind that this loop computes."""
