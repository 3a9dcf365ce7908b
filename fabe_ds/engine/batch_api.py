"""The batch APIs of servers: how a batch is sent, watched, read and cancelled.

Sources: OpenAI API reference, "Files" and "Batch", and its guide, which Azure, Groq, Alibaba Cloud
Model Studio, Zhipu, SiliconFlow and Moonshot follow; Anthropic API reference, "Message Batches".
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import requests

from fabe_ds import network
from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.verdict import Verdict, classify
from fabe_ds.errors import MalformedResponse, RecordFailed, RunStopped
from fabe_ds.providers import Completion, HttpProvider, Request
from fabe_ds.providers.finish import End, end_of
from fabe_ds.providers.http import STREAM
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

    def __init__(
        self, provider: HttpProvider, policy: PolicySettings, learned: Mapping[str, str]
    ) -> None:
        """`learned`: how the server wants bodies to be."""
        self.provider, self._policy = provider, policy
        self._learned = {**learned, STREAM: ""}  # a batch has none
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
            "body": self.provider.sent(self.provider.asked(request), self._learned),
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
        file = self._call("POST", "/files", data={"purpose": "batch"}, files=upload)["id"]
        body = {
            "input_file_id": file,
            "endpoint": self._endpoint(self.provider.path(first)),
            "completion_window": self._policy.batch_window,
            "metadata": {RUN: run},
        }
        return str(self._call("POST", "/batches", json=body)["id"])

    def state(self, batch: str) -> BatchState:
        """Raises: RunStopped."""
        return self._state_of(self._call("GET", f"/batches/{batch}"))

    def cancel(self, batch: str) -> BatchState:
        """Raises: RunStopped."""
        return self._state_of(self._call("POST", f"/batches/{batch}/cancel"))

    def list(self) -> Iterator[BatchState]:
        """All batches that the server has, the newest first. Raises: RunStopped."""
        after = ""
        for _ in range(PAGES):
            page = self._send("GET", f"/batches?limit={PAGE}{after}").json()
            data = page if isinstance(page, list) else page.get("data") or []
            yield from map(self._state_of, data)
            if isinstance(page, list) or not page.get("has_more") or not data:
                return
            after = f"&{self._after(page, data)}"

    def _after(self, page: Mapping[str, Any], data: Sequence[Mapping[str, Any]]) -> str:
        return f"after={page.get('last_id') or data[-1]['id']}"

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

    def results(self, state: BatchState) -> Iterator[tuple[str, Completion | Verdict]]:
        """The answers of a batch that has ended, each after its key, in any order."""
        for name in ("output_file_id", "error_file_id"):
            if file := state.raw.get(name):
                for line in self._lines(f"/files/{file}/content"):
                    yield str(line.get("custom_id")), self._read(line)

    def _lines(self, path: str) -> Iterator[Mapping[str, Any]]:
        answer = self._send("GET", path, stream=True)
        for line in answer.iter_lines(chunk_size=1 << 16):
            if line.strip():
                yield load_json(line)

    def _read(self, line: Mapping[str, Any]) -> Completion | Verdict:
        response = line.get("response")
        if not isinstance(response, Mapping):
            return AGAIN
        body = response.get("body")
        if response.get("status_code") != 200 or not isinstance(body, Mapping):
            return classify(int(response.get("status_code") or 500), {}, json.dumps(body).encode())
        return self._completion(body)

    def _completion(self, body: Mapping[str, Any]) -> Completion | Verdict:
        try:
            completion = self.provider.completion(body)
        except MalformedResponse as error:
            return Verdict("retry", "malformed", str(error))
        except RecordFailed as error:
            return Verdict("fail", error.kind, str(error))
        return AGAIN if end_of(completion.finish_reason) is End.FAULT else completion

    def _call(self, method: str, path: str, **body: Any) -> Mapping[str, Any]:
        payload = self._send(method, path, **body).json()
        if not isinstance(payload, Mapping):
            raise RunStopped(f"{self.provider.address}: {path} gave no JSON object")
        return payload

    def _send(self, method: str, path: str, **body: Any) -> requests.Response:
        """One call, tried again while the server is away for no longer than it may."""
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
                    return answer
                verdict = classify(answer.status_code, answer.headers, answer.content)
            except requests.RequestException as error:
                verdict = Verdict("retry", "connection", type(error).__name__)
            now = time.monotonic()
            gone_since = gone_since or now
            if verdict.action != "retry" or now - gone_since > self._policy.give_up_after:
                raise RunStopped(f"{self.provider.address}: {verdict.message}")
            time.sleep(max(seconds, verdict.wait or 0.0))
            seconds = min(WAIT_MOST, seconds * 2)


class MessageBatches(BatchClient):
    """Anthropic's: requests go without a file, results are read from an address of their own. It
    keeps no metadata, so a batch whose name was never noted is not found again."""

    def line(self, key: bytes, request: Request) -> bytes:
        body = self.provider.sent(self.provider.asked(request), self._learned)
        return json.dumps({"custom_id": key.hex(), "params": body}).encode()

    def create(self, run: str, first: Request, lines: Sequence[bytes]) -> str:
        body = b'{"requests": [' + b",".join(lines) + b"]}"
        headers = {"Content-Type": "application/json"}
        return str(self._call("POST", "/messages/batches", data=body, headers=headers)["id"])

    def state(self, batch: str) -> BatchState:
        return self._state_of(self._call("GET", f"/messages/batches/{batch}"))

    def cancel(self, batch: str) -> BatchState:
        return self._state_of(self._call("POST", f"/messages/batches/{batch}/cancel"))

    def list(self) -> Iterator[BatchState]:
        after = ""
        for _ in range(PAGES):
            page = self._call("GET", f"/messages/batches?limit={PAGE}{after}")
            yield from map(self._state_of, page.get("data") or [])
            if not page.get("has_more"):
                return
            after = f"&after_id={page['last_id']}"

    def find(self, run: str) -> str | None:
        return None

    def _state_of(self, raw: Mapping[str, Any]) -> BatchState:
        word = str(raw.get("processing_status"))
        kind = COMPLETED if word == "ended" else RUNNING
        if kind == COMPLETED and raw.get("cancel_initiated_at"):
            kind = CANCELLED
        # Its counts stay at zero until the end.
        return BatchState(str(raw.get("id")), kind, word, raw=raw)

    def results(self, state: BatchState) -> Iterator[tuple[str, Completion | Verdict]]:
        if url := state.raw.get("results_url"):
            for line in self._lines(str(url)):
                yield str(line.get("custom_id")), self._read(line)

    def _read(self, line: Mapping[str, Any]) -> Completion | Verdict:
        result = line.get("result")
        if not isinstance(result, Mapping) or result.get("type") not in ("succeeded", "errored"):
            return AGAIN
        if result["type"] == "succeeded":
            return self._completion(result.get("message") or {})
        error: Mapping[str, Any] = result.get("error") or {}
        if isinstance(error.get("error"), Mapping):
            error = error["error"]
        status = {"invalid_request_error": 400, "authentication_error": 401}.get(
            str(error.get("type")), 500
        )
        return classify(status, {}, json.dumps({"error": error}).encode())


def batch_client(
    provider: HttpProvider, policy: PolicySettings, learned: Mapping[str, str]
) -> BatchClient:
    """The batch API that the provider's servers have."""
    kind = MessageBatches if provider.name == "anthropic" else BatchClient
    return kind(provider, policy, learned)


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
        if isinstance(error.get("line"), int)
    }
    return reason, bool(queued) or coded, lines
