"""The callable that a batched `Dataset.map` takes."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.config.settings import TransformConfig, by_name, flag, setting, signature_of, validated
from fabe_ds.engine.runtime import Session, open_cache
from fabe_ds.errors import FabeError, RecordFailed, UsageError
from fabe_ds.executors import worker_counts as tally
from fabe_ds.fields import dotted_hint, inside, parse_path, with_inside
from fabe_ds.formats.json.load import BROKEN, SCHEMA
from fabe_ds.network import without_secrets
from fabe_ds.prompts.checks import build_check
from fabe_ds.prompts.template import Instruction, load_instruction
from fabe_ds.providers import (
    Endpoint,
    HttpProvider,
    LocalProvider,
    Provider,
    Request,
    Sampling,
    build_provider,
    provider_class,
)
from fabe_ds.request import Item, Outcome, Stats
from fabe_ds.store.completions import Completions
from fabe_ds.text import encodable
from fabe_ds.version import JOB_VERSION, TRANSFORM_VERSION

if TYPE_CHECKING:
    from datasets import Features

log = logging.getLogger(__name__)

CARRIER = tuple(SCHEMA.names)
OURS = "__fabe_"
"""What the names of columns begin with that stand beside a table's own on the way to workers."""
SAMPLE = f"{OURS}sample"
"""A column that says how many equal requests stand before each of a row's, where answers are
sampled."""
_RUNTIME = "FABE_DS_RUNTIME_"
_KEY = "FABE_DS_KEY_"


def transform_fn(**options: Any) -> Transform:
    """A callable for `Dataset.map(..., batched=True)` that rewrites one field of each record.

    Takes the command line's options by their Python names (`TransformConfig` lists them):
    `field`, `instruction`, `provider`, `model`, `base_url`, `cache_dir`, ... It returns the field's
    column with the new values and, where the records lack one, a column `backup_field` with the
    originals. Missing and empty values stay. Completions are kept in `cache_dir` as they arrive.

    `field` may be a list: the first is backed up as `backup_field`, each other as `original_` and
    its column's name. `status_field` adds a column of what became of each record (of its first
    field that failed), `n` (or `samples`) one of so many answers to each, of which the first is
    the new value.

    The callable is pure configuration: it pickles, and its fingerprint is the same in every
    process. A batch of a thousand rows or more keeps the model busy; each batch waits for its
    slowest record.

    Raises: UsageError. The map raises FabeError after a batch in which records failed, so that no
    failure is cached; with on_error="keep" they keep their originals instead.
    """
    options = by_name(options)
    if "n" in options:
        options["samples"] = options.pop("n")
    if isinstance(options.get("field"), list | tuple):
        if not options["field"]:
            raise UsageError("field: an empty list; name a field")
        options["field"], *options["also_fields"] = options["field"]
    return Transform(validated(TransformConfig, options, {}))


transform_fn.__signature__ = signature_of(  # type: ignore[attr-defined]
    TransformConfig,
    inspect.Parameter(
        "field",
        inspect.Parameter.KEYWORD_ONLY,
        default=TransformConfig.model_fields["field"].default,
        annotation=str | list[str],
    ),
).replace(return_annotation="Transform")


class Transform:
    """What `transform_fn` gives."""

    def __init__(
        self,
        config: TransformConfig,
        open_cache: Callable[[TransformConfig], Completions] = open_cache,
        template: tuple[str, str] | None = None,
    ) -> None:
        """`template`: the instruction's text and name, where its file is elsewhere."""
        # A misspelled name is said before what else is missing.
        self._provider_class = provider_class(config.provider)
        config = config.model_copy(update={"base_url": self._base_url(config)})
        asks = self._provider_class.asks
        if asks and not config.instruction:
            raise UsageError("--instruction is required: a text or a template file")
        if asks and not config.model:
            raise UsageError("--model is required (or MODEL_PATH in the environment)")
        try:
            self.paths = [parse_path(name) for name in (config.field, *config.also_fields)]
        except ValueError as error:
            raise UsageError(f"--field: {error}") from None
        for name, path in zip(config.also_fields, self.paths[1:], strict=True):
            others = (other for other in self.paths if other is not path)
            if any(path[: len(other)] == other[: len(path)] for other in others):
                raise UsageError(f"--also-field {name}: another field is the same, or inside it")
        self.path = self.paths[0]
        if config.batch_api and config.provider != "openai":
            raise UsageError(f"--batch-api: {config.provider} has none; it goes with openai")
        self._checks_record = False
        if config.validate_with:
            # A wrong one is said now, not at the first answer.
            self._checks_record = build_check(config.validate_with).needs_record
        self.config = config
        self._check_backups()
        self._open_cache = open_cache
        self.template = template or load_instruction(config.instruction or "")
        self.instructions = [
            Instruction(*self.template, config.template_vars, path) for path in self.paths
        ]
        self.instruction = self.instructions[0]
        self._sampling = Sampling(
            config.max_new_tokens,
            config.temperature,
            config.top_p,
            config.do_sample,
            config.seed,
            tuple(config.stop),
        )
        if config.samples > 1 and asks and not self._sampling.samples:
            raise UsageError("--samples: equal answers without sampling; give a --temperature")
        self._system, self._chat = config.system_prompt or None, config.use_chat_template
        self._language = config.template_vars.get("language", "python")
        self._session: Session | None = None
        self._opening = (os.getpid(), threading.Lock())  # threads may call for the first time
        self._ahead: Iterator[Outcome] | None = None
        self._rank = 0
        self._check_local()
        self._chat_template = _read_template(config.chat_template)
        self.provider = self._build_provider()

    def _check_local(self) -> None:
        """Raises: UsageError where a setting of local models goes with another provider."""
        if issubclass(self._provider_class, LocalProvider):
            return
        for name in ("base_model", "chat_template", "thinking"):
            if getattr(self.config, name) is not None:
                raise UsageError(
                    f"{flag(name)} goes with a local model (hf, modelscope); "
                    f"{self.config.provider} asks a server"
                )

    def _base_url(self, config: TransformConfig) -> str | None:
        """The server's address, of the configuration or of the provider's own variables."""
        if config.base_url or not issubclass(self._provider_class, HttpProvider):
            return config.base_url
        for name in self._provider_class.base_url_variables:
            if text := os.environ.get(name, "").strip():
                base_url = self._provider_class.base_url_of(text)
                log.info("%s: asking %s", name, without_secrets(base_url))
                return base_url
        return None

    def _check_backups(self) -> None:
        """Raises: UsageError where two backups would have one place."""
        if not self.config.backup:
            return
        keys = {(path[:-1], kept) for path, (_, kept) in zip(self.paths, self.targets, strict=True)}
        for places in (keys, set(self.backups)):
            if len(places) < len(self.paths):
                raise UsageError(
                    f"--backup-field {self.config.backup_field}: two fields would be kept there; "
                    "give another"
                )

    def _build_provider(self) -> Provider:
        config = self.config
        devices = config.devices
        endpoint = Endpoint(
            config.model or "local",
            config.base_url,
            devices[self._rank % len(devices)],
            config.dtype,
            config.local_files_only,
            config.trust_remote_code,
            config.batch_size,
            config.max_batch_tokens,
            config.attn_implementation,
            config.compile,
            config.on_long_prompt,
            config.engine,
            len(devices),
            batches=4 if config.concurrency == "auto" else config.concurrency,
            base_model=config.base_model,
            chat_template=self._chat_template,
            thinking=None if config.thinking is None else config.thinking == "on",
            chat=config.use_chat_template,
            instruction="\n".join(
                [self.template[0], config.system_prompt or "", *config.template_vars.values()]
            ),
            max_new_tokens=config.max_new_tokens,
            cache_dir=config.cache_dir,
        )
        return build_provider(config.provider, endpoint, self.key())

    def key(self) -> str | None:
        """The key for the server, of the configuration or the environment."""
        if self.config.api_key is not None:
            return self.config.api_key.get_secret_value()
        if not issubclass(self._provider_class, HttpProvider):
            return None
        return os.environ.get(self._provider_class.key_variable or "")

    # Identity: what is pickled, hashed by datasets, and shipped to workers.

    def spec(self) -> str:
        """All that can change what comes out, as canonical JSON."""
        values = {
            name: getattr(self.config, name)
            for name, declared in TransformConfig.model_fields.items()
            if (changes := setting(name, "changes"))
            and not (
                changes == "when set"
                and getattr(self.config, name) == declared.get_default(call_default_factory=True)
            )
        }
        values["instruction"], _ = self.template
        if self._chat_template is not None:
            values["chat_template"] = self._chat_template
        values["strip_fences"] = values["auto_extract_code"] = self.config.strips_fences
        values["identity"] = self.provider.identity()
        return _canonical(values)

    def digest(self) -> str:
        """Names what this transform makes of a record."""
        return _named(TRANSFORM_VERSION, self.spec())

    def jobs(self) -> list[str]:
        """Names what is asked for: values that this job wrote in place are known by it, whatever
        later versions make of an answer. The first name is this version's, another may be that
        under which earlier ones knew it."""
        spec = self.spec()
        former = self.provider.former_identity()
        specs = [spec]
        if former is not None:
            specs.append(_canonical({**json.loads(spec), "identity": former}))
        return [_named(JOB_VERSION, each) for each in specs]

    def __reduce__(self) -> tuple[Callable[..., Transform], tuple[str, int]]:
        if self._session is not None:
            self._session.intake.begin()  # datasets pickles its callable when a map begins
        spec = self.spec()
        self._leave_runtime(hashlib.sha256(spec.encode()).hexdigest()[:16])
        return _rebuild, (spec, TRANSFORM_VERSION)

    def _leave_runtime(self, name: str) -> None:
        """Leaves what is no part of the fingerprint where worker processes inherit it."""
        values = {
            field: getattr(self.config, field)
            for field in TransformConfig.model_fields
            if setting(field, "changes") is not True and field != "api_key"
        }
        os.environ[_RUNTIME + name] = json.dumps(values, default=str)
        if self.config.api_key is not None:
            os.environ[_KEY + name] = self.config.api_key.get_secret_value()

    def __repr__(self) -> str:
        return (
            f"fabe_ds.transform_fn(provider={self.config.provider!r}, field={self.config.field!r})"
        )

    # The work.

    @property
    def session(self) -> Session:
        """What is open in this process: cache and engine. Never shared with a forked child."""
        if self._opening[0] != os.getpid():  # a lock that another thread held at a fork stays shut
            self._opening = (os.getpid(), threading.Lock())
        with self._opening[1]:
            if self._session is None or self._session.pid != os.getpid():
                if self._session is not None:
                    self.provider = self._build_provider()
                self._session = Session(self.config, self.provider, self._open_cache)
                weakref.finalize(self, self._session.close)  # a map's callable has no last call
            return self._session

    @property
    def stats(self) -> Stats:
        """Counts so far in this process."""
        return self._session.stats if self._session else Stats()

    def close(self) -> None:
        """Stops what look_ahead began (what is on its way is waited for and kept)."""
        if self._ahead is not None:
            self._ahead.close()  # type: ignore[attr-defined]
            self._ahead = None
        if self._session is not None:
            self._session.close()
        self._session = None

    def item(self, text: Any, record: str | Mapping[str, Any] | None, field: int = 0) -> Item:
        """What one record asks for, for the nth of its fields. Raises: TemplateError."""
        if not isinstance(text, str) or not text or text.isspace():
            return None
        try:
            prompt = self.instructions[field].prompt(text, record)
        except RecordFailed as error:
            return error
        request = Request(text, prompt, self._system, self._sampling, self._chat, self._language)
        return request._replace(record=record) if self._checks_record else request

    def __call__(
        self, batch: Mapping[str, Sequence[Any]], *more: Any
    ) -> dict[str, list[Any]] | pa.Table:
        """One batch. Of what `with_indices=True` and `with_rank=True` add, the rank says which of
        several devices is this process's."""
        rank = next((value for value in more if isinstance(value, int)), None)
        if not _is_batch(batch, self.path[0]):
            raise UsageError("a map over single records; write map(..., batched=True)")
        if rank is not None and rank != self._rank:
            self.close()
            self._rank = rank
            self.provider = self._build_provider()
        result = self._answer(batch)
        tally.leave(self.stats)
        return result

    def _answer(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]] | pa.Table:
        if all(name in batch for name in CARRIER):
            if self._ahead is not None:
                return result_table(islice(self._ahead, len(batch["index"])))
            # A dict: a map that is given a table takes it for all the columns there are.
            return result_table(self.session.outcomes(self.carrier_items(batch))).to_pydict()
        return self.rewritten(batch)

    def carrier_items(self, batch: Mapping[str, Sequence[Any]]) -> Iterator[Item]:
        """What the rows of a carrier ask for."""
        count = len(batch["text"])
        raws = batch["raw"] if self.needs_record else [None] * count
        samples = batch.get(SAMPLE) or [[0]] * count
        targets = batch.get("target") or [0] * count
        errors = batch.get("error") or [None] * count
        columns = (batch["text"], raws, samples, targets, errors)
        for text, raw, sample, target, error in zip(*columns, strict=True):
            if error is not None:  # a line that is no record fails once, however many fields
                yield RecordFailed(BROKEN, error) if target == 0 else None
            else:
                yield _numbered(self.item(text, raw, target), sample[0])

    def look_ahead(self, items: Iterable[Item]) -> None:
        """Answers `items`, those of all the rows of the coming map, ahead of its batches.

        Without it, each batch waits for its slowest record. Nothing starts before the first batch.
        """
        self._ahead = self._answers(items)

    def _answers(self, items: Iterable[Item]) -> Iterator[Outcome]:
        yield from self.session.outcomes(items)

    @property
    def targets(self) -> list[tuple[str, str | None]]:
        """The fields of a JSON record that are rewritten, each with the key of its backup."""
        config = self.config
        others = [
            (name, f"original_{path[-1]}" if config.backup else None)
            for name, path in zip(config.also_fields, self.paths[1:], strict=True)
        ]
        return [(config.field, config.backup), *others]

    @property
    def backups(self) -> list[str | None]:
        """The columns of a table that keep the originals, one for each field."""
        config = self.config
        others = [f"original_{name}" if config.backup else None for name in config.also_fields]
        return [config.backup, *others]

    @property
    def needs_record(self) -> bool:
        """Whether the whole record is looked at, and not its fields alone."""
        return self.instruction.needs_record or self._checks_record

    @property
    def samples(self) -> bool:
        """Whether equal requests have answers of their own."""
        return self._sampling.samples

    def new_columns(self, there: Collection[str]) -> dict[str, pa.DataType]:
        """The columns that a table of these columns gains."""
        config, text = self.config, pa.string()
        new: dict[str, pa.DataType] = {
            backup: text for backup in self.backups if backup and backup not in there
        }
        if config.samples > 1:
            new[config.samples_field] = pa.list_(text)
        if config.status_field:
            told = dict.fromkeys(("state", "failure", "message", "finish_reason"), text)
            counts = dict.fromkeys(("prompt_tokens", "completion_tokens"), pa.int64())
            new[config.status_field] = pa.struct(told | counts)
        return new

    @property
    def answers_each(self) -> int:
        """Items that one record of a table asks for."""
        return len(self.paths) * self.config.samples

    def table_items(self, batch: Mapping[str, Sequence[Any]]) -> Iterator[Item]:
        """What the rows of an ordinary Dataset ask for: for each row, each field, all samples.

        Raises: UsageError (no such column), TemplateError.
        """
        for name, path in zip(
            (self.config.field, *self.config.also_fields), self.paths, strict=True
        ):
            if path[0] not in batch:
                hint = dotted_hint(name, batch)
                raise UsageError(f"--field {name}: the dataset has no column {path[0]!r}{hint}")
            _check_text(name, (inside(value, path[1:]) for value in batch[path[0]]))
        names = [name for name in batch if not name.startswith(OURS)]
        whole = self.needs_record
        count = len(batch[self.path[0]])
        samples = batch.get(SAMPLE) or [[0] * self.answers_each] * count
        for row, numbers in zip(range(count), samples, strict=True):
            record = {name: batch[name][row] for name in names} if whole else None
            number = iter(numbers)
            for field, (column, *inner) in enumerate(self.paths):
                item = self.item(inside(batch[column][row], inner), record, field)
                for _ in range(self.config.samples):  # the engine tells equal requests apart
                    yield _numbered(item, next(number))

    def rewritten(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The columns of an ordinary Dataset that change."""
        samples = self.config.samples
        if self._ahead is not None:
            count = len(batch[self.path[0]]) * self.answers_each
            outcomes = list(islice(self._ahead, count))
        else:
            outcomes = list(self.session.outcomes(self.table_items(batch)))
        failed = [outcome for outcome in outcomes if outcome.kind is not None]
        if failed and self.config.on_error == "raise":
            raise FabeError(
                f"{len(failed)} of {len(outcomes)} records of this batch failed; the first: "
                f"{failed[0].message}. What was answered is kept; run again to send the failed "
                "ones, or keep their originals with on_error='keep'"
            )
        changed: dict[str, list[Any]] = {}
        for field, (column, *inner) in enumerate(self.paths):
            first = outcomes[field * samples :: self.answers_each]
            values = changed.get(column) or list(batch[column])
            backup = self.backups[field]
            if backup and backup not in batch:
                changed[backup] = [inside(value, inner) for value in values]
            changed[column] = [
                value if outcome.text is None else with_inside(value, inner, outcome.text)
                for value, outcome in zip(values, first, strict=True)
            ]
        each = range(0, len(outcomes), self.answers_each)
        if samples > 1:
            changed[self.config.samples_field] = [
                [outcome.text for outcome in outcomes[start : start + samples]] for start in each
            ]
        if self.config.status_field:
            changed[self.config.status_field] = [
                _status(outcomes[start : start + self.answers_each]) for start in each
            ]
        return changed


def _read_template(name: str | None) -> str | None:
    """The chat template: a file's text, or what a spec has of one already.

    Raises: UsageError.
    """
    if name is None or "{" in name:
        return name
    try:
        template = Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--chat-template {name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--chat-template {name}: not UTF-8") from None
    if "{" not in template:
        raise UsageError(f"--chat-template {name}: no template of Jinja2 in it")
    return template


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _named(version: int, spec: str) -> str:
    return hashlib.sha256(f"{version}\0{spec}".encode()).hexdigest()[:32]


def _check_text(name: str, values: Iterable[Any]) -> None:
    """Raises: UsageError where there is no text among the values, but others."""
    there = (value for value in values if value is not None)
    first = next(there, None)
    if first is not None and not any(isinstance(value, str) for value in (first, *there)):
        raise UsageError(f"--field {name}: its values are not text ({type(first).__name__})")


def _is_batch(batch: Mapping[str, Any], column: str) -> bool:
    """Whether these are columns, and not the values of one record."""
    if type(batch).__name__ == "LazyRow":  # of datasets
        return False
    return not isinstance(batch.get(column), str)


def _numbered(item: Item, sample: int) -> Item:
    """The item as so many-th of its equals, where another process sees the others."""
    return item._replace(sample=sample) if sample and isinstance(item, Request) else item


def _status(outcomes: list[Outcome]) -> dict[str, Any]:
    """What became of one record: its first failure, else its last answer; tokens of all.

    `state` is done, cached (no request was sent), failed or skipped (it has no text).
    """
    told = next((outcome for outcome in outcomes if outcome.kind is not None), outcomes[-1])
    completions = [outcome.completion for outcome in outcomes if outcome.completion]
    if told.kind is not None:
        state = "failed"
    elif not completions and told.text is None:
        state = "skipped"
    else:
        state = "cached" if all(o.cached for o in outcomes if o.text is not None) else "done"
    return {
        "state": state,
        "failure": told.kind,
        "message": told.message,
        "finish_reason": told.completion.finish_reason if told.completion else None,
        "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in completions),
        "completion_tokens": sum(answer.completion_tokens or 0 for answer in completions),
    }


def _rebuild(spec: str, version: int) -> Transform:
    """A transform from its pickle, with the runtime settings its process was left."""
    name = hashlib.sha256(spec.encode()).hexdigest()[:16]
    values = json.loads(spec)
    values.pop("identity")
    values = {**json.loads(os.environ.get(_RUNTIME + name, "{}")), **values}
    if _KEY + name in os.environ:
        values["api_key"] = os.environ[_KEY + name]
    return Transform(validated(TransformConfig, values, {}))


RESULT = {
    "completion": pa.large_string(),  # the new value; null where the record keeps its own
    "failure": pa.string(),  # class of what went wrong, or null
    "message": pa.string(),  # and what that was
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "answer": pa.large_string(),  # the last answer of a record that failed
    "cached": pa.bool_(),  # whether no request was sent for it
}
"""The columns that a transform gives for a carrier."""
_SCHEMA = pa.schema(list(RESULT.items()))


def result_features() -> Features:
    from datasets import Features

    return Features.from_arrow_schema(_SCHEMA)


def result_table(outcomes: Iterable[Outcome]) -> pa.Table:
    """The outcomes as columns of `RESULT`; a table, which a map writes as it is."""
    got = list(outcomes)
    answers = [outcome.completion for outcome in got]
    columns = {
        "completion": [None if o.text is None else encodable(o.text) for o in got],
        "failure": [outcome.kind for outcome in got],
        "message": [outcome.message for outcome in got],
        "finish_reason": [answer and answer.finish_reason for answer in answers],
        "prompt_tokens": [answer and answer.prompt_tokens for answer in answers],
        "completion_tokens": [answer and answer.completion_tokens for answer in answers],
        "answer": [encodable(o.completion.text) if o.kind and o.completion else None for o in got],
        "cached": [outcome.cached for outcome in got],
    }
    return pa.table(columns, schema=_SCHEMA)
