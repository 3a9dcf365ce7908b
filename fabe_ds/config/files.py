"""Settings that may be files: read when they are validated, so that a run keeps what they held."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from fabe_ds.config.params import object_of
from fabe_ds.errors import first_line, reason

_KEYS = ("input", "output")


def as_list(value: Any) -> Any:
    """A list, also of what is given as one value, or as none."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else value


def on_or_off(value: Any) -> Any:
    """The word of a setting that was true or false before it had words; false was auto's way."""
    if isinstance(value, bool):
        return "on" if value else "auto"
    words = {"true": "on", "false": "off", "1": "on", "0": "off"}
    return words.get(value.lower(), value.lower()) if isinstance(value, str) else value


def auto_or_off(value: Any) -> Any:
    """The word of a setting that is auto, off or a number: YAML reads off as false."""
    return ("auto" if value else "off") if isinstance(value, bool) else value


def _text_of(name: str) -> str:
    """Raises: ValueError."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {reason(error)}") from None


def choices_of(value: Any) -> list[str] | None:
    """The choices of a text (a,b,c), of the lines of a file, or of a list. Raises: ValueError."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        if any(isinstance(choice, bool) or choice is None for choice in value):
            raise ValueError("put yes, no, on, off and null in quotes")
        value = [str(choice) for choice in value]
    if isinstance(value, str):
        lines = _text_of(value).splitlines() if os.path.isfile(value) else value.split(",")  # noqa: PTH113
        value = [line.strip() for line in lines]
    choices = [choice for choice in value if choice.strip()]
    if len(choices) < 2:
        raise ValueError("give two choices or more (a,b,c, or a file of one a line)")
    if len(set(map(str.casefold, choices))) < len(choices):
        raise ValueError("two choices are the same")
    return choices


def schema_of(value: Any) -> Any:
    """The JSON schema of a file, of a model of pydantic (or of `module:Model`), or as it is given.

    Raises: ValueError.
    """
    if isinstance(value, str) and value.lstrip()[:1] != "{":
        module, colon, name = value.partition(":")
        is_file = os.path.exists(value) or "/" in value or value.endswith(".json")  # noqa: PTH110
        named = colon and not is_file
        value = _imported(module, name) if named else _parsed(_text_of(value))
    elif isinstance(value, str):
        value = _parsed(value)
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if value is not None and not isinstance(value, dict):
        raise ValueError("neither a JSON schema nor a model of pydantic")
    if value is not None:
        _check_schema(value)
    return value


def _parsed(text: str) -> Any:
    value = object_of(text, otherwise="a JSON schema is an object")
    # As OpenAI's API takes it, with the schema inside.
    inner = value.get("json_schema", value)
    if "type" in value and value["type"] == "json_schema" and isinstance(inner, dict):
        return inner.get("schema", inner)
    return value


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # it runs another's code
        raise ValueError(f"cannot be imported: {first_line(error)}") from None


def _check_schema(schema: dict[str, Any]) -> None:
    import jsonschema

    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"not a JSON schema: {first_line(error)}") from None


def examples_of(value: Any) -> Any:
    """The examples of a file of JSON lines, or as they are given. Raises: ValueError."""
    if isinstance(value, str | os.PathLike):
        lines = enumerate(_text_of(os.fspath(value)).split("\n"), 1)
        value = [_example(line, f"line {number}: ") for number, line in lines if line.strip()]
    if value is None:
        return None
    if not value:
        raise ValueError("there are no examples in it")
    for number, example in enumerate(value):
        if not isinstance(example, dict) or any(
            not isinstance(example.get(key), str) for key in _KEYS
        ):
            raise ValueError(f"example {number + 1} lacks a text as `input`, or as `output`")
    return value


def _example(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}not JSON: {error}") from None
