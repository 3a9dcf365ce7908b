"""The report of a run (`outputs.run.json`): its one model, writer and reader."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fabe_ds.config.load import MAYBE_FILES, in_folder
from fabe_ds.config.sections import SECRETS
from fabe_ds.config.settings import JUDGE_FILE, SCHEMA_FILE, RunConfig, setting
from fabe_ds.errors import UsageError, reason
from fabe_ds.files import is_text, replacing
from fabe_ds.network import without_secrets
from fabe_ds.remote import url_of
from fabe_ds.report.result import RunResult
from fabe_ds.version import __version__
from fabe_ds.who_answers import Fallback

REPORT_VERSION = 2
"""Of the report's layout. Reports without a version are of layout 1, which lacked nothing of 2."""


class RunReport(BaseModel):
    """What a run did, with which settings, and how it went: JSON, beside the output.

    Counts are those of `RunResult`. `config` holds the settings but for the key. `history` are
    points as `report.course.Point` describes them; `latency` and the sizes of tokens are counts by
    size: {n: values of up to 2**(n/4)}.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    fabe_ds: str
    version: int = 1
    ended: str = ""
    config: dict[str, Any]
    input: str = ""
    """The path that was read: of remote input, that of its copy."""
    records: int
    done: int
    cached: int
    failed: int
    skipped: dict[str, int] = Field(default_factory=dict)
    failures_by_kind: dict[str, int] = Field(default_factory=dict)
    bad_files: list[str] = Field(default_factory=list)
    outputs: list[str]
    seconds: float = 0.0
    requests: int = 0
    retries: int = 0
    refusals: int = 0
    reasks: int = 0
    hedged: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cost: float = 0.0
    failures_file: str | None = None
    report: str | None = None
    loading: float = 0.0
    notes: list[str] = Field(default_factory=list)
    answered_by: dict[str, int] = Field(default_factory=dict)
    history: list[list[float]] = Field(default_factory=list)
    latency: dict[int, int] = Field(default_factory=dict)
    instruction: str = ""
    prompt_tokens_each: dict[int, int] = Field(default_factory=dict)
    completion_tokens_each: dict[int, int] = Field(default_factory=dict)


def read_report(path: Path) -> RunReport:
    """The report of a run, of this version or an earlier one; settings that it does not know have
    their defaults. Raises: UsageError where the file is no such report.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        # Settings that are newer than the report have their defaults.
        defaults = {
            name: declared.get_default(call_default_factory=True)
            for name, declared in RunConfig.model_fields.items()
        }
        report = RunReport(**{**data, "config": {**defaults, **data["config"]}})
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from None
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path}: not the report of a run (outputs.run.json)") from None
    if report.version > REPORT_VERSION:
        raise UsageError(f"{path}: of a later version of fabe-ds ({report.fabe_ds})")
    return report


def write_report(config: RunConfig, result: RunResult, course: dict[str, Any]) -> None:
    """Writes the report of a run to `result.report`.

    `course` is the instruction, and the history and the sizes for the charts.
    """
    assert result.report is not None
    head = {"fabe_ds": __version__, "version": REPORT_VERSION}  # `run_files` knows it by its head
    body = {
        **head,
        "ended": f"{datetime.now():%Y-%m-%d %H:%M}",
        "config": _settings(config),
        **{field.name: getattr(result, field.name) for field in fields(result)},
        **course,
    }
    # There may be very many.
    body["outputs"] = [os.path.abspath(path) for path in result.outputs]  # noqa: PTH100
    report = json.dumps(body, indent=2, ensure_ascii=False, default=str)
    if not is_text(report):  # a name that is no UTF-8: JSON has an escape for its bytes
        report = json.dumps(body, indent=2, default=str)
    with replacing(result.report) as file:
        file.write(report.encode() + b"\n")


def _settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a run as they can be used again from any folder, but for the key."""
    settings = {
        name: getattr(config, name)
        for name in RunConfig.model_fields
        if name not in SECRETS and setting(name, "panel")
    }
    here = Path.cwd()
    settings["validate_with"] = [in_folder(c, SCHEMA_FILE, here) for c in config.validate_with]
    settings["pick"] = in_folder(config.pick, JUDGE_FILE, here)
    # Of headers, only where they come from.
    found = {name: text for name, text in config.headers.items() if text.startswith("env:")}
    settings["headers"] = found
    urls = list(map(without_secrets, config.base_url))
    settings["fallback_models"] = [
        model if url is None else f"{model}@{without_secrets(url)}"
        for model, url in map(Fallback.parse, config.fallback_models)
    ]
    settings["base_url"] = urls if len(urls) > 1 else next(iter(urls), None)
    for name, value in settings.items():
        if isinstance(value, Path) or (name in MAYBE_FILES and isinstance(value, str)):
            url = url_of(value) if isinstance(value, Path) else None
            settings[name] = url or _from_anywhere(value)
    return settings


def _from_anywhere(value: Path | str | None) -> Path | str | None:
    """A path as it can be found from any folder; what is none (a name, a text) stays."""
    try:
        return Path(value).absolute() if value and Path(value).exists() else value
    except (OSError, ValueError):  # a text too long for a name, or with a NUL in it
        return value
