"""What a verdict means for one request: again after so long, or a failure of its record.

A decision of what it is given: no clock, no randomness of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fabe_ds.engine.verdict import Verdict

BACKOFF_SECONDS, BACKOFF_MAX = 0.5, 30.0
AT_ONCE_SECONDS = 0.005
"""Wait in seconds before a try that costs nothing: a connection was closed while it was idle."""


class Attempts(NamedTuple):
    """What a request has been through: tries that failed, answers that a proxy cut, and whether
    its one free try is left; how often, and for how many seconds, it waited for room."""

    tries: int = 0
    cuts: int = 0
    free: bool = True
    waits: int = 0
    waited: float = 0.0


class Decision(NamedTuple):
    """`after`: seconds until the request goes again; None where its record fails. `attempts` is
    what it has been through then; `counts` says that it is a retry in the run's counts."""

    after: float | None
    attempts: Attempts
    counts: bool = True


def decide(
    attempts: Attempts,
    verdict: Verdict,
    retries: int,
    chance: Callable[[float, float], float],
    patience: float = 0.0,
) -> Decision:
    """What becomes of a request whose verdict is "retry", with `retries` tries after the first;
    for so many seconds of `patience`, waiting for a tier's room costs none.

    `chance(low, high)` gives a number between both: full jitter, so that requests that were
    refused together do not come back together.
    """
    # A kept-alive connection that the server has closed meanwhile is nobody's fault.
    if verdict.local or (verdict.gone and attempts.free):
        return Decision(AT_ONCE_SECONDS, attempts._replace(free=False), counts=False)
    if verdict.waits and attempts.waited < patience:
        ceiling = min(BACKOFF_MAX, BACKOFF_SECONDS * 2 ** min(10, attempts.waits + 1))
        after = max(chance(ceiling / 2, ceiling), verdict.wait or 0.0)
        waits, waited = attempts.waits + 1, attempts.waited + after
        return Decision(after, attempts._replace(waits=waits, waited=waited))
    spent = attempts._replace(tries=attempts.tries + 1, cuts=attempts.cuts + int(verdict.proxy_cut))
    if spent.tries > retries or spent.cuts > 1:  # the model ran for nothing, twice
        return Decision(None, spent)
    ceiling = min(BACKOFF_MAX, BACKOFF_SECONDS * 2 ** min(10, spent.tries))
    return Decision(max(chance(0.0, ceiling), verdict.wait or 0.0), spent)
