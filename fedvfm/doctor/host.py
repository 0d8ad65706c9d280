"""This machine: port, disk, versions, permissions, other users."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shutil
import socket
import stat
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import psutil
from packaging import requirements, version

from fedvfm import errors
from fedvfm.report import finding
from fedvfm.storage import storage

MIB = 1 << 20
PROBE = "doctor.probe"
PROBE_BYTES = MIB
SHOWN = 3


def port(host: str, number: int, mine: int | None) -> finding.Row:
    """Whether the port can be had.

    Args:
        host: the address to listen at.
        number: of the port.
        mine: the process of ours that holds it, if one runs.
    """
    where = f"{host}:{number}"
    if mine is not None:
        return finding.ok("port", f"{where} is held by our own process {mine}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
            probe.listen(1)
        except OSError as error:
            return _port_taken(where, number, error)
    return finding.ok("port", f"{where} is free")


def _port_taken(where: str, number: int, error: OSError) -> finding.Row:
    if error.errno == errno.EADDRINUSE:
        who = _holder(number)
        return finding.blocker("port", f"{where} is taken{who}", "end that program, or give another --listen host:port")
    if error.errno == errno.EACCES:
        return finding.blocker(
            "port", f"{where}: ports below 1024 need a right this user lacks", "listen above 1024 and forward the port"
        )
    return finding.blocker(
        "port",
        f"{where}: {error.strerror or type(error).__name__}",
        "give --listen an address of this machine; sites may reach it under another one",
    )


def _holder(number: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == number and one.pid:
                return f" by process {one.pid} ({psutil.Process(one.pid).name()})"
    return ""


def disk(folder: Path, need: int) -> finding.Row:
    """Whether ``folder`` takes writes, and has ``need`` bytes left."""
    probe = folder / PROBE
    try:
        storage.write_bytes(probe, bytes(PROBE_BYTES))
    except errors.StorageError as error:
        return finding.blocker("disk", str(error).partition(". ")[0], "free space, raise the quota or mend permissions")
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    told = f"{free / MIB:,.0f} MiB free at {folder}, about {need / MIB:,.0f} MiB needed"
    if free < need:
        return finding.blocker("disk", told, "free space, or put the state folder on a larger disk")
    if free < 2 * need:
        return finding.warning("disk", told, "watch it: logs and Flower's database grow")
    return finding.ok("disk", told)


def versions(others: Mapping[str, str]) -> list[finding.Row]:
    """This installation against what it was built for, and against others.

    Args:
        others: who -> its version of fedvfm.
    """
    own = metadata.version("fedvfm")
    found = [fault for one in metadata.requires("fedvfm") or () if (fault := _unmet(one))]
    rows = [
        finding.blocker("versions", fault, f"pip install 'fedvfm=={own}' into a fresh environment") for fault in found
    ]
    differing = {who: one for who, one in others.items() if one and one != own}
    if differing:
        told = ", ".join(f"{who} has {one}" for who, one in sorted(differing.items()))
        rows.append(finding.warning("versions", f"fedvfm {own} here; {told}", "install the same release at both ends"))
    return rows or [finding.ok("versions", f"fedvfm {own}, flwr {metadata.version('flwr')}")]


def _unmet(text: str) -> str:
    """What is wrong with Flower's version, on which the wire depends; pip looks after the others."""
    wanted = requirements.Requirement(text)
    if wanted.name != "flwr" or wanted.marker is not None:
        return ""
    try:
        have = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        return "flwr is not installed"
    if version.Version(have) in wanted.specifier:
        return ""
    return f"flwr {have} is installed; this release of fedvfm is for flwr {wanted.specifier}"


def private(folder: Path) -> finding.Row:
    """Whether everything below a state folder is its owner's alone."""
    found = [path for path in [folder, *_below(folder)] if _open(path)]
    if not found:
        return finding.ok("files", f"{folder} and all below it are their owner's alone")
    shown = ", ".join(f"{path} ({stat.S_IMODE(path.lstat().st_mode):04o})" for path in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    remedy = f"chmod -R go-rwx {folder}, and think about who may have read a key"
    return finding.blocker("files", f"open to others than their owner: {shown}{more}", remedy)


def _below(folder: Path) -> Iterable[Path]:
    return (path for path in sorted(folder.rglob("*")) if not path.is_symlink())


def _open(path: Path) -> bool:
    with contextlib.suppress(OSError):  # a file of a running server may go meanwhile
        return bool(stat.S_IMODE(path.lstat().st_mode) & 0o077)
    return False


def other_users(own: int | None = None) -> finding.Row:
    """Whether other people have accounts here that can log in."""
    mine = os.getuid() if own is None else own
    people = [one.pw_name for one in pwd.getpwall() if _person(one) and one.pw_uid != mine]
    if not people:
        return finding.ok("other-users", "nobody else has an account here")
    shown = ", ".join(people[:SHOWN]) + (f" and {len(people) - SHOWN} more" if len(people) > SHOWN else "")
    remedy = "use a machine, a virtual machine or a container of its own for the coordinator"
    return finding.warning("other-users", f"accounts that can log in here: {shown}", remedy)


def _person(one: pwd.struct_passwd) -> bool:
    idle = one.pw_shell.endswith(("nologin", "false", "sync")) or not one.pw_shell
    return 1000 <= one.pw_uid < 60000 and not idle


def alive(running: Mapping[str, int | None]) -> finding.Row:
    """Which of an end's processes run; none is as well as all."""
    away = [name for name, pid in running.items() if pid is None]
    if not away:
        return finding.ok("processes", "all run: " + ", ".join(running))
    if len(away) == len(running):
        return finding.ok("processes", "none runs; nothing was started yet")
    remedy = "they are started again by themselves; if they stay away, read their logs in the folder run/"
    return finding.warning("processes", f"not running: {', '.join(away)}", remedy)
