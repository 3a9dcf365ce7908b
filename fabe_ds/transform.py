"""The callable that a batched `Dataset.map` takes."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fabe_ds.answers import by_record, flat_table, tolerant
from fabe_ds.config import rules
from fabe_ds.config.load import by_name, signature_of, validated
from fabe_ds.config.sections import SECRETS
from fabe_ds.config.settings import TransformConfig, setting
from fabe_ds.engine.runtime import Runtime, open_cache
from fabe_ds.errors import FabeError, RecordFailed, UsageError
from fabe_ds.formats import columns as by_column
from fabe_ds.formats.base import BROKEN, Row, without
from fabe_ds.formats.json.load import SCHEMA
from fabe_ds.identity import FALLBACK_IDENTITIES, SYSTEM_TEMPLATE, digest_of, jobs_of, spec_of
from fabe_ds.map_bar import MapBar
from fabe_ds.prompts.asking import Asking, Texts, texts_of
from fabe_ds.prompts.checks import build_check
from fabe_ds.prompts.template import load_chat_template
from fabe_ds.providers import Provider, Request, provider_class
from fabe_ds.request import LEAVE, Item, Outcome, Stats
from fabe_ds.session import Session
from fabe_ds.store.completions import Completions
from fabe_ds.version import TRANSFORM_VERSION
from fabe_ds.who_answers import Providers, base_urls_of

if TYPE_CHECKING:
    from datasets import Features

log = logging.getLogger(__name__)

_RUNTIME = "FABE_DS_RUNTIME_"
_KEY = "FABE_DS_KEY_"
GROUP, BATCH_GROUP = 256, 50_000
"""Answers whose failures are asked of a fallback model together; of batches, those of a window."""


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
        texts: Texts | None = None,
    ) -> None:
        """`texts`: those of files that are elsewhere."""
        # A misspelled name is said before what else is missing.
        self._provider_class = provider_class(config.provider)
        urls = base_urls_of(config, self._provider_class)
        config = config.model_copy(update={"base_url": urls})
        rules.check_transform(config, self._provider_class)
        self.targets = config.targets
        # A wrong one is said now, not at the first answer.
        checks = [build_check(spec) for spec in config.validate_with]
        self._checks_record = any(check.needs_record for check in checks)
        self.config = config
        self.texts = texts or texts_of(config)
        self._asking = Asking(config, self.texts, self._provider_class.takes_forms)
        self._chat_template = load_chat_template(config.chat_template)
        self.providers = Providers(config, self.texts, self._chat_template)
        judging = self._asking.judging if self.texts.judge is not None else None
        self.session = Session(config, self.providers, judging, open_cache)
        self._map_bar = MapBar()

    # Identity: what is pickled, hashed by datasets, and shipped to workers.

    def spec(self) -> str:
        """All that can change what comes out, as canonical JSON."""
        asked = [self.provider, *self.session.behind]
        return spec_of(self.config, self.texts, self._chat_template, asked)

    def digest(self) -> str:
        """Names what this transform makes of a record."""
        return digest_of(self.spec())

    def jobs(self) -> list[str]:
        """Names what is asked for, whatever is made of an answer (`identity.jobs_of`)."""
        return jobs_of(self.spec(), self.provider)

    def __reduce__(self) -> tuple[Callable[..., Transform], tuple[str, int]]:
        self.session.begin()  # datasets pickles its callable when a map begins
        spec = self.spec()
        self._leave_runtime(hashlib.sha256(spec.encode()).hexdigest()[:16])
        return _rebuild, (spec, TRANSFORM_VERSION)

    def _leave_runtime(self, name: str) -> None:
        """Leaves what is no part of the fingerprint where worker processes inherit it."""
        values = {
            field: getattr(self.config, field)
            for field in TransformConfig.model_fields
            if setting(field, "affects_output") is not True and field not in SECRETS
        }
        values["base_url"] = self.config.base_url  # all of them
        os.environ[_RUNTIME + name] = json.dumps(values, default=str)
        for secret in SECRETS:
            if (key := getattr(self.config, secret)) is not None:
                os.environ[f"{_KEY}{secret}_{name}"] = key.get_secret_value()

    def __repr__(self) -> str:
        return (
            f"fabe_ds.transform_fn(provider={self.config.provider!r}, field={self.config.field!r})"
        )

    # The work.

    @property
    def provider(self) -> Provider:
        """Who answers."""
        return self.session.provider

    @property
    def runtime(self) -> Runtime:
        """What asks the run's own model in this process: cache and engine."""
        return self.session.runtime

    @property
    def stats(self) -> Stats:
        """Counts so far in this process."""
        return self.session.stats

    def close(self) -> None:
        """Closes what is open in this process."""
        self.session.close()

    def answers(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """The outcomes of items, in order. Raises: RunStopped, CacheError."""
        return self.session.answers(items)

    def __call__(self, batch: Mapping[str, Sequence[Any]], *more: Any) -> dict[str, list[Any]]:
        """One batch of a Dataset: the columns that change, or, of a carrier that `load_records`
        gave, the columns of `answers.FIELDS`. Of what `with_indices=True` and `with_rank=True` add,
        the rank says which of several devices is this process's.

        Raises: UsageError, TemplateError, FabeError (records that failed, unless they are kept).
        """
        if not _is_batch(batch, str(self.targets.paths[0][0])):
            raise UsageError("a map over single records; write map(..., batched=True)")
        self.use_rank(next((value for value in more if isinstance(value, int)), None))
        if all(name in batch for name in SCHEMA.names):
            if not self.targets.is_plain or self.targets.each > 1 or self.targets.gained:
                raise UsageError(
                    "records of load_records have one field, and one answer to it; for several, or "
                    "for new fields, take fabe_ds.run"
                )
            rows = map(Row, zip(batch["text"]), _raws(batch, self.needs_record), batch["error"])
            flat = flat_table(self.outcomes(rows), self.targets)
            columns: dict[str, list[Any]] = flat.to_pydict()
            return columns
        return self.rewritten(batch)

    def use_rank(self, rank: int | None) -> None:
        """Takes the device of a process's rank, where several share the work."""
        if rank is not None:
            self.session.use_rank(rank)

    def outcomes(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """The outcomes of all that the rows ask for, in order. Raises: RunStopped, CacheError."""
        return self.answers(self.items(rows))

    def items(
        self, rows: Iterable[Row], numbers: Iterable[Sequence[int]] | None = None
    ) -> Iterator[Item]:
        """What rows ask for: for each row, each field, all samples. `numbers` are the sample
        numbers of each row's items, where another process sees the items before them."""
        samples, asking, whole = self.config.samples, self._asking, self._keeps_record
        if self._is_simple and numbers is None:  # as nearly all are: twice as quick
            for texts, record, error, _, chosen, failure in rows:
                if error is None and chosen:
                    yield asking.item(texts[0], record, keep=whole)
                else:
                    row = Row(texts, record, error, None, chosen, failure)
                    yield from self._items_of(row)
            return
        counted = repeat(None) if numbers is None else map(iter, numbers)
        for row, number in zip(rows, counted, strict=False):
            for item in self._items_of(row):
                for _ in range(samples):  # the engine tells equal requests apart
                    yield item if number is None else _numbered(item, next(number))

    def _items_of(self, row: Row) -> Iterator[Item]:
        """What each text of a row asks for."""
        seen: Counter[int] = Counter()
        for place, text in enumerate(row.texts):
            field = place if row.fields is None else row.fields[place]
            if not row.chosen:
                yield LEAVE
            elif row.error is not None and row.failure == BROKEN:
                # What is no record fails once, however many fields.
                yield RecordFailed(row.failure, row.error) if place == 0 else None
            else:
                item = self._asking.item(text, row.record, field, seen[field], self._keeps_record)
                fails = row.error is not None and isinstance(item, Request)
                yield RecordFailed(row.failure, row.error or "") if fails else item
            seen[field] += 1

    @property
    def _is_simple(self) -> bool:
        return self.targets.each == 1 and not self.targets.has_several

    @property
    def _keeps_record(self) -> bool:
        """Whether a request goes with its record: a check, or a judge, looks at it."""
        return self._checks_record or any(each.needs_record for each in self._asking.judging)

    def features(self, given: Features) -> Features:
        """The columns of a map of records with columns `given`, with their types: for
        `Dataset.map(..., features=...)`, where the first batch may not tell the type of all."""
        from datasets import Features

        new = by_column.new_columns(self.targets, given.arrow_schema)
        added = Features.from_arrow_schema(pa.schema(list(new.items())))
        return Features({**given, **added})

    def rewritten(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The columns of an ordinary Dataset that change."""
        targets = self.targets
        taken = next((name for name in targets.gained if name in batch), None)
        if taken and not self.replaces_gained:
            raise UsageError(f"{taken}: there is such a column; name another")
        rows = list(by_column.rows_of(batch, targets, self.needs_record))
        done = list(by_column.existing_outputs(batch, targets)) if targets.skips_existing else None
        if done is not None:
            rows = list(map(without, rows, done))
        with self._map_bar.following(lambda: self.stats):
            outcomes = tolerant(list(self.outcomes(rows)), targets)
        self.raise_failed(outcomes)
        lengths = (len(row.texts) * targets.samples for row in rows)
        answers = list(by_record(flat_table(outcomes, targets), lengths))
        return by_column.rewritten(batch, targets, answers, done)

    @property
    def replaces_gained(self) -> bool:
        """Whether fields of states and samples that records have already may be replaced."""
        return "on_existing" in self.config.model_fields_set

    def raise_failed(self, outcomes: Sequence[Outcome]) -> None:
        """Raises: FabeError where records failed, unless they are to keep their originals."""
        failed = [outcome for outcome in outcomes if outcome.kind is not None]
        if failed and self.config.on_error == "raise":
            raise FabeError(
                f"{len(failed)} of {len(outcomes)} records of this batch failed; the first: "
                f"{failed[0].message}. What was answered is kept; run again to send the failed "
                "ones, or keep their originals with on_error='keep'"
            )

    @property
    def needs_record(self) -> bool:
        """Whether the whole record is looked at, and not its fields alone."""
        return self._asking.needs_record or self._keeps_record

    @property
    def is_sampling(self) -> bool:
        """Whether equal requests have answers of their own."""
        return self.config.sampling.is_sampling


def _is_batch(batch: Mapping[str, Any], column: str) -> bool:
    """Whether these are columns, and not the values of one record."""
    if type(batch).__name__ == "LazyRow":  # of datasets
        return False
    return not isinstance(batch.get(column), str)


def _numbered(item: Item, sample: int) -> Item:
    """The item as so many-th of its equals, where another process sees the others."""
    return item._replace(sample=sample) if sample and isinstance(item, Request) else item


def _raws(batch: Mapping[str, Sequence[Any]], whole: bool) -> Iterable[Any]:
    return batch["raw"] if whole else repeat(None, len(batch["text"]))


def _rebuild(spec: str, version: int) -> Transform:
    """A transform from its pickle, with the runtime settings its process was left."""
    name = hashlib.sha256(spec.encode()).hexdigest()[:16]
    values = json.loads(spec)
    values.pop("identity")
    values.pop(FALLBACK_IDENTITIES, None)
    is_template = values.pop(SYSTEM_TEMPLATE, False)
    left = json.loads(os.environ.get(_RUNTIME + name, "{}"))
    values = {**left, **values, **{key: left[key] for key in ("base_url",) if key in left}}
    for secret in SECRETS:
        if (key := os.environ.get(f"{_KEY}{secret}_{name}")) is not None:
            values[secret] = key
    config = validated(TransformConfig, values, {})
    texts = texts_of(config)
    if is_template:
        texts = texts._replace(system=(config.system_prompt or "", "system prompt"))
    return Transform(config, texts=texts)
