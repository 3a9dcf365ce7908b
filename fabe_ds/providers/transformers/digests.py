"""Digests of large files, remembered by path, size and times."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fabe_ds.store.layout import Layout


@dataclass
class Digests:
    """SHA-256 of large files, remembered by path, size and time in a file of the cache folder."""

    file: Path | None = None
    _kept: dict[str, Any] = field(default_factory=dict)
    _changed: bool = False

    @classmethod
    def below(cls, folder: Path | None) -> Digests:
        """Those that a cache folder holds. None holds none, and keeps none."""
        if folder is None:
            return cls()
        file = Layout(folder).models
        try:
            kept = json.loads(file.read_text())
        except (OSError, ValueError):
            kept = {}
        return cls(file, kept if isinstance(kept, dict) else {})

    def digest(self, path: Path) -> str:
        """The SHA-256 of a file, in hexadecimal digits."""
        found = self.of(path).get("sha256")
        if not isinstance(found, str):
            with path.open("rb") as data:
                found = hashlib.file_digest(data, "sha256").hexdigest()
            self.keep(path, "sha256", found)
        return found

    def of(self, path: Path) -> dict[str, Any]:
        """What is known of a file, as it is now."""
        known = self._kept.get(str(path.resolve()))
        if isinstance(known, dict) and known.get("state") == _state(path):
            return known
        return {}

    def keep(self, path: Path, name: str, value: Any) -> None:
        known = {**self.of(path), "state": _state(path), name: value}
        self._kept[str(path.resolve())] = known
        self._changed = True

    def save(self) -> None:
        """Writes what is new, where the cache folder is there and can be written."""
        if not self._changed or self.file is None or not self.file.parent.is_dir():
            return
        scratch = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            scratch.write_text(json.dumps(self._kept))
            scratch.replace(self.file)
            self._changed = False


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
