"""What a verdict means for one request. A unit test: the decision is a table, with no clock in it."""

from __future__ import annotations

import pytest

from fabe_ds.engine.retry import AT_ONCE_SECONDS, BACKOFF_MAX, Attempts, decide
from fabe_ds.engine.verdict import Verdict


def highest(low: float, high: float) -> float:
    return high


def lowest(low: float, high: float) -> float:
    return low


BUSY = Verdict("retry", "rate", "429", busy=True)
WAIT = Verdict("retry", "rate", "429", busy=True, wait=7.0)
GONE = Verdict("retry", "connection", "closed", gone=True)
LOCAL = Verdict("retry", "connection", "no files", local=True)
CUT = Verdict("retry", "proxy", "524", proxy_cut=True)


@pytest.mark.parametrize(
    ("attempts", "verdict", "retries", "after", "spent"),
    [
        (Attempts(), BUSY, 3, 1.0, Attempts(1)),
        (Attempts(1), BUSY, 3, 2.0, Attempts(2)),
        (Attempts(2), BUSY, 3, 4.0, Attempts(3)),
        (Attempts(3), BUSY, 3, None, Attempts(4)),
        (Attempts(), BUSY, 0, None, Attempts(1)),
        (Attempts(20), BUSY, 99, BACKOFF_MAX, Attempts(21)),
        (Attempts(), WAIT, 3, 7.0, Attempts(1)),  # never before the server's wish
        (Attempts(5), WAIT, 9, BACKOFF_MAX, Attempts(6)),  # nor before our own
        (Attempts(), GONE, 3, AT_ONCE_SECONDS, Attempts(0, 0, False)),  # once for nothing
        (Attempts(0, 0, False), GONE, 3, 1.0, Attempts(1, 0, False)),
        (Attempts(), GONE, 0, AT_ONCE_SECONDS, Attempts(0, 0, False)),
        (Attempts(0, 0, False), LOCAL, 0, AT_ONCE_SECONDS, Attempts(0, 0, False)),
        (Attempts(), CUT, 9, 1.0, Attempts(1, 1)),
        (Attempts(1, 1), CUT, 9, None, Attempts(2, 2)),  # the model ran for nothing, twice
    ],
)
def test_the_table(attempts, verdict, retries, after, spent):
    decision = decide(attempts, verdict, retries, highest)
    assert (decision.after, decision.attempts) == (after, spent)


def test_requests_that_were_refused_together_do_not_come_back_together():
    assert decide(Attempts(3), BUSY, 9, lowest).after == 0.0
    assert decide(Attempts(3), BUSY, 9, highest).after == 8.0


def test_what_costs_no_try_is_no_retry():
    assert not decide(Attempts(), GONE, 3, highest).counts
    assert not decide(Attempts(), LOCAL, 3, highest).counts
    assert decide(Attempts(), BUSY, 3, highest).counts
