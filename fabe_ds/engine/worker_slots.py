"""Places in flight that worker processes of one map share."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from fabe_ds.files import is_locked
from fabe_ds.store.layout import Layout, private_folder

COUNT_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class SharedSlots:
    """`count` places for all workers of a parent; a lock on a file is a place taken.

    The system lets go of a lock however its holder ends, so a killed worker blocks nothing.
    """

    def __init__(self, folder: Path, count: int, name: str = "") -> None:
        """`name`: of whom the places are asked, where a process asks several models."""
        home = private_folder(private_folder(Layout(folder).slots) / f"{os.getppid()}{name}")
        self._free = [FileLock(home / f"{n}.lock", thread_local=False) for n in range(count)]
        # Each worker begins its search elsewhere, or they would all try the same file.
        turn = os.getpid() % count
        self._free = self._free[turn:] + self._free[:turn]
        self._held: list[FileLock] = []
        self._home = home
        self._member = FileLock(home / f"worker-{os.getpid()}.lock", thread_local=False)
        self._member.acquire(timeout=0)
        self._counted_at, self._count = -COUNT_SECONDS, 1

    def workers(self) -> int:
        """How many processes share the places just now; counted anew every second."""
        now = time.monotonic()
        if now - self._counted_at >= COUNT_SECONDS:
            others = [path for path in self._home.glob("worker-*") if not self._is_mine(path)]
            self._count = 1 + sum(map(is_locked, others))
            self._counted_at = now
        return self._count

    def _is_mine(self, path: Path) -> bool:
        return str(path) == self._member.lock_file

    def hold(self, wanted: int) -> bool:
        """Takes or gives back places until `wanted` are held; False where there are not as many."""
        while len(self._held) > wanted:
            lock = self._held.pop()
            lock.release()
            self._free.append(lock)
        for lock in list(self._free):
            if len(self._held) >= wanted:
                break
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                self._free.remove(lock)
                self._held.append(lock)
        return len(self._held) >= wanted


def is_worker() -> bool:
    """Whether this process is one of a pool's, as `Dataset.map(num_proc=...)` starts them."""
    multiprocess = sys.modules.get("multiprocess")
    return multiprocess is not None and multiprocess.parent_process() is not None


def die_with_parent() -> None:
    """A pool's workers outlive a killed parent, and would go on asking. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
