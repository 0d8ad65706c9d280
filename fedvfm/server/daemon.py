"""``fedvfm server start --detach``: the same command in the background, told of as soon as it listens."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.runtime import processes
from fedvfm.storage import storage

LOG = "server"
MARK = "listening.json"
PATIENCE_S = 300.0
"""More than SuperLink and proxy are waited for in the background."""


def announce(folder: Path, address: str) -> None:
    """Say, in the folder of the server's processes, that this process listens."""
    storage.write_text(folder / MARK, json.dumps({"pid": processes.own_pid(), "address": address}) + "\n")


def silence(folder: Path) -> None:
    """The inverse of :func:`announce`."""
    (folder / MARK).unlink(missing_ok=True)


def command(state: Path, options: Sequence[str], *, stay: bool) -> tuple[str, ...]:
    """The command that runs this server in the foreground."""
    words = ["--state", str(state.absolute()), *options, *(["--stay"] if stay else [])]
    return processes.module("fedvfm.cli", "server", "start", *words)


def launch(folder: Path, command: tuple[str, ...], patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """Start a server in a session of its own, which outlives this process and its terminal; return when it listens.

    Args:
        folder: of the server's processes; its log goes there.
        command: that runs it in the foreground.
        patience_s: how long it is waited for.

    Returns: ``pid``, ``address``, ``log``, and ``finished`` where there was nothing left to do.

    Raises:
        EngineError: with the text and the codes of the error it ended with, if it does not listen; it was ended then.
    """
    with storage.guard(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    path = processes.log_path(folder, LOG)
    log = processes.open_log(path)
    try:
        failed = processes.error_path(folder, LOG)
        environment = {**os.environ, processes.ERROR_FILE: str(failed)}
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    finally:
        os.close(log)
    told = {"pid": child.pid, "log": str(path)}
    try:
        deadline = time.monotonic() + patience_s
        while child.poll() is None and time.monotonic() < deadline:
            if (address := _listens(folder, child.pid)) is not None:
                child.returncode = 0  # it is let go, and goes on; Python would warn of it
                return {**told, "address": address, "finished": False}
            time.sleep(0.1)
        if child.returncode == 0:
            return {**told, "address": "", "finished": True}
    except BaseException:
        _end(child)
        raise
    code = child.poll()
    _end(child)
    if code is None:
        raise errors.EngineError(f"the server does not listen after {patience_s:g} s and was ended. Its log: {path}")
    raise processes.read_failure(failed, child.pid, code).error(f"the server did not start (log: {path})")


def _listens(folder: Path, pid: int) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return str(found["address"]) if found["pid"] == pid else None
    return None


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(30)
        child.kill()
        child.wait()
