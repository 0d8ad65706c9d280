"""A process that has imported everything once and forks a child for every call of the command line.

A child is a process of its own: it runs the real entry point from its first line and can be killed at any moment. Only
the seconds of imports are shared. Reads one JSON object a line, answers with one line each.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import sys
from typing import Any

sys.argv = ["fedvfm"]

from fedvfm.cli import main as cli  # noqa: E402


def preload() -> None:
    import peft
    import torch
    import transformers

    import fedvfm.backbones.vit
    import fedvfm.inference.export
    import fedvfm.simulation.engines.in_process
    import fedvfm.simulation.results.pictures
    import fedvfm.simulation.results.report
    import fedvfm.simulation.run
    import fedvfm.tasks.segmentation

    assert all([peft, fedvfm, transformers.Dinov2Model])
    torch.set_num_threads(1)
    gc.freeze()


def child(call: dict[str, Any]) -> None:
    """Be the command line; never returns."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(call[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if call.get("limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (call["limit"], call["limit"]))
        os.environ.update(call["env"])
        sys.argv = ["fedvfm", *call["arguments"]]
        try:
            cli.main()
            code = 0
        except SystemExit as leave:
            code = int(leave.code or 0)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def main() -> None:
    preload()
    print("ready", flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        if "wait" in call:
            status = os.waitpid(call["wait"], 0)[1]
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            child(call)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
