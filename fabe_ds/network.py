"""The network as every request of ours sees it: proxies, certificates, addresses, keys.

The request engine sends with aiohttp; preflight, batches and doctor with requests. Both libraries
read the environment in ways of their own, so neither does here: proxies are those that curl would
take, certificates those that REQUESTS_CA_BUNDLE or SSL_CERT_FILE name, and ~/.netrc is never read.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import ipaddress
import logging
import os
import re
import socket
import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from fabe_ds.errors import RunStopped, UsageError

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
FOLDERS = ("SSL_CERT_DIR",)
"""Variables that name certificates; those that are set are trusted, and no others."""
_SHOWN_QUERY = ("api-version",)
_FROM_ENVIRONMENT = "env:"
_header_name = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, a token


@dataclass(frozen=True, slots=True)
class Address:
    """A server's base URL, taken apart. `str()` of it holds no user, password or secret query."""

    parts: SplitResult

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises: ValueError where it is no http address."""
        parts = urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write http://HOST:PORT/v1")
        _ = parts.port  # raises where it is no number
        return cls(parts._replace(path=parts.path.rstrip("/"), fragment=""))

    @property
    def host(self) -> str:
        return self.parts.hostname or ""

    @property
    def base(self) -> str:
        """The address without user and password: who is asked, in a cache key."""
        return urlunsplit(self.parts._replace(netloc=self._host_and_port))

    @property
    def _host_and_port(self) -> str:
        return self.parts.netloc.rpartition("@")[2]

    def url(self, path: str) -> str:
        """The address of something below the base, with the base's query behind it."""
        whole = self.parts._replace(netloc=self._host_and_port, path=self.parts.path + path)
        return urlunsplit(whole)

    def elsewhere(self) -> Address:
        """The same server's address with /v1 behind it; without, where it ends so."""
        path = self.parts.path
        path = path.removesuffix("/v1") if path.endswith("/v1") else f"{path}/v1"
        return Address(self.parts._replace(path=path))

    def basic(self) -> str | None:
        """The Authorization header for the user and password in the address, if they are there."""
        user, separator, password = self.parts.netloc.rpartition("@")[0].partition(":")
        if not user and not separator:
            return None
        pair = f"{unquote(user)}:{unquote(password)}".encode()
        return f"Basic {base64.b64encode(pair).decode()}"

    def __str__(self) -> str:
        return self.shown("")

    def shown(self, path: str) -> str:
        """`url` for people: values of its query are left out, unless they are harmless."""
        parts = urlsplit(self.url(path))
        pairs = [pair.partition("=") for pair in parts.query.split("&") if pair]
        query = "&".join(
            f"{name}={value if name in _SHOWN_QUERY else '...'}" for name, _, value in pairs
        )
        return urlunsplit(parts._replace(query=query))


def without_secrets(url: str) -> str:
    """The address as it may be shown or written down: no user, no password, no secret query."""
    try:
        return str(Address.parse(url))
    except ValueError:
        before, separator, after = url.partition("?")[0].rpartition("@")
        scheme, slashes, _ = before.partition("://")
        return f"{scheme}{slashes}{after}" if separator and slashes else after


def headers_of(given: Mapping[str, str]) -> dict[str, str]:
    """Headers as they are sent; a value `env:NAME` is that of an environment variable.

    Raises: UsageError. Values are never in it.
    """
    headers = {}
    for name, text in given.items():
        value = text
        if text.startswith(_FROM_ENVIRONMENT):
            variable = text.removeprefix(_FROM_ENVIRONMENT)
            if variable not in os.environ:
                raise UsageError(f"--header {name}={text}: {variable} is not in the environment")
            value = os.environ[variable].strip()
        if not _header_name.fullmatch(name) or not value.isprintable() or not value.isascii():
            raise UsageError(f"--header {name}: not a header")
        headers[name] = value
    return headers


def clean_key(key: str | None, source: str) -> str | None:
    """The key without white space around it; None where nothing is left.

    Raises: UsageError, naming `source`, where it holds what no key has.
    """
    key = (key or "").strip()
    wrong = next((char for char in key if not "!" <= char <= "~" or char in "\"'`"), None)
    if wrong is not None:
        what = "a space" if wrong == " " else ascii(wrong)[1:-1] if wrong < "!" else wrong
        raise UsageError(
            f"{source}: the key holds a character that no key has ({what}); copy it again, "
            "without quotes"
        )
    return key or None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def is_private(host: str) -> bool:
    """Whether a host is this machine or one of a local network, by its look or its addresses."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        pass
    if host == "localhost" or "." not in host or host.endswith((".local", ".internal")):
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(
        not ipaddress.ip_address(str(entry[4][0]).split("%")[0]).is_global for entry in found
    )


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy, and the variable that names it."""

    url: str
    variable: str

    def __str__(self) -> str:
        return f"{self.variable}={without_secrets(self.url)}"


def proxy_for(url: str) -> Proxy | None:
    """The proxy that the environment names for an address; this machine is always reached direct.

    NO_PROXY holds names, suffixes, addresses and networks (10.0.0.0/8), with or without a port.
    """
    from requests.utils import select_proxy, should_bypass_proxies

    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or should_bypass_proxies(url, None):
        return None
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if parts.port and f"{host}:{parts.port}" in excepted.replace(" ", "").split(","):
        return None
    proxy = select_proxy(url, urllib.request.getproxies())
    if not proxy:
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    names = (f"{kind}_proxy" for kind in (parts.scheme, "all"))
    spelled = [spelling for name in names for spelling in (name, name.upper())]
    found = (name for name in spelled if os.environ.get(name, "") in (proxy, proxy[7:]))
    return Proxy(proxy, next(found, "the system's proxy"))


def usable_proxy(url: str) -> Proxy | None:
    """`proxy_for`. Raises: RunStopped where it is one that we cannot speak to (SOCKS)."""
    proxy = proxy_for(url)
    if proxy is not None and not proxy.url.startswith(("http://", "https://")):
        raise RunStopped(
            f"{proxy}: only http proxies are spoken to; give one, or name the server in NO_PROXY"
        )
    return proxy


def bundles() -> list[tuple[str, str]]:
    """The variables that name certificates, with what they name."""
    return [(name, os.environ[name]) for name in (*BUNDLES, *FOLDERS) if os.environ.get(name)]


@functools.cache
def _context(named: tuple[tuple[str, str], ...]) -> ssl.SSLContext:
    if not named:
        import certifi

        context = ssl.create_default_context()
        context.load_verify_locations(certifi.where())
        return context
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for variable, path in named:
        is_folder = Path(path).is_dir()
        try:
            context.load_verify_locations(None if is_folder else path, path if is_folder else None)
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror if isinstance(error, FileNotFoundError) else "no certificates"
            raise UsageError(f"{variable}={path}: {reason}") from None
    return context


def certificates() -> ssl.SSLContext:
    """What a server's certificate is checked against. Raises: UsageError (a file that is none)."""
    return _context(tuple(bundles()))


def certificate_hint() -> str:
    """Where trusted certificates come from, for a refusal."""
    named = ", ".join(f"{name}={path}" for name, path in bundles())
    return named or "name its CA's file with SSL_CERT_FILE or REQUESTS_CA_BUNDLE"


def session() -> requests.Session:
    """A synchronous session that sees the network as the engine does, for one address at a time.

    Use `send`, which looks up the proxy.
    """
    import requests
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs, ssl_context=certificates())

        def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
            return super().proxy_manager_for(proxy, **kwargs, ssl_context=certificates())

    opened = requests.Session()
    opened.trust_env = False  # no netrc, no proxies or certificates by other rules
    opened.mount("https://", Adapter())
    named = bundles()
    opened.verify = named[0][1] if named else True
    return opened


def send(opened: requests.Session, method: str, url: str, **options: Any) -> requests.Response:
    """One request; redirects are not followed. Raises: RunStopped, requests' exceptions."""
    proxy = usable_proxy(url)
    proxies = {urlsplit(url).scheme: proxy.url} if proxy else {}
    return opened.request(method, url, proxies=proxies, allow_redirects=False, **options)


def get(url: str, headers: dict[str, str], seconds: float) -> requests.Response:
    """One GET in a session of its own. Raises: RunStopped, requests' exceptions."""
    with session() as opened:
        return send(opened, "GET", url, headers=headers, timeout=seconds)


def allow_open_files(connections: int, beside: int) -> int:
    """How many of so many connections may be open at once, `beside` other files; the process's
    soft limit on open files is raised for them, as far as the hard one lets it."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + beside
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft >= wanted:
        return connections
    room = max(1, soft - beside)
    log.warning("--concurrency: %d at once, as ulimit -n allows no more open files", room)
    return room
