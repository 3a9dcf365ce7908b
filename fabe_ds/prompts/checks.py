"""Checks that an answer must pass before it goes into a record."""

from __future__ import annotations

import ast
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fabe_ds.errors import RecordFailed, RunStopped, UsageError, first_line, reason
from fabe_ds.prompts.comparisons import (
    LENGTHS,
    SAME_LANGUAGE,
    keeping_check,
    language_check,
    length_check,
)
from fabe_ds.text import as_path

if TYPE_CHECKING:
    from referencing import Registry

Record = Mapping[str, Any] | None

GROUP = "fabe_ds.validators"

Check = Callable[[str, str, Record], str | None]
"""What is wrong with an answer, in words for the model, or None; it is given the answer, the
original, and the record where it asked for it."""
_LITERALS = (ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.Set, ast.JoinedStr)
_NESTED = (RecursionError, OverflowError)
RAISED = "check"
"""Class of the failure of a record on which a check of another package raised."""


class BuiltCheck(NamedTuple):
    """A check made ready."""

    check: Check
    needs_record: bool = False


def build_check(spec: str) -> BuiltCheck:
    """The check that `--validate` names: python-syntax, json, json-schema:FILE, regex:PATTERN,
    max-length-ratio:N, min-length-ratio:N, keeps:KINDS, same-language, or an entry point of the
    group fabe_ds.validators.

    Such a one is a function of the answer, which may also take `original` and `record` by these
    names. It gives None or True for a good answer, what is wrong as a text, or False.

    Raises: UsageError.
    """
    name, _, argument = spec.partition(":")
    if name == "python-syntax":
        return BuiltCheck(_of_text(_python_syntax))
    if name == "json":
        return BuiltCheck(_of_text(_json))
    if name == "json-schema":
        return BuiltCheck(_of_text(_json_schema(argument)))
    if name == "regex":
        return BuiltCheck(_of_text(_regex(argument)))
    if name in LENGTHS:
        return BuiltCheck(length_check(name, argument))
    if spec == SAME_LANGUAGE:
        return BuiltCheck(language_check())
    if name == "keeps":
        return BuiltCheck(keeping_check(argument))
    for entry in entry_points(group=GROUP, name=name):
        return _other(f"--validate {name}: {entry.value}", entry)
    raise UsageError(
        f"--validate {spec}: no such check; known: python-syntax, json, json-schema:FILE, "
        "regex:PATTERN, max-length-ratio:N, min-length-ratio:N, keeps:KINDS, "
        "same-language, and entry points of fabe_ds.validators"
    )


def _of_text(check: Callable[[str], str | None]) -> Check:
    return lambda text, original, record: check(text)


def _other(what: str, entry: EntryPoint) -> BuiltCheck:
    """The check of another package. Raises: UsageError where it cannot be one."""
    try:
        function = entry.load()
        names = inspect.signature(function).parameters
        inspect.signature(function).bind(
            "", **{name: None for name in ("original", "record") if name in names}
        )
    except TypeError as error:
        raise UsageError(
            f"{what} is not a check: {error}; write a function of the answer, and of `original` "
            "and `record` if it needs them"
        ) from None
    except Exception as error:  # it runs another package's code
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UsageError(f"{what} cannot be imported: {kind}{first_line(error)}") from error

    def check(text: str, original: str, record: Record) -> str | None:
        given = {"original": original, "record": record}
        wanted = {name: value for name, value in given.items() if name in names}
        try:
            result = function(text, **wanted)
        except Exception as error:
            raised = f"{type(error).__name__}: {first_line(error)}"
            raise RecordFailed(RAISED, f"{what} raised {raised}") from error
        if result is None or result is True or result == "":
            return None
        if result is False:
            return "not valid"
        if isinstance(result, str):
            return result
        raise RunStopped(
            f"{what} gave {type(result).__name__}: it must give None or True for a good answer, "
            "what is wrong as a text, or False"
        )

    return BuiltCheck(check, "record" in names)


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


def _json_schema(file: str) -> Callable[[str], str | None]:
    what = f"--validate json-schema:{file}"
    try:
        schema = json.loads(as_path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = reason(error) if isinstance(error, OSError) else first_line(error)
        raise UsageError(f"{what}: {why}") from None
    return schema_check(schema, what, as_path(file).parent)


def schema_check(
    schema: Any, what: str = "--response-format", folder: Path | None = None
) -> Callable[[str], str | None]:
    """The check that an answer is JSON and follows a schema, which may refer to files in its
    folder. `what` names it in errors. Raises: UsageError."""
    import jsonschema
    import referencing.exceptions
    from referencing.jsonschema import DRAFT202012

    try:
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        registry = _beside(folder)
        validator = kind(schema, registry=registry)
        root = referencing.Resource.from_contents(schema, DRAFT202012)
        for reference in _references(schema):  # now, not at the first answer
            registry.resolver_with_root(root).lookup(reference)
    except (ValueError, jsonschema.SchemaError, *_NESTED) as error:
        raise UsageError(f"{what}: {first_line(error)}") from None
    except referencing.exceptions.Unresolvable as error:
        raise UsageError(
            f"{what}: $ref {error.ref!r} is not in it, nor a file beside it (nothing is fetched)"
        ) from None

    def check(text: str) -> str | None:
        if no_json := _json(text):
            return no_json
        try:
            wrong = next(validator.iter_errors(json.loads(text)), None)
        except _NESTED:
            return "does not follow the JSON schema: nested too deep to be checked"
        except referencing.exceptions.Unresolvable as error:
            raise RunStopped(f"{what}: $ref {error.ref!r} is not there") from None
        if wrong is None:
            return None
        return f"does not follow the JSON schema at {wrong.json_path}: {wrong.message}"

    return check


def _beside(folder: Path | None) -> Registry:
    """Finds what a schema refers to in files beside it, and nowhere else."""
    from referencing import Registry, Resource
    from referencing.exceptions import NoSuchResource
    from referencing.jsonschema import DRAFT202012

    def retrieve(uri: str) -> Any:
        if folder is None:
            raise NoSuchResource(ref=uri)  # type: ignore[call-arg]
        place = folder / uri
        if ":" in uri or not place.resolve().is_relative_to(folder.resolve()):
            raise NoSuchResource(ref=uri)  # type: ignore[call-arg]
        try:
            contents = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise NoSuchResource(ref=uri) from None  # type: ignore[call-arg]
        return Resource.from_contents(contents, default_specification=DRAFT202012)

    return Registry(retrieve=retrieve)  # type: ignore[call-arg]


def _references(schema: Any) -> Iterator[str]:
    """What a schema refers to, as far as its own names are not of another place."""
    if isinstance(schema, dict):
        if "$id" in schema or "id" in schema:
            return
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _regex(pattern: str) -> Callable[[str], str | None]:
    try:
        search = re.compile(pattern).search
    except (re.error, *_NESTED) as error:
        raise UsageError(f"--validate regex:{pattern}: {first_line(error)}") from None
    return lambda text: None if search(text) else f"does not match the pattern {pattern}"
