"""The Windows Subsystem for Linux: on Windows the client runs there, and some of what it stands on is Windows' own."""

from __future__ import annotations

from pathlib import Path

from fedvfm.report import finding

KERNEL, MOUNTS, SERVICES = Path("/proc/version"), Path("/proc/mounts"), Path("/run/systemd/system")
NOT_PRIVATE = ("9p", "drvfs", "v9fs", "fuse.drvfs")
"""File systems that show Windows' own: modes of files are made up there unless it is mounted with "metadata"."""


def examine(folder: Path, kernel: Path = KERNEL, mounts: Path = MOUNTS, services: Path = SERVICES) -> list[finding.Row]:
    """Rows about WSL; none on any other machine.

    Args:
        folder: the state folder.
        kernel: says which kernel this is: WSL 2 names itself, WSL 1 names Microsoft alone.
        mounts: what is mounted where.
        services: there where systemd runs.
    """
    try:
        words = kernel.read_text(encoding="utf-8", errors="replace").lower()
    except OSError:
        return []
    if "microsoft" not in words:
        return []
    if "wsl2" not in words:
        problem = "WSL 1: no Linux kernel, so no GPU, and locks of files and limits of memory do not hold"
        return [finding.blocker("windows", problem, "in PowerShell: wsl --set-version DISTRIBUTION 2")]
    rows = []
    kind = _kind(folder.resolve(), mounts)
    if kind in NOT_PRIVATE:
        rows.append(
            finding.blocker(
                "windows",
                f"WSL 2, and {folder} lies on Windows' file system ({kind}): files cannot be their owner's alone there",
                "move the state folder below your home in Linux; images may stay where they are, and are read slowly",
            )
        )
    if not services.is_dir():
        rows.append(
            finding.warning(
                "windows",
                "WSL 2 without systemd: Windows ends it when no terminal is open",
                "write [boot] systemd=true into /etc/wsl.conf, then: wsl --shutdown; and see docs/sites-it.md",
            )
        )
    return rows or [finding.ok("windows", "WSL 2, state folder on Linux' file system")]


def _kind(folder: Path, mounts: Path) -> str:
    """The kind of file system that a folder lies on; empty where nobody says."""
    best, kind = -1, ""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        parts = line.split(" ")
        if len(parts) > 2:
            place = Path(parts[1].replace("\\040", " "))
            if folder.is_relative_to(place) and len(place.parts) >= best:
                best, kind = len(place.parts), parts[2]
    return kind
