"""The batch APIs of servers: how a batch is sent, watched, read and cancelled.

Sources: OpenAI API reference, "Files" and "Batch", and its guide, which Azure, Groq, Alibaba Cloud
Model Studio, Zhipu, SiliconFlow and Moonshot follow; Anthropic API reference, "Message Batches".
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, TypeVar, cast
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from fabe_ds import network
from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.lessons import Lessons
from fabe_ds.engine.reading import completion_in
from fabe_ds.engine.server_errors import ServerError, error_of
from fabe_ds.engine.verdict import Verdict, classify, classify_error, classify_payload
from fabe_ds.errors import READING_FAULTS, RunStopped
from fabe_ds.providers import Completion, HttpProvider, Request
from fabe_ds.providers.http import STREAM
from fabe_ds.store.completions import Completions
from fabe_ds.text import load_json

log = logging.getLogger(__name__)

WAIT_SECONDS, WAIT_MOST = 0.5, 60.0
PAGE, PAGES = 100, 20
RUN = "fabe_ds_run"
"""The name under which a batch's metadata say whose it is."""
AGAIN = Verdict("retry", "batch", "the batch ended without an answer")
RUNNING, COMPLETED, FAILED, EXPIRED, CANCELLED = (
    *("running", "completed", "failed", "expired", "cancelled"),
)
_WORDS = {
    "completed": COMPLETED,
    "success": COMPLETED,
    "ended": COMPLETED,
    "failed": FAILED,
    "expired": EXPIRED,
    "timeout_exceeded": EXPIRED,
    "cancelled": CANCELLED,
    "canceled": CANCELLED,
}


_IN_MEMORY = 64 << 20
T = TypeVar("T")


class Refusal(NamedTuple):
    """An error that a batch has in the place of an answer."""

    status: int
    error: ServerError


Result = Completion | Verdict | Refusal


class Limits(NamedTuple):
    """What one file of a batch may hold."""

    requests: int = 50_000
    megabytes: int = 200

    @property
    def size(self) -> int:
        """In bytes, a little less: whose megabytes they are is not said."""
        return self.megabytes * 950_000


LIMITS: Mapping[str, Limits] = {
    ".openai.azure.com": Limits(100_000, 200),
    ".groq.com": Limits(50_000, 100),
    ".together.xyz": Limits(50_000, 100),
    ".together.ai": Limits(50_000, 100),
    ".aliyuncs.com": Limits(50_000, 100),
    ".bigmodel.cn": Limits(50_000, 100),
    ".z.ai": Limits(50_000, 100),
    ".siliconflow.cn": Limits(5_000, 1000),
    ".siliconflow.com": Limits(5_000, 1000),
    ".moonshot.cn": Limits(50_000, 100),
    ".moonshot.ai": Limits(50_000, 100),
    ".x.ai": Limits(50_000, 50),
    ".anthropic.com": Limits(100_000, 256),
}
"""By the ends of host names; others have OpenAI's."""


class BatchState(NamedTuple):
    """How far a batch is: `word` is the server's own, `done` of `total` requests are through (None
    where it does not say). Of one that failed: `reason`, whether it is `passing` (too much is
    queued by now), and the numbers, from 1, of the `bad_lines` that it names."""

    name: str
    kind: str
    word: str
    done: int | None = None
    total: int | None = None
    reason: str = ""
    passing: bool = False
    bad_lines: Mapping[int, str] = {}
    run: str | None = None
    raw: Mapping[str, Any] = {}

    @property
    def counted(self) -> str:
        """How many requests are through, for people; empty where the server does not say."""
        return f"{self.done or 0:,} of {self.total:,}" if self.total else ""

    @property
    def progress(self) -> str:
        """Where it stands, for people."""
        return self.counted if self.kind == RUNNING and self.total else self.word


def limits_of(host: str) -> Limits:
    """What the server of this name takes."""
    return next((limits for end, limits in LIMITS.items() if f".{host}".endswith(end)), Limits())


class BatchClient:
    """The batch API of a server that follows OpenAI's."""

    path = "/batches"
    after = "after"
    """The parameter of a list's next page."""

    def __init__(
        self, provider: HttpProvider, policy: PolicySettings, memory: Completions | None = None
    ) -> None:
        """`memory` keeps what is learned of how the server wants bodies to be."""
        self.provider, self._policy = provider, policy
        self.lessons = Lessons(provider, policy, memory)
        self.lessons.use(STREAM, "")  # a batch has none
        self._session = network.session()
        self._session.headers.update(provider.headers())
        self.limits = limits_of(provider.address.host)

    def close(self) -> None:
        self._session.close()

    def line(self, key: bytes, request: Request) -> bytes:
        """A request as a line of the file."""
        line = {
            "custom_id": key.hex(),
            "method": "POST",
            "url": self._endpoint(self.provider.path(request)),
            "body": self.lessons.written(request),
        }
        return json.dumps(line).encode() + b"\n"

    def _endpoint(self, path: str) -> str:
        """What a batch and its lines name: the version and what follows, without what stands
        before it (Groq's /openai/v1, DashScope's /compatible-mode/v1, Zhipu's /api/paas/v4)."""
        segments = self.provider.address.parts.path.split("/")
        version = next((part for part in segments[::-1] if re.fullmatch(r"v\d+", part)), None)
        return f"/{version}{path}" if version else path

    def create(self, run: str, first: Request, lines: Sequence[bytes]) -> str:
        """Sends a batch; gives its name. Raises: RunStopped."""
        upload = {"file": ("requests.jsonl", b"".join(lines))}
        file = self._send("POST", "/files", _name, data={"purpose": "batch"}, files=upload)
        body = {
            "input_file_id": file,
            "endpoint": self._endpoint(self.provider.path(first)),
            "completion_window": self._policy.batch_window,
            "metadata": {RUN: run},
        }
        # Where the reply is lost, the batch may be there all the same.
        return self._send("POST", self.path, _name, lambda: self.find(run), json=body)

    def state(self, batch: str) -> BatchState | None:
        """How far it is; None where the server knows nothing of it. Raises: RunStopped."""
        try:
            return self._state_of(self._send("GET", f"{self.path}/{batch}", _object))
        except _NotThere:
            return None

    def cancel(self, batch: str) -> BatchState:
        """Raises: RunStopped."""
        return self._state_of(self._send("POST", f"{self.path}/{batch}/cancel", _object))

    def list(self) -> Iterator[BatchState]:
        """All batches that the server has, the newest first. Raises: RunStopped."""
        more = ""
        for _ in range(PAGES):
            page = self._send("GET", f"{self.path}?limit={PAGE}{more}", _page)
            yield from map(self._state_of, page.data)
            if page.last is None:
                return
            more = f"&{self.after}={page.last}"

    def find(self, run: str) -> str | None:
        """The batch of a run that was killed before it could note its name."""
        return next((state.name for state in self.list() if state.run == run), None)

    def _state_of(self, raw: Mapping[str, Any]) -> BatchState:
        word = str(raw.get("status") or "")
        kind = _WORDS.get(word.lower(), RUNNING)
        counts = raw.get("request_counts") or raw  # Zhipu has them beside the status
        done = [_number(counts, name) for name in ("completed", "failed")]
        reason, passing, bad_lines = _failure_of(raw) if kind == FAILED else ("", False, {})
        return BatchState(
            str(raw.get("id")),
            kind,
            word,
            None if done[0] is None else done[0] + (done[1] or 0),
            _number(counts, "total"),
            reason,
            passing,
            bad_lines,
            (raw.get("metadata") or {}).get(RUN),
            raw,
        )

    def results(self, state: BatchState) -> Iterator[tuple[str, Result]]:
        """The answers of a batch that has ended, each after its key, in any order. What cannot be
        read is left out, as if it were not there. Raises: RunStopped."""
        for name in ("output_file_id", "error_file_id"):
            if file := state.raw.get(name):
                yield from self._results_in(f"/files/{file}/content")

    def _results_in(self, path: str) -> Iterator[tuple[str, Result]]:
        with self._send("GET", path, _spooled, stream=True) as file:
            for text in file:
                try:
                    line = load_json(text) if text.strip() else None
                    if isinstance(line, Mapping):
                        yield str(line.get("custom_id")), self._read(line)
                except READING_FAULTS as error:
                    log.debug("a line of %s is left out: %s", path, error)

    def _read(self, line: Mapping[str, Any]) -> Result:
        response = line.get("response")
        if not isinstance(response, Mapping):
            return AGAIN
        body = response.get("body")
        status = int(response.get("status_code") or 500)
        if status != 200 or not isinstance(body, Mapping):
            return Refusal(status, error_of(body))
        return self._completion(body)

    def _completion(self, body: Mapping[str, Any]) -> Result:
        """What a body that came with status 200 holds."""
        return classify_payload(body, {}) or completion_in(body, self.provider)

    def judged(
        self, refusal: Refusal, request: Request, known: Mapping[str, str] | None
    ) -> Verdict:
        """What becomes of a request of a batch that was refused; `known` is what was known of the
        server when it was sent."""
        verdict = classify_error(refusal.status, refusal.error, {})
        sent = self.lessons.written(request, known)
        return self.lessons.judged(verdict, refusal.status, refusal.error, request, sent)

    def _send(
        self,
        method: str,
        path: str,
        read: Callable[[requests.Response], T],
        found: Callable[[], T | None] = lambda: None,
        **body: Any,
    ) -> T:
        """One call, and what `read` makes of its answer; tried again while the server is away, or
        answers with nonsense, for no longer than it may. `found`: what it was for, where that came
        about without an answer."""
        gone_since: float | None = None
        seconds = WAIT_SECONDS
        while True:
            try:
                where = path if "://" in path else self.provider.address.url(path)
                answer = network.send(
                    self._session, method, where, timeout=self._policy.timeout, **body
                )
                if 300 <= answer.status_code < 400 and "Location" in answer.headers:
                    # A file's content may lie elsewhere, where our key is not to go.
                    answer = network.get(answer.headers["Location"], {}, self._policy.timeout)
                if answer.ok:
                    return read(answer)
                verdict = classify(answer.status_code, answer.headers, answer.content)
                if answer.status_code == 404:
                    raise _NotThere(f"{self.provider.address}: {verdict.message}")
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                verdict = Verdict("retry", "connection", type(error).__name__)
            except READING_FAULTS as error:
                message = f"{path} gave what is not of the protocol ({type(error).__name__})"
                verdict = Verdict("retry", "malformed", message)
            now = time.monotonic()
            gone_since = gone_since or now
            if verdict.action != "retry" or now - gone_since > self._policy.give_up_after:
                raise RunStopped(f"{self.provider.address}: {verdict.message}")
            time.sleep(max(seconds, verdict.wait or 0.0))
            seconds = min(WAIT_MOST, seconds * 2)
            if (there := found()) is not None:
                return there


class MessageBatches(BatchClient):
    """Anthropic's: requests go without a file, results are read from an address of their own. It
    keeps no metadata, so a batch whose name was never noted is not found again."""

    path = "/messages/batches"
    after = "after_id"

    def line(self, key: bytes, request: Request) -> bytes:
        return json.dumps(
            {"custom_id": key.hex(), "params": self.lessons.written(request)}
        ).encode()

    def create(self, run: str, first: Request, lines: Sequence[bytes]) -> str:
        body = b'{"requests": [' + b",".join(lines) + b"]}"
        headers = {"Content-Type": "application/json"}
        return self._send("POST", self.path, _name, data=body, headers=headers)

    def find(self, run: str) -> str | None:
        return None

    def _state_of(self, raw: Mapping[str, Any]) -> BatchState:
        word = str(raw.get("processing_status"))
        kind = COMPLETED if word == "ended" else RUNNING
        if kind == COMPLETED and raw.get("cancel_initiated_at"):
            kind = CANCELLED
        # Its counts stay at zero until the end.
        return BatchState(str(raw.get("id")), kind, word, raw=raw)

    def results(self, state: BatchState) -> Iterator[tuple[str, Result]]:
        # Where they are may be another server's address, where our key is not to go.
        here = self.provider.address.parts
        named = urljoin(self.provider.address.base, str(state.raw.get("results_url") or ""))
        same = urlsplit(named)[:2] == (here.scheme, here.netloc.rpartition("@")[2])
        own = f"{self.path}/{state.name}/results"
        if state.raw.get("results_url"):
            yield from self._results_in(named if same else own)

    def _read(self, line: Mapping[str, Any]) -> Result:
        result = line.get("result")
        if not isinstance(result, Mapping) or result.get("type") not in ("succeeded", "errored"):
            return AGAIN
        if result["type"] == "succeeded":
            return self._completion(result["message"])
        error = error_of(result["error"])
        return Refusal(
            next((_STATUSES[kind] for kind in error.codes & _STATUSES.keys()), 500), error
        )


_STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
}
"""HTTP statuses that errors of these types have. Source: Anthropic API reference, "Errors"."""


def batch_client(
    provider: HttpProvider, policy: PolicySettings, memory: Completions | None = None
) -> BatchClient:
    """The batch API that the provider's servers have."""
    kinds = {"files": BatchClient, "messages": MessageBatches}
    return kinds[provider.batch_api](provider, policy, memory)


class _NotThere(RunStopped):
    """A server knows nothing of what was asked for."""


class _Page(NamedTuple):
    """A part of a list; `last` names its end where there is more."""

    data: Sequence[Mapping[str, Any]]
    last: str | None


def _object(answer: requests.Response) -> Mapping[str, Any]:
    payload = answer.json()
    if not isinstance(payload, Mapping):
        raise TypeError("no JSON object")
    return payload


def _name(answer: requests.Response) -> str:
    name = _object(answer)["id"]
    if not isinstance(name, str | int):
        raise TypeError("no name")
    return str(name)


def _page(answer: requests.Response) -> _Page:
    payload = answer.json()
    data = payload if isinstance(payload, list) else payload["data"] or []
    if not all(isinstance(each, Mapping) for each in data):
        raise TypeError("no list of objects")
    has_more = bool(data) and isinstance(payload, Mapping) and bool(payload.get("has_more"))
    return _Page(data, str(payload.get("last_id") or data[-1]["id"]) if has_more else None)


def _spooled(answer: requests.Response) -> IO[bytes]:
    """The body as a file, read to its end before any of it is looked at."""
    file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - its reader closes it
    for part in answer.iter_content(1 << 16):
        file.write(part)
    file.seek(0)
    return cast(IO[bytes], file)


def _number(counts: Mapping[str, Any], name: str) -> int | None:
    number = counts.get(name)
    return number if isinstance(number, int) else None


def _failure_of(raw: Mapping[str, Any]) -> tuple[str, bool, dict[int, str]]:
    """Why a batch failed, whether it may be taken later (where too much is queued by now), and
    which of its lines are why.

    Source: OpenAI's batch guide, "Rate limits"; Azure says it with the same code.
    """
    listed = raw.get("errors")
    errors: Sequence[Any] = (listed.get("data") if isinstance(listed, Mapping) else listed) or []
    errors = [error for error in errors if isinstance(error, Mapping)]
    said = [str(error.get("message") or "no reason given") for error in errors]
    reason = said[0] if said else str(raw.get("error") or "no reason given")
    queued = re.search(r"enqueued|in_progress batches have been completed", reason, re.I)
    coded = any(error.get("code") == "token_limit_exceeded" for error in errors)
    lines = {
        error["line"]: message
        for error, message in zip(errors, said, strict=True)
        if type(error.get("line")) is int
    }
    return reason, bool(queued) or coded, lines
