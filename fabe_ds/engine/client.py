"""One request in, its completion or a verdict out: what is sent over HTTP, and what came back."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import aiohttp

from fabe_ds import network
from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.lessons import Lessons
from fabe_ds.engine.reading import completion_in, payload_of, unlike_protocol
from fabe_ds.engine.server_errors import read_error
from fabe_ds.engine.verdict import Verdict, classify_error, classify_payload
from fabe_ds.errors import READING_FAULTS, MalformedResponse
from fabe_ds.providers.dialects import DIALECT
from fabe_ds.providers.http import STREAM, TIER, HttpProvider
from fabe_ds.request import Completion, Request
from fabe_ds.store.completions import Completions

log = logging.getLogger(__name__)

BODY_LIMIT = 32 << 20
HEADER_LIMIT = 256 << 10
CONNECT_SECONDS = 10.0
AUTO, FLEX, FLEX_SECONDS = "auto", "flex", 900.0
"""The tier that the server chooses, the one that waits, and how long its answers may take.

Source: OpenAI's guide, "Flex processing".
"""
ANSWERED = "answered"
"""The learned word for an endpoint that has answered."""


class Reply(NamedTuple):
    """What one request came to; `headers` are the answer's, None where there was none."""

    result: Completion | Verdict
    headers: Mapping[str, str] | None = None


class HttpClient:
    """Sends single requests to one endpoint, in the way that it has been found to want them.

    `open` and `post` belong to the event loop; `check` blocks.
    """

    def __init__(
        self, provider: HttpProvider, policy: PolicySettings, memory: Completions | None
    ) -> None:
        """`memory` keeps, for later runs, what was learned of the endpoint."""
        self.provider, self._policy = provider, policy
        self._lessons = Lessons(provider, policy, memory)
        self.proven = ANSWERED in self._lessons
        """Whether this endpoint has answered a request for this model, in this run or earlier."""
        self._answered_before = self.proven
        self._has_told_tier = False
        self._answered_at: float | None = None  # on the monotonic clock: the latest answer
        if policy.stream == "on":
            self._lessons.use(STREAM, "true")
        elif policy.stream == "off":
            self._lessons.use(STREAM, None)
        # Of a stream, each silence may be so long, and not the whole answer.
        self._seconds = policy.timeout
        if policy.service_tier == FLEX:
            self._seconds = max(FLEX_SECONDS, policy.timeout)
        self._silence = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=self._seconds
        )
        self._session: aiohttp.ClientSession

    async def open(self) -> None:
        """Opens the connections' pool. Raises: RunStopped, UsageError."""
        timeout = aiohttp.ClientTimeout(total=self._seconds, sock_connect=CONNECT_SECONDS)
        secure = self.provider.address.parts.scheme == "https"
        proxy = network.usable_proxy(self.provider.address.base)
        self._session = aiohttp.ClientSession(
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

    async def close(self) -> None:
        await self._session.close()

    def check(self) -> None:
        """Asks the endpoint whether it is there, before the first request is spent on it.

        Raises: RunStopped, UsageError.
        """
        self.provider.refuse_open_key()
        self.provider.preflight()
        if found := self.provider.detected:  # for processes that do not look themselves
            self._lessons.remember(DIALECT, found)

    def answered(self) -> None:
        """A completion came: the key, the model and the parameters are good."""
        self._answered_at = time.monotonic()
        self._lessons.has_answered = True
        if not self.proven:
            self.proven = True
            self._lessons.remember(ANSWERED, "1")

    @property
    def answered_ago(self) -> float | None:
        """Seconds since the latest answer; infinite where it came in an earlier run."""
        if self._answered_at is None:
            return math.inf if self._answered_before else None
        return time.monotonic() - self._answered_at

    def learn(self, lesson: Mapping[str, str], why: str) -> None:
        """Sends bodies in another way from now on, and in later runs."""
        self._lessons.learn(lesson, why)

    async def post(self, request: Request) -> Reply:
        """One try."""
        url = self.provider.address.url(self.provider.path(request))
        sent = self._lessons.written(request)
        started = time.monotonic()
        try:
            data = json.dumps(sent).encode()
            timeout = self._silence if sent.get(STREAM) else self._session.timeout
            async with self._session.post(
                url, data=data, allow_redirects=False, timeout=timeout
            ) as response:
                data = await _read(response)
                status, headers = response.status, response.headers
        except _TooLarge:
            message = f"the answer is over {BODY_LIMIT >> 20} MiB"
            return Reply(Verdict("fail", "too large", message))
        except (aiohttp.ClientError, OSError) as error:
            return Reply(self._broken(error))
        if status != 200:
            said = read_error(data)
            verdict = classify_error(status, said, headers, time.monotonic() - started)
            if verdict.proxy_cut and self._policy.stream == "auto" and not sent.get(STREAM):
                return Reply(replace(verdict, lesson={STREAM: "true"}), headers)
            return Reply(self._lessons.judged(verdict, status, said, request, sent), headers)
        return Reply(self._answer(data, headers, request, sent), headers)

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
                return Verdict("retry", "connection", f"no connection: {reason}", local=True)
            through = network.proxy_for(self.provider.address.base)
            by = f" (through {through})" if through else ""
            return Verdict("retry", "connection", f"no connection: {reason}{by}", gone=True)
        return Verdict("retry", "connection", f"the connection broke: {type(error).__name__}")

    def _answer(
        self,
        data: bytes,
        headers: Mapping[str, str],
        request: Request,
        sent: Mapping[str, Any],
    ) -> Completion | Verdict:
        """What a body that came with status 200 holds."""
        try:
            payload = payload_of(data, self.provider)
            verdict = classify_payload(payload, headers)
        except MalformedResponse as error:
            return Verdict("retry", "malformed", str(error))
        except READING_FAULTS as error:
            return Verdict("retry", "malformed", unlike_protocol(error))
        if verdict is not None:
            return self._lessons.judged(verdict, 400, read_error(data), request, sent)
        result = completion_in(payload, self.provider)
        if isinstance(result, Completion):
            self._compare_tier(payload)
        return result

    def _compare_tier(self, payload: Mapping[str, Any]) -> None:
        """Says, once, that the server has answered in another tier than it was asked for."""
        asked, given = self._policy.service_tier, payload.get(TIER)
        if asked in (None, AUTO, given) or not isinstance(given, str) or self._has_told_tier:
            return
        self._has_told_tier = True
        log.warning(
            "%s: it answers in the tier %s, not %s; costs are counted as of %s",
            self.provider.address,
            given,
            asked,
            asked,
        )


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
