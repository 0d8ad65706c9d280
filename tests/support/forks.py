"""Real processes of the command line without the seconds of start-up: forked from one that has imported everything.

What the template is, and why a child of it is a process like any other, stands in :mod:`tests.support.template`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PIPE_BYTES = 1 << 20
F_SETPIPE_SZ = 1031


class Answer(NamedTuple):
    """What one call of the command line gave; one that a signal ended has its negative number as code."""

    code: int
    out: str
    err: str


class Forked:
    """A child of the template, with the part of :class:`subprocess.Popen` that tests use.

    Attributes:
        pid: number of the process; not another's before its end was seen here.
        returncode: None until then.
    """

    def __init__(self, template: Template, pid: int, out: int, err: int) -> None:
        self._template, self.pid, self._handle = template, pid, os.pidfd_open(pid)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._ended(0)

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None and select.select([self._handle], [], [], seconds)[0]:
            self.returncode = self._template.ask({"wait": self.pid})
            os.close(self._handle)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended; its exit code."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it runs still."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it prints from now on, until its end."""
        texts = ["", ""]

        def read(at: int, stream: Any) -> None:
            with stream:
                texts[at] = stream.read()

        readers = [
            threading.Thread(target=read, args=(at, stream), daemon=True)
            for at, stream in enumerate((self.stdout, self.stderr))
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return texts[0], texts[1]

    def answer(self, timeout: float | None = None) -> Answer:
        """All of it, when it has ended; one that takes longer is killed."""
        try:
            out, err = self.communicate(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return Answer(self.wait(), out, err)


class Template:
    """The process that forks; it starts with the first call, and several threads may ask it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._lock = threading.Lock()

    def _started(self) -> socket.socket:
        if self._process is None:
            ours, theirs = socket.socketpair()
            fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
            kept = {key: value for key, value in os.environ.items() if not key.startswith(("FEDVFM_", "RAY_", "COV_"))}
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("template.py")), str(theirs.fileno())],
                env=kept | fixed,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            theirs.close()
            self._socket, self._lines = ours, ours.makefile("rb")
        return self._socket

    @property
    def pid(self) -> int:
        """Its number, once it was started."""
        assert self._process is not None
        return self._process.pid

    def begin(self) -> None:
        """Start it without waiting until it is ready."""
        with self._lock:
            self._started()

    def wait_ready(self) -> None:
        """Until everything is imported."""
        with self._lock:
            self._started()
            self._greeted()

    def _greeted(self) -> None:
        if not self._ready:
            assert self._lines.readline() == b"ready\n", "the template could not be loaded; see its words above"
            self._ready = True

    def ask(self, call: Mapping[str, Any], streams: tuple[int, ...] = ()) -> int:
        """Send a request and its streams; the number that answers it."""
        with self._lock:
            connection = self._started()
            self._greeted()
            socket.send_fds(connection, [json.dumps(call).encode() + b"\n"], list(streams))
            return int(self._lines.readline())

    def start(
        self,
        *arguments: str | Path,
        folder: Path,
        environment: Mapping[str, str],
        limit: int = 0,
        start_new_session: bool = False,
        terminal: int | None = None,
    ) -> Forked:
        """Begin one call of the command line.

        Args:
            arguments: of the command line.
            folder: it works in.
            environment: all of it.
            limit: RLIMIT_FSIZE in bytes, 0 for none.
            start_new_session: whether it leads a group of its own.
            terminal: what it writes its errors to, in place of a pipe; stays the caller's.
        """
        call = {
            "arguments": [str(word) for word in arguments],
            "folder": str(folder),
            "environment": dict(environment),
            "limit": limit,
            "session": start_new_session,
        }
        with contextlib.ExitStack() as closing:

            def pipe() -> tuple[int, int]:
                read, write = os.pipe()
                closing.callback(os.close, write)
                with contextlib.suppress(OSError):  # what nobody reads yet stops nobody
                    fcntl.fcntl(write, F_SETPIPE_SZ, PIPE_BYTES)
                return read, write

            nothing = os.open(os.devnull, os.O_RDONLY)
            closing.callback(os.close, nothing)
            out, write_out = pipe()
            err, write_err = pipe() if terminal is None else (os.dup(nothing), terminal)
            return Forked(self, self.ask(call, (nothing, write_out, write_err)), out, err)

    def close(self) -> None:
        if self._process is not None:
            self._lines.close()
            self._socket.close()
            self._process.wait(timeout=30)
