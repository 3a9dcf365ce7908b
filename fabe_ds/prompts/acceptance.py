"""What makes a value of a completion, and what is said to one that will not do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fabe_ds.config.settings import TransformConfig
from fabe_ds.errors import RecordFailed
from fabe_ds.prompts.answer import clean_answer
from fabe_ds.prompts.checks import RAISED, build_check, schema_check
from fabe_ds.prompts.form import choice_in
from fabe_ds.providers import Completion, Provider, Request
from fabe_ds.request import Accept, Reask

INVALID = "invalid"


def acceptance(config: TransformConfig, provider: Provider) -> Accept:
    """What makes a record's new text of a completion. It may raise RecordFailed."""
    checks = [build_check(spec).check for spec in config.validate_with]
    form = _form_check(config)
    # An answer that takes the text's place ends as that does.
    in_place = not config.output_fields and form is None

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
            in_place=in_place,
        )
        if form is not None:
            text = form(text)
        for check in checks:
            if wrong := check(text, request.text, whole_record(request)):
                raise RecordFailed(INVALID, wrong)
        return text

    return accept


def _form_check(config: TransformConfig) -> Callable[[str], str] | None:
    """What gives the value of an answer that must be a choice, or follow a schema, or None where an
    answer may be any text. It may raise RecordFailed."""
    if choices := config.choices:

        def choose(text: str) -> str:
            chosen = choice_in(text, choices)
            if chosen is None:
                raise RecordFailed(INVALID, f"not one of: {', '.join(choices)}")
            return chosen

        return choose
    if (schema := config.response_format) is None:
        return None
    check = schema_check(schema)

    def follow(text: str) -> str:
        if wrong := check(text):
            raise RecordFailed(INVALID, wrong)
        json.loads(text, parse_constant=_refuse_constant)
        return text.strip()

    return follow


def _refuse_constant(name: str) -> None:
    """NaN and Infinity, which Python takes for numbers of JSON."""
    raise RecordFailed(INVALID, f"not valid JSON: {name} is no number")


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
