"""Counts of records, out of the answers to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fabe_ds.answers import Answers
from fabe_ds.formats.base import Records
from fabe_ds.request import NOT_CHOSEN


def record_counts(
    answers: Answers, skips: list[pa.ChunkedArray] | None, records: Records, asked: bool
) -> dict[str, Any]:
    """The counts of records for a RunResult: failed where any answer did, else rewritten where any
    text was. `skips` are the reasons why fields have no text; `asked` False: all that was answered
    comes from an earlier run.
    """
    flat = answers.flat
    failed_answers = _mask(pc.is_valid(flat.column("failure")))
    given = _mask(pc.is_valid(flat.column("completion")))
    cached = _mask(flat.column("cached").fill_null(False))
    failed = _any(failed_answers, answers.ends)
    rewritten = _any(given, answers.ends) & ~failed
    sent = rewritten & _any(given & ~cached, answers.ends)
    done = int(sent.sum()) if asked else 0
    return {
        "records": len(answers),
        "done": done,
        "cached": int(rewritten.sum()) - done,
        "failed": int(failed.sum()),
        "skipped": _skipped(~failed & ~rewritten, skips, records, answers),
        "failures_by_kind": _kinds(flat, failed_answers, answers),
    }


def models_of(answers: Answers, own: str | None) -> dict[str, int]:
    """Good answers by the model that gave them; empty where there is but the run's own."""
    flat = answers.flat
    if not answers.targets.several_models:
        return {}
    given = flat.column("model").filter(pc.is_valid(flat.column("completion")))
    return counted(given.fill_null(own or "local"))


def _mask(column: pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = column.to_numpy()
    return found


def _any(mask: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """For each record, whether the mask holds for any answer to it."""
    sums = np.concatenate([[0], np.cumsum(mask)])[np.concatenate([[0], ends]).astype(np.int64)]
    found: np.ndarray = np.diff(sums) > 0
    return found


def _kinds(flat: pa.Table, failed: np.ndarray, answers: Answers) -> dict[str, int]:
    """Failed records by the class of their first failure."""
    places = np.flatnonzero(failed)
    owners = np.searchsorted(answers.ends, places, side="right")
    firsts = places[np.unique(owners, return_index=True)[1]]
    return counted(flat.column("failure").take(pa.array(firsts, pa.int64())))


def _skipped(
    left: np.ndarray, skips: list[pa.ChunkedArray] | None, records: Records, answers: Answers
) -> dict[str, int]:
    """The records that were left as they are, by the reason."""
    skipped: dict[str, int] = {}
    messages = answers.flat.column("message")
    if messages.null_count < len(messages):
        chosen = _mask(pc.equal(messages.fill_null(""), NOT_CHOSEN))
        left_out = left & _any(chosen, answers.ends)
        if records.limit is not None:
            left_out[records.limit :] = left[records.limit :]
        skipped[NOT_CHOSEN] = int(left_out.sum())
        left = left & ~left_out
    if records.done is not None:
        done = left & np.array([bool(fields) for fields in records.done], bool)
        skipped["done before"] = int(done.sum())
        # Such records have no other reason to be skipped.
        left = left & ~done
    if skips is not None:
        skipped |= counted(pc.coalesce(*skips).filter(pa.array(left)))
    else:
        skipped["no text"] = int(left.sum())
    return {reason: count for reason, count in skipped.items() if count}


def counted(column: Any) -> dict[str, int]:
    """How often each value stands in a column."""
    counts = column.drop_null().value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts}
