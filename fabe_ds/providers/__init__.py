"""Who answers: one module a provider, found through the entry-point group fabe_ds.providers."""

from fabe_ds.providers.base import (
    Completion,
    Endpoint,
    LocalProvider,
    Provider,
    Request,
    Requirement,
    Sampling,
)
from fabe_ds.providers.http import HttpProvider
from fabe_ds.providers.registry import (
    build_provider,
    missing_of,
    provider_class,
    provider_names,
)

__all__ = [
    "Completion",
    "Endpoint",
    "HttpProvider",
    "LocalProvider",
    "Provider",
    "Request",
    "Requirement",
    "Sampling",
    "build_provider",
    "missing_of",
    "provider_class",
    "provider_names",
]
