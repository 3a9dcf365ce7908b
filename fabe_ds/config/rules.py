"""What goes with what: asked before anything is read or sent, by runs and dry runs alike."""

from __future__ import annotations

import logging
import re

from fabe_ds.config.settings import RunConfig, TransformConfig, flag
from fabe_ds.engine.budget import Budget, read_price
from fabe_ds.errors import UsageError
from fabe_ds.providers import LocalProvider, Provider

log = logging.getLogger(__name__)

_CODE = re.compile(r"code|source|script|func|program|solution|snippet|impl|sql|patch|diff", re.I)
"""Names of fields that hold code."""
_OF_PUSHES = ("public", "revision", "push_config_name", "force", "push_failures")
_OF_RAY = ("ray_address", "workers", "gpus_per_worker")


def check(config: RunConfig, provider: Provider) -> None:
    """Raises: UsageError where settings do not go together."""
    if config.batch_api:
        refuse_caps(config, "--batch-api")
    if isinstance(provider, LocalProvider):
        refuse_caps(config, f"--provider {provider.name}")
    if config.runner == "ray":
        refuse_caps(config, "--runner ray")
    budget_of(config)


def remark(config: RunConfig, provider: Provider) -> None:
    """Says which settings have no effect, and what a person may not have meant."""
    _say_system_prompt(config, provider)
    if config.runner != "ray":
        _say_idle(config, _OF_RAY, "--runner ray")
    if config.push_to_hub is None:
        _say_idle(config, _OF_PUSHES, "--push-to-hub")
    if config.input_glob and config.input_path is not None and config.input_path.is_file():
        log.warning("--glob has no effect: %s is one file", config.input_path)


def _say_system_prompt(config: RunConfig, provider: Provider) -> None:
    """Says that the system prompt is the one for code, where it may be none of the user's."""
    if "system_prompt" in config.model_fields_set or not provider.cached:
        return
    names = [name.rpartition(".")[2] for name in (config.field, *config.also_fields)]
    if not all(_CODE.search(name) for name in names):
        log.info(
            "the system prompt is the default, for code (%r); --system-prompt gives another, or '' "
            "for none",
            config.system_prompt,
        )


def _say_idle(config: RunConfig, names: tuple[str, ...], other: str) -> None:
    for name in names:
        if getattr(config, name) not in (None, False):
            log.warning("%s has no effect without %s", flag(name), other)


def refuse_caps(config: TransformConfig, other: str) -> None:
    """Raises: UsageError where spending is capped, which goes without `other`."""
    if config.capped:
        raise UsageError(
            "--max-requests, --max-tokens-total and --max-cost hold for the requests that one "
            f"process sends to a server; leave {other} out"
        )


def budget_of(config: TransformConfig) -> Budget:
    """What may be spent. Raises: UsageError where there is a cap on costs and no price."""
    price = None
    if config.max_cost is not None or config.prices is not None:
        price = read_price(config.prices, config.model or "")
    return Budget(config.max_requests, config.max_tokens_total, config.max_cost, price)
