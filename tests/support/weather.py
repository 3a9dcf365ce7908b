"""Simulated servers around a limiter: what comes of it in seconds of a clock of their own."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from fabe_ds.engine.limiter import Limiter

Refuses = Callable[[float, int, random.Random], bool]
"""Whether a server refuses a request, by the time, the requests inside, and chance."""


def calm(now: float, inside: int, chance: random.Random) -> bool:
    return False


def sometimes(share: float, until: float = math.inf) -> Refuses:
    """A share of requests is refused, whatever else goes on."""
    return lambda now, inside, chance: now < until and chance.random() < share


def admits(limit: Callable[[float], int]) -> Refuses:
    """So many at once are let in, the rest refused."""
    return lambda now, inside, chance: inside >= limit(now)


class RateLimited:
    """A token bucket: `rate` requests a second, others are refused."""

    def __init__(self, rate: float) -> None:
        self.rate, self.level, self.at = rate, rate / 10, 0.0

    def __call__(self, now: float, inside: int, chance: random.Random) -> bool:
        self.level = min(self.rate / 10 + 1, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level < 1:
            return True
        self.level -= 1
        return False


@dataclass
class Server:
    """Latency is log-normal around `median`; beyond `workers` at once, requests queue."""

    median: float = 0.1
    sigma: float = 0.0
    workers: int = 10_000
    refuses: Refuses = calm


@dataclass
class Seen:
    """What a simulation saw: moments of answers and refusals, and tries of each record."""

    answers: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    failed: int = 0
    limits: list[tuple[float, int]] = field(default_factory=list)

    def rate(self, start: float, end: float) -> float:
        """Answers a second between two moments."""
        return sum(start <= moment < end for moment in self.answers) / (end - start)

    @property
    def refused(self) -> float:
        return len(self.refusals) / max(1, len(self.refusals) + len(self.answers))


def simulate(
    concurrency: int | None, server: Server, seconds: float, seed: int, retry: int = 3
) -> Seen:
    """Endless records against a server for so many seconds."""
    chance, now = random.Random(seed), 0.0
    limiter = Limiter(concurrency, lambda: now)
    seen = Seen()
    events: list[tuple[float, int, str, float, int]] = []
    count = in_flight = inside = 0
    waiting: list[float] = []  # when each busy worker is free again
    again: list[int] = []  # tries of the records whose backoff is over

    def push(at: float, kind: str, sent_at: float, tries: int) -> None:
        nonlocal count
        count += 1
        heapq.heappush(events, (at, count, kind, sent_at, tries))

    while now < seconds:
        while in_flight < limiter.limit:
            tries = again.pop() if again else 0
            in_flight += 1
            limiter.sent()
            if server.refuses(now, inside, chance):
                push(now + chance.uniform(0.001, 0.004), "refused", now, tries)
                continue
            inside += 1
            takes = server.median * math.exp(server.sigma * chance.gauss(0, 1))
            begins = now
            if len(waiting) >= server.workers:
                begins = max(now, heapq.heappop(waiting))
            heapq.heappush(waiting, begins + takes)
            push(begins + takes, "answered", now, tries)
        now, _, kind, sent_at, tries = heapq.heappop(events)
        while waiting and waiting[0] < now and len(waiting) > server.workers:
            heapq.heappop(waiting)
        if kind == "again":
            again.append(tries)
            continue
        in_flight -= 1
        if kind == "answered":
            inside -= 1
            limiter.answered(sent_at, in_flight + 1)
            seen.answers.append(now)
        else:
            limiter.refused(sent_at, in_flight)
            seen.refusals.append(now)
            if tries >= retry:
                seen.failed += 1
            else:
                push(now + chance.uniform(0, 0.5 * 2 ** (tries + 1)), "again", 0.0, tries + 1)
        seen.limits.append((now, limiter.limit))
    return seen
