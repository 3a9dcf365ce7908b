"""What each kind of answer means: one table."""

from __future__ import annotations

import email.utils
import json
import time

import pytest

from fabe_ds.engine.server_errors import read_error, retry_after
from fabe_ds.engine.verdict import classify, classify_payload, in_context


def body(message="no", **fields):
    return json.dumps({"error": {"message": message, **fields}}).encode()


@pytest.mark.parametrize(
    ("status", "content", "action", "kind"),
    [
        (400, body(), "fail", "rejected"),
        (400, body(code="context_length_exceeded"), "fail", "context"),
        (400, body(type="exceed_context_size_error"), "fail", "context"),
        (400, body("This model's maximum context length is 8 tokens"), "fail", "context"),
        (401, body(code="invalid_api_key"), "stop", "key"),
        (402, b"", "stop", "quota"),
        (403, b"", "stop", "key"),
        (404, body(code="model_not_found"), "stop", "model"),
        (404, b'{"error": "model \'x\' not found"}', "stop", "model"),
        (404, b"404 page not found", "stop", "url"),
        (404, b'{"detail": "Not Found"}', "stop", "url"),
        (404, b'{"error": "no such record"}', "fail", "rejected"),
        (408, b"", "retry", "server"),
        (409, b"", "retry", "server"),
        (413, b"", "fail", "rejected"),
        (422, body(), "fail", "rejected"),
        (425, b"", "retry", "server"),
        (429, body(code="rate_limit_exceeded"), "retry", "rate"),
        (429, body(code="insufficient_quota"), "stop", "quota"),
        (429, body(type="insufficient_quota", code="credit_balance_exhausted"), "stop", "quota"),
        (500, body(), "retry", "server"),
        (502, b"<html>", "retry", "server"),
        (503, b"", "retry", "server"),
        (504, b"", "retry", "server"),
        (529, b"", "retry", "server"),
        (307, b"", "stop", "redirect"),
        (403, b"<html>blocked", "fail", "refused"),
        (429, body(code="Throttling.RateQuota"), "retry", "rate"),
        (429, body(code="1302"), "retry", "rate"),
        (429, body(code="1113"), "stop", "quota"),
        (400, body(code="Arrearage"), "stop", "quota"),
        (400, body("Model Not Exist"), "stop", "model"),
        (404, body(code="model_not_found", message="no models loaded"), "stop", "model"),
        (500, body("error loading model: unable to allocate buffer"), "retry", "server"),
        (500, body("Failed to parse input: print('Loading model...')"), "retry", "server"),
        (503, body("Loading model"), "retry", "loading"),
        (400, body("prompt is too long: 9 tokens > 8 maximum"), "fail", "context"),
        (400, body("API key not valid. Please pass a valid API key."), "stop", "key"),
    ],
)
def test_statuses(status, content, action, kind):
    verdict = classify(status, {}, content)
    assert (verdict.action, verdict.kind) == (action, kind)


@pytest.mark.parametrize(
    ("payload", "action"),
    [
        ({"choices": []}, None),
        ({"error": None, "choices": []}, None),
        ({"error": {"code": 429, "message": "slow down"}}, "retry"),
        ({"error": {"code": 401, "message": "no"}}, "stop"),
        ({"error": {"message": "provider error"}}, "retry"),
        ({"error": "text"}, "retry"),
        ([], "retry"),
        ("text", "retry"),
    ],
)
def test_errors_with_status_200(payload, action):
    verdict = classify_payload(payload, {})
    assert (verdict and verdict.action) == action


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (body("too  long\nby far"), "too long by far"),
        (b'{"error": "text"}', "text"),
        (b'{"message": "flat"}', "flat"),
        (b'{"detail": "fastapi"}', "fastapi"),
        (b'[{"error": {"message": "wrapped"}}]', "wrapped"),
        (b"<html><body>Bad gateway", "an HTML page"),
        (b"plain", "plain"),
        (b"", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_the_servers_own_message(content, message):
    assert read_error(content)[0] == message


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "2"}, 2),
        ({"Retry-After": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "86400"}, 86400),
    ],
)
def test_how_long_a_server_asks_to_wait(headers, seconds):
    assert retry_after(headers) == seconds


def test_a_date_to_wait_for():
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 <= (retry_after({"Retry-After": date}) or 0) <= 30


GEMINI = """[{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message":
"You exceeded your current quota, please check your plan and billing details.
Please retry in 38.5s.", "details": [{"retryDelay": "38s"}]}}]""".replace("\n", " ")


def test_geminis_minute_is_no_empty_account():
    verdict = classify(429, {}, GEMINI.encode())
    assert (verdict.action, verdict.kind, verdict.wait) == ("retry", "rate", 38.5)


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("Please try again in 1.2s.", 1.2),
        ("Please try again in 6m0s.", 360),
        ("try again in 20ms", 0.02),
        ("Please retry after 7 seconds.", 7),
        ("Please retry in 26.66s.", 26.66),
        ("no", None),
    ],
)
def test_waits_in_words(message, seconds):
    assert read_error(body(message)).wait == seconds


@pytest.mark.parametrize(
    ("ago", "wait", "action"),
    [(None, None, "stop"), (1.0, None, "retry"), (1000.0, None, "stop"), (None, 3.0, "retry")],
)
def test_a_quota_in_the_light_of_others(ago, wait, action):
    verdict = classify(
        429, {"Retry-After": str(wait)} if wait else {}, body(code="insufficient_quota")
    )
    assert in_context(verdict, ago).action == action
