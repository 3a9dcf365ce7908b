"""Attention over blocks of rows of one length: the key-value cache of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import Cache

from fabe_ds.providers.transformers.grammar import Matcher

ATTENTION = "fabe_ds"


ALIGN = 16  # tokens; kernels read masks in blocks


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
    __slots__ = ("generator", "ids", "last", "matcher", "new", "prompt")

    def __init__(self, prompt: Prompt, plan: DecodingRules, device: Any) -> None:
        self.prompt = prompt
        self.new: list[int] = []
        self.last = -1  # the newest token, not yet taken in
        self.ids = torch.tensor(prompt.ids, device=device) if plan.each else None
        self.matcher = prompt.grammar.fresh() if prompt.grammar is not None else None
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


class Unsupported(Exception):
    """The model's attention is not of the kind that this loop computes."""
