"""Answers: what became of every record, as one Arrow column beside the records.

A record has a list of answers: those to its first field, sample by sample, then those to the next
field, and so on for each place of a field that a record has several times. The list is what an
executor gives, what a format writes back, and what a report counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from fabe_ds.confidence import confidence
from fabe_ds.fields import Added, Pick, Targets
from fabe_ds.paging import passed_over
from fabe_ds.reasoning import reasoning_of
from fabe_ds.request import NOT_CHOSEN, Outcome
from fabe_ds.text import encodable

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, Features

COLUMN = "answers"
FIELDS = {
    "completion": pa.large_string(),  # the new value; null where the record keeps its own
    "failure": pa.string(),  # class of what went wrong, or null
    "message": pa.string(),  # and what that was
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "answer": pa.large_string(),  # the last answer of a record that failed
    "cached": pa.bool_(),  # whether no request was sent for it
}
"""What is kept of one answer."""
MORE_FIELDS = {
    "reasoning": pa.large_string(),  # what the model wrote before the answer proper, or null
    "confidence": pa.float64(),  # probability of a choice, or null
    "score": pa.float64(),  # what a judge gave the answer, or null
    "model": pa.string(),  # who answered, where it was another than the run's own
}
"""What is kept beside, where a run asks for it."""
STATUS = {
    **dict.fromkeys(("state", "failure", "message", "finish_reason"), pa.string()),
    **dict.fromkeys(("prompt_tokens", "completion_tokens"), pa.int64()),
    "model": pa.string(),
}
"""What `--status-field` says of a record."""


class Answer(NamedTuple):
    """One answer, as `FIELDS` describes it."""

    completion: str | None
    failure: str | None
    message: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    answer: str | None
    cached: bool
    reasoning: str | None = None
    confidence: float | None = None
    score: float | None = None
    model: str | None = None


class Change(NamedTuple):
    """A new value of a field that was asked about (`added` is None), or of one beside it.

    `is_json`: the value is JSON text, of which `added.key` names a part.
    """

    added: Added | None
    value: str | float | None
    is_json: bool = False


def by_place(answers: Sequence[Answer], samples: int) -> list[Sequence[Answer]]:
    """The answers to each place of a record: all samples."""
    return [answers[at : at + samples] for at in range(0, len(answers), samples)]


def picked(samples: Sequence[Answer], pick: Pick) -> Answer | None:
    """The answer whose text is the value; None where a field failed, or was not asked about.

    A field fails with any of its answers, unless one of them is to be picked: then only where none
    is good (`tolerant`).
    """
    if any(answer.failure is not None for answer in samples):
        return None
    good = [answer for answer in samples if answer.completion is not None]
    if not good or (pick == "first" and good[0] is not samples[0]):
        return None
    if pick == "vote":
        votes = Counter(answer.completion for answer in good)
        return max(good, key=lambda answer: votes[answer.completion])  # the first of equal ones
    if pick == "judge":
        return max(good, key=lambda answer: float("-inf") if answer.score is None else answer.score)
    return good[0]


def values_of(answers: Sequence[Answer], targets: Targets) -> list[str | None]:
    """The picked text at each place of a record."""
    best = (picked(samples, targets.pick) for samples in by_place(answers, targets.samples))
    return [answer and answer.completion for answer in best]


def samples_of(answers: Sequence[Answer], targets: Targets) -> list[Any]:
    """What `--samples-field` holds of a record: all answers to its first field; of a field that it
    may have several times, a list for each place."""
    places = [[answer.completion for answer in s] for s in by_place(answers, targets.samples)]
    return places if targets.has_several else next(iter(places), [])


def changes_of(samples: Sequence[Answer], targets: Targets, added: Sequence[Added]) -> list[Change]:
    """What becomes of one place of a record: the new values of the field, or of what is `added`
    because of it. Empty where all stays as it is."""
    best = picked(samples, targets.pick)
    if best is None:
        if not targets.failed_is_null or all(answer.failure is None for answer in samples):
            return []
        nothing = [Change(each, None) for each in added]
        return nothing if targets.outputs else [Change(None, None), *nothing]
    values = {"reasoning": best.reasoning, "confidence": best.confidence}
    changes = [] if targets.outputs else [Change(None, best.completion)]
    for each in added:
        if each.kind in values:
            changes.append(Change(each, values[each.kind]))
        else:
            changes.append(Change(each, best.completion, targets.is_json))
    return changes


def fields_of(targets: Targets) -> dict[str, pa.DataType]:
    """What is kept of each answer in a run."""
    return FIELDS | MORE_FIELDS if targets.is_extended else FIELDS


def schema_of(targets: Targets) -> pa.Schema:
    """The answers' column: a list a record."""
    return pa.schema([(COLUMN, pa.list_(pa.struct(list(fields_of(targets).items()))))])


def features(targets: Targets) -> Features:
    """The answers' column as `Dataset.map` wants it declared."""
    from datasets import Features

    return Features.from_arrow_schema(schema_of(targets))


def tolerant(outcomes: Sequence[Outcome], targets: Targets) -> Sequence[Outcome]:
    """The outcomes of whole places; where the best of several is picked, one that failed beside a
    good one is no failure of the record."""
    if targets.pick == "first":
        return outcomes
    kept: list[Outcome] = []
    for at in range(0, len(outcomes), targets.samples):
        samples = outcomes[at : at + targets.samples]
        if any(outcome.kind is None and outcome.text is not None for outcome in samples):
            kept += (
                o if o.kind is None else o._replace(kind=None, message=f"{o.kind}: {o.message}")
                for o in samples
            )
        else:
            kept += samples
    return kept


def flat_table(outcomes: Iterable[Outcome], targets: Targets) -> pa.Table:
    """One row an outcome, with the columns of `fields_of`."""
    got = list(outcomes)  # column by column: half the time of making each a row first
    answers = [outcome.completion for outcome in got]
    columns = [
        [None if o.text is None else encodable(o.text) for o in got],
        [outcome.kind for outcome in got],
        [outcome.message for outcome in got],
        [answer and answer.finish_reason for answer in answers],
        [answer and answer.prompt_tokens for answer in answers],
        [answer and answer.completion_tokens for answer in answers],
        [encodable(o.completion.text) if o.kind and o.completion else None for o in got],
        [outcome.cached for outcome in got],
    ]
    if targets.is_extended:
        columns += [
            [_reasoning(outcome) for outcome in got],
            [_confidence(outcome) for outcome in got],
            [outcome.score for outcome in got],
            [outcome.model for outcome in got],
        ]
    return pa.table(columns, schema=pa.schema(list(fields_of(targets).items())))


def _reasoning(outcome: Outcome) -> str | None:
    if outcome.completion is None:
        return None
    apart = outcome.completion.reasoning
    found = apart if apart else reasoning_of(outcome.completion.text, outcome.original)
    return None if found is None else encodable(found)


def _confidence(outcome: Outcome) -> float | None:
    if outcome.completion is None or outcome.text is None:
        return None
    return confidence(outcome.completion, outcome.text)


def answer_table(
    outcomes: Iterable[Outcome], targets: Targets, places: Sequence[int] | None = None
) -> pa.Table:
    """One row a record, with its list of answers. A table, which a map writes as it is.

    `places`: how many texts each record has; None where each has one of each field.
    """
    flat = flat_table(tolerant(list(outcomes), targets), targets)
    if places is None:
        ends: Iterable[int] = range(targets.each, len(flat) + 1, targets.each)
    else:
        ends = accumulate(count * targets.samples for count in places)
    chunks = [column.combine_chunks() for column in flat.columns]
    struct = pa.StructArray.from_arrays(chunks, fields=list(flat.schema))
    # Lists share the rows' buffers: no text is copied.
    lists = pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), struct)
    return pa.table([lists], schema=schema_of(targets))


def by_record(flat: pa.Table, lengths: Iterable[int]) -> Iterator[list[Answer]]:
    """The rows of `flat_table` as answers, so many to each record."""
    columns = (column.to_pylist() for column in flat.columns)
    rows = (Answer(*row) for row in zip(*columns, strict=True))
    return (list(islice(rows, length)) for length in lengths)


def status(answers: Sequence[Answer], model: str | None = None) -> dict[str, Any]:
    """What became of one record: its first failure, else its last answer; tokens of all.

    `state` is done, cached (no request was sent), failed, not chosen (--where, --limit) or skipped
    (it has no text).
    """
    if not answers:
        answers = [_NOTHING]
    given = [answer for answer in answers if answer.completion is not None] or answers
    shown = next((answer for answer in answers if answer.failure is not None), given[-1])
    if shown.failure is not None:
        state = "failed"
    elif all(answer.completion is None for answer in answers):
        state = "not chosen" if _is_not_chosen(answers) else "skipped"
    else:
        state = "cached" if all(answer.cached for answer in given) else "done"
    return {
        "state": state,
        "failure": shown.failure,
        "message": shown.message,
        "finish_reason": shown.finish_reason,
        "prompt_tokens": sum(answer.prompt_tokens or 0 for answer in answers),
        "completion_tokens": sum(answer.completion_tokens or 0 for answer in answers),
        "model": shown.model or model,
    }


_NOTHING = Answer(None, None, None, None, None, None, None, False)


def _is_not_chosen(answers: Sequence[Answer]) -> bool:
    return any(answer.message == NOT_CHOSEN for answer in answers)


class Answers:
    """The answers to all records of a Dataset, in its order, mapped from disk."""

    def __init__(self, dataset: Dataset, targets: Targets) -> None:
        self.dataset, self.targets = dataset, targets

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def flat(self) -> pa.Table:
        """One row an answer."""
        return _flattened(self.dataset.data.table.column(COLUMN))

    @cached_property
    def ends(self) -> np.ndarray:
        """Where the answers to each record end, counted through all answers."""
        import numpy as np
        import pyarrow.compute as pc

        lists = self.dataset.data.table.column(COLUMN)
        return np.cumsum(pc.list_value_length(lists).fill_null(0).to_numpy())

    def record_of(self, answer: int) -> tuple[int, int]:
        """The record that an answer is to, and which of the record's it is."""
        import numpy as np

        number = int(np.searchsorted(self.ends, answer, side="right"))
        return number, answer - (int(self.ends[number - 1]) if number else 0)

    @property
    def has_failures(self) -> bool:
        failures = self.flat.column("failure")
        return bool(failures.null_count != len(failures))

    @property
    def has_completions(self) -> bool:
        completions = self.flat.column("completion")
        return bool(completions.null_count != len(completions))

    def tables(self, rows: int) -> Iterator[tuple[pa.Table, list[int]]]:
        """One row an answer, those of so many records at a time; and how many each record has."""
        import pyarrow.compute as pc

        for part in passed_over(self.dataset.with_format("arrow").iter(batch_size=rows)):
            lists = part.column(COLUMN)
            yield _flattened(lists), pc.list_value_length(lists).to_pylist()

    def records(self, rows: int) -> Iterator[list[Answer]]:
        """The answers to one record after another."""
        for table, lengths in self.tables(rows):
            yield from by_record(table, lengths)


def _flattened(lists: pa.ChunkedArray) -> pa.Table:
    """The answers in lists, one a row. Nothing is copied: Arrow's own functions for it would make
    a copy of all texts."""
    fields = list(lists.type.value_type)
    columns: list[list[pa.Array]] = [[] for _ in fields]
    for chunk in lists.chunks:
        if not len(chunk):
            continue
        first, last = chunk.offsets[0].as_py(), chunk.offsets[-1].as_py()
        answers = chunk.values.slice(first, last - first)
        for number, column in enumerate(columns):
            column.append(answers.field(number))
    arrays = [
        pa.chunked_array(chunks, field.type) for chunks, field in zip(columns, fields, strict=True)
    ]
    return pa.table(arrays, schema=pa.schema(fields))
