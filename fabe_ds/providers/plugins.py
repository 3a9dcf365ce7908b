"""Providers of other packages: what they lack, and what they do wrong, is said in a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fabe_ds.errors import MalformedResponse, RecordFailed, RunStopped
from fabe_ds.plugins import watched
from fabe_ds.providers.base import LocalProvider, Provider
from fabe_ds.providers.http import HttpProvider
from fabe_ds.request import Completion


def lacking(found: object) -> str | None:
    """What a class lacks to be a provider, for people; None where nothing."""
    if not isinstance(found, type):
        return "is no class; a provider is a class derived from HttpProvider or LocalProvider"
    if not issubclass(found, HttpProvider | LocalProvider):
        return "is not derived from fabe_ds.providers.HttpProvider or LocalProvider"
    lacks = sorted(getattr(found, "__abstractmethods__", ()))
    lacks = [f"{name}()" for name in lacks]
    if not isinstance(getattr(found, "name", None), str):
        lacks.append("name")
    if issubclass(found, HttpProvider) and not hasattr(found, "default_base_url"):
        lacks.append("default_base_url")
    return f"lacks {', '.join(lacks)}" if lacks else None


def guarded(cls: type[Provider]) -> type[Provider]:
    """The class with its methods watched: what they raise, and give, that they should not."""
    methods = {
        name: watched(
            f"--provider {cls.name}: {cls.__name__}.{name}()",
            getattr(cls, name),
            check,
            # An answer may be to blame for what reading it raises: worth another try.
            MalformedResponse if name == "completion" else RunStopped,
        )
        for name, check in _CHECKS.items()
        if callable(getattr(cls, name, None))
    }
    return type(cls.__name__, (cls,), {**methods, "__module__": cls.__module__})


def _json_object(result: object, *_: object) -> str | None:
    if not isinstance(result, Mapping):
        return f"{type(result).__name__}, not a dict"
    try:
        json.dumps(result)
    except (TypeError, ValueError) as error:
        return f"what is no JSON ({error})"
    return None


def _path(result: object, *_: object) -> str | None:
    if isinstance(result, str) and result.startswith("/"):
        return None
    return f"{result!r}, not a path that begins with /"


def _text(result: object, *_: object) -> str | None:
    return None if isinstance(result, str) else f"{type(result).__name__}, not a text"


def _completion(result: object, *_: object) -> str | None:
    if not isinstance(result, Completion):
        return f"{type(result).__name__}, not a Completion"
    return _text(result.text)


def _completions(result: object, requests: Any) -> str | None:
    if not isinstance(result, list):
        return f"{type(result).__name__}, not a list"
    if len(result) != len(requests):
        return f"{len(result)} answers to {len(requests)} requests"
    others = (_completion(one) for one in result if not isinstance(one, RecordFailed))
    return next(filter(None, others), None)


def _anything(*_: object) -> None:
    return None


_CHECKS: dict[str, Callable[..., str | None]] = {
    "body": _json_object,
    "path": _path,
    "identity": _text,
    "completion": _completion,
    "complete": _completions,
    "preflight": _anything,
    "headers": _json_object,
    "shown": _text,
    "prompt_tokens": _anything,
}
