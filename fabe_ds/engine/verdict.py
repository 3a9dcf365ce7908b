"""What a server's answer means for its request and for the run.

RULES is the table: the first rule that fits an error decides. Statuses alone come last.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fabe_ds.engine.server_errors import ServerError, error_of, read_error, retry_after

PROXY_SECONDS = 1.0
"""A gateway's timeout that comes later than this has cut an answer; sooner, nobody was there."""
QUOTA_SECONDS = 90.0
"""A quota that is full for longer than any minute is used up."""
RECENT_SECONDS = 60.0
"""An account that had an answer so long ago is not empty: it is asked too fast."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be done with a request that was not answered.

    `action`: retry (this request again), fail (this record), stop (the run). `kind` is the class
    in the failures file. `wait`: seconds that the server asks for. `busy`: it has more to do than
    it can. `gone`: nothing that speaks the protocol answered. `loading`: its model is not ready.
    `refused`: it said no before any model ran. `doubtful`: whether it holds for the run or for
    this request shows by what became of others (`in_context`). `proxy_cut`: a proxy cut the
    answer, so the model ran for nothing. `local`: this machine is why.
    `waits`: the tier that was asked for has no room, which costs no try.
    `patience`: seconds after which it will not pass. `lesson`: how the body is to be sent instead.
    """

    action: str
    kind: str
    message: str
    wait: float | None = None
    busy: bool = False
    gone: bool = False
    loading: bool = False
    refused: bool = False
    doubtful: bool = False
    proxy_cut: bool = False
    local: bool = False
    waits: bool = False
    patience: float = math.inf
    lesson: Mapping[str, str] | None = None

    @property
    def unavailable(self) -> bool:
        """Whether the server, and not this request, is why."""
        return self.gone or self.busy or self.loading


class Rule(NamedTuple):
    """An error fits where its status is among `statuses` (none: any), and one of its codes or its
    message matches. `seen` says at which servers."""

    verdict: Verdict
    seen: str
    statuses: frozenset[int] = frozenset()
    codes: str = ""
    texts: str = ""

    def fits(self, status: int, error: ServerError) -> bool:
        if self.statuses and status not in self.statuses:
            return False
        if not self.codes and not self.texts:
            return True
        by_code = bool(self.codes) and any(re.fullmatch(self.codes, code) for code in error.codes)
        return by_code or bool(self.texts and re.search(self.texts, error.message, re.IGNORECASE))


_RATE = Verdict("retry", "rate", "{text}", busy=True)
_BUSY = Verdict("retry", "server", "{text}", busy=True)
_LOADING = Verdict("retry", "loading", "{text}", busy=True, loading=True)
_REFUSED = Verdict("fail", "refused", "the server refused the record's text ({text})")
_CONTEXT = Verdict("fail", "context", "{text}")
_QUOTA = Verdict("stop", "quota", "the quota is used up ({text})")
_KEY = Verdict("stop", "key", "the key is not accepted ({text})")
_MODEL = Verdict("stop", "model", "the model is not there ({text})")
_REGION = Verdict("stop", "region", "the server does not serve this place ({text})")
_URL = Verdict("stop", "url", "{text}; does --base-url end in /v1, with nothing behind it?")
_RETRY = Verdict("retry", "server", "{text}")

RULES: tuple[Rule, ...] = (
    Rule(_KEY, "all", statuses=frozenset({401})),
    # Who is asked too fast may say so with an empty account's code, and what is too long for a
    # minute with a context's words: these first.
    Rule(
        _RATE,
        "DashScope, Zhipu, MiniMax, Moonshot, Volcengine, Baidu, OpenAI",
        codes=r"throttling(\..*)?|limit_requests|limit_burst_rate|rate_limit\w*|\w+_rate_limit\w*"
        r"|ratelimitexceeded.*|requestbursttoofast|130[235]|1002|1041|too_many_requests",
    ),
    Rule(
        replace(_RATE, patience=QUOTA_SECONDS),
        "Gemini, which says of a minute what OpenAI says of an empty account",
        codes=r"resource_exhausted",
    ),
    Rule(
        _LOADING,
        "llama.cpp, Hugging Face, Ollama",
        statuses=frozenset({503}),
        texts=r"^(llm server )?loading model|is (currently|still) loading|is (starting|warming) up",
    ),
    Rule(_LOADING, "Volcengine", codes=r"modelloadingerror|model_loading"),
    Rule(
        _REFUSED,
        "DashScope, Azure, Zhipu, Moonshot, MiniMax, DeepSeek, Volcengine, Baidu, xAI, one-api",
        codes=r"data_?inspection_?failed|content_filter|content_policy\w*|responsibleaipolicy\w*"
        r"|130[01]|102[67]|system_unsafe|user_setting_unsafe|\w*sensitivecontent\w*(\..*)?"
        r"|\w+textriskdetection|sensitive_words_detected|prompt_blocked|sensitive_check_error"
        r"|invalid_prompt|moderation\w*|customroleblocked|refusal",
        texts=r"content exists risk|violates usage guidelines|considered high risk"
        r"|filtering policy|input was flagged|new_sensitive|flagged (as|for|by)|不安全或敏感"
        r"|content management policy",
    ),
    Rule(
        replace(_QUOTA, doubtful=True),
        "DashScope says it of a minute, OpenAI of an empty account",
        codes=r"insufficient_quota|quotaexceeded|1310|1308|2056",
        texts=r"exceeded your current quota",
    ),
    Rule(
        _QUOTA,
        "OpenAI, MiniMax, Moonshot, Zhipu, SiliconFlow, DashScope, Volcengine, Anthropic, xAI",
        codes=r"billing\w*|insufficient_(user_quota|balance\w*|funds|credits?)|credit_\w+"
        r"|exceeded_current_quota_error|1008|111[03]|1112|1121|1309|30001|arrearage"
        r"|accountoverdueerror|\w+billoverdue|accessdenied\.unpurchased|allocationquota\.\w+"
        r"|commoditynotpurchased|resourceunavailable\.(inarrears|lowbalance)"
        r"|pre_consume_token_quota_failed",
        texts=r"insufficient balance|balance is (insufficient|too low)|credit balance|余额不足|欠费"
        r"|out of credits?|all available credits|monthly spending limit|free allocated quota"
        r"|check your plan and billing|paid balance",
    ),
    Rule(_QUOTA, "OpenRouter, DeepSeek, others", statuses=frozenset({402})),
    Rule(
        _CONTEXT,
        "OpenAI, vLLM, SGLang, llama.cpp, LM Studio, Ollama, TGI, DashScope, Moonshot, MiniMax, "
        "Anthropic, Gemini, Mistral, Groq, Together, xAI, Bedrock, Baidu, Volcengine",
        statuses=frozenset({200, 400, 404, 413, 422, 500}),
        codes=r"context_length_exceeded|exceed_context_size_error|string_above_max_length"
        r"|string_too_long|tokens_too_long|characters_too_long|outofcontexterror|1261"
        r"|request_too_large",
        texts=r"maximum context length|exceeds the context|context window|maximum model length"
        r"|model'?s context length|available context size|max(imum)? context|input length exceeds"
        r"|greater than the context|truncate prompt with n_keep|context size has been exceeded"
        r"|keep the first \d+ tokens|inputs` (tokens|must)|range of input length should"
        r"|(exceeds?|exceeded) model token limit|input token (length|count)|prompt is too long"
        r"|maximum prompt length|reduce the length of the messages|input is too long"
        r"|message token length exceed|exceed context limit",
    ),
    Rule(
        _REGION,
        "OpenAI, Gemini",
        codes=r"unsupported_country_region_territory",
        texts=r"user location is not supported|country, region, or territory not supported",
    ),
    Rule(
        _MODEL,
        "OpenAI, vLLM, Ollama, DashScope, DeepSeek, Zhipu, SiliconFlow, Volcengine, OpenRouter",
        statuses=frozenset({200, 400, 404, 410}),
        codes=r"model_?not_?(found|available|supported|open)|1211|20012|deploymentnotfound"
        r"|invalidendpointormodel\.notfound|invalidendpoint\.closedendpoint",
        texts=r"model.{0,80}(does not exist|not found|not exist|is not (there|a valid))"
        r"|not a valid model|unknown model|no endpoints found",
    ),
    Rule(_MODEL, "others", statuses=frozenset({404}), texts=r"model"),
    Rule(
        _KEY,
        "all with 401; Gemini with 400, MiniMax with 200",
        codes=r"invalid_?api_?key|1004|2049|invalid_authentication_error"
        r"|incorrect_api_key_error|authenticationerror|invalid_iam_token",
        texts=r"api key not valid",
    ),
    Rule(
        _URL,
        "LM Studio, with 200",
        statuses=frozenset({200, 400, 404, 405, 500}),
        texts=r"unexpected endpoint or method",
    ),
    Rule(_BUSY, "Anthropic, with whatever status", codes=r"overloaded_error"),
    Rule(
        replace(_BUSY, waits=True),
        "OpenAI's flex tier, with 429; Groq's, with 498",
        statuses=frozenset({429, 498}),
        codes=r"resource_?unavailable|capacity_exceeded",
        texts=r"resource unavailable",
    ),
    # By their statuses alone.
    Rule(replace(_KEY, doubtful=True), "all", statuses=frozenset({403})),
    Rule(_RATE, "all", statuses=frozenset({429})),
    Rule(
        _BUSY,
        "all; Anthropic, OpenRouter and Cloudflare with 529, Groq with 498",
        statuses=frozenset({498, 503, 529}),
    ),
    Rule(
        replace(_RETRY, gone=True),
        "proxies; Cloudflare with 52x",
        statuses=frozenset({502, 504, 520, 521, 522, 523, 524, 525, 526, 530}),
    ),
    Rule(_RETRY, "all", statuses=frozenset({408, 409, 425})),
)
_PROXY_TIMEOUTS = (408, 504, 524)
_PROXY_CUT = Verdict(
    "retry",
    "proxy",
    "a proxy cut the answer after {seconds:.0f} s ({text}); fewer --max-new-tokens, or --stream",
    proxy_cut=True,
)


def classify(status: int, headers: Mapping[str, str], body: bytes, seconds: float = 0.0) -> Verdict:
    """The verdict on an answer that holds no completion and came after so many seconds."""
    return classify_error(status, read_error(body), headers, seconds)


def classify_error(
    status: int, error: ServerError, headers: Mapping[str, str], seconds: float = 0.0
) -> Verdict:
    message = error.message.removeprefix(f"{status}: ")
    if status == 200:
        text = message or "an error without a message"
    else:
        text = f"{status}: {message}" if message else f"HTTP status {status}"
    found = _find(status, error, headers, seconds)
    filled = found.message.format(text=text, seconds=seconds)
    waits = [wait for wait in (retry_after(headers), error.wait) if wait is not None]
    wait = max(waits, default=None) if found.action == "retry" or found.doubtful else None
    return replace(found, message=filled, wait=wait, refused=not found.proxy_cut)


def _find(status: int, error: ServerError, headers: Mapping[str, str], seconds: float) -> Verdict:
    if 300 <= status < 400:
        where = headers.get("Location", "elsewhere").replace("{", "{{").replace("}", "}}")
        return Verdict("stop", "redirect", f"the server redirects to {where}; use that --base-url")
    if status in _PROXY_TIMEOUTS and seconds > PROXY_SECONDS:
        return _PROXY_CUT
    if error.moderated or (status == 403 and error.is_page and error.message):
        return _REFUSED
    for rule in RULES:
        if rule.fits(status, error):
            return rule.verdict
    if status == 404 and (error.message.rstrip(".").lower() == "not found" or error.is_page):
        return _URL
    if status >= 500 or status == 200:
        return _RETRY
    return Verdict("fail", "rejected", "{text}")


def in_context(verdict: Verdict, answered_ago: float | None) -> Verdict:
    """A doubtful verdict in the light of others: `answered_ago` is the seconds since the latest
    answer that the same key got, None where it never got one."""
    if not verdict.doubtful:
        return verdict
    if verdict.kind == "quota":
        recent = answered_ago is not None and answered_ago <= RECENT_SECONDS
        recent = recent and "billing" not in verdict.message  # OpenAI's own words for it
        if recent or verdict.wait is not None:
            message = verdict.message.replace("the quota is used up", "asked too fast")
            return replace(
                verdict,
                action="retry",
                kind="rate",
                busy=True,
                doubtful=False,
                patience=QUOTA_SECONDS,
                message=message,
            )
        return replace(verdict, doubtful=False)
    if answered_ago is None:
        return verdict
    message = verdict.message.replace(
        "the key is not accepted", "the server refused this record, and took the key for others"
    )
    return replace(verdict, action="fail", kind="refused", doubtful=False, message=message)


def classify_payload(payload: Any, headers: Mapping[str, str]) -> Verdict | None:
    """The verdict on a 200 whose body says that it is an error; None where it does not."""
    if not isinstance(payload, Mapping):
        return Verdict("retry", "malformed", "the answer is not a JSON object")
    inside: Any = payload.get("error")
    choices = payload.get("choices")
    if not inside and isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        inside = choices[0].get("error")  # as OpenRouter tells of a fault in the middle
        payload = {"error": inside}
    base = payload.get("base_resp")
    failed = isinstance(base, Mapping) and base.get("status_code") not in (0, None)
    if not inside and not failed and payload.get("object") != "error":
        if choices or isinstance(payload.get("message"), Mapping) or "response" in payload:
            return None
        # A flat error beside no choices at all: a code, and words.
        if payload.get("code") in (None, 0, "0", 200, "200") or "choices" in payload:
            return None
    error = error_of(payload)
    return classify_error(_status_in(error), error, headers)


def _status_in(error: ServerError) -> int:
    """The HTTP status that an error's codes name, else 200: the server said that all was well."""
    statuses = (int(code) for code in sorted(error.codes) if code.isdecimal() and len(code) == 3)
    return next((status for status in statuses if 400 <= status < 600), 200)
