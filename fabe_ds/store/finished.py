"""What is remembered of finished runs: their answers, and the files that they have written."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fabe_ds.errors import reason
from fabe_ds.files import digest
from fabe_ds.scratch import remove, scratch_in
from fabe_ds.store.layout import private_folder

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Finished:
    """What is known of runs of one transform over the same records.

    `path` is a small file of digests beside the answers. What it says counts only as long as the
    answers are, byte for byte, those that it was written for.
    """

    path: Path
    answers: Path
    """The file of the answers; a process each has one like it, where there are several."""
    clean: bool = False
    """Whether the answers are there, and none of them is a failure."""
    digests: list[str] = field(default_factory=list)
    """Of the answers."""
    exports: dict[str, str] = field(default_factory=dict)
    """Of the files that were written, by their absolute paths."""

    @classmethod
    def of(cls, folder: Path, transform: str) -> Finished:
        """`folder`: that of the answers to the same records. `transform`: its digest."""
        private_folder(folder)
        with contextlib.suppress(OSError):
            os.utime(folder)  # its last use, which `cache prune` looks at
        found = cls(folder / f"finished-{transform}.json", folder / f"answers-{transform}.arrow")
        try:
            kept = json.loads(found.path.read_text())
            found.exports = {str(path): str(value) for path, value in kept["exports"].items()}
            found.digests = found._digests()
            found.clean = bool(found.digests) and kept["answers"] == found.digests
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return found

    def _digests(self) -> list[str]:
        return [digest(path) for path in sorted(self.path.parent.glob(f"{self.answers.stem}*"))]

    def remember_answers(self) -> None:
        """The answers are there, and none of them is a failure."""
        with contextlib.suppress(OSError):
            self.digests, self.clean = self._digests(), True
            self._save()

    def remember_exports(self, digests: Mapping[str, str]) -> None:
        """These files, by their digests, were written with the answers that are there."""
        if self.clean:
            self.exports |= {_absolute(path): value for path, value in digests.items() if value}
            self._save()

    def _save(self) -> None:
        """Remembers it, as far as there is room: without it, a run is but done anew."""
        scratch = scratch_in(self.path.parent)
        try:
            scratch.write_text(json.dumps({"answers": self.digests, "exports": self.exports}))
            scratch.replace(self.path)
        except OSError as error:
            log.warning("%s: not remembered as finished: %s", self.path, reason(error))
            remove(scratch)

    def are_current(self, paths: Iterable[str]) -> bool:
        """Whether all the files are what an earlier run of this very job has written."""
        paths = list(paths)
        return self.clean and bool(paths) and all(map(self._is_current, paths))

    def _is_current(self, path: str) -> bool:
        expected = self.exports.get(_absolute(path))
        try:
            return expected is not None and digest(path) == expected
        except OSError:
            return False


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 - there may be very many
