"""What of this machine a process may use: cores and memory, by the scheduler's word and the control group's.

A container sees all cores of its host and may compute on two: whoever starts as many threads as there are cores is
stopped for most of the time.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sys
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
MIB = 1 << 20


def cores(groups: Path = GROUPS) -> int:
    """How many cores this process may compute on at a time, at least 1.

    Args:
        groups: where the kernel shows control groups; version 1 and 2 are read.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(allowed, _quota(groups))))


def raise_file_limit() -> tuple[int, int]:
    """Let this process and its children open as many files as may be; how many before, and now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft, soft
    with contextlib.suppress(OSError, ValueError):  # more than the kernel allows
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return soft, hard
    return soft, soft


def file_limit() -> int:
    """How many files this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def memory_mib(groups: Path = GROUPS) -> float:
    """How much memory this process may still take, in MiB."""
    free = float(psutil.virtual_memory().available)
    for folder in _folders(groups, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            free = min(free, _number(folder / limit) - _number(folder / used, 0.0) + _reclaimable(folder))
    return max(0.0, free) / MIB


def _quota(groups: Path) -> float:
    """Cores' worth of time that a control group gives, infinite where it does not say."""
    least = math.inf
    for folder in _folders(groups, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            share, period = (folder / "cpu.max").read_text().split()
            least = min(least, math.inf if share == "max" else float(share) / float(period))
        share_us = _number(folder / "cpu.cfs_quota_us")
        if 0 < share_us < math.inf:
            least = min(least, share_us / _number(folder / "cpu.cfs_period_us", 100_000.0))
    return least


def _folders(groups: Path, controller: str) -> list[Path]:
    """This process's own control group and those above it, as far as they can be seen from here."""
    found = {groups, groups / controller}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(",") or not names:
                top = groups / controller if names else groups
                own = Path(path.lstrip("/"))
                found |= {top / part for part in (own, *own.parents)}
    return sorted(found)


def _number(path: Path, otherwise: float = math.inf) -> float:
    try:
        text = path.read_text().strip()
        return otherwise if text == "max" else float(text)
    except (OSError, ValueError):
        return otherwise


def _reclaimable(folder: Path) -> float:
    """Bytes of the file cache, which count as used and are given back when they are needed."""
    with contextlib.suppress(OSError, ValueError):
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        found = {row[0]: float(row[1]) for row in rows if len(row) == 2}
        return found.get("inactive_file", 0.0)
    return 0.0
