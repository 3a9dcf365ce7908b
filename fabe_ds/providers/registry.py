"""Providers by name; any package adds its own with the entry-point group fabe_ds.providers."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from fabe_ds.errors import UsageError
from fabe_ds.providers.base import Endpoint, Provider, Requirement
from fabe_ds.providers.http import HttpProvider

GROUP = "fabe_ds.providers"


def provider_names() -> list[str]:
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def provider_class(name: str) -> type[Provider]:
    """Raises: UsageError (no such provider, or it cannot be imported)."""
    for entry in entry_points(group=GROUP, name=name):
        try:
            found = entry.load()
        except ImportError as error:
            raise UsageError(
                f"--provider {name}: {entry.value} cannot be imported: {error}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, Provider)):
            raise UsageError(f"--provider {name}: {entry.value} is not a Provider")
        return found
    near = difflib.get_close_matches(name, provider_names(), 1)
    hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(provider_names())}"
    raise UsageError(f"--provider {name}: no such provider{hint}")


def build_provider(name: str, endpoint: Endpoint, api_key: str | None = None) -> Provider:
    """The provider, ready to write requests; a model is loaded when the first one is answered.

    Raises: UsageError, Requirement (a package it needs is not installed).
    """
    cls = provider_class(name)
    if lacking := cls.missing():
        raise Requirement(f"--provider {name}: {lacking}")
    if issubclass(cls, HttpProvider):
        return cls(endpoint, api_key)
    return cls(endpoint)
