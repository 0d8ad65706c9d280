"""A process that has imported everything once and forks a child for every call.

A child is a process of its own: it has its own number, arguments, environment, folder and streams, runs the real entry
point from its first line and can be killed at any moment. Only the seconds of imports are shared: when a child begins,
its memory is that of a new interpreter that has imported what :func:`preload` lists. Nothing was computed before, no
thread was started (checked below), no random number drawn, no connection or file opened, and no key was ever read.

Requests come over a socket: a line of JSON, with the child's streams as file descriptors; each is answered by a line.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

LONGEST = 1 << 20
STREAMS = 3


def preload() -> None:
    """Import what most commands import."""
    import peft
    import torch
    import transformers

    import fedvfm.backbones.vit
    import fedvfm.cli.main
    import fedvfm.client.dry_run
    import fedvfm.inference.export
    import fedvfm.inference.predict
    import fedvfm.server.supervisor
    import fedvfm.simulation.engines.in_process
    import fedvfm.simulation.engines.workers
    import fedvfm.simulation.results.pictures
    import fedvfm.simulation.results.report
    import fedvfm.simulation.run
    import fedvfm.tasks.segmentation

    assert all([peft, fedvfm, transformers.Dinov2Model])
    torch.set_num_threads(1)


def child(call: dict[str, Any], streams: list[int], asked: socket.socket) -> None:
    """Be what was asked for; never returns."""
    asked.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if call["session"]:
        os.setsid()
    if call["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (call["limit"], call["limit"]))
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    sys.argv = ["fedvfm", *call["arguments"]]
    os._exit(_leave(_run()))


def _run() -> int:
    """The exit code of the real entry point."""
    from fedvfm.cli import main as cli

    try:
        cli.main()
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        print(leave.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _leave(code: int) -> int:
    """What an interpreter does at its end."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    return code


def main(number: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = socket.socket(fileno=int(number))
    preload()
    gc.collect()
    gc.freeze()
    threads = len(list(Path("/proc/self/task").iterdir())) if Path("/proc/self/task").exists() else 1
    assert threads == threading.active_count() == 1, f"{threads} threads: a fork of this process is not safe"
    asked.sendall(b"ready\n")
    while True:
        line, streams, _, _ = socket.recv_fds(asked, LONGEST, STREAMS)
        if not line:
            return
        while not line.endswith(b"\n"):
            line += asked.recv(LONGEST)
        call = json.loads(line)
        if "wait" in call:
            answer = os.waitstatus_to_exitcode(os.waitpid(call["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            child(call, streams, asked)
        for stream in streams:
            os.close(stream)
        asked.sendall(b"%d\n" % answer)


if __name__ == "__main__":
    main(sys.argv[1])
