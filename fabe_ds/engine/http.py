"""Sends requests to an HTTP endpoint: as many at once as it takes, each until it is answered."""

from __future__ import annotations

import contextlib
import json
import queue
import urllib.request
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp

from fabe_ds.engine.budget import Budget
from fabe_ds.engine.intake import Intake, Item, Outcome, Slot
from fabe_ds.engine.job import Job
from fabe_ds.engine.limiter import Limiter
from fabe_ds.engine.loop import LoopThread
from fabe_ds.engine.slots import SharedSlots
from fabe_ds.engine.verdict import Verdict, judge, judge_payload
from fabe_ds.errors import MalformedResponse, RecordFailed
from fabe_ds.providers.base import Completion, HttpProvider, Request
from fabe_ds.surrogates import load_json

BODY_LIMIT = 32 << 20
SIGNAL_SECONDS = 0.5
"""Python looks at a signal that came just before a wait when the wait ends: so long at most."""


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
        sharers = slots.workers if slots else None
        self.limiter = Limiter(policy.concurrency, rpm=policy.rpm, tpm=policy.tpm, sharers=sharers)
        self._checked = False
        self.jobs: list[Job] = []  # the loop's; several where several threads call
        self._thread = LoopThread.shared()
        self._session = self._thread.call(self._open_session())

    def outcomes(self, items: Iterable[Item]) -> Generator[Outcome, None, None]:
        """One outcome an item, in order.

        Left early (an error, Ctrl-C), it sends no more, waits for what is on its way, and keeps
        it. Raises: RunStopped, CacheError.
        """
        job = Job(self, iter(items))
        loop = self._thread.loop
        loop.call_soon_threadsafe(self.jobs.append, job)
        loop.call_soon_threadsafe(job.pump)
        loop.call_soon_threadsafe(job.watch)
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

    @property
    def busy(self) -> int:
        """Places in flight that are taken."""
        return sum(job.busy for job in self.jobs)

    def pump(self) -> None:
        """Lets the jobs start what they may, the oldest first."""
        for job in list(self.jobs):
            job.pump()

    def close(self) -> None:
        if not self._thread.ended:  # Python's exit may come here after the loop's end
            self._thread.call(self._session.close())

    async def _open_session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(
            total=self.policy.timeout, sock_connect=self.policy.connect_timeout
        )
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
            timeout=timeout,
            headers={"Content-Type": "application/json", **self.provider.headers()},
            # aiohttp's trust_env would read ~/.netrc and the environment for every request.
            proxy=_proxy(self.provider.base_url),
            cookie_jar=aiohttp.DummyCookieJar(),
            raise_for_status=False,
        )

    def check(self) -> None:
        """Asks the endpoint whether it is there, before the first request is spent on it."""
        if not self._checked:
            self.provider.preflight()
            self._checked = True

    async def post(self, request: Request) -> Completion | Verdict:
        """One try."""
        url = self.provider.base_url + self.provider.path(request)
        body = json.dumps(self.provider.body(request)).encode()
        try:
            async with self._session.post(url, data=body, allow_redirects=False) as response:
                data = await _read(response)
                status, headers = response.status, response.headers
                self.limiter.told(headers)
        except aiohttp.ClientSSLError as error:
            return Verdict(
                "stop", "certificate", f"the server's certificate is not accepted: {error}"
            )
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            return Verdict("stop", "url", "--base-url is not an http address")
        except aiohttp.ServerDisconnectedError:
            return Verdict("retry", "connection", "the server closed the connection", gone=True)
        except TimeoutError as error:
            connecting = isinstance(error, aiohttp.ConnectionTimeoutError)
            message = "no connection in time" if connecting else "no answer in time (--timeout)"
            return Verdict("retry", "timeout", message, gone=connecting)
        except aiohttp.ClientConnectorError as error:
            return Verdict("retry", "connection", f"no connection: {error.strerror}", gone=True)
        except (aiohttp.ClientError, OSError) as error:
            return Verdict("retry", "connection", f"the connection broke: {type(error).__name__}")
        except _TooLarge:
            return Verdict("fail", "too large", f"the answer is over {BODY_LIMIT >> 20} MiB")
        if status != 200:
            return judge(status, headers, data)
        try:
            payload = load_json(data)
        except (ValueError, RecursionError):
            html = data.lstrip()[:1] == b"<"
            what = "an HTML page, not JSON" if html else "not JSON, or cut off"
            return Verdict("retry", "malformed", f"the answer is {what}")
        verdict = judge_payload(payload, headers, data)
        if verdict is not None:
            return verdict
        try:
            return self.provider.completion(payload)
        except MalformedResponse as error:
            return Verdict("retry", "malformed", str(error))
        except RecordFailed as error:
            return Verdict("fail", error.kind, str(error))


def _waited(ready: queue.SimpleQueue[list[Slot] | None]) -> list[Slot] | None:
    while True:
        with contextlib.suppress(queue.Empty):
            return ready.get(timeout=SIGNAL_SECONDS)


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for the address, if any."""
    parts = urlsplit(url)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)


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
