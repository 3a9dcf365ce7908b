"""Sends requests to an HTTP endpoint: as many at once as it takes, each until it is answered."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from fabe_ds import network
from fabe_ds.engine.budget import Budget
from fabe_ds.engine.coalesce import Intake, Slot
from fabe_ds.engine.dispatch import Job
from fabe_ds.engine.limiter import Limiter
from fabe_ds.engine.loop import LoopThread
from fabe_ds.engine.rates import Rates
from fabe_ds.engine.verdict import ServerError, Verdict, judge_error, judge_payload, read_error
from fabe_ds.engine.worker_slots import SharedSlots
from fabe_ds.errors import MalformedResponse, RecordFailed
from fabe_ds.providers import Completion, HttpProvider, Request
from fabe_ds.providers.finish import End, end_of
from fabe_ds.providers.http import STREAM, refused_parameter, stream_parts
from fabe_ds.request import Item, Outcome
from fabe_ds.text import encodable, load_json

log = logging.getLogger(__name__)

BODY_LIMIT = 32 << 20
HEADER_LIMIT = 256 << 10
SIGNAL_SECONDS = 0.5
"""Longest blocking wait in seconds. A Ctrl-C that arrives just before a wait is handled only when
the wait returns."""
FILES_BESIDE = 48  # open files of a process beside its connections
_PARAMETER_STATUSES = (400, 422)


@dataclass(frozen=True, slots=True)
class Policy:
    """How hard to try. Times in seconds; `concurrency` None finds the limit out."""

    concurrency: int | None = 4
    retry: int = 3
    timeout: float = 600.0
    connect_timeout: float = 10.0
    give_up_after: float = 600.0
    rpm: float | None = None
    tpm: float | None = None
    stream: bool = False
    patient: bool = False
    """Whether to go on where the first records all fail."""

    @property
    def window(self) -> int:
        """Records looked at ahead of the oldest unanswered one."""
        return max(2000, 64 * (self.concurrency or 64))


class HttpEngine:
    """Answers items in order, keeping the endpoint busy from the first to the last.

    A loop in a thread of its own pulls items as places get free, so the caller's pace and batch
    size hold nothing up. Each completion is on disk before it counts.
    """

    def __init__(
        self,
        provider: HttpProvider,
        intake: Intake,
        policy: Policy,
        budget: Budget,
        slots: SharedSlots | None = None,
    ) -> None:
        self.provider, self.intake, self.policy, self.slots = provider, intake, policy, slots
        self.budget = budget
        self.limiter = Limiter(policy.concurrency)
        self.limiter.ceiling = network.allow_open_files(self.limiter.ceiling, FILES_BESIDE)
        sharers = slots.workers if slots else None
        self.rates = Rates(policy.rpm, policy.tpm, sharers=sharers)
        self.checked = self._checking = False
        self.answered_at: float | None = None  # on the monotonic clock: the latest answer
        self.jobs: list[Job] = []  # the loop's; several where several threads call
        self._endpoint = (str(provider.address), provider.endpoint.model)
        self._learned: dict[str, str] = {}
        self.proven = False
        """Whether this endpoint has answered a request for this model, in this run or earlier."""
        if intake.cache is not None:
            self._learned |= intake.cache.learned(*self._endpoint)
            self.proven = bool(self._learned.pop("answered", ""))
        self._answered_before = self.proven
        if policy.stream:
            self._learned[STREAM] = "true"
        self._thread = LoopThread.shared()
        self._session = self._thread.call(self._open_session())

    def outcomes(self, items: Iterable[Item]) -> Generator[Outcome, None, None]:
        """One outcome an item, in order.

        Left early (an error, Ctrl-C), it sends no more, waits for what is on its way, and keeps
        it. Raises: RunStopped, CacheError.
        """
        job = Job(self, iter(items))
        loop = self._thread.loop
        loop.call_soon_threadsafe(job.begin)
        try:
            while (ready := _waited(job.ready)) is not None:
                for slot in ready:
                    assert slot.outcome is not None
                    yield slot.outcome
                loop.call_soon_threadsafe(job.consumed, len(ready))
            if job.error is not None:
                raise job.error
        finally:
            loop.call_soon_threadsafe(job.stop)
            try:
                while not job.drained.wait(SIGNAL_SECONDS):
                    pass
            except BaseException:  # a second Ctrl-C: do not wait for the last answers
                loop.call_soon_threadsafe(job.abort)
                raise
            finally:
                job.error = None  # its traceback holds this frame, which holds the job

    @property
    def busy(self) -> int:
        """Places in flight that are taken."""
        return sum(job.busy for job in self.jobs)

    def pump(self) -> None:
        """Lets the jobs start what they may, the oldest first."""
        for job in list(self.jobs):
            job.pump()

    def close(self) -> None:
        self._thread.finish(self._session.close())

    async def _open_session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(
            total=self.policy.timeout, sock_connect=self.policy.connect_timeout
        )
        secure = self.provider.address.parts.scheme == "https"
        proxy = network.usable_proxy(self.provider.address.base)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, ttl_dns_cache=300, ssl=network.certificates() if secure else True
            ),
            timeout=timeout,
            headers={"Content-Type": "application/json", **self.provider.headers()},
            proxy=proxy.url if proxy else None,
            cookie_jar=aiohttp.DummyCookieJar(),
            raise_for_status=False,
            max_line_size=HEADER_LIMIT,
            max_field_size=HEADER_LIMIT,
        )

    def begin_check(self) -> None:
        """Asks the endpoint whether it is there, before the first request is spent on it; the jobs
        go on, or end with what is wrong, when it has answered.

        In a thread of its own: it blocks for seconds, and other endpoints share the loop.
        """
        if not self._checking:
            self._checking = True
            threading.Thread(target=self._check, name="fabe-ds-preflight", daemon=True).start()

    def _check(self) -> None:
        problem: BaseException | None = None
        try:
            self.provider.refuse_open_key()
            self.provider.preflight()
        except BaseException as error:
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._thread.loop.call_soon_threadsafe(self._checked, problem)

    def _checked(self, problem: BaseException | None) -> None:
        self._checking, self.checked = False, problem is None
        for job in list(self.jobs):
            if problem is not None:
                job.fatal(problem)
            job.pump()

    def answered(self) -> None:
        """A completion came: the key, the model and the parameters are good."""
        self.answered_at = time.monotonic()
        if not self.proven:
            self.proven = True
            self._remember("answered", "1")

    @property
    def answered_ago(self) -> float | None:
        """Seconds since the latest answer; infinite where it came in an earlier run."""
        if self.answered_at is None:
            return math.inf if self._answered_before else None
        return time.monotonic() - self.answered_at

    def learn(self, lesson: Mapping[str, str], why: str) -> None:
        """Sends bodies in another way from now on, and in later runs."""
        for name, value in lesson.items():
            if self._learned.get(name) != value:
                self._learned[name] = value
                self._remember(name, value)
                log.info("%s: %s (%s)", self.provider.address, _in_words(name, value), why)

    def _remember(self, name: str, value: str) -> None:
        if self.intake.cache is not None:
            self.intake.cache.learn(*self._endpoint, name, value)

    async def post(self, request: Request) -> Completion | Verdict:
        """One try."""
        url = self.provider.address.url(self.provider.path(request))
        sent = self.provider.sent(self.provider.body(request), self._learned)
        started = time.monotonic()
        try:
            data = json.dumps(sent).encode()
            async with self._session.post(url, data=data, allow_redirects=False) as response:
                data = await _read(response)
                status, headers = response.status, response.headers
        except _TooLarge:
            return Verdict("fail", "too large", f"the answer is over {BODY_LIMIT >> 20} MiB")
        except (aiohttp.ClientError, OSError) as error:
            return self._broken(error)
        self.rates.read(headers)
        if status != 200:
            told = read_error(data)
            verdict = judge_error(status, told, headers, time.monotonic() - started)
            return self._with_lesson(verdict, status, told, sent)
        return self._answer(data, headers, sent)

    def _broken(self, error: Exception) -> Verdict:
        """The verdict on a connection that failed."""
        if isinstance(error, aiohttp.ClientSSLError):
            hint = network.certificate_hint()
            message = f"the server's certificate is not accepted: {error} ({hint})"
            return Verdict("stop", "certificate", message)
        if isinstance(error, aiohttp.InvalidURL | aiohttp.NonHttpUrlClientError):
            return Verdict("stop", "url", "--base-url is not an http address")
        if isinstance(error, aiohttp.ClientHttpProxyError):
            proxy = network.proxy_for(self.provider.address.base)
            message = f"the proxy refuses ({proxy}): {error.status} {error.message}"
            return Verdict("retry", "connection", message, gone=True)
        if isinstance(error, aiohttp.ServerDisconnectedError):
            return Verdict("retry", "connection", "the server closed the connection", gone=True)
        if isinstance(error, TimeoutError):
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                return Verdict("retry", "timeout", "no connection in time", gone=True)
            return Verdict("retry", "timeout", "no answer in time (--timeout)")
        if isinstance(error, aiohttp.ClientConnectorError):
            reason = error.strerror or str(error.os_error) or type(error).__name__
            if error.errno in network.OUT_OF_FILES:
                self.limiter.ceiling = max(1, min(self.limiter.ceiling, self.busy - 1))
                log.warning("no more open files (ulimit -n): %d at once", self.limiter.ceiling)
                return Verdict("retry", "connection", f"no connection: {reason}", local=True)
            through = network.proxy_for(self.provider.address.base)
            by = f" (through {through})" if through else ""
            return Verdict("retry", "connection", f"no connection: {reason}{by}", gone=True)
        return Verdict("retry", "connection", f"the connection broke: {type(error).__name__}")

    def _answer(
        self, data: bytes, headers: Mapping[str, str], sent: Mapping[str, Any]
    ) -> Completion | Verdict:
        """What a body that came with status 200 holds."""
        try:
            payload = _payload(data, self.provider)
            verdict = judge_payload(payload, headers)
            if verdict is not None:
                return self._with_lesson(verdict, 400, read_error(data), sent)
            completion = self.provider.completion(payload)
        except MalformedResponse as error:
            return Verdict("retry", "malformed", str(error))
        except RecordFailed as error:
            return Verdict("fail", error.kind, str(error))
        if end_of(completion.finish_reason) is End.FAULT:
            message = f"the server broke the answer off (finish reason {completion.finish_reason})"
            return Verdict("retry", "server", message)
        return completion

    def _with_lesson(
        self, verdict: Verdict, status: int, error: ServerError, sent: Mapping[str, Any]
    ) -> Verdict:
        """The verdict, and how to send the body instead where a parameter of it is refused."""
        if verdict.kind not in ("rejected", "server") or status not in _PARAMETER_STATUSES:
            return verdict
        if self.answered_at is not None:  # it took them all for another record
            return verdict
        name = refused_parameter(sent, error.parameter, error.codes, error.message)
        if name is None:
            return verdict
        lesson = self.provider.instead(name, sent, error.message)
        if lesson is not None and name not in self._learned.values():
            return replace(verdict, action="retry", lesson=dict([lesson]))
        message = f"the server does not take the parameter {name} ({verdict.message})"
        return Verdict("stop", "parameter", message, refused=True)


def _in_words(name: str, value: str) -> str:
    if name == STREAM:
        return "it wants to stream its answers" if value == "true" else "it knows no stream"
    return f"{name} goes as {value}" if value else f"it takes no {name}, so none is sent"


def _payload(data: bytes, provider: HttpProvider) -> Any:
    """The JSON of a body, put together where the server streamed it.

    Raises: MalformedResponse.
    """
    try:
        return load_json(data)
    except (ValueError, RecursionError):
        pass
    text = encodable(data.decode("utf-8-sig", "replace"))
    if text.lstrip()[:1] == "<":
        raise MalformedResponse("the answer is an HTML page, not JSON")
    parts = stream_parts(text)
    if parts is None:
        raise MalformedResponse("the answer is not JSON, or cut off")
    if len(parts) == 1 and not _is_chunk(parts[0]):
        return parts[0]
    return provider.joined(parts)


def _is_chunk(part: Mapping[str, Any]) -> bool:
    choices: Any = part.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return part.get("done") is False or (isinstance(first, Mapping) and "delta" in first)


def _waited(ready: queue.SimpleQueue[list[Slot] | None]) -> list[Slot] | None:
    while True:
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=SIGNAL_SECONDS)


class _TooLarge(Exception):
    pass


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, uncompressed, as far as it is of a size to be an answer."""
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > BODY_LIMIT:
            response.close()
            raise _TooLarge
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
