"""The providers of a configuration: the model that is asked, and others that may be."""

from __future__ import annotations

import logging
import os
import re
from typing import Any, NamedTuple

from fabe_ds.config.sections import SECRETS, ModelSettings
from fabe_ds.config.settings import TransformConfig
from fabe_ds.network import without_secrets
from fabe_ds.prompts.asking import Texts
from fabe_ds.providers import Endpoint, HttpProvider, Provider, build_provider, provider_class

log = logging.getLogger(__name__)

OTHER_KEY = "FALLBACK_API_KEY"
"""The variable of the key for a fallback model at an address of its own."""
_elsewhere = re.compile(r"(.+?)@(https?://.+)", re.IGNORECASE)


class Fallback(NamedTuple):
    """A model that is asked where the one before it gave no good answer. `base_url`: where it is,
    if not at the run's own servers."""

    model: str
    base_url: str | None = None

    @classmethod
    def parse(cls, text: str) -> Fallback:
        """MODEL, or MODEL@BASE_URL."""
        found = _elsewhere.fullmatch(text)
        return cls(*found.groups()) if found else cls(text)


def base_urls_of(config: TransformConfig, kind: type[Provider]) -> list[str]:
    """The servers' addresses, of the configuration or of the provider's own variables."""
    if config.base_url or not issubclass(kind, HttpProvider):
        return config.base_url
    for name in kind.base_url_variables:
        if text := os.environ.get(name, "").strip():
            base_url = kind.base_url_of(text)
            log.info("%s: asking %s", name, without_secrets(base_url))
            return [base_url]
    return []


class Providers:
    """Builds the providers of a configuration."""

    def __init__(self, config: TransformConfig, texts: Texts, chat_template: str | None) -> None:
        self._config, self._texts, self._chat_template = config, texts, chat_template
        self._kind = provider_class(config.provider)

    def build(self, rank: int = 0, model: str | None = None) -> Provider:
        """The run's own; with `model`, another model at the same place. `rank`: which of several
        devices is this process's."""
        config = self._config
        urls = {
            "base_url": next(iter(config.base_url), None),
            "more_base_urls": tuple(config.base_url[1:]),
        }
        endpoint = self._endpoint(rank, model or config.model or "local", **urls)
        return build_provider(config.provider, endpoint, self._key(self._kind))

    def fallback(self, wanted: Fallback, rank: int = 0) -> Provider:
        """Who is asked in the run's place: at an address, by the protocol of the run's provider,
        or by OpenAI's where that is a model in this process."""
        if wanted.base_url is None:
            return self.build(rank, wanted.model)
        is_local = not issubclass(self._kind, HttpProvider)
        name = "openai" if is_local else self._config.provider
        more: dict[str, Any] = {
            "base_url": wanted.base_url,
            "provider": name,
            "endpoint_name": None,
        }
        if is_local:  # those of a local model's own
            more |= {"provider_options": {}, "chat_template": None, "base_model": None}
        key = self._other_key or self._key(provider_class(name))
        return build_provider(name, self._endpoint(rank, wanted.model, **more), key)

    def _endpoint(self, rank: int, model: str, **more: object) -> Endpoint:
        config, devices = self._config, self._config.devices
        settings = {name: getattr(config, name) for name in ModelSettings.model_fields}
        words = [*self._texts.words, *config.template_vars.values()]
        run = {
            **dict.fromkeys(SECRETS),  # they go to the provider by themselves
            "model": model,
            "device": devices[rank % len(devices)],
            "chat_template": self._chat_template,
            "sharers": len(devices),
            "batches": 4 if config.concurrency == "auto" else config.concurrency,
            "chat": config.use_chat_template,
            "instruction": "\n".join(words),
            "max_new_tokens": config.max_new_tokens,
            "cache_dir": config.cache_dir,
        }
        return Endpoint(**{**settings, **run, **more})

    @property
    def keys(self) -> dict[str, str]:
        """The keys that there are, by the names of their settings."""
        found = dict(zip(SECRETS, (self._key(self._kind), self._other_key), strict=True))
        return {name: key for name, key in found.items() if key}

    @property
    def _other_key(self) -> str | None:
        """The key for models at addresses of their own."""
        given = self._config.fallback_api_key
        return given.get_secret_value() if given is not None else os.environ.get(OTHER_KEY)

    def _key(self, kind: type[Provider]) -> str | None:
        """The key for the server, of the configuration or the environment."""
        if self._config.api_key is not None:
            return self._config.api_key.get_secret_value()
        if not issubclass(kind, HttpProvider):
            return None
        return os.environ.get(kind.key_variable or "")
