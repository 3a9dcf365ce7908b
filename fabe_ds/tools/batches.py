"""The batches of a server: which there are, how far they are, and their end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from fabe_ds.config.sections import PolicySettings
from fabe_ds.config.settings import RunConfig
from fabe_ds.engine.batch_api import RUNNING, BatchClient, BatchState, batch_client
from fabe_ds.errors import UsageError
from fabe_ds.providers import Endpoint, HttpProvider, build_provider, provider_class
from fabe_ds.store.completions import OpenBatch, RecordCache
from fabe_ds.who_answers import base_urls_of

PATIENCE = 10.0
"""Seconds for which a server may be away: somebody waits."""


class Listed(NamedTuple):
    """A batch: where and how far it is, and whether a run from this cache folder waits for it."""

    endpoint: str
    state: BatchState
    is_ours: bool


def listed(config: RunConfig) -> Iterator[Listed]:
    """The batches at the server, or, where none is named, at all that this cache folder knows
    of; the newest first. Raises: FabeError."""
    for endpoint, opened in _endpoints(config).items():
        ours = {each.batch for each in opened} | {each.run for each in opened}
        with contextlib.closing(_client(config, endpoint)) as client:
            for state in client.list():
                yield Listed(endpoint, state, bool(ours & {state.name, state.run}))


def cancelled(config: RunConfig, names: list[str], everything: bool) -> Iterator[Listed]:
    """Cancels batches: those of these names, or all that runs from this cache folder wait for.

    Raises: FabeError.
    """
    found = list(listed(config))
    known = {each.state.name: each for each in found}
    if unknown := next((name for name in names if name not in known), None):
        raise UsageError(f"{unknown}: no such batch; fabe-ds batch list shows those there are")
    chosen = [known[name] for name in names]
    if everything:
        chosen = [each for each in found if each.is_ours and each.state.kind == RUNNING]
    for each in chosen:
        with contextlib.closing(_client(config, each.endpoint)) as client:
            yield each._replace(state=client.cancel(each.state.name))


def _endpoints(config: RunConfig) -> dict[str, list[OpenBatch]]:
    """The servers to look at, each with the batches that are remembered of it.

    Raises: FabeError.
    """
    cache = RecordCache.existing(config.cache_dir)
    with contextlib.closing(cache) if cache else contextlib.nullcontext():
        opened = cache.open_batches() if cache else []
    urls = base_urls_of(config, provider_class(config.provider))
    endpoints = [str(_provider(config, url).address) for url in urls]
    endpoints = endpoints or list(dict.fromkeys(each.endpoint for each in opened))
    if not endpoints:
        raise UsageError(
            f"--cache-dir {config.cache_dir}: no batch is open; --base-url names a server to ask"
        )
    return {
        endpoint: [each for each in opened if each.endpoint == endpoint] for endpoint in endpoints
    }


def _provider(config: RunConfig, url: str) -> HttpProvider:
    kind = provider_class(config.provider)
    if not issubclass(kind, HttpProvider) or not kind.has_batches:
        raise UsageError(f"--provider {config.provider} has no batches")
    given = config.api_key.get_secret_value() if config.api_key else None
    key = given or os.environ.get(kind.key_variable or "")
    endpoint = Endpoint(config.model or "any", url, headers=config.headers)
    built = build_provider(config.provider, endpoint, key)
    assert isinstance(built, HttpProvider)
    built.refuse_open_key()
    return built


def _client(config: RunConfig, endpoint: str) -> BatchClient:
    policy = config.part(PolicySettings).model_copy(update={"give_up_after": PATIENCE})
    return batch_client(_provider(config, endpoint), policy)
