"""Text for people."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES_SHOWN = 5
_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Seconds with a tenth below a minute, h:mm:ss or m:ss from there on."""
    return clock(seconds) if seconds >= 60 else f"{seconds:.1f} s"


def listed(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(map(shown_name, names[:NAMES_SHOWN])) + more


def as_path(text: str) -> Path:
    """The file that a text names, also where the locale is not UTF-8."""
    return Path(os.fsdecode(text.encode()))


def shown_name(name: str) -> str:
    """A file's name as text: bytes in it that are no UTF-8, as in names out of old archives, are
    written `\\xNN`. `real_name` gives it back."""
    name = _ESCAPE.sub(r"\\x5cx\1", name)
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def real_name(shown: str) -> str:
    """The file's name that `shown_name` has written."""
    data = shown.encode().decode("latin-1")
    return os.fsdecode(_ESCAPE.sub(lambda byte: chr(int(byte[1], 16)), data).encode("latin-1"))


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
