"""Faults of a hospital's machine in the middle of its training, and a reboot of every machine at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

import pytest

pytestmark = pytest.mark.slow
WORDS = {signal.SIGKILL: "SIGKILL", signal.SIGTERM: "SIGTERM"}
LEASE = "the coordinator took it for present for up to a minute more and refused it (code 2004), then let it in"


def test_every_process_of_a_site_is_ended_and_then_all_machines_reboot(
    federation: Any, table: Any, all_of: Any
) -> None:
    fed = federation(rounds=9)
    fed.start_all()
    fed.finished(1)
    for number in WORDS:
        executor_ended(fed, table, number)
    for number in WORDS:
        supernode_ended(fed, table, number)
    for number in WORDS:
        client_ended(fed, table, number)
    reboot(fed, table, all_of)
    fed.done()
    fed.whole()
    table.row("none", "an undisturbed round, the median", 0, fed.quiet())


def executor_ended(fed: Any, table: Any, number: int) -> None:
    """The process that trains, in the middle of it: what it had not finished is trained by the next one."""
    hurt, pid = fed.held("south")
    fed.faulted.add(hurt)
    before = fed.pid("south", "supernode")
    began = time.monotonic()
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    fed.anew("south", "executor", pid)
    fed.anew("south", "supernode", before)
    taken = fed.finished(hurt) - began
    happened = "started again with its SuperNode, which tells that it began anew; asked again, trained from the start"
    table.row(f"{WORDS[number]} of a site's executor while it trains", happened, 0, taken)


def supernode_ended(fed: Any, table: Any, number: int) -> None:
    """Flower's process at the site. The executor trains on and keeps what it made: asked again, it sends that."""
    hurt = fed.training("east")
    fed.faulted.add(hurt)
    began = time.monotonic()
    before = fed.hit("east", "supernode", number)
    fed.anew("east", "supernode", before)
    taken = fed.finished(hurt) - began
    happened = LEASE if number == signal.SIGKILL else "it signed off, came back at once"
    table.row(f"{WORDS[number]} of a site's SuperNode", f"{happened}; the update was sent, not trained again", 0, taken)


def client_ended(fed: Any, table: Any, number: int) -> None:
    """``fedvfm client start`` itself, and its processes with it."""
    hurt = fed.training("south")
    fed.faulted.add(hurt)
    began = time.monotonic()
    fed.started["south"].send_signal(number)
    fed.started["south"].wait(600)
    names = ("supernode", "executor")
    fed.until(lambda: not any(fed.pid("south", name) for name in names), "its processes ended with it")
    fed.start("south")
    taken = fed.finished(hurt) - began
    happened = "its processes ended with it, the SuperNode signed off; went on when `fedvfm client start` ran again"
    table.row(f"{WORDS[number]} of `fedvfm client start`", happened, 0, taken)


def reboot(fed: Any, table: Any, all_of: Any) -> None:
    """Every process of all three machines at once, when one of two updates is admitted; pid files and sockets go."""
    hurt, _ = fed.held("south")
    fed.faulted.add(hurt)
    fed.until(fed.received, "the update of east is admitted")
    began = time.monotonic()
    while pids := all_of(fed.folder):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for process in fed.started.values():
        process.wait(600)
    gone = [path for end in ("server", *fed.sites) for path in volatile(fed.run_folder(end).parent)]
    assert {path.name for path in gone} >= {"server.pid", "client.pid", "superlink.pid", "executor.pid"}
    for path in gone:
        path.unlink()
    assert len(fed.received()) == 1, "what was admitted is on disk"
    fed.start_all()
    taken = fed.finished(hurt) - began
    happened = (
        "all killed, pid and lock files and sockets removed, all three started again: the update that was admitted "
        "counted, the other site trained"
    )
    table.row("reboot of all machines (SIGKILL of everything)", happened, 0, taken)


def volatile(folder: Any) -> list[Any]:
    """What does not outlive a machine that is switched off: pid files, locks, sockets."""
    return [path for path in folder.rglob("*") if path.suffix in (".pid", ".lock") or path.is_socket()]
