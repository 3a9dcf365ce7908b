"""What an answer must be: one of some choices, or JSON that follows a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fabe_ds.config.settings import TransformConfig
from fabe_ds.request import FREE, AnswerForm

CHOICE = "choice"
"""The key of the object in which a server gives a choice: OpenAI's API takes objects only."""


def form_of(config: TransformConfig) -> AnswerForm:
    """What the answers of a transform must be."""
    if config.choices:
        choices = tuple(config.choices)
        return AnswerForm(choice_schema(choices), choices, bool(config.confidence_field))
    if config.response_format is not None:
        return AnswerForm(config.response_format)
    return FREE


def choice_schema(choices: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an object that holds one of the choices."""
    return {
        "type": "object",
        "properties": {CHOICE: {"type": "string", "enum": list(choices)}},
        "required": [CHOICE],
        "additionalProperties": False,
    }


def choice_in(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names, if it is nothing but that: as it is, in JSON, in quotes, in
    other capitals, with a full stop. None where it is none, or more."""
    text = answer.strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, Mapping) and len(value) == 1:
        (value,) = value.values()
    if isinstance(value, str):
        text = value.strip()
    if text in choices:
        return text
    bare = text.strip("\"'`*").rstrip(".!").strip("\"'`*").strip().casefold()
    return next((choice for choice in choices if choice.casefold() == bare), None)
