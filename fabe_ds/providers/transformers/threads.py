"""How many threads a model is computed with: as many processors as this process is granted."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def use_granted(sharers: int) -> int:
    """Sets torch's threads to this process's share of the processors that it is granted, unless
    OMP_NUM_THREADS says another number; gives how many are used."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        most = min(torch.get_num_threads(), granted())
        torch.set_num_threads(max(1, round(most / sharers)))
    return int(torch.get_num_threads())


def granted(root: Path = _ROOT, own: Path = Path("/proc/self/cgroup")) -> int:
    """The processors that this process may use: those that it may run on, and no more than the
    quotas of its control groups (versions 1 and 2) and of those around them add up to."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1 << 10)
    for folder in _groups(root, own):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            allowed = min(allowed, int(quota) / int(period))  # "max" is no number: no quota
        with contextlib.suppress(OSError, ValueError):
            quota = (folder / "cpu.cfs_quota_us").read_text()
            if int(quota) > 0:
                allowed = min(allowed, int(quota) / int((folder / "cpu.cfs_period_us").read_text()))
    return max(1, round(allowed))


def _groups(root: Path, own: Path) -> list[Path]:
    """The folders of this process's control groups and of all around them."""
    folders = [root, root / "cpu", root / "cpu,cpuacct"]
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / controllers if controllers else root
            inside = top / path.lstrip("/")
            while inside != top and top in inside.parents:
                folders.append(inside)
                inside = inside.parent
    return folders
