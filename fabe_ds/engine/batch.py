"""Sends requests through a batch API: at half the price, some time within a day.

Source: OpenAI API reference, "Files" and "Batch". A batch is remembered before it is waited for, so
a run that was killed finds it again instead of paying for another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import requests

from fabe_ds import network
from fabe_ds.config.sections import PolicySettings
from fabe_ds.engine.coalesce import Coalescer, Pending
from fabe_ds.engine.local import answer_window
from fabe_ds.engine.verdict import Verdict, classify
from fabe_ds.errors import MalformedResponse, RecordFailed, RunStopped
from fabe_ds.providers import Completion, HttpProvider, Request
from fabe_ds.providers.finish import End, end_of
from fabe_ds.providers.http import STREAM
from fabe_ds.request import Item, Outcome
from fabe_ds.store.completions import OpenBatch, RecordCache, Row
from fabe_ds.text import load_json

log = logging.getLogger(__name__)

MOST_REQUESTS, MOST_BYTES = 50_000, 190 << 20
WAIT_SECONDS, WAIT_MOST, WAIT_GROWTH = 0.5, 60.0, 1.5
_RUN = "fabe_ds_run"
_ENDED = ("completed", "failed", "expired", "cancelled")
_AGAIN = Verdict("retry", "batch", "the batch ended without an answer")


class BatchEngine:
    """Answers items in order; what the cache lacks goes into batches of up to 50,000 requests."""

    def __init__(
        self, provider: HttpProvider, coalescer: Coalescer, policy: PolicySettings
    ) -> None:
        assert isinstance(coalescer.cache, RecordCache)  # batches are not sent from other nodes
        provider.refuse_open_key()
        self.provider, self.coalescer, self.policy = provider, coalescer, policy
        self.cache = coalescer.cache
        self._session = network.session()
        self._session.headers.update(provider.headers())
        learned = self.cache.learned(str(provider.address), provider.endpoint.model)
        self._learned = {**learned, STREAM: ""}  # a batch has none

    def outcomes(self, items: Iterable[Item]) -> Generator[Outcome, None, None]:
        """One outcome an item, in order. Raises: RunStopped, CacheError."""
        if not self.coalescer.offline:
            self._collect_open()
        iterator = iter(items)
        while window := list(islice(iterator, MOST_REQUESTS)):
            yield from answer_window(self.coalescer, window, self._answer)

    def close(self) -> None:
        self._session.close()

    def _answer(self, entries: list[Pending]) -> None:
        left = [(entry, _AGAIN) for entry in entries]
        tries = 0
        while left and tries <= self.policy.retry:
            todo, left = [entry for entry, _ in left], []
            for part in self._parts(todo):
                left += self._run(part)
            tries += 1
            self.coalescer.stats.retries += len(left)
        for entry, verdict in left:
            self.coalescer.failed(entry, RecordFailed(verdict.kind, verdict.message))

    def _parts(self, entries: list[Pending]) -> Iterator[list[tuple[Pending, bytes]]]:
        """The entries with their lines, in files of a size that is taken."""
        part: list[tuple[Pending, bytes]] = []
        size = 0
        for entry in entries:
            line = self._line(entry)
            if part and size + len(line) > MOST_BYTES:
                yield part
                part, size = [], 0
            part.append((entry, line))
            size += len(line)
        if part:
            yield part

    def _line(self, entry: Pending) -> bytes:
        assert entry.request is not None
        line = {
            "custom_id": entry.key.hex(),
            "method": "POST",
            "url": self._endpoint(self.provider.path(entry.request)),
            "body": self.provider.sent(self.provider.asked(entry.request), self._learned),
        }
        return json.dumps(line).encode() + b"\n"

    def _endpoint(self, path: str) -> str:
        """What a batch and its lines name: the version and what follows, without what stands
        before it (Groq's /openai/v1, DashScope's /compatible-mode/v1, Zhipu's /api/paas/v4)."""
        segments = self.provider.address.parts.path.split("/")
        version = next((part for part in segments[::-1] if re.fullmatch(r"v\d+", part)), None)
        return f"/{version}{path}" if version else path

    def _run(self, part: list[tuple[Pending, bytes]]) -> list[tuple[Pending, Verdict]]:
        """One batch, to its end. Gives the entries that are to be tried again."""
        entries = {entry.key.hex(): entry for entry, _ in part}
        run = hashlib.sha256("".join(sorted(entries)).encode()).hexdigest()[:32]
        first = part[0][0].request
        assert first is not None
        self.coalescer.stats.requests += len(part)
        opened = OpenBatch(run, str(self.provider.address), None)
        state = self._create(opened, first, b"".join(line for _, line in part), len(part))
        left = []
        for key, answer in self._results(state):
            entry = entries.pop(key, None)
            if entry is None:
                continue
            if isinstance(answer, Completion):
                self.coalescer.store([(entry, answer)])
                if not self.coalescer.answered(entry, answer):
                    left.append((entry, _AGAIN))
            elif answer.action == "stop":
                raise RunStopped(f"{self.provider.address}: {answer.message}")
            elif answer.action == "retry":
                left.append((entry, answer))
            else:
                self.coalescer.failed(entry, RecordFailed(answer.kind, answer.message))
        self.cache.forget_batch(run)
        return left + [(entry, _AGAIN) for entry in entries.values()]

    def _create(
        self, opened: OpenBatch, first: Request, lines: bytes, count: int
    ) -> Mapping[str, Any]:
        """Sends a batch and waits for its end; where the server has too much queued for us, until
        it takes it. A batch that fails is forgotten, or each later run would stop at it.

        Raises: RunStopped.
        """
        since = time.monotonic()
        seconds = WAIT_SECONDS
        while True:
            self.cache.remember_batch(opened)
            upload = {"file": ("requests.jsonl", lines)}
            file = self._call("POST", "/files", data={"purpose": "batch"}, files=upload)["id"]
            body = {
                "input_file_id": file,
                "endpoint": self._endpoint(self.provider.path(first)),
                "completion_window": "24h",
                "metadata": {_RUN: opened.run},
            }
            batch = str(self._call("POST", "/batches", json=body)["id"])
            self.cache.remember_batch(opened._replace(batch=batch))
            log.info("batch %s: %d requests", batch, count)
            state = self._wait(batch)
            if state["status"] != "failed":
                return state
            self.cache.forget_batch(opened.run)
            reason, passing = _failure_of(state)
            if not passing or time.monotonic() - since > self.policy.give_up_after:
                raise RunStopped(f"batch {batch} failed: {reason}")
            log.info("batch %s: %s; sending it again in %.0f s", batch, reason, seconds)
            time.sleep(seconds)
            seconds = min(WAIT_MOST, seconds * 2)

    def _collect_open(self) -> None:
        """Waits for the batches that killed runs left, and stores their answers."""
        for opened in self.cache.open_batches(str(self.provider.address)):
            batch = opened.batch or self._find(opened.run)
            if batch is not None:
                log.info("batch %s: taken up again", batch)
                state = self._wait(batch)
                if state["status"] == "failed":
                    log.info("batch %s failed: %s; it is sent anew", batch, _failure_of(state)[0])
                for key, answer in self._results(state):
                    if isinstance(answer, Completion):
                        self.cache.put([Row(bytes.fromhex(key), answer)])
            self.cache.forget_batch(opened.run)

    def _find(self, run: str) -> str | None:
        """The batch of a run that was killed before it could note its name."""
        for batch in self._call("GET", "/batches?limit=100").get("data") or []:
            if (batch.get("metadata") or {}).get(_RUN) == run:
                return str(batch["id"])
        return None

    def _results(self, state: Mapping[str, Any]) -> Iterator[tuple[str, Completion | Verdict]]:
        """The answers of a batch that has ended, each after its key."""
        for name in ("output_file_id", "error_file_id"):
            if file := state.get(name):
                for line in self._lines(file):
                    yield str(line.get("custom_id")), self._read(line)

    def _wait(self, batch: str) -> Mapping[str, Any]:
        seconds = WAIT_SECONDS
        while True:
            state = self._call("GET", f"/batches/{batch}")
            if state.get("status") in _ENDED:
                return state
            self.coalescer.stats.state = f"batch {batch} is {state.get('status')}"
            time.sleep(seconds)
            seconds = min(WAIT_MOST, seconds * WAIT_GROWTH)

    def _lines(self, file: str) -> Iterator[Mapping[str, Any]]:
        answer = self._send("GET", f"/files/{file}/content", stream=True)
        for line in answer.iter_lines(chunk_size=1 << 16):
            if line.strip():
                yield load_json(line)

    def _read(self, line: Mapping[str, Any]) -> Completion | Verdict:
        response = line.get("response")
        if not isinstance(response, Mapping):
            return _AGAIN
        body = response.get("body")
        if response.get("status_code") != 200 or not isinstance(body, Mapping):
            return classify(int(response.get("status_code") or 500), {}, json.dumps(body).encode())
        try:
            completion = self.provider.completion(body)
        except MalformedResponse as error:
            return Verdict("retry", "malformed", str(error))
        except RecordFailed as error:
            return Verdict("fail", error.kind, str(error))
        return _AGAIN if end_of(completion.finish_reason) is End.FAULT else completion

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
                where = self.provider.address.url(path)
                answer = network.send(
                    self._session, method, where, timeout=self.policy.timeout, **body
                )
                if 300 <= answer.status_code < 400 and "Location" in answer.headers:
                    # A file's content may lie elsewhere, where our key is not to go.
                    answer = network.get(answer.headers["Location"], {}, self.policy.timeout)
                if answer.ok:
                    return answer
                verdict = classify(answer.status_code, answer.headers, answer.content)
            except requests.RequestException as error:
                verdict = Verdict("retry", "connection", type(error).__name__)
            now = time.monotonic()
            gone_since = gone_since or now
            if verdict.action != "retry" or now - gone_since > self.policy.give_up_after:
                raise RunStopped(f"{self.provider.address}: {verdict.message}")
            time.sleep(max(seconds, verdict.wait or 0.0))
            seconds = min(WAIT_MOST, seconds * 2)


def _failure_of(state: Mapping[str, Any]) -> tuple[str, bool]:
    """Why a batch failed, and whether it may be taken later: where too much is queued by now.

    Source: OpenAI's batch guide, "Rate limits"; Azure says it with the same code.
    """
    errors = (state.get("errors") or {}).get("data") or [{}]
    reason = str(errors[0].get("message") or "no reason given")
    queued = re.search(r"enqueued|in_progress batches have been completed", reason, re.I)
    return reason, bool(queued) or errors[0].get("code") == "token_limit_exceeded"
