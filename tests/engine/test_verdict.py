"""What each kind of answer means: one table."""

from __future__ import annotations

import email.utils
import json
import time

import pytest

from fabe_ds.engine.verdict import judge, judge_payload, read_error, retry_after


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
    ],
)
def test_statuses(status, content, action, kind):
    verdict = judge(status, {}, content)
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
    verdict = judge_payload(payload, {}, json.dumps(payload).encode())
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
