"""Input and output on other file systems (hf://, s3://, gs://, ...), through fsspec.

Files are copied to the cache folder and worked on there, so that a run knows one kind of file. What
it writes is copied back, each file whole or not at all; files that have not changed are not copied
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fabe_ds.config.settings import RunConfig
from fabe_ds.errors import ExportError, UsageError, first_line
from fabe_ds.files import digest
from fabe_ds.formats.discover import glob_takes
from fabe_ds.formats.registry import class_of
from fabe_ds.run_files import LEFT_BEHIND, beside
from fabe_ds.scratch import scratch_in
from fabe_ds.store.layout import Layout

log = logging.getLogger(__name__)

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,3}(.*)", re.DOTALL)  # a Path makes one slash of two
_SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")
_IN_PLACES = ("file", "local", "sftp", "ssh", "smb", "ftp", "hdfs", "arrow_hdfs", "webhdfs", "dbfs")
"""File systems where a file that is being written can be seen: there, it gets its name last.
Object stores, and the Hub, show a file when it is whole."""


def url_of(path: Path | None) -> str | None:
    """The URL that a path stands for, where it is one of another file system; else None."""
    if path is None or os.path.lexists(path):
        return None
    # What is on this machine goes before a URL that is spelled the same.
    found = _URL.fullmatch(str(path))
    return f"{found[1]}://{found[2]}" if found else None


@dataclass(frozen=True, slots=True)
class Staged:
    """A run's settings with local files in the place of remote ones."""

    config: RunConfig
    source: _Copy | None = None
    output: _Copy | None = None

    def publish(self, outputs: Iterable[Path], reports: Path) -> None:
        """Copies what the run has written to where it belongs. Raises: ExportError."""
        target = self.source if self.config.inplace else self.output
        if target is None:
            return
        for path in outputs:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in files:
                if file.is_file():
                    target.put(file, file.relative_to(target.local).as_posix())
        if not self.config.inplace:
            for name in LEFT_BEHIND:
                if (left := beside(reports, name)).exists():
                    target.put_beside(left)
        target.save()


def staged(config: RunConfig, cache_dir: Path | None = None) -> Staged:
    """Copies remote input below the cache folder, or below another one.

    Raises: UsageError (no such file, a file system that is not installed, or that refuses).
    """
    home = Layout(cache_dir or config.cache_dir)
    source = output = None
    changes: dict[str, Any] = {}
    if (url := url_of(config.input_path)) is not None:
        source = _Copy.of("--input", url, home)
        source.fetch(config.input_glob)
        changes["input_path"] = source.local
    if (url := url_of(config.output_path)) is not None:
        output = _Copy.of("--output", url, home)
        changes["output_path"] = output.local
    return Staged(config.model_copy(update=changes) if changes else config, source, output)


@dataclass(slots=True)
class _Copy:
    """A remote file or folder and its local copy. `known` is what is remembered of each file, by
    its path below the root: the checksum there, and the digest here."""

    flag: str
    url: str
    local: Path
    system: Any
    root: str
    known: dict[str, list[str]]

    @classmethod
    def of(cls, flag: str, url: str, home: Layout) -> _Copy:
        """Raises: UsageError."""
        import fsspec

        with _said(flag, url):
            system, root = fsspec.core.url_to_fs(url)
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        folder = home.made(home.remote) / name
        home.made(folder)
        local = folder / (PurePosixPath(root).name or "root")
        copy = cls(flag, url, local, system, root, {})
        with contextlib.suppress(OSError, ValueError, TypeError):
            copy.known = dict(json.loads(copy._state.read_text()))
        return copy

    @property
    def _state(self) -> Path:
        return self.local.parent / "copied.json"

    def save(self) -> None:
        """Remembers what was copied, as far as there is room."""
        scratch = scratch_in(self.local.parent)
        with contextlib.suppress(OSError):
            scratch.write_text(json.dumps(self.known))
            scratch.replace(self._state)

    def fetch(self, globs: list[str]) -> None:
        """Brings the local copy up to date. Raises: UsageError."""
        with _said(self.flag, self.url):
            files = dict(self._files(globs))
            for name, path in files.items():
                local = self.local / name if name else self.local
                there = str(self.system.checksum(path))
                if self.known.get(name, [""])[0] == there and local.exists():
                    continue
                local.parent.mkdir(parents=True, exist_ok=True)
                scratch = scratch_in(local.parent)
                self.system.get_file(path, str(scratch))
                scratch.replace(local)
                self.known[name] = [there, digest(local)]
        # What is gone there is no input any more.
        for name in set(self.known) - set(files):
            (self.local / name).unlink(missing_ok=True)
            del self.known[name]
        self.save()

    def _files(self, globs: list[str]) -> Iterator[tuple[str, str]]:
        """The remote files that may be read: each one's path below the root, and its whole one."""
        if self.system.isfile(self.root):
            yield "", self.root
            return
        if not self.system.exists(self.root):
            raise FileNotFoundError("no such file or folder")
        for path in sorted(self.system.find(self.root)):
            name = path[len(self.root) :].lstrip("/")
            base = PurePosixPath(name).name
            wanted = glob_takes(globs, name) if globs else not base.startswith(".")
            if wanted and (class_of(base) is not None or base in _SAVED or globs):
                yield name, path

    def put(self, file: Path, name: str) -> None:
        """Copies one file back, unless it is there as it is. Raises: ExportError."""
        key = "" if name == "." else name
        self._put(file, f"{self.root.rstrip('/')}/{name}" if key else self.root, key)

    def put_beside(self, file: Path) -> None:
        """Copies a file to beside the root, as it stands beside the local one."""
        folder, _, _ = self.root.rstrip("/").rpartition("/")
        self._put(file, f"{folder}/{file.name}", f"../{file.name}")

    def _put(self, file: Path, path: str, key: str) -> None:
        here = digest(file)
        with _said(self.flag, self.url, ExportError):
            known = self.known.get(key)
            if known and known[1] == here and self._checksum(path) == known[0]:
                return
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            if {*_as_tuple(self.system.protocol)} & {*_IN_PLACES}:
                self.system.put_file(str(file), f"{path}.fabe-ds-part")
                self.system.mv(f"{path}.fabe-ds-part", path)
            else:
                self.system.put_file(str(file), path)
            self.known[key] = [self._checksum(path), here]
        log.debug("%s: copied", path)

    def _checksum(self, path: str) -> str:
        # Listings are cached, and would show the file that was there before.
        self.system.invalidate_cache()
        try:
            return str(self.system.checksum(path))
        except FileNotFoundError:
            return ""


def _as_tuple(protocol: str | tuple[str, ...]) -> tuple[str, ...]:
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


@contextlib.contextmanager
def _said(flag: str, url: str, kind: type[UsageError | ExportError] = UsageError) -> Iterator[None]:
    """Says in a line what a file system of another package raises."""
    try:
        yield
    except (UsageError, ExportError):
        raise
    except ImportError as error:
        raise UsageError(f"{flag} {url}: {first_line(error)}") from None
    except Exception as error:  # each file system has its own
        what = "no such file or folder" if isinstance(error, FileNotFoundError) else ""
        raise kind(f"{flag} {url}: {what or first_line(error)}") from None
