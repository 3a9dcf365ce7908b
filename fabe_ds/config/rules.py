"""What goes with what: all combinations of settings that are refused, or have no effect.

Asked before anything is read or sent, by runs, dry runs and `transform_fn` alike.
"""

from __future__ import annotations

import difflib
import logging
import re
from typing import Protocol

from fabe_ds.config.settings import VERY_NEAR, RunConfig, TransformConfig, flag
from fabe_ds.errors import UsageError
from fabe_ds.fields import FieldPath, Items, is_in_list, is_several, parse_path

log = logging.getLogger(__name__)

_CODE = re.compile(r"code|source|script|func|program|solution|snippet|impl|sql|patch|diff", re.I)
"""Names of fields that hold code."""
_OF_PUSHES = ("public", "revision", "push_config_name", "force", "push_failures")
_OF_BATCHES = ("batches", "batch_requests", "batch_window")
_at_an_address = re.compile(r".+?@https?://[^/\s]\S*", re.IGNORECASE)
_no_model = re.compile(r"@$|://|@(localhost|[\d.]+):\d", re.IGNORECASE)
"""What MODEL@BASE_URL was meant to be, and is not."""
_OF_RAY = ("ray_address", "workers", "gpus_per_worker")
_OF_LOCAL_MODELS = ("base_model", "chat_template")


class ProviderFacts(Protocol):
    """What rules look at of a provider: its class knows it."""

    @property
    def name(self) -> str: ...
    @property
    def asks(self) -> bool: ...
    @property
    def cached(self) -> bool: ...
    @property
    def is_local(self) -> bool: ...
    @property
    def has_batches(self) -> bool: ...
    @property
    def lacks(self) -> tuple[str, ...]: ...
    @property
    def has_tiers(self) -> bool: ...


def check_transform(config: TransformConfig, provider: ProviderFacts) -> None:
    """Raises: UsageError where settings of a transform do not go together."""
    if provider.asks and not config.instruction and config.context is None:
        raise UsageError("--instruction is required: a text or a template file")
    if provider.asks and not config.model:
        raise UsageError("--model is required (or MODEL_PATH in the environment)")
    _check_names(config)
    _check_fields(config)
    _check_outputs(config)
    _check_form(config)
    if not all(map(str.strip, config.base_url)):
        raise UsageError("--base-url: an empty one; leave it out, or name the server")
    if len({url.rstrip("/") for url in config.base_url}) < len(config.base_url):
        raise UsageError("--base-url: one is given twice")
    for name in config.fallback_models:
        if not _at_an_address.fullmatch(name) and (not name.strip() or _no_model.search(name)):
            raise UsageError(
                f"--fallback-model {name}: write MODEL or MODEL@BASE_URL, as in "
                "big@https://api.openai.com/v1"
            )
        if name == config.model:
            raise UsageError(f"--fallback-model {name}: it is the run's own model")
    if config.service_tier is not None and "service_tier" in config.given_params:
        raise UsageError("--service-tier and --param service_tier are one setting")
    for name in provider.lacks:
        if getattr(config, name) not in (None, []):
            raise UsageError(f"{flag(name)}: {config.provider} has no such parameter")
    if config.service_tier is not None and not provider.has_tiers:
        raise UsageError(f"--service-tier: {config.provider} has none")
    if config.service_tier is not None and config.batch_api:
        raise UsageError("--service-tier and --batch-api do not go together")
    if config.batch_api and len(config.base_url) > 1:
        raise UsageError("--batch-api sends to one server; give one --base-url")
    if config.batch_api and not provider.has_batches:
        raise UsageError(
            f"--batch-api: {config.provider} has none; it goes with openai, responses and anthropic"
        )
    sampling = config.temperature > 0 if config.do_sample is None else config.do_sample
    if config.samples > 1 and provider.asks and not sampling:
        raise UsageError("--samples: equal answers without sampling; give a --temperature")
    if not provider.is_local:
        for name in _OF_LOCAL_MODELS:
            if getattr(config, name) is not None:
                raise UsageError(
                    f"{flag(name)} goes with a local model (hf, modelscope); "
                    f"{config.provider} asks a server"
                )


def _check_fields(config: TransformConfig) -> None:
    """Raises: UsageError where fields are no paths, or one another's, or two backups have one
    place."""
    targets = config.targets
    try:
        paths = targets.paths
    except ValueError as error:
        raise UsageError(f"--field: {error}") from None
    for name, path in zip(targets.names, paths, strict=True):
        if isinstance(path[0], Items):
            raise UsageError(f"--field {name}: a path begins with a key")
    for name, path in zip(config.also_fields, paths[1:], strict=True):
        others = (other for other in paths if other is not path)
        if any(_is_inside(path, other) for other in others):
            raise UsageError(f"--also-field {name}: another field is the same, or inside it")
    if targets.backup and not targets.outputs:
        pairs = zip(paths, targets.backup_keys, strict=True)
        keys = {(path[:-1], kept) for path, kept in pairs}
        columns = [name for name in targets.backup_columns if name is not None]
        for places, count in ((keys, len(paths)), (set(columns), len(columns))):
            if len(places) < count:
                raise UsageError(
                    f"--backup-field {config.backup_field}: two fields would be kept there; "
                    "give another"
                )
    # A JSON record and a table keep originals under other names; neither may meet these.
    taken = {*targets.names, *(path[0] for path in paths), *filter(None, targets.backup_columns)}
    if config.samples > 1 and not targets.samples_field:
        raise UsageError("--samples-field: several samples need a field; name one")
    for field in range(len(targets.names)):
        for each in targets.added(field):
            spelled = "--output-field"
            if each.kind in ("reasoning", "confidence"):
                spelled = f"--{each.kind}-field"
            # Beside a field of its own, a name may be there again.
            place = (*paths[field][:-1], *each.path) if each.beside else each.path
            if place in paths or each.name in taken:
                raise UsageError(f"{spelled} {each.name}: another field has that name")
            taken.add(each.name)
    for name in targets.gained:
        spelled = "--status-field" if name == targets.status_field else "--samples-field"
        if name in taken:
            raise UsageError(f"{spelled} {name}: another field has that name; give another")
        taken.add(name)


def _check_names(config: TransformConfig) -> None:
    """Raises: UsageError where the name of an output field is no path, or leads to many places."""
    beside = [("--reasoning-field", config.reasoning_field)]
    beside.append(("--confidence-field", config.confidence_field))
    outputs = [("--output-field", name) for name in config.output_fields]
    paths: list[FieldPath] = []
    for spelled, name in (*outputs, *beside):
        if name is None or (name == "" and spelled != "--output-field"):
            continue
        try:
            path = parse_path(name)
        except ValueError as error:
            raise UsageError(f"{spelled} {name}: {error}") from None
        if is_several(path):
            raise UsageError(f"{spelled} {name}: * and [...] are no place for an answer")
        if any(_is_inside(path, other) or _is_inside(other, path) for other in paths):
            raise UsageError(f"{spelled} {name}: another output is the same, or inside it")
        paths.append(path)


def _check_outputs(config: TransformConfig) -> None:
    """Raises: UsageError where answers cannot go where they are wanted."""
    targets, fields = config.targets, 1 + len(config.also_fields)
    outputs, schema = targets.outputs, config.response_format
    if config.on_existing == "skip" and not outputs:
        raise UsageError("--on-existing skip looks for the --output-field; give one")
    if len(outputs) > 1 and fields == 1 and schema is None:
        raise UsageError(
            "--output-field is given several times: with --response-format, each takes the key of "
            "the answer that it is named for; without it, there is one answer"
        )
    if fields == 1 and len(outputs) > 1:
        for name in outputs:
            if name not in targets.keyed:
                raise UsageError(f"--output-field {name}: the --response-format has no such key")
    if fields > 1 and outputs and len(outputs) != fields:
        raise UsageError("--output-field: with several fields, give one for each, in their order")
    for field, path in enumerate(targets.paths):
        if not is_several(path):
            continue
        for each in targets.added(field):
            if not each.beside:
                raise UsageError(
                    f"--output-field {each.name}: beside each {targets.names[field]} goes a name "
                    "without a dot"
                )
        if isinstance(path[-1], Items) and targets.added(field):
            raise UsageError(
                f"--field {targets.names[field]}: beside the items of a list there is no place for "
                "a field"
            )
    if config.context == "turns" and not all(map(is_in_list, targets.paths)):
        raise UsageError(
            "--context turns: the field is no turn of a chat; as in --field 'messages"
            "[role=assistant].content'"
        )


def _check_form(config: TransformConfig) -> None:
    """Raises: UsageError where answers cannot be of the form that is wanted."""
    if config.choices and config.response_format is not None:
        raise UsageError("--choices and --response-format do not go together")
    if config.confidence_field and not config.choices:
        raise UsageError("--confidence-field tells the probability of a choice; give --choices")
    if config.pick != "first" and config.samples == 1:
        raise UsageError(f"--pick {config.pick}: there is one answer; give --samples")
    if config.judge_model and not config.pick.startswith("judge:"):
        raise UsageError("--judge-model goes with --pick judge:FILE")


def _is_inside(path: FieldPath, other: FieldPath) -> bool:
    return path[: len(other)] == other[: len(path)]


def check(config: RunConfig, provider: ProviderFacts) -> None:
    """Raises: UsageError where settings of a run do not go together."""
    if config.inplace:
        for name in ("output_path", "output_format"):
            if getattr(config, name) is not None:
                raise UsageError(f"--inplace and {flag(name)} do not go together")
    kept = config.targets.backup or config.output_fields
    if config.inplace and config.on_failure == "null" and not kept:
        raise UsageError(
            "--on-failure null with --inplace would lose the originals of records that fail; give "
            "a --backup-field, an --output-field or an --output"
        )
    if config.batch_api:
        refuse_caps(config, "--batch-api")
    if provider.is_local:
        refuse_caps(config, f"--provider {provider.name}")
    if config.runner == "ray":
        check_workers(config)
    if config.max_cost is not None and config.prices is None:
        raise UsageError("--max-cost needs --prices: auto, or a YAML file of the models' prices")


def check_workers(config: TransformConfig) -> None:
    """Raises: UsageError for what goes with one process alone, and not with Ray's workers."""
    if config.batch_api:
        raise UsageError("--batch-api sends from one process; leave --runner ray out")
    refuse_caps(config, "--runner ray")
    if len(config.devices) > 1:
        raise UsageError(
            f"--device {config.device}: Ray gives each worker its own; say --device cuda and "
            "--workers"
        )


def refuse_caps(config: TransformConfig, other: str) -> None:
    """Raises: UsageError where spending is capped, which goes without `other`."""
    if config.capped:
        raise UsageError(
            "--max-requests, --max-tokens-total and --max-cost hold for the requests that one "
            f"process sends to a server; leave {other} out"
        )


def remark(config: RunConfig, provider: ProviderFacts) -> None:
    """Says which settings have no effect, and what a person may not have meant."""
    _say_system_prompt(config, provider)
    _say_short(config)
    _say_key(config)
    if config.runner != "ray":
        _say_idle(config, _OF_RAY, "--runner ray")
    if config.push_to_hub is None:
        _say_idle(config, _OF_PUSHES, "--push-to-hub")
    for name in _OF_BATCHES:
        if not config.batch_api and _is_changed(config, name):
            log.warning("%s has no effect without --batch-api", flag(name))
    if config.fallback_api_key is not None and not config.fallback_models:
        log.warning("--fallback-api-key has no effect without --fallback-model")
    if config.input_glob and config.input_path is not None and config.input_path.is_file():
        log.warning("--glob has no effect: %s is one file", config.input_path)


def _say_system_prompt(config: RunConfig, provider: ProviderFacts) -> None:
    """Says that the system prompt is the one for code, where it may be none of the user's."""
    if config.context and _is_changed(config, "system_prompt"):
        log.warning(
            "--system-prompt has no effect with --context turns: the instruction is the system "
            "prompt"
        )
    if "system_prompt" in config.model_fields_set or not provider.cached or config.context:
        return
    names = [name.rpartition(".")[2] for name in config.targets.names]
    if not all(_CODE.search(name) for name in names):
        log.info(
            "the system prompt is the default, for code (%r); --system-prompt gives another, or '' "
            "for none",
            config.system_prompt,
        )


def _say_key(config: RunConfig) -> None:
    """Says that the whole answer goes into a field whose name is nearly that of a part of it."""
    if config.response_format is None or config.targets.keyed:
        return
    keys = list(config.response_format.get("properties") or ())
    for name in config.output_fields:
        if near := difflib.get_close_matches(name, keys, 1, VERY_NEAR):
            log.warning(
                "--output-field %s: the --response-format has no such key, so it takes the whole "
                "answer; did you mean %s?",
                name,
                near[0],
            )


def _say_short(config: RunConfig) -> None:
    """Says that a model which reasons needs more tokens than the default."""
    if config.thinking not in (None, "off") and "max_new_tokens" not in config.model_fields_set:
        log.warning(
            "--thinking %s with --max-new-tokens %d (the default): answers will be cut while the "
            "model reasons; give it more, as in --max-new-tokens 4096",
            config.thinking,
            config.max_new_tokens,
        )


def _is_changed(config: RunConfig, name: str) -> bool:
    """Whether a setting is another than the default; of a run that is run again, all are set."""
    default = RunConfig.model_fields[name].get_default(call_default_factory=True)
    return bool(getattr(config, name) != default)


def _say_idle(config: RunConfig, names: tuple[str, ...], other: str) -> None:
    for name in names:
        if getattr(config, name) not in (None, False):
            log.warning("%s has no effect without %s", flag(name), other)
