"""What tokens cost: by a file of the user's, or as a package ships what is published."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fabe_ds.config.yaml_file import read_yaml
from fabe_ds.errors import UsageError, reason

log = logging.getLogger(__name__)

AUTO = "auto"
BATCH = "batch"
"""The tier of requests that go through a batch API."""
_PLAIN = (None, "auto", "default", "standard", "on_demand")
"""Tiers that cost what is said without one."""
_MILLION = 1_000_000
_PACKAGE = "genai-prices"
_verified = re.compile(r"\d{4}-\d\d-\d\d")


class Price(Protocol):
    """What a model's tokens cost, in whatever currency the cap is in."""

    def cost(self, prompt: int, completion: int, cached: int = 0) -> float:
        """What so many tokens cost; `cached` are those of the prompt that the server had."""


@dataclass(frozen=True, slots=True)
class FixedPrice:
    """Of a million tokens. Cached ones cost what others do, where nothing else is said."""

    prompt: float = 0.0
    completion: float = 0.0
    cached: float | None = None

    def cost(self, prompt: int, completion: int, cached: int = 0) -> float:
        for_cached = self.prompt if self.cached is None else self.cached
        new = (prompt - cached) * self.prompt + completion * self.completion
        return (new + cached * for_cached) / _MILLION


FREE = FixedPrice()


def is_auto(file: Path) -> bool:
    """Whether `--prices` asks for those that are published."""
    return file.name == AUTO and not file.exists()


def read_price(file: Path | None, model: str, base_url: str = "", tier: str | None = None) -> Price:
    """The model's price in a YAML file of `model: {prompt: ..., completion: ..., cached: ...}`, or,
    of a service tier, in `model: {flex: {prompt: ..., ...}}`; `auto` is what its provider, as far
    as `base_url` tells it, has published.

    Raises: UsageError. Where no price is given there is none to assume.
    """
    if file is None:
        raise UsageError("--max-cost needs --prices: auto, or a YAML file of the models' prices")
    if is_auto(file):
        return _published(model, base_url, tier)
    try:
        prices: Any = read_yaml(file)
    except OSError as error:
        raise UsageError(f"--prices {file}: {reason(error)}") from None
    except ValueError as error:
        raise UsageError(f"--prices {file}{error}") from None
    try:
        entry = prices[model]
        if tier in entry:
            entry = entry[tier]
        elif tier not in (*_PLAIN, BATCH):  # a batch costs no more than the plain price
            raise UsageError(
                f"--prices {file}: no price of {model!r} for --service-tier {tier}; write "
                f"`{model}: {{{tier}: {{prompt: .., completion: ..}}}}`"
            )
        cached = entry.get("cached")
        numbers = [float(entry["prompt"]), float(entry["completion"])]
        numbers += [] if cached is None else [float(cached)]
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError("a price that is none")
        return FixedPrice(*numbers)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(
            f"--prices {file}: no price of {model!r}; write `{model}: {{prompt: 0.15, "
            "completion: 0.60}`, per million tokens"
        ) from None


class PublishedPrice:
    """As a provider has published it. Some models cost more from so many tokens on, or at times of
    the day."""

    def __init__(self, model: str, provider: str, context: Mapping[str, str]) -> None:
        self._model, self._provider, self._context = model, provider, context

    def cost(self, prompt: int, completion: int, cached: int = 0) -> float:
        from genai_prices import Usage, calc_price

        usage = Usage(input_tokens=prompt, output_tokens=completion, cache_read_tokens=cached)
        found = calc_price(
            usage, self._model, provider_id=self._provider, price_context=self._context
        )
        return float(found.total_price)


@functools.cache
def _published(model: str, base_url: str, tier: str | None) -> Price:
    """Raises: UsageError."""
    try:
        from genai_prices.data_snapshot import get_snapshot

        version = importlib.metadata.version(_PACKAGE)
    except ImportError:
        raise UsageError(f"--prices auto needs {_PACKAGE}; pip install 'fabe-ds[prices]'") from None
    lists = get_snapshot()
    # An address that the lists do not know may be a proxy's: the model's own provider, then.
    found = (_found(lists, model, base_url) if base_url else None) or _found(lists, model, None)
    if found is None:
        raise UsageError(
            f"--prices auto: {_PACKAGE} {version} has no price of {model!r}; give a YAML file of "
            f"`{model}: {{prompt: 0.15, completion: 0.60}}`, per million tokens"
        )
    provider, listed = found
    context = {} if tier in _PLAIN else {"processing" if tier == BATCH else "service_tier": tier}
    variants = [each.when for each in listed.price_variants or ()]
    if context and context not in variants:
        named = "--batch-api" if tier == BATCH else f"--service-tier {tier}"
        raise UsageError(
            f"--prices auto: {_PACKAGE} {version} has no price of {model!r} for {named}; give a "
            "YAML file"
        )
    price = PublishedPrice(model, provider.id, context)
    dates = _verified.findall(listed.price_comments or "")
    log.info(
        "prices: %s of %s, %.6g and %.6g a million tokens of prompts and answers%s (%s %s%s)",
        listed.id,
        provider.name,
        price.cost(1000, 0) * 1000,
        price.cost(0, 1000) * 1000,
        f", {tier}" if context else "",
        _PACKAGE,
        version,
        f", checked {max(dates)}" if dates else "",
    )
    return price


def _found(lists: Any, model: str, base_url: str | None) -> tuple[Any, Any] | None:
    try:
        found: tuple[Any, Any] = lists.find_provider_model(model, None, None, base_url)
    except LookupError:
        return None
    return found
