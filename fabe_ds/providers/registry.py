"""Providers by name; any package adds its own with the entry-point group fabe_ds.providers."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from fabe_ds.errors import FabeError, UsageError, first_line
from fabe_ds.plugins import imported
from fabe_ds.providers.base import Endpoint, Provider, Requirement
from fabe_ds.providers.http import HttpProvider
from fabe_ds.providers.plugins import guarded, lacking

GROUP = "fabe_ds.providers"


def provider_names() -> list[str]:
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def provider_class(name: str) -> type[Provider]:
    """Raises: UsageError (no such provider, or one that cannot be used)."""
    for entry in entry_points(group=GROUP, name=name):
        what = f"--provider {name}: {entry.value}"
        found = imported(what, entry)
        if lacks := lacking(found):
            raise UsageError(f"{what} {lacks} (fabe_ds/providers/README.md)")
        return found if found.__module__.startswith("fabe_ds.") else guarded(found)
    near = difflib.get_close_matches(name, provider_names(), 1)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(provider_names())}"
    raise UsageError(f"--provider {name}: no such provider{hint}")


def missing_of(cls: type[Provider]) -> str | None:
    """What is not installed for a provider to run, or None. Raises: UsageError."""
    try:
        return cls.missing()
    except Exception as error:
        message = f"missing() raised {type(error).__name__}: {first_line(error)}"
        raise UsageError(f"--provider {cls.name}: {message}") from error


def build_provider(name: str, endpoint: Endpoint, api_key: str | None = None) -> Provider:
    """The provider, ready to write requests; a model is loaded when the first one is answered.

    Raises: UsageError, Requirement (a package it needs is not installed).
    """
    cls = provider_class(name)
    if missing := missing_of(cls):
        raise Requirement(f"--provider {name}: {missing}")
    try:
        return cls(endpoint, api_key) if issubclass(cls, HttpProvider) else cls(endpoint)
    except FabeError:
        raise
    except Exception as error:
        message = f"{cls.__name__}() raised {type(error).__name__}: {first_line(error)}"
        raise UsageError(f"--provider {name}: {message}") from error
