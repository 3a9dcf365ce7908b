"""Settings read from flags, the environment, YAML and keywords, and validated."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from fabe_ds.config.params import params_of
from fabe_ds.config.sections import SECRETS
from fabe_ds.config.settings import JUDGE_FILE, SCHEMA_FILE, VERY_NEAR, RunConfig, flag, setting
from fabe_ds.config.yaml_file import read_yaml
from fabe_ds.errors import UsageError, reason
from fabe_ds.files import is_text

C = TypeVar("C", bound=BaseModel)


VALUE_SHOWN = 100
"""Characters of a wrong value."""


_PATHS = ("input_path", "output_path", "cache_dir", "prices")


MAYBE_FILES = (
    *("instruction", "system_prompt", "model", "base_model", "chat_template"),
    *("response_format", "choices", "examples"),
)
"""Settings that are a text or a name, unless a file of that name is there."""


_ALIASES = ("strip_fences", "auto_extract_code")


_SPELLED = {
    str(flag_name).replace("-", "_"): name
    for name in RunConfig.model_fields
    if (flag_name := setting(name, "flag"))
}
"""Settings by the names of their flags, where these are others."""


_LISTS = [
    name
    for name, declared in RunConfig.model_fields.items()
    if get_origin(declared.annotation) is list
]


def read_config(flags: Mapping[str, Any], file: Path | None = None) -> RunConfig:
    """The configuration: flag over environment over YAML file over default.

    Raises: UsageError, naming the flag, variable or key that is wrong.
    """
    layers: list[tuple[dict[str, Any], Callable[[str], str]]] = [
        (_read_yaml(file) if file else {}, lambda name: f"{file}: {name}"),
        (_read_environment(), lambda name: str(setting(name, "environment"))),
        (dict(flags), flag),
    ]
    values: dict[str, Any] = {}
    named: dict[str, str] = {}
    for layer, name_of in layers:
        given = {name: value for name, value in layer.items() if value is not None}
        for name, other in (_ALIASES, _ALIASES[::-1]):
            if name in given:
                if given.get(other, given[name]) != given[name]:
                    raise UsageError(f"{name_of(name)} and {name_of(other)} are one setting")
                values[other] = given[name]
                named[other] = name_of(name)
        values |= given
        named |= {name: name_of(name) for name in given}
    return validated(RunConfig, values, named)


def by_name(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of keywords, which may be called as the flags are too (`input`, `validate`)."""
    values: dict[str, Any] = {}
    for given, value in options.items():
        name = "samples" if given == "n" else _SPELLED.get(given, given)
        if name in values:
            raise UsageError(f"{given}: given twice, under two names")
        values[name] = value
    for name in _LISTS:
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    if isinstance(values.get("field"), list | tuple):
        if not values["field"]:
            raise UsageError("field: an empty list; name a field")
        values["field"], *values["also_fields"] = values["field"]
    return values


def config_from(config: RunConfig | None, options: Mapping[str, Any]) -> RunConfig:
    """A configuration with keywords in the place of its settings, or of keywords alone.

    Raises: UsageError.
    """
    if config is not None and not options:
        return config
    given = {} if config is None else dict(config)
    return validated(RunConfig, {**given, **by_name(options)}, {})


def signature_of(model: type[BaseModel], *first: inspect.Parameter) -> inspect.Signature:
    """The settings of a configuration as keywords, behind other parameters: for `help`, and for
    the hints of notebooks and editors."""
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=declared.get_default(call_default_factory=True),
            annotation=declared.rebuild_annotation(),
        )
        for name, declared in model.model_fields.items()
        if name not in {parameter.name for parameter in first}
    ]
    return inspect.Signature([*first, *keywords])


def with_settings(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function that takes settings of a run as keywords, with each of them."""
    own = inspect.signature(function)
    named = (each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD)
    return signature_of(RunConfig, *named).replace(return_annotation=own.return_annotation)


def validated(model: type[C], values: Mapping[str, Any], named: Mapping[str, str]) -> C:
    """The configuration of these values; `named` is how each was given, for the error."""
    values = dict(values)
    temperature = values.get("temperature")
    if isinstance(temperature, str) and temperature.strip().lower() == "none":  # the server's own
        del values["temperature"]
        try:
            values["params"] = {**params_of(values.get("params")), "temperature": None}
        except ValueError as error:
            raise UsageError(f"{named.get('params', 'params')}: {error}") from None
    try:
        return model(**{n: v if n in _PATHS else _as_text(v) for n, v in values.items()})
    except UnicodeDecodeError:
        wrong = next(n for n, v in values.items() if n not in _PATHS and not _is_text(v))
        raise UsageError(f"{named.get(wrong, wrong)}: not UTF-8") from None
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise UsageError(unknown(name, [*model.model_fields, *_SPELLED])) from None
        if name == "device":
            raise UsageError(
                f"--device {first['input']}: write cpu, cuda, cuda:0, cuda:0,1, mps or auto"
            ) from None
        message = str(first["msg"]).removeprefix("Value error, ").replace("Input should", "should")
        for other in error.errors()[1:]:  # what else a setting of several kinds takes
            if other["loc"][0] == name and other["type"] == "literal_error":
                message += f", or {other['ctx']['expected']}"
        given = "" if name in (*SECRETS, "headers") else f" {_short(first['input'])}"
        raise UsageError(f"{named.get(name, name)}{given}: {message}") from None


def _as_text(value: Any) -> Any:
    """A value of the command line, whose bytes are UTF-8 whatever the locale says.

    Raises: UnicodeDecodeError.
    """
    if isinstance(value, str) and not is_text(value):
        return os.fsencode(value).decode()
    return [_as_text(item) for item in value] if isinstance(value, list) else value


def _is_text(value: Any) -> bool:
    try:
        _as_text(value)
    except UnicodeDecodeError:
        return False
    return True


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= VALUE_SHOWN else f"{shown[:VALUE_SHOWN]}..."


def unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, VERY_NEAR)
    return f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a YAML file; paths in it are relative to it."""
    try:
        loaded = read_yaml(file)
    except OSError as error:
        raise UsageError(f"--config {file}: {reason(error)}") from None
    except ValueError as error:
        raise UsageError(f"--config {file}{error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"--config {file}: not a mapping of settings")
    values: dict[str, Any] = {}
    names = list(RunConfig.model_fields)
    for given, value in loaded.items():
        # As the flag is called, too: input, also-field, --glob.
        name = str(given).removeprefix("--").replace("-", "_")
        name = _SPELLED.get(name, name)
        if name not in RunConfig.model_fields:
            raise UsageError(f"--config {file}: {unknown(str(given), [*names, *_SPELLED])}")
        if name in values:
            raise UsageError(f"--config {file}: {given} is there twice, under two names")
        values[name] = value
    base = file.parent
    for name in _PATHS:
        if isinstance(values.get(name), str) and "://" not in values[name]:
            values[name] = base / values[name]
    for name in MAYBE_FILES:
        value = values.get(name)
        if isinstance(value, str) and value and "\n" not in value and len(value) < 1024:
            beside = base / value
            if value.startswith(("./", "../")) or os.path.lexists(beside):
                values[name] = str(beside)
    for name in _LISTS:
        if isinstance(values.get(name), str):
            values[name] = [values[name]]
    if isinstance(checks := values.get("validate_with"), list):
        values["validate_with"] = [in_folder(check, SCHEMA_FILE, base) for check in checks]
    if isinstance(pick := values.get("pick"), str):
        values["pick"] = in_folder(pick, JUDGE_FILE, base)
    for name, as_value in (("template_vars", str), ("provider_options", lambda value: value)):
        if name in values:
            values[name] = _pairs(values[name], f"--config {file}: {name}", as_value)
    return values


def in_folder(text: Any, prefix: str, folder: Path) -> Any:
    """A setting that names a file behind a prefix, with the file's path taken from a folder."""
    if not isinstance(text, str) or not text.startswith(prefix):
        return text
    return f"{prefix}{folder / text.removeprefix(prefix)}"


def _pairs(given: Any, where: str, as_value: Callable[[Any], Any]) -> Any:
    """A mapping, also where it is written as the flag takes it: a list of name=value."""
    if isinstance(given, str | list):
        given = [given] if isinstance(given, str) else given
        pairs = [str(pair).partition("=") for pair in given]
        if wrong := next((name for name, equals, _ in pairs if not equals), None):
            raise UsageError(f"{where}: {wrong}: write name: value, or name=value")
        return {name: value for name, _, value in pairs}
    if isinstance(given, dict):
        return {str(name): as_value(value) for name, value in given.items()}
    return given


def _read_environment() -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in RunConfig.model_fields:
        variable = setting(name, "environment")
        if variable and (text := os.environ.get(variable, "")):
            values[name] = text
    return values
