"""What names a transform: its configuration as canonical JSON, and digests of that."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fabe_ds.config.settings import JUDGE_FILE, TransformConfig, setting
from fabe_ds.prompts.asking import Texts
from fabe_ds.providers import Provider
from fabe_ds.version import JOB_VERSION, TRANSFORM_VERSION

SYSTEM_TEMPLATE = "system_template"
"""Key of a spec whose system prompt is a template, and not a text as it is."""
FALLBACK_IDENTITIES = "fallback_identities"
"""Key of a spec of models that may be asked in the run's place."""
_NO_PART_OF_JOBS = ("where", "on_existing", "on_failure")
"""Settings that say which values are asked for, and nothing of what is made of them."""


def spec_of(
    config: TransformConfig,
    texts: Texts,
    chat_template: str | None,
    asked: Sequence[Provider],
) -> str:
    """All that can change what comes out, as canonical JSON. What stands in files is in it.
    `asked`: who answers, and who may instead."""
    values = {
        name: getattr(config, name)
        for name, declared in TransformConfig.model_fields.items()
        if (affects := setting(name, "affects_output"))
        and not (
            affects == "when set"
            and getattr(config, name) == declared.get_default(call_default_factory=True)
        )
    }
    values["instruction"] = texts.instruction[0]
    if texts.system is not None:
        values["system_prompt"] = texts.system[0]
        values[SYSTEM_TEMPLATE] = True
    if texts.judge is not None:
        values["pick"] = f"{JUDGE_FILE}{texts.judge[0]}"
    # Under a name of the user's, it does not matter where the servers are, or how many.
    values["base_url"] = next(iter(config.base_url), None) if not config.endpoint_name else None
    checks = config.validate_with  # several came later than one
    values["validate_with"] = checks if len(checks) > 1 else next(iter(checks), None)
    if chat_template is not None:
        values["chat_template"] = chat_template
    values["strip_fences"] = values["auto_extract_code"] = config.strips_fences
    values["identity"], *others = (provider.identity() for provider in asked)
    if others:
        values[FALLBACK_IDENTITIES] = others
    return _canonical(values)


def digest_of(spec: str) -> str:
    """Names what a transform makes of a record."""
    return _named(TRANSFORM_VERSION, spec)


def jobs_of(spec: str, provider: Provider) -> list[str]:
    """Names what is asked for: values that this job wrote in place are known by it, whatever
    later versions make of an answer. The first name is this version's, another may be that
    under which earlier ones knew it."""
    values = json.loads(spec)
    for name in _NO_PART_OF_JOBS:
        values.pop(name, None)
    former = provider.former_identity()
    specs = [values] if former is None else [values, {**values, "identity": former}]
    return [_named(JOB_VERSION, _canonical(each)) for each in specs]


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _named(version: int, spec: str) -> str:
    return hashlib.sha256(f"{version}\0{spec}".encode()).hexdigest()[:32]
