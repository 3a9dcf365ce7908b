"""Whether the server is there: a decision without a socket or a clock of its own."""

from __future__ import annotations

import random
from collections.abc import Callable

FEWEST = 5  # failures in a row that may be an outage
BACKOFF_SECONDS, PROBE_MAX = 0.5, 10.0


class Outage:
    """Failures in a row, of several records: the server is away, overwhelmed or loading.

    While it is, one request at a time looks for it, and costs its record no try. One record that
    always fails is no outage: it is that record.
    """

    def __init__(
        self, clock: Callable[[], float], chance: Callable[[float, float], float] = random.uniform
    ) -> None:
        self._clock, self._chance = clock, chance
        self._probe_at = 0.0
        self._probes = 0
        self.reset()

    def reset(self) -> None:
        """An answer came."""
        self._failures = 0
        self._records: set[int] = set()
        self._since: float | None = None
        self.down = False
        self.reason = self.how = ""

    def failed(
        self, record: object, reason: str, how: str, limit: int, *, certain: bool, alone: bool
    ) -> None:
        """A request found the server unavailable, `how` in a word. `limit`: requests that may be
        in flight. `certain`: the server says so itself. `alone`: nothing else is on its way."""
        now = self._clock()
        self._since = now if self._since is None else self._since
        self._failures += 1
        if len(self._records) < FEWEST:
            self._records.add(id(record))
        self.reason, self.how = reason, how
        if self.down:
            return
        many = self._failures >= max(FEWEST, limit) and len(self._records) > 1
        if certain or (many and alone):
            self.down, self._probes = True, 0

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return 0.0 if self._since is None else self._clock() - self._since

    def until_probe(self) -> float:
        """Seconds until the next request may look for the server; 0 where there is no outage."""
        return max(0.0, self._probe_at - self._clock()) if self.down else 0.0

    def probed(self, wait: float | None) -> None:
        """A probe found nothing; the next one comes later, and not before the server's wish."""
        ceiling = min(PROBE_MAX, BACKOFF_SECONDS * 2 ** min(10, self._probes))
        self._probes += 1
        self._probe_at = self._clock() + max(self._chance(ceiling / 2, ceiling), wait or 0.0)
