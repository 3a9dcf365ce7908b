"""What a server's answer means for its request and for the run."""

from __future__ import annotations

import email.utils
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fabe_ds.surrogates import load_json

CONTEXT_CODES = ("context_length_exceeded", "exceed_context_size_error", "string_above_max_length")
CONTEXT_TEXTS = ("maximum context length", "exceeds the context", "context window")
QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached", "insufficient_balance")
MODEL_CODES = ("model_not_found", "model_not_available")
_RETRIED = {408, 409, 425, 429}
_MESSAGE_LENGTH = 500


@dataclass(frozen=True, slots=True)
class Verdict:
    """`action`: retry (this request again), fail (this record), stop (the run).

    `floor`: seconds that the server asks to wait, for every request to it. `busy`: the server has
    more to do than it can. `gone`: nothing that speaks the protocol answered. `refused`: it said
    no before any model ran.
    """

    action: str
    kind: str
    message: str
    floor: float | None = None
    busy: bool = False
    gone: bool = False
    refused: bool = False


def judge(status: int, headers: Mapping[str, str], body: bytes) -> Verdict:
    """The verdict on an answer that holds no completion."""
    return replace(_judge(status, headers, body), refused=True)


def _judge(status: int, headers: Mapping[str, str], body: bytes) -> Verdict:
    message, codes = read_error(body)
    message = message.removeprefix(f"{status}: ")
    text = f"{status}: {message}" if message else f"HTTP status {status}"
    floor = retry_after(headers)
    if codes & set(QUOTA_CODES) or status == 402:
        return Verdict("stop", "quota", f"the quota is used up ({text})")
    if status in (401, 403):
        return Verdict("stop", "key", f"the key is not accepted ({text})")
    if 300 <= status < 400:
        where = headers.get("Location", "elsewhere")
        return Verdict("stop", "redirect", f"the server redirects to {where}; use that --base-url")
    lowered = message.lower()
    if codes & set(CONTEXT_CODES) or any(text in lowered for text in CONTEXT_TEXTS):
        return Verdict("fail", "context", text)
    if status == 429:
        return Verdict("retry", "rate", text, floor, busy=True)
    if status in _RETRIED or status >= 500:
        busy = status in (503, 529)
        return Verdict("retry", "server", text, floor, busy, gone=status in (502, 504))
    if codes & set(MODEL_CODES) or (status == 404 and "model" in lowered):
        return Verdict("stop", "model", f"the model is not there ({text})")
    if status == 404 and (message.rstrip(".").lower() == "not found" or _is_page(body)):
        hint = "does --base-url end in /v1, with nothing behind it?"
        return Verdict("stop", "url", f"{text}; {hint}")
    return Verdict("fail", "rejected", text)


def _is_page(body: bytes) -> bool:
    """Whether a server without such a path answers, and none that speaks of a model or record."""
    return body.lstrip()[:1] not in (b"{", b"[")


def judge_payload(payload: Any, headers: Mapping[str, str], body: bytes) -> Verdict | None:
    """The verdict on a 200 whose body says that it is an error; None where it does not."""
    if not isinstance(payload, Mapping):
        return Verdict("retry", "malformed", "the answer is not a JSON object")
    error = payload.get("error")
    if not error:
        return None
    code = error.get("code") if isinstance(error, Mapping) else None
    if isinstance(code, int) and 400 <= code < 600:
        return judge(code, headers, body)
    return judge(500, headers, body)


def read_error(body: bytes) -> tuple[str, set[str]]:
    """A server's own message, and the codes and types it gives with it."""
    try:
        payload = load_json(body)
    except (ValueError, RecursionError):
        text = body[:_MESSAGE_LENGTH].decode("utf-8", "replace").strip()
        return ("an HTML page" if text.startswith("<") else text), set()
    if isinstance(payload, list) and payload:  # as Gemini's servers wrap it
        payload = payload[0]
    if not isinstance(payload, Mapping):
        return str(payload)[:_MESSAGE_LENGTH], set()
    error = payload.get("error", payload)
    if not isinstance(error, Mapping):
        return str(error)[:_MESSAGE_LENGTH], set()
    codes = {str(error[name]) for name in ("code", "type") if error.get(name)}
    message = error.get("message") or error.get("detail") or payload.get("detail") or ""
    return " ".join(str(message).split())[:_MESSAGE_LENGTH], codes


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: retry-after-ms, or Retry-After in seconds or as a date.

    Source: RFC 9110, section 10.2.3; retry-after-ms as OpenAI's servers send it. What is no
    positive number is no wish.
    """
    for name, scale in (("retry-after-ms", 0.001), ("Retry-After", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError):
                continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    return None
