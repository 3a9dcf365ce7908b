"""Parameters of a request that the user names: how they are written, and how they are merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def params_of(value: Any) -> Any:
    """Parameters as a mapping, nested where a name has dots (`options.num_ctx`); also out of texts
    `name=value`, whose values are JSON, or else text. Raises: ValueError."""
    pairs = _pairs(value)
    if pairs is not None:
        given = [(name, _value(text)) for name, text in pairs]
    else:
        given = list(value.items()) if isinstance(value, Mapping) else value
    nested: dict[str, Any] = {}
    for name, inner in given:
        *outer, last = str(name).split(".")
        if not all((*outer, last)):
            raise ValueError(f"{name!r} has an empty step")
        for step in reversed((*outer, last)):
            inner = {step: inner}
        nested = merged(nested, inner)
    return nested


def headers_of(value: Any) -> Any:
    """Headers as a mapping, also out of texts `name=value`. Raises: ValueError."""
    pairs = _pairs(value)
    return value if pairs is None else {name: text.strip() for name, text in pairs}


def _pairs(value: Any) -> list[tuple[str, str]] | None:
    """The names and values of texts `name=value`, of one or several or none; None where it is given
    as something else. Raises: ValueError."""
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return None
    pairs = [str(text).partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not equals or not name.strip():
            raise ValueError(f"write name=value, not {name!r}")
    return [(name.strip(), text) for name, _, text in pairs]


def object_of(value: Any, otherwise: str = "write a JSON object") -> Any:
    """The JSON object of a text; what is no text stays. `otherwise` is said of other JSON. Raises:
    ValueError."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(otherwise)  # noqa: TRY004 - pydantic's own kind
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def merged(body: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A body with more parameters in it: objects are merged, other values replaced, and what is
    null is taken out."""
    whole = dict(body)
    for name, value in more.items():
        if value is None and name in body:
            del whole[name]
        elif isinstance(value, Mapping) and isinstance(whole.get(name), Mapping):
            whole[name] = merged(whole[name], value)
        elif value is not None or name not in body:
            whole[name] = value
    return whole


def without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body without what is null, at its own level: what was to be taken out and was not
    there."""
    return {name: value for name, value in body.items() if value is not None}
