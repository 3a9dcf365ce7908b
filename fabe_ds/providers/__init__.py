"""Who answers: one module a provider, found through the entry-point group fabe_ds.providers."""

from fabe_ds.providers.base import Endpoint, LocalProvider, Provider, Requirement
from fabe_ds.providers.http import HttpProvider
from fabe_ds.providers.registry import build_provider, missing_of, provider_class, provider_names
from fabe_ds.request import Completion, Request, Sampling

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
