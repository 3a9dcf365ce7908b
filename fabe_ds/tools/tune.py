"""How many records a local model is quickest with: tried out on some of the user's own."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fabe_ds.config.settings import RunConfig
from fabe_ds.config.yaml_file import yaml_value
from fabe_ds.engine.coalesce import stored
from fabe_ds.errors import FabeError, RunStopped, UsageError
from fabe_ds.files import replacing
from fabe_ds.job import open_job
from fabe_ds.providers.base import LocalProvider
from fabe_ds.request import Outcome, Request
from fabe_ds.tools.dry_run import items_by_record, loaded
from fabe_ds.transform import Transform

_FULL = 1.5  # records of a trial, as a share of those in flight: to see rows take others' places
_BETTER = 1.05  # what a larger size must gain, since it takes more memory
_SIZES = [2**power for power in range(1, 14)]  # of a batch
_LEAST = 3  # sizes to compare
_CHUNK = 1000  # records whose answers are looked up together
_WARM = 4  # records answered before the first trial


@dataclass(frozen=True, slots=True)
class Trial:
    """`records` answered with so many in flight (`batch_size` times `concurrency`); `tokens` are
    those of prompts and answers, a second."""

    batch_size: int
    in_flight: int
    records: int
    records_per_second: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best of the trials; `ended` says why there were no more."""

    best: Trial
    trials: list[Trial]
    concurrency: int
    ended: str


def tune(config: RunConfig, count: int) -> Tuned:
    """Answers `count` records in batches of growing size; the record cache keeps the answers.

    Raises: FabeError; UsageError where no local model answers, or nothing is left to measure.
    """
    job = open_job(config)
    transform = job.transform
    provider = transform.provider
    if not isinstance(provider, LocalProvider) or not provider.cached:
        raise UsageError(
            f"--provider {config.provider}: tune is for local models (hf, modelscope); a server's "
            "limit is found in a run with --concurrency auto"
        )
    if not provider.resizes:
        raise UsageError(f"--engine {config.engine}: it plans its batches itself")
    try:
        records = loaded(job)
        requests = chain.from_iterable(
            (item for item in items if isinstance(item, Request))
            for items in items_by_record(job, records)
        )
        asked = _unanswered(transform, requests, count)
        concurrency = 4 if config.concurrency == "auto" else config.concurrency
        least = _WARM + sum(_records(size * concurrency) for size in _SIZES[:_LEAST])
        if len(asked) < least:
            raise UsageError(
                f"{len(asked)} records are left to answer, and {least} are the least to compare "
                f"{_LEAST} sizes with: give more (-n), or --no-resume to answer them again"
            )
        random.Random(0).shuffle(asked)  # so that all trials have like ones
        provider.preflight()
        return _tried(transform, provider, asked, concurrency)
    finally:
        transform.close()


def _unanswered(transform: Transform, requests: Iterator[Request], count: int) -> list[Request]:
    """The first `count` different requests that nothing is known of."""
    found: dict[bytes, Request] = {}
    while len(found) < count and (some := list(islice(requests, _CHUNK))):
        keys = {transform.provider.key(request): request for request in some}
        cache = transform.runtime.cache
        known = stored(cache, transform.provider, keys) if cache is not None else {}
        found |= {key: request for key, request in keys.items() if key not in known}
    return list(found.values())[:count]


def _tried(
    transform: Transform, provider: LocalProvider, asked: list[Request], concurrency: int
) -> Tuned:
    waiting = iter(asked)
    _measured(transform, list(islice(waiting, _WARM)))
    trials: list[Trial] = []
    left, ended = len(asked) - _WARM, ""
    for size in _SIZES:
        rows = size * concurrency
        part = list(islice(waiting, _records(rows)))
        left -= len(part)
        provider.resize(rows)
        seconds, outcomes = _measured(transform, part)
        tokens = sum(
            (answer.prompt_tokens or 0) + (answer.completion_tokens or 0)
            for outcome in outcomes
            if (answer := outcome.completion) is not None
        )
        if provider.rows < rows and trials:
            ended = f"{rows} in flight do not fit into memory"
            break
        trials.append(Trial(size, rows, len(part), len(part) / seconds, tokens / seconds))
        if len(trials) > 2 and trials[-1].tokens_per_second < trials[-3].tokens_per_second:
            ended = "more are slower"
            break
        if left < _records(2 * rows):
            ended = "more would want more records (-n)"
            break
    best = trials[0]
    for trial in trials[1:]:
        if trial.tokens_per_second > _BETTER * best.tokens_per_second:
            best = trial
    return Tuned(best, trials, concurrency, ended)


def _records(rows: int) -> int:
    """Records of a trial with so many in flight."""
    return max(8, int(_FULL * rows))


def _measured(transform: Transform, part: list[Request]) -> tuple[float, list[Outcome]]:
    """Raises: RunStopped where none of them is answered."""
    started = time.monotonic()
    outcomes = list(transform.answers(iter(part)))
    seconds = time.monotonic() - started
    if not any(outcome.completion for outcome in outcomes):
        raise RunStopped(next((o.message for o in outcomes if o.message), "nothing is answered"))
    return seconds, outcomes


def write_settings(path: Path, settings: Mapping[str, int]) -> None:
    """Sets numbers in a YAML file and leaves every other byte as it is.

    Raises: FabeError where the file cannot be written, or is laid out in another way than a setting
    a line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            text = before = file.read()
    except OSError as error:
        raise FabeError(f"{path}: {error.strerror}") from None
    end = "\r\n" if "\r\n" in text else "\n"
    for name, value in settings.items():
        spelled = name.replace("_", "[-_]")  # a file may call a setting as its flag is called
        line = re.compile(rf"^((?:--)?{spelled}[ \t]*:[ \t]*)[^\s#]+", re.MULTILINE)
        text, found = line.subn(rf"\g<1>{value}", text, count=1)
        if not found:
            text += ("" if not text or text.endswith("\n") else end) + f"{name}: {value}{end}"
    if _read(text) != {**_read(before), **settings}:
        said = ", ".join(f"{name}: {value}" for name, value in settings.items())
        raise FabeError(f"{path}: not a setting a line, so it is left as it is; put in {said}")
    with replacing(path) as out:
        out.write(text.encode())


def _read(text: str) -> dict[str, Any]:
    """The settings of a YAML text, by their names; of one that is none, nothing."""
    try:
        loaded = yaml_value(text.encode()) or {}
    except ValueError:
        return {}
    if not isinstance(loaded, dict):
        return {}
    return {str(k).removeprefix("--").replace("-", "_"): value for k, value in loaded.items()}
