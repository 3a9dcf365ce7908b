"""Counts of records, out of the answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import pyarrow as pa

from fabe_ds.answers import Answers


def record_counts(
    answers: Answers,
    skips: list[pa.ChunkedArray] | None,
    done_before: Sequence[Sequence[int]] | None,
    asked: bool,
) -> dict[str, Any]:
    """The counts of records for a RunResult: failed where any answer did, else rewritten where any
    field was. `skips` are the reasons why fields have no text; `done_before` the fields of each
    record that were rewritten in place before. `asked` False: all that was answered comes from an
    earlier run.
    """
    import pyarrow.compute as pc

    targets = answers.targets
    each = [(f, s) for f in range(len(targets.names)) for s in range(targets.samples)]

    def columns(name: str) -> list[pa.ChunkedArray]:
        return [answers.column(name, field, sample) for field, sample in each]

    failure = pc.coalesce(*columns("failure"))
    good = pc.is_null(failure)
    changed = list(map(_is_given, columns("completion")))
    rewritten = pc.and_(good, reduce(pc.or_, changed))
    sent = map(pc.and_not, changed, columns("cached"))
    done = pc.sum(pc.and_(rewritten, reduce(pc.or_, sent))).as_py() or 0 if asked else 0
    left = pc.and_(good, pc.invert(rewritten))
    return {
        "records": len(failure),
        "done": done,
        "cached": (pc.sum(rewritten).as_py() or 0) - done,
        "failed": len(failure) - failure.null_count,
        "skipped": _skipped(left, skips, done_before),
        "failures_by_kind": counted(failure),
    }


def _is_given(column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow.compute as pc

    return pc.is_valid(column)


def _skipped(
    left: pa.ChunkedArray,
    skips: list[pa.ChunkedArray] | None,
    done_before: Sequence[Sequence[int]] | None,
) -> dict[str, int]:
    """The records that were left as they are, by the reason."""
    import pyarrow.compute as pc

    skipped: dict[str, int] = {}
    if done_before is not None:
        done = pc.and_(left, pa.array([bool(fields) for fields in done_before], pa.bool_()))
        skipped["done before"] = pc.sum(done).as_py() or 0
        # Such records have no other reason to be skipped.
        left = pc.and_not(left, done)
    if skips is not None:
        skipped |= counted(pc.coalesce(*skips).filter(left))
    else:
        skipped["no text"] = pc.sum(left).as_py() or 0
    return {reason: count for reason, count in skipped.items() if count}


def counted(column: Any) -> dict[str, int]:
    """How often each value stands in a column."""
    counts = column.drop_null().value_counts().to_pylist()
    return {entry["values"]: entry["counts"] for entry in counts}
