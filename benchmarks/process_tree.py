"""What a command and all its descendants take: wall and CPU seconds, and peak memory with shared pages counted once."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

POLL_S = 0.2


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        wall: seconds.
        cpu: user and system seconds of the process and its descendants.
        pss: peak of their proportional set sizes together, in MiB, sampled a few times a second.
        out: what it printed.
    """

    wall: float
    cpu: float
    pss: float
    out: str


def measure(command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> Cost:
    """Run a command to its end.

    CPU time is what the system counted of all that were waited for; daemons that outlive their parents are sampled.

    Raises:
        SystemExit: if it fails, with the end of what it said.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.monotonic()
        child = psutil.Popen(list(command), stdout=out, stderr=err, env=dict(environment), cwd=folder)
        peak, seen = 0.0, {}
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            pss, times = _sample(child)
            peak, seen = max(peak, pss), seen | times
            time.sleep(POLL_S)
        wall, code = time.monotonic() - started, os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}\n{texts[1][-3000:]}")
    return Cost(wall, max(usage.ru_utime + usage.ru_stime, sum(seen.values())), peak, texts[0])


def _sample(child: psutil.Process) -> tuple[float, dict[tuple[int, float], float]]:
    """PSS of all now, in MiB, and each one's CPU seconds so far by its number and birth."""
    pss, times = 0.0, {}
    try:
        members = [child, *child.children(recursive=True)]
    except psutil.Error:
        return 0.0, {}
    for member in members:
        try:
            pss += member.memory_full_info().pss / 2**20
            spent = member.cpu_times()
            times[member.pid, member.create_time()] = spent.user + spent.system
        except psutil.Error:
            continue
    return pss, times
