"""What servers do with the form of an answer: schemas, probabilities, reasoning told apart.

Sources: OpenAI API reference ("Structured model outputs", `logprobs`); DeepSeek, SGLang, vLLM,
OpenRouter, Groq and Ollama for where reasoning stands; Mistral for content of typed parts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

FORMAT, LOGPROBS = "response_format", "logprobs"
OLLAMA_FORMAT, TEXT_FORMAT, OUTPUT_CONFIG = "format", "text", "output_config"
"""Where others than OpenAI's chat completions have it: Ollama, OpenAI's Responses, Anthropic."""
FORMS: Mapping[str, tuple[str, ...]] = {
    FORMAT: ("json_schema", "schema"),
    OLLAMA_FORMAT: (),
    TEXT_FORMAT: ("format", "schema"),
    OUTPUT_CONFIG: ("format", "schema"),
}
"""Parameters that ask for a form of answers, each with where in it the schema stands."""
IN_PROMPT = "in the prompt"
"""What is learned of a server that does not enforce schemas."""
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "reasoning_text")
_about_schema = re.compile(
    r"invalid.{0,40}schema|schema.{0,60}(invalid|not valid|not a valid|not supported|feature)"
    r"|unknown format|unsupported.{0,20}keyword|additionalProperties|for type: object",
    re.IGNORECASE | re.DOTALL,
)
_about_type = re.compile(r"json_schema[`'\"]? (is|are) |type [`'\"]?json_schema|does not support")


_names_form = re.compile(
    r"response_?format|json_?schema|output_config|output_format|text\.format"
    r"|structured output|output format|unknown format|grammar"
    r"|handle the requested parameters|ChatRequest\.format|invalid format",
    re.IGNORECASE,
)
_NOT_OF_FORM = (401, 408, 409, 429)


def refused_form(
    sent: Mapping[str, Any], status: int, parameter: str | None, message: str
) -> str | None:
    """The part of a body that asks for a form of answers and that a server's error refuses, or
    None. `parameter` and `message` are what the error holds."""
    if not 400 <= status < 500 or status in _NOT_OF_FORM:
        return None
    named = f"{parameter or ''} {message}"
    if LOGPROBS in sent and re.search(r"logprobs", named, re.IGNORECASE):
        return LOGPROBS
    if _names_form.search(named) or (parameter or "").startswith("text.format"):
        return next((name for name in FORMS if name in sent), None)
    return None


def schema_lesson(name: str, sent: Mapping[str, Any], message: str) -> tuple[str, str] | None:
    """What to learn of a server that refuses the schema `name` of a body: that it takes none, or
    not this one. None where that is no schema."""
    if name not in FORMS or _schema_in(name, sent[name]) is None:
        return None
    of_this_one = _about_schema.search(message) and not _about_type.search(message)
    return (_name_of(name, sent[name]) if of_this_one else name), IN_PROMPT


def _name_of(name: str, asked: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return f"{name} {digest[:12]}"


def as_taken(body: Mapping[str, Any], learned: Mapping[str, str]) -> dict[str, Any]:
    """The body with its schema in the prompt, where the server takes none, or not this one."""
    for name in FORMS:
        asked = body.get(name)
        if isinstance(asked, Mapping) and IN_PROMPT in (
            learned.get(name),
            learned.get(_name_of(name, asked)),
        ):
            schema = _schema_in(name, asked)
            return dict(body) if schema is None else _with_schema_in_prompt(body, schema)
    return dict(body)


def _schema_in(name: str, asked: Any) -> Mapping[str, Any] | None:
    """The schema of a parameter of `FORMS`; None where there is none in it."""
    for key in FORMS[name]:
        asked = asked.get(key) if isinstance(asked, Mapping) else None
    return asked if isinstance(asked, Mapping) else None


def _with_schema_in_prompt(body: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    words = schema_words(schema)
    others = {name: value for name, value in body.items() if name not in FORMS}
    place = next(name for name in ("messages", "input", "prompt") if name in body)
    if isinstance(body[place], str):
        return {**others, place: f"{body[place]}\n\n{words}"}
    messages = list(body[place])
    last = max(n for n, turn in enumerate(messages) if turn["role"] == "user" or not n)
    messages[last] = {**messages[last], "content": f"{messages[last]['content']}\n\n{words}"}
    return {**others, place: messages}


def schema_words(schema: Mapping[str, Any]) -> str:
    """What a model is told of the form of its answer where no server enforces it."""
    properties = schema.get("properties")
    only = properties.get("choice") if isinstance(properties, Mapping) else None
    if isinstance(only, Mapping) and len(properties) == 1 and "enum" in only:  # type: ignore[arg-type]
        choices = "\n".join(map(str, only["enum"]))
        return f"Answer with one of these, and nothing else:\n{choices}"
    written = json.dumps(schema, ensure_ascii=False)
    return f"Answer with JSON that follows this JSON schema, and nothing else:\n{written}"


def reasoning_in(message: Mapping[str, Any]) -> str | None:
    """What the model reasoned, where a message has it apart from its content."""
    for key in _REASONING_KEYS:
        value = message.get(key)
        if isinstance(value, str) and value.strip():
            return value
    parts = message.get("content")
    if not isinstance(parts, list):
        return None
    texts = [_thought(part) for part in parts if isinstance(part, Mapping)]
    return "".join(texts) or None


def _thought(part: Mapping[str, Any]) -> str:
    thinking = part.get("thinking")
    if isinstance(thinking, list):
        texts = (inner.get("text") for inner in thinking if isinstance(inner, Mapping))
        return "".join(text for text in texts if isinstance(text, str))
    return thinking if isinstance(thinking, str) else ""


def told_logprobs(told: Any) -> str | None:
    """The log probabilities of an answer's tokens as `Completion.logprobs` has them; None where the
    server tells none."""
    if isinstance(told, Mapping):
        if isinstance(told.get("tokens"), list):  # of the older completions API
            pairs = zip(told["tokens"], told.get("token_logprobs") or [], strict=False)
            return _dumped(list(pairs))
        told = told.get("content")
    if not isinstance(told, list):
        return None
    return _dumped(
        [(each.get("token"), each.get("logprob")) for each in told if isinstance(each, Mapping)]
    )


def _dumped(pairs: list[tuple[Any, Any]]) -> str | None:
    good = all(isinstance(t, str) and isinstance(p, int | float) for t, p in pairs)
    return json.dumps(pairs) if pairs and good else None
