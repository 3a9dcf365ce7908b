"""Tries out, on the model itself, which ways of computing answers give the model's own.

The measure is what one prompt alone gets from the model's own forward and from transformers'
generate. It is compared in float32 where memory allows: in half precision a model's own
implementations may differ by more than a wrong one does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from fabe_ds.errors import RunStopped
from fabe_ds.providers.transformers.attention import ALIGN, DecodingRules, Prompt, _Row
from fabe_ds.providers.transformers.decoder import Decoder, Room

log = logging.getLogger(__name__)

NO_NUMBERS = "the model's scores are not numbers; try --dtype float32"

Together = Literal["padded", "equal", "alone"]
"""Which prompts transformers' generate takes at once: any, padded; those of one length; one."""

_WINDOW = re.compile(
    r"(window|window_size|chunk_size|block_size|local_size|compress_rate|compress_ratio)$"
)
_CHOICE = re.compile(r"(index_topk|sparse_topk|index_topk_blocks|topk_blocks)$")
_FAR = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
"""How far two computations may be apart, as a share of the scores' standard deviation."""
_NOISY = 0.5
_MEMORY_SHARE = 0.5
_NEW = 4
_LONGEST = 4200
"""Tokens up to which a trial beyond a window is worth its time."""


@dataclass(frozen=True)
class Limits:
    """Numbers of tokens at which a model begins to compute otherwise.

    `windows`: attention reaches no further back. `choices`: it sees so many tokens that score
    best, where the least rounding may change the choice. `ropes`: all rotary positions of a step
    change their scale with the largest of them.
    """

    windows: tuple[int, ...] = ()
    choices: tuple[int, ...] = ()
    ropes: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Any) -> Limits:
        text = config.get_text_config()
        settings = text.to_dict()
        windows, choices = _numbers(settings, _WINDOW), _numbers(settings, _CHOICE)
        ropes = _numbers(settings, re.compile("original_max_position_embeddings$"))
        for rope in _ropes(getattr(text, "rope_parameters", None)):
            kind = str(rope.get("rope_type") or rope.get("type") or "")
            begin = rope.get("original_max_position_embeddings")
            if kind == "longrope" and begin:
                ropes.add(int(begin))
            elif "dynamic" in kind:
                ropes.add(int(begin or settings["max_position_embeddings"]))
        return cls(tuple(sorted(windows)), tuple(sorted(choices)), tuple(sorted(ropes)))

    @property
    def first(self) -> int | None:
        """Tokens up to which nothing of this happens; None where there is no such limit."""
        return min((*self.windows, *self.choices, *self.ropes), default=None)

    def stretch(self, prompt: int, new: int) -> Stretch:
        """Where a prompt of so many tokens, with so many new ones, stands to the limits."""
        whole = prompt + new
        if self.first is None or whole <= self.first:
            return Stretch("short", 0)
        apart = any(whole > limit for limit in self.choices)
        if apart or any(prompt <= rope < whole for rope in self.ropes):
            return Stretch("apart", 0)
        passed = [limit for limit in (*self.windows, *self.ropes) if whole > limit]
        return Stretch("long", max(passed))


@dataclass(frozen=True, order=True)
class Stretch:
    """`kind`: "short" of all limits; "long", beyond `limit`; "apart", where what stands beside a
    prompt may change what it gets: beyond a choice of tokens, or crossing a limit of rotary scale.
    """

    kind: Literal["short", "long", "apart"]
    limit: int


def _numbers(settings: Mapping[str, Any], name: re.Pattern[str]) -> set[int]:
    """The numbers above 1 of those settings that are called so."""
    found: set[int] = set()
    for key, value in settings.items():
        if name.search(key):
            values = value if isinstance(value, list) else [value]
            found |= {v for v in values if type(v) is int and v > 1}
    return found


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """The rotary settings of a configuration: one mapping, or one for each type of layer."""
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters or "type" in parameters:
        yield parameters
    for value in parameters.values():
        if isinstance(value, dict):
            yield from _ropes(value)


def is_causal(model: Any, device: Any) -> bool:
    """Whether a token's scores do not depend on the tokens behind it.

    Raises: RunStopped where they are no numbers.
    """
    ids = _ids(model, 12)
    other = [*ids[:-1], (ids[-1] + 1) % _vocabulary(model)]
    with torch.inference_mode():
        one, two = (
            model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0, :-1]
            for row in (ids, other)
        )
    if one.isnan().any():
        raise RunStopped(NO_NUMBERS)
    return _near(one, two, _FAR.get(one.dtype, 0.2))


def loop_agrees(model: Any, device: Any, pad: int, longest: int | None = None) -> bool:
    """Whether our own decoding loop gives what the model's own forward does, for prompts behind a
    shared beginning and beside longer ones. `longest`: tokens that must not be exceeded."""
    most = min(longest or 64, 64)
    if most < 16:
        return False
    ids = _ids(model, most)
    shared, short = most // 4, most // 2
    with _in_float32(model, device) as exactly, torch.inference_mode():
        try:
            ours = _of_two_rows(model, device, pad, ids, shared, short)
            with attention_as(model, "eager"):
                theirs = _whole(model, device, ids, shared, short)
            noise = 0.0
            if not exactly:
                with contextlib.suppress(ValueError), attention_as(model, "sdpa"):
                    noise = distance(_whole(model, device, ids, shared, short), theirs)
        except Exception as error:  # it does not run this way, whatever it raises
            log.debug("our own loop: %s: %s", type(error).__name__, error)
            return False
        far = max(_FAR.get(ours[0].dtype, 0.2), min(_NOISY, 2 * noise))
        return distance(ours, theirs) <= far


def _of_two_rows(
    model: Any, device: Any, pad: int, ids: list[int], shared: int, short: int
) -> list[torch.Tensor]:
    """The loop's scores of two rows that begin alike, for a trial.

    One row is the ids without those from `shared` to `short`, the other the first `short` of them,
    each with one more as its first new token, the other with two drafted ones behind. Scores: of
    both prompts' next token, then of what follows the new and the drafted ones.
    """
    prompts = [Prompt(0, [*ids[:shared], *ids[short:-1]]), Prompt(1, ids[:short])]
    decoder = Decoder(model, DecodingRules(1, frozenset()), Room(2, 1 << 20), pad, device)
    decoder._begin(ids[:shared])
    rows = [_Row(prompt, decoder.plan, device) for prompt in prompts]
    block = decoder._block(rows, len(ids) + ALIGN)
    first = decoder._prefill(block, 0, rows)
    for row, token in zip(rows, (ids[-1], ids[short]), strict=True):
        row.new = [token]
    rows[1].draft = ids[short + 1 : short + 3]
    second, where = decoder._scores([block])
    return [*first, *(second[place] for row in where for place in row)]


def _whole(model: Any, device: Any, ids: list[int], shared: int, short: int) -> list[torch.Tensor]:
    """The same scores by one forward over each row, alone and without a cache."""
    found: list[list[torch.Tensor]] = []
    for row, count in (([*ids[:shared], *ids[short:]], 2), (ids[: short + 3], 4)):
        tokens = torch.tensor([row], device=device)
        found.append([*model(input_ids=tokens, use_cache=False).logits[0, -count:]])
    return [found[0][0], found[1][0], found[0][1], *found[1][1:]]


def takes_together(model: Any, device: Any, pad: int, longest: int, beyond: int = 0) -> Together:
    """What transformers' generate may be given at once so that each prompt gets its own answer.

    `beyond`: the limit that all these prompts are past. `longest`: tokens that fit the model.
    """
    if beyond > _LONGEST:
        return "equal"
    lengths = [beyond + extra for extra in (24, 17, 9)]
    if max(lengths) + _NEW > longest:
        lengths = [max(2, longest - _NEW - less) for less in (0, 5, 9)]
    ids = _ids(model, max(lengths))
    rows = [_turned(ids, by)[:length] for by, length in enumerate(lengths)]
    even = [_turned(ids[: lengths[1]], by) for by in range(3)]
    with _in_float32(model, device), torch.inference_mode():
        try:
            alone = [_generated(model, device, pad, [row])[0] for row in rows]
            if _same(_generated(model, device, pad, rows), alone):
                return "padded"
            alone = [_generated(model, device, pad, [row])[0] for row in even]
            if _same(_generated(model, device, pad, even), alone):
                return "equal"
        except Exception as error:  # models' own code raises what it likes
            log.debug("several at once: %s: %s", type(error).__name__, error)
    return "alone"


def _turned(ids: list[int], by: int) -> list[int]:
    return [*ids[by:], *ids[:by]]


def _generated(
    model: Any, device: Any, pad: int, rows: Sequence[Sequence[int]]
) -> list[list[torch.Tensor]]:
    """The scores of a few new tokens of each row, padded on the left."""
    ids, mask = padded(rows, pad)
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            max_new_tokens=_NEW,
            do_sample=False,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    return [[step[row] for step in output.logits] for row in range(len(rows))]


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids made one length by padding on the left, and the mask of what is not
    padding: [rows, tokens] each."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _same(ours: list[list[torch.Tensor]], theirs: list[list[torch.Tensor]]) -> bool:
    """Whether rows have the same scores, up to where they choose different tokens, and the same
    tokens."""
    for mine, other in zip(ours, theirs, strict=True):
        for one, two in zip(mine, other, strict=True):
            if not _near(one, two, _FAR.get(one.dtype, 0.2)):
                return False
            if one.argmax() != two.argmax():
                break
    return True


def _near(ours: torch.Tensor, theirs: torch.Tensor, far: float) -> bool:
    return distance([ours], [theirs]) <= far


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """How far apart scores are at most, in standard deviations; infinity where some are no
    numbers."""
    worst = 0.0
    for one, two in zip(ours, theirs, strict=True):
        one, two = one.float(), two.float()
        apart = torch.where(one == two, 0.0, (one - two).abs()).max()  # both may be infinite
        apart /= two[two.isfinite()].std().clamp_min(1e-9)
        worst = max(worst, float(apart) if apart.isfinite() else float("inf"))
    return worst


def _ids(model: Any, count: int) -> list[int]:
    vocabulary = _vocabulary(model)
    return [(7 * i * i + 13 * i + 3) % vocabulary for i in range(count)]


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().num_embeddings)


@contextlib.contextmanager
def attention_as(model: Any, name: str) -> Iterator[None]:
    """The model with another attention while the block runs. Raises: ValueError where it has no
    such."""
    before = attention_of(model)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_of(model: Any) -> str:
    """The attention of the part that reads text: parts that see may have another."""
    return str(model.config.get_text_config()._attn_implementation)


@contextlib.contextmanager
def _in_float32(model: Any, device: Any) -> Iterator[bool]:
    """The model in float32 while the block runs, where memory allows; whether it is. What was in
    half precision comes back bit by bit."""
    parts = dict(model.named_parameters()) | dict(model.named_buffers())
    halves = {n: p.dtype for n, p in parts.items() if p.dtype in (torch.bfloat16, torch.float16)}
    if not halves:
        yield all(part.dtype == torch.float32 for part in model.parameters())
        return
    extra = sum(4 * parts[name].numel() for name in halves)
    whole = all(part.is_floating_point() for part in model.parameters())
    if not whole or getattr(model, "is_quantized", False) or extra > _MEMORY_SHARE * free(device):
        yield False
        return
    for name in halves:
        parts[name].data = parts[name].data.float()
    try:
        yield True
    finally:
        for name, dtype in halves.items():
            parts[name].data = parts[name].data.to(dtype)


def free(device: Any) -> int:
    """Bytes of memory that are free on the device."""
    if str(device).startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
