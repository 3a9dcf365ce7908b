"""What makes a value of a completion, and what is said to one that will not do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fabe_ds.config.settings import TransformConfig
from fabe_ds.errors import RecordFailed
from fabe_ds.prompts.answer import clean_answer
from fabe_ds.prompts.checks import RAISED, build_check
from fabe_ds.providers import Completion, Provider, Request
from fabe_ds.request import Accept, Reask

INVALID = "invalid"


def acceptance(config: TransformConfig, provider: Provider) -> Accept:
    """What makes a record's new text of a completion. It may raise RecordFailed."""

    check = build_check(config.validate_with).check if config.validate_with else None

    def accept(request: Request, completion: Completion) -> str:
        if lost := provider.lost_prompt(request, completion):
            raise RecordFailed("context", lost)
        text = clean_answer(
            completion.text,
            completion.finish_reason,
            original=request.text,
            strip_fences=config.strips_fences,
            on_truncated=config.on_truncated,
            several=config.fences,
            good_ends=config.good_ends,
        )
        if check is not None and (wrong := check(text, request.text, whole_record(request))):
            raise RecordFailed(INVALID, wrong)
        return text

    return accept


def whole_record(request: Request) -> Mapping[str, Any] | None:
    """The record that a request is about, where a check asked for it."""
    if isinstance(request.record, str):
        try:
            value = json.loads(request.record)
        except (ValueError, RecursionError) as error:
            raise RecordFailed(RAISED, f"the record cannot be shown whole: {error}") from None
        return value if isinstance(value, Mapping) else None
    return request.record


def asking_again(config: TransformConfig) -> Reask:
    """What an answer that fails its check is told, so many times at most."""

    def reask(request: Request, completion: Completion, kind: str, message: str) -> Request | None:
        if kind != INVALID or len(request.turns) >= config.max_reasks:
            return None
        complaint = f"Your answer is {message}. Answer again, corrected, and in full."
        return request._replace(turns=(*request.turns, (completion.text, complaint)))

    return reask
