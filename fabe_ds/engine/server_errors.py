"""Errors as servers tell them, in whichever of the usual shapes."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from fabe_ds.engine.rates import duration
from fabe_ds.text import load_json

_MESSAGE_LENGTH = 500


class ServerError(NamedTuple):
    """An error as a server tells it: `codes` are its codes and types, as text in lower case."""

    message: str
    codes: frozenset[str] = frozenset()
    parameter: str | None = None
    wait: float | None = None
    moderated: bool = False
    is_page: bool = False


def read_error(body: bytes) -> ServerError:
    """What a server says of an error, in whichever of the usual shapes."""
    try:
        payload = load_json(body)
    except (ValueError, RecursionError):
        text = body[:_MESSAGE_LENGTH].decode("utf-8", "replace").strip()
        is_page = text.startswith("<")
        cut_off = text.startswith(("{", "["))
        return ServerError("an HTML page" if is_page else text, is_page=not cut_off)
    return error_of(payload)


def error_of(payload: Any) -> ServerError:
    """The error in a JSON body."""
    if isinstance(payload, list) and payload:  # as Gemini's servers wrap it
        payload = payload[0]
    if not isinstance(payload, Mapping):
        return ServerError(_short(payload))
    error = payload.get("error") or payload
    if not isinstance(error, Mapping):
        flat = [str(payload["code"]).lower()] if payload.get("code") else []
        return ServerError(_short(error), frozenset(flat), wait=_wait_in(payload, str(error)))
    parts = [
        part
        for part in (error, payload.get("base_resp"), error.get("innererror"), payload)
        if isinstance(part, Mapping)
    ]
    names = ("code", "type", "status", "status_code", "error_type", "http_code")
    codes = {str(part[name]).lower() for part in parts for name in names if part.get(name)}
    metadata = error.get("metadata")
    moderated = isinstance(metadata, Mapping) and bool(
        {"reasons", "flagged_input"} & metadata.keys()
    )
    message = _message(parts)
    parameter = error.get("param")
    return ServerError(
        _short(message),
        frozenset(codes),
        parameter if isinstance(parameter, str) else _refused_location(payload),
        _wait_in(error, str(message)),
        moderated,
    )


def _message(parts: list[Mapping[str, Any]]) -> Any:
    for part in parts:
        for name in ("message", "msg", "status_msg", "detail", "error_msg", "error_description"):
            said = part.get(name)
            if isinstance(said, list):  # as FastAPI lists what is wrong with a body
                said = "; ".join(
                    f"{'.'.join(map(str, entry.get('loc', ())))}: {entry.get('msg', '')}"
                    for entry in said
                    if isinstance(entry, Mapping)
                )
            if said:
                return said
    return ""


def _refused_location(payload: Mapping[str, Any]) -> str | None:
    """The field of the body that FastAPI complains of."""
    detail = payload.get("detail")
    if isinstance(detail, list) and detail and isinstance(detail[0], Mapping):
        where = detail[0].get("loc")
        if isinstance(where, list) and len(where) > 1:
            return str(where[1])
    return None


def _short(message: Any) -> str:
    return " ".join(str(message).split())[:_MESSAGE_LENGTH]


_wait_text = re.compile(
    r"(?:try|retry)(?: again)? (?:in|after) ((?:\d+(?:\.\d+)?\s*(?:ms|h|m|s|d)[a-z]*\s*)+)",
    re.IGNORECASE,
)


def _wait_in(error: Mapping[str, Any], message: str) -> float | None:
    """Seconds that the body asks to wait.

    Sources: google.rpc.RetryInfo (`retryDelay`) in details; `estimated_time` of Hugging Face's
    inference servers; the words of OpenAI, Azure, Groq and Gemini.
    """
    waits = []
    details = error.get("details")
    for detail in details if isinstance(details, list) else ():
        if isinstance(detail, Mapping) and isinstance(detail.get("retryDelay"), str):
            waits.append(duration(detail["retryDelay"]))
    for name, scale in (("retry_after_ms", 0.001), ("retry_after", 1.0)):
        value = error.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            waits.append(value * scale)
    if found := _wait_text.search(message):
        waits.append(duration(found[1]))
    return max(waits, default=None) or None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: retry-after-ms, or Retry-After in seconds or as a date.

    Source: RFC 9110, section 10.2.3; retry-after-ms as OpenAI's servers send it. Anything but a
    number of at least 0 is ignored.
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
