"""A coordinator's machine that stands still for a while: a suspended virtual machine, a process that was stopped."""

from __future__ import annotations

import functools
import os
import signal
import time
from typing import Any

import pytest

pytestmark = pytest.mark.slow
FROZEN_S = 45.0
"""Longer than a SuperNode waits for the next part of a message."""
SUSPENDED_S = 75.0
"""Longer than a SuperLink takes a silent SuperNode, or the holder of its task, for present."""
DEADLINE_S = 600.0
ALL = ("server", "coordinate", "superlink", "proxy")


def test_a_coordinator_that_stood_still_goes_on_with_its_round(federation: Any, table: Any) -> None:
    fed = federation(rounds=14, settings=f"round_timeout_s = {DEADLINE_S}\n")
    fed.start_all()
    fed.finished(1)
    still_while_it_sends(fed, table, ("coordinate",), "ServerApp's process stands still")
    still_while_it_sends(fed, table, ALL, "the coordinator's machine stands still")
    suspended(fed, table)
    fed.done()
    fed.whole()
    table.row("none", "an undisturbed round, the median", 0, fed.quiet())


def still_while_it_sends(fed: Any, table: Any, names: tuple[str, ...], fault: str) -> None:
    """Processes that stop between a message's head and its parts; sites have half of it, or an old question is open."""
    pids, hurt = caught(fed, names)
    fed.faulted.add(hurt)
    time.sleep(FROZEN_S)
    taken = wake(fed, pids, hurt)
    happened = "sites got the rest, or gave the message up and were asked again; from its waking"
    table.row(f"{fault} for {FROZEN_S:.0f} s in the middle of a message", happened, 0, taken)


def wake(fed: Any, pids: list[int], hurt: int) -> float:
    """Let processes go on; seconds until the round is finished, which is long before its deadline."""
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    woke = time.monotonic()
    taken: float = fed.finished(hurt) - woke
    assert taken < DEADLINE_S / 4, "sites came back by themselves"
    return taken


def caught(fed: Any, names: tuple[str, ...]) -> tuple[list[int], int]:
    """Processes stopped while a site has begun to receive a message and not all of it; and the round."""
    while fed.round() < 9:
        number, begun = fed.round(), receiving(fed)
        pids = processes_of(fed, names)
        fed.until(functools.partial(more, fed, begun), "a site receives a message", "server", every=0.001)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        if halves(fed):
            return pids, fed.round() + 1
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        fed.finished(number + 1)
    raise AssertionError("never met in the middle of a message")


def processes_of(fed: Any, names: tuple[str, ...]) -> list[int]:
    return [fed.started["server"].pid if name == "server" else fed.pid("server", name) for name in names]


def logs(fed: Any) -> list[str]:
    return [(fed.run_folder(site) / "supernode.log").read_text(errors="replace") for site in fed.sites]


def receiving(fed: Any) -> int:
    """Messages that sites have begun to receive."""
    return sum(text.count("Receiving: ") for text in logs(fed))


def halves(fed: Any) -> int:
    """Those of them that sites neither have whole nor gave up."""
    over = ("Received successfully", "Failed to receive", "Ignoring message")
    return receiving(fed) - sum(text.count(word) for text in logs(fed) for word in over)


def more(fed: Any, begun: int) -> bool:
    return receiving(fed) > begun


def suspended(fed: Any, table: Any) -> None:
    """All processes of the coordinator's machine, while a site trains."""
    hurt = fed.training("east")
    fed.faulted.add(hurt)
    pids = processes_of(fed, ALL)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(SUSPENDED_S)
    taken = wake(fed, pids, hurt)
    happened = "sites were there again by themselves, what they had trained counted; from its waking"
    table.row(f"the coordinator's machine stands still for {SUSPENDED_S:.0f} s", happened, 0, taken)
