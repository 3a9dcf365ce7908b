"""JSON may hold halves of surrogate pairs, which no UTF-8 can."""

from __future__ import annotations

import json
from typing import Any


def encodable(text: str) -> str:
    """The text with U+FFFD for surrogates that stand alone."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encodable_value(value: Any) -> Any:
    """A JSON value with `encodable` texts and keys."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, list):
        return [encodable_value(item) for item in value]
    if isinstance(value, dict):
        return {encodable(key): encodable_value(item) for key, item in value.items()}
    return value


def load_json(data: bytes) -> Any:
    """The value of a JSON text that came from elsewhere. Raises: ValueError, RecursionError."""
    value = json.loads(data)
    # Escaped, or as the three bytes that Python's reader lets through.
    return encodable_value(value) if b"\\u" in data or b"\xed" in data else value
