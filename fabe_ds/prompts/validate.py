"""Checks that an answer must pass before it goes into a record."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from fabe_ds.errors import UsageError

GROUP = "fabe_ds.validators"

Check = Callable[[str], str | None]
"""What is wrong with a text, in words for the model; None where nothing is."""
_LITERALS = (ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Set, ast.JoinedStr)


def build_check(spec: str) -> Check:
    """The check that `--validate` names: python-syntax, json, json-schema:FILE, regex:PATTERN, or
    an entry point of the group fabe_ds.validators (a Check).

    Raises: UsageError.
    """
    name, _, argument = spec.partition(":")
    if name == "python-syntax":
        return _python_syntax
    if name == "json":
        return _json
    if name == "json-schema":
        return _json_schema(argument)
    if name == "regex":
        return _regex(argument)
    for entry in entry_points(group=GROUP, name=name):
        check: Check = entry.load()
        return check
    raise UsageError(
        f"--validate {spec}: no such check; known: python-syntax, json, json-schema:FILE, "
        "regex:PATTERN, and entry points of fabe_ds.validators"
    )


def _python_syntax(text: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        reason = getattr(error, "msg", None) or str(error)
        return f"not valid Python: {reason}" + (f" (line {line})" if line else "")
    # Code that a model has put into JSON, or between quotes for fences, is Python too.
    values = [node.value if isinstance(node, ast.Expr) else node for node in tree.body]
    if values and all(isinstance(value, _LITERALS) for value in values):
        return "not code, but a bare literal"
    return None


def _json(text: str) -> str | None:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not valid JSON: {error}"
    return None


def _json_schema(file: str) -> Check:
    import jsonschema

    try:
        schema = json.loads(Path(file).read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"--validate json-schema:{file}: {reason}") from None
    validator = jsonschema.Draft202012Validator(schema)

    def check(text: str) -> str | None:
        if wrong := _json(text):
            return wrong
        error = next(validator.iter_errors(json.loads(text)), None)
        return error and f"does not follow the JSON schema at {error.json_path}: {error.message}"

    return check


def _regex(pattern: str) -> Check:
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise UsageError(f"--validate regex:{pattern}: {error}") from None
    return lambda text: None if search(text) else f"does not match the pattern {pattern}"
