"""Whether this machine has what a run needs: packages, devices, servers, keys, the cache."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fabe_ds import network
from fabe_ds.config.settings import RunConfig
from fabe_ds.errors import CacheError, FabeError, RunStopped, UsageError
from fabe_ds.files import check_writable
from fabe_ds.job import checked_transform, open_job
from fabe_ds.providers import Endpoint, HttpProvider
from fabe_ds.providers.openai import OpenAIProvider
from fabe_ds.store.layout import usable_folder

_PACKAGES = ("datasets", "pyarrow", "aiohttp")
_OPTIONAL = {  # and the extra that brings each
    "torch": "hf",
    "transformers": "hf",
    "peft": "hf",
    "modelscope": "modelscope",
    "vllm": "vllm",
    "ray": "ray",
}
_KEYS = ("OPENAI_API_KEY", "HF_TOKEN", "MODELSCOPE_API_TOKEN")
_SERVERS = {
    "ollama": "http://localhost:11434/api/tags",
    "OpenAI-compatible": "http://localhost:8000/v1/models",
}
_SECONDS = 2.0
_MEANING = {401: ": the key is refused", 403: ": the key is refused", 404: ": does it end in /v1?"}


class Finding(NamedTuple):
    """`state` is ok, none (it is not there, and need not be) or bad."""

    state: str
    what: str
    detail: str


def findings(
    cache_dir: Path, base_urls: Sequence[str] = (), config: RunConfig | None = None
) -> Iterator[Finding]:
    """All that is looked at, as it is found. `config`: of a run that is to be."""
    yield Finding("ok", "python", sys.version.split()[0])
    yield from _packages()
    yield _device()
    yield from _environment()
    if config is not None:
        yield from _run(config)
    else:
        yield from _servers(base_urls)
    for name in _KEYS:
        key = bool(os.environ.get(name))
        yield Finding("ok" if key else "none", name, "set" if key else "not set")
    yield from _cache(cache_dir)


def _packages() -> Iterator[Finding]:
    for name in (*_PACKAGES, *_OPTIONAL):
        try:
            yield Finding("ok", name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            if extra := _OPTIONAL.get(name):
                yield Finding("none", name, f"not installed; pip install 'fabe-ds[{extra}]'")
            else:
                yield Finding("bad", name, "not installed; pip install fabe-ds")


def _device() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("none", "device", "no torch, so no local models")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        return Finding("ok", "device", f"cuda: {', '.join(names)}")
    if torch.backends.mps.is_available():
        return Finding("ok", "device", "mps")
    return Finding("ok", "device", f"cpu, {torch.get_num_threads()} threads; no GPU")


def _servers(base_urls: Sequence[str]) -> Iterator[Finding]:
    import requests

    wanted: list[tuple[str, str, dict[str, str]]] = []
    for base_url in base_urls:
        try:
            asked = OpenAIProvider(Endpoint("any", base_url), os.environ.get("OPENAI_API_KEY"))
            asked.refuse_open_key()
        except (UsageError, RunStopped) as error:
            yield Finding("bad", "--base-url", str(error))
            continue
        wanted.append(("--base-url", asked.address.url("/models"), asked.headers()))
    if not base_urls:
        wanted = [(name, url, {}) for name, url in _SERVERS.items()]
    for name, url, headers in wanted:
        shown = network.without_secrets(url)
        try:
            status = network.get(url, headers, _SECONDS).status_code
        except (requests.RequestException, RunStopped) as error:
            why = str(error) if isinstance(error, RunStopped) else _nothing(url, error)
            yield Finding("bad" if base_urls else "none", name, why)
        else:
            detail = f"{shown} answers {status}{_MEANING.get(status, '')}"
            yield Finding("ok" if status == 200 else "bad", name, detail)


def _nothing(url: str, error: Exception) -> str:
    """Why nothing answers, as far as this machine's settings are why."""
    import requests

    shown = network.without_secrets(url)
    if isinstance(error, requests.exceptions.SSLError):
        return f"{shown}: the certificate is not accepted ({network.certificate_hint()})"
    proxy = network.proxy_for(url)
    return f"nothing answers at {shown}" + (f" through {proxy}" if proxy else "")


def _environment() -> Iterator[Finding]:
    """Variables that change how servers are reached."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        if value := os.environ.get(name.lower()) or os.environ.get(name):
            yield Finding("ok", name, network.without_secrets(value))
    for name, value in network.bundles():
        yield Finding("ok" if Path(value).exists() else "bad", name, value)
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OLLAMA_HOST"):
        if value := os.environ.get(name):
            yield Finding("ok", name, network.without_secrets(value))


def _cache(folder: Path) -> Iterator[Finding]:
    from fabe_ds.tools.cache import stats

    try:
        check_writable(folder)
        usable_folder(folder)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder}: not a folder")
    except UsageError as error:
        yield Finding("bad", "cache", str(error))
        return
    try:
        found = stats(folder)
        detail = f"{found.completions} completions, {found.whole / 1e6:.1f} MB"
    except UsageError:
        detail = "none yet"
    except CacheError as error:
        yield Finding("bad", "cache", str(error))
        return
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free / 1e9
    yield Finding("ok", "cache", f"{folder}: {detail}; {free:.0f} GB free")


def _run(config: RunConfig) -> Iterator[Finding]:
    """Whether a run with these settings could begin."""

    try:
        transform = checked_transform(config)
        yield Finding("ok", "settings", f"{config.provider}, model {config.model}")
    except FabeError as error:
        yield Finding("bad", "settings", str(error))
        return
    if config.input_path is not None:
        try:
            job = open_job(config, transform)
            count = len(job.source.files)
            kind = f"{job.format.name}, {count} file{'s' if count != 1 else ''}"
            yield Finding("ok", "input", f"{config.input_path}: {kind}")
        except FabeError as error:
            yield Finding("bad", "input", str(error))
    if not isinstance(transform.provider, HttpProvider):
        return
    for provider in transform.provider.of_each_server():
        try:
            provider.refuse_open_key()
            provider.preflight()
            yield Finding("ok", "server", f"{provider.address} answers")
        except FabeError as error:
            yield Finding("bad", "server", str(error))
