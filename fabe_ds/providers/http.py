"""Providers behind an HTTP endpoint: addresses, keys, and what a server teaches of its dialect."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Self

from fabe_ds import network
from fabe_ds.config.params import merged
from fabe_ds.errors import MalformedResponse, RunStopped, ServerAway, UsageError
from fabe_ds.providers.base import Endpoint, Provider, written
from fabe_ds.providers.dialects import DIALECT, DIALECTS, THINKING, dialect_of_host, in_dialect
from fabe_ds.providers.forms import IN_PROMPT, as_taken, schema_lesson
from fabe_ds.request import Completion, Request

PREFLIGHT_SECONDS = 10.0
STREAM = "stream"
"""The learned word for servers that have to stream: "true", or "" where they know no such field."""


TIER = "service_tier"
"""The parameter of --service-tier, which is no part of a request's key."""


class HttpProvider(Provider):
    """A model behind an HTTP endpoint: pure functions that write a request and read its answer.

    `body` is all that can change the answer, so it is the cache key; `sent` is the body as it goes
    over the wire, in the dialect that this server was found to speak.
    """

    default_base_url: ClassVar[str]
    base_url_variables: ClassVar[tuple[str, ...]] = ()
    """Environment variables that name the server where --base-url does not."""
    key_variable: ClassVar[str | None] = None
    """The environment variable that holds the key where --api-key does not."""

    def __init__(self, endpoint: Endpoint, api_key: str | None = None) -> None:
        """Raises: UsageError where the base URL is no address, or the key no key."""
        super().__init__(endpoint)
        self.detected: str | None = None
        """The dialect that the server was found to speak, where it was asked."""
        if endpoint.dialect is not None and endpoint.dialect not in DIALECTS:
            known = ", ".join(DIALECTS)
            raise UsageError(f"--dialect {endpoint.dialect}: no such dialect; there are {known}")
        self.models: list[str] = []
        """What the server said that it has, where it was asked."""
        self._api_key = network.clean_key(api_key, self.key_variable or "--api-key")
        self._headers = network.headers_of(endpoint.headers)
        try:
            self.address = network.Address.parse(self.base_url)
        except ValueError as error:
            shown = without_userinfo(self.base_url)
            raise UsageError(f"--base-url {shown}: {error}") from None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.endpoint!r})"

    @classmethod
    def base_url_of(cls, text: str) -> str:
        """The base URL that a text of `base_url_variables` means."""
        return text

    @property
    def base_url(self) -> str:
        return (self.endpoint.base_url or self.default_base_url).rstrip("/")

    def identity(self) -> str:
        return self.endpoint.endpoint_name or without_userinfo(self.base_url)

    def of_each_server(self) -> list[Self]:
        """One for each server that has the model, this one first."""
        others = []
        for url in self.endpoint.more_base_urls:
            endpoint = self.endpoint.model_copy(update={"base_url": url, "more_base_urls": ()})
            others.append(type(self)(endpoint, self._api_key))
        return [self, *others]

    @abstractmethod
    def path(self, request: Request) -> str:
        """Where the request is posted, below the base URL."""

    @abstractmethod
    def completion(self, payload: Mapping[str, Any]) -> Completion:
        """Reads one answer.

        Raises: MalformedResponse where it does not follow the protocol, RecordFailed where the
        model refused.
        """

    def sent(self, body: Mapping[str, Any], learned: Mapping[str, str]) -> Mapping[str, Any]:
        """The body as this server takes it; what differs from `body` does not change the answer.

        `learned`: the names of parameters, each with the name that the server has for it, or ""
        where it takes none.
        """
        renamed = as_taken(_renamed(body, learned), learned)
        if learned.get(STREAM) == "true":
            renamed[STREAM] = True
        level = renamed.pop(THINKING, None)
        return renamed if level is None else merged(self.told_to_think(level, learned), renamed)

    def told_to_think(self, level: str, learned: Mapping[str, str]) -> dict[str, Any]:
        """The parameters of a body for --thinking.

        Raises: RunStopped where it is not known how this server is told.
        """
        name = self.dialect(learned)
        if name is None:
            raise RunStopped(
                f"{self.address}: it is not known how this server is told to think; give its "
                f"--dialect ({', '.join(DIALECTS)}), or its own parameter with --param"
            )
        return in_dialect(name, level)

    def dialect(self, learned: Mapping[str, str]) -> str | None:
        """How the server is told to think, as far as it is known."""
        host = dialect_of_host(self.address.host)
        return self.endpoint.dialect or host or learned.get(DIALECT) or self.detected

    def refused(self, sent: Mapping[str, Any], parameter: str | None, message: str) -> str | None:
        """The parameter of a body that an error refuses in this protocol's own way, or None."""
        return None

    def instead(self, name: str, sent: Mapping[str, Any], message: str) -> tuple[str, str] | None:
        """What to learn where the server refuses the parameter `name` of a body, with this
        message: a pair for `learned`. None where it cannot do without."""
        return schema_lesson(name, sent, message)

    def joined(self, chunks: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The one answer that the parts of a stream make, as `completion` reads it.

        Raises: MalformedResponse where there is none, or its end is missing.
        """
        raise MalformedResponse("the server streams, which was not asked for")

    def refuse_open_key(self) -> None:
        """Raises: RunStopped where the key would go over the network for all to read."""
        if self._api_key is None or self.address.parts.scheme != "http":
            return
        if self.address.basic() is None and not network.is_private(self.address.host):
            raise RunStopped(
                f"{self.address}: the key would be sent unencrypted; use an https:// --base-url"
            )

    def headers(self) -> dict[str, str]:
        """What says who asks. A user and password in the address go first, and the key stays."""
        if basic := self.address.basic():
            return {"Authorization": basic, **self._headers}
        return {**(self.key_headers(self._api_key) if self._api_key else {}), **self._headers}

    def key_headers(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key}"}

    def unreachable(self, error: Exception, hint: str) -> ServerAway:
        """What to say where nothing answers, naming the proxy or certificates that are in use."""
        import requests

        if isinstance(error, requests.exceptions.ProxyError):
            proxy = network.proxy_for(self.address.base)
            return ServerAway(
                f"{self.address}: the proxy does not let us through ({proxy}); "
                "NO_PROXY names servers to reach without one"
            )
        if isinstance(error, requests.exceptions.SSLError):
            return ServerAway(
                f"{self.address}: the server's certificate is not accepted "
                f"({network.certificate_hint()})"
            )
        return ServerAway(f"{self.address}: {hint}")

    def shown(self, request: Request) -> str:
        body = self.asked(request)
        if (level := body.pop(THINKING, None)) is not None:
            try:
                body = merged(self.told_to_think(level, {}), body)
            except RunStopped:  # the server itself will show
                body["(thinking)"] = level
        others = (each.address for each in self.of_each_server()[1:])
        addresses = "".join(f"\n  or {other.shown(self.path(request))}" for other in others)
        return f"POST {self.address.shown(self.path(request))}{addresses}\n{written(body)}"


def _renamed(body: Mapping[str, Any], learned: Mapping[str, str]) -> dict[str, Any]:
    renamed = {}
    for name, value in body.items():
        ours = name != "temperature" or not value  # 0 is sent unasked, another is the user's
        if name in learned and ours and name != STREAM and learned[name] != IN_PROMPT:
            if learned[name]:
                renamed[learned[name]] = value
        else:
            renamed[name] = value
    return renamed


_refusing_code = re.compile(r"unsupported_(parameter|value)|unknown_parameter|extra_forbidden")
_refusing = re.compile(
    r"unsupported|not supported|does not support|unrecognized|unknown (parameter|name|field)"
    r"|unexpected|not permitted|extra_forbidden|not allowed|only support|must be set to"
    r"|unknown argument|no longer supported|is deprecated for|may only be"
    r"|cannot both be",
    re.IGNORECASE,
)
_stream_wanted = re.compile(
    r"non-?stream|stream\w* (only|is required|must)|only.{0,20}stream", re.I
)


def refused_parameter(
    sent: Mapping[str, Any], parameter: str | None, codes: Iterable[str], message: str
) -> str | None:
    """The parameter of a body that a server refuses as such (not its value), or None.

    `parameter`, `codes` and `message` are what the server's error holds.
    """
    if _stream_wanted.search(message) and not sent.get(STREAM):
        return STREAM
    if TIER in sent and TIER in f"{parameter} {message}":  # one of its values, too
        return TIER
    if not _refusing.search(message) and not any(map(_refusing_code.fullmatch, codes)):
        return None
    optional = [name for name in sent if name not in ("model", "messages", "input", "prompt")]
    if parameter is not None:  # also reasoning.effort, or stop[0]
        whole = re.split(r"[.\[]", parameter)[0]
        return whole if whole in optional else None
    quoted = (name for name in optional if re.search(rf"['\"`]{name}['\"`]", message))
    named = (name for name in optional if _names(name, message))
    return next(chain(quoted, named), None)


def _names(name: str, message: str) -> bool:
    """Whether a refusal is of the parameter, and does not just hold its name somewhere."""
    pattern = (
        rf"['\"`]{name}['\"`]|\b{name}:? (?:is|was|extra|not|does|has|must)\b"
        rf"|(?:parameter|argument|field|property|option)s?(?: supplied)?:? {name}\b"
        rf"|support(?:s|ed)?:? {name}\b"
    )
    return re.search(pattern, message, re.IGNORECASE) is not None


def stream_parts(text: str) -> list[Mapping[str, Any]] | None:
    """The JSON objects of an event stream or of JSON lines; None where the text is neither.

    Source: WHATWG HTML, "Server-sent events"; `[DONE]` at its end is OpenAI's. A whole answer
    with such an end behind it is a stream of one part.
    """
    parts: list[Mapping[str, Any]] = []
    for line in _data_lines(text):
        try:
            part = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(part, Mapping):
            return None
        parts.append(part)
    return parts or None


def _data_lines(text: str) -> Iterable[str]:
    """The data of events, one JSON text each, which may go over several lines."""
    pending: list[str] = []
    for line in [*text.replace("\r\n", "\n").split("\n"), ""]:
        if line.startswith("data:"):
            line = line[5:].strip()
            if pending and line:
                yield "\n".join(pending)
                pending = []
        elif line.startswith((":", "event:", "id:", "retry:")):
            continue
        if line.strip() == "[DONE]":
            continue
        if line.strip():
            pending.append(line)
        if pending and (not line.strip() or _is_whole(pending)):
            yield "\n".join(pending)
            pending = []


def _is_whole(lines: list[str]) -> bool:
    return lines[0].startswith("{") and lines[-1].rstrip().endswith("}") and len(lines) == 1


def without_userinfo(url: str) -> str:
    """The address without the user and password it may hold."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"
