"""Faults of the coordinator's machine: every process of it, by SIGKILL and SIGTERM, while sites train."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

pytestmark = pytest.mark.slow
WORDS = {signal.SIGKILL: "SIGKILL", signal.SIGTERM: "SIGTERM"}
DOWN_S = 30.0


def test_every_process_of_the_server_is_ended_and_nothing_admitted_is_lost(federation: Any, table: Any) -> None:
    fed = federation(rounds=12)
    fed.start_all()
    fed.finished(1)
    for name in ("superlink", "proxy"):
        for number in WORDS:
            ended(fed, table, name, number)
    for number in WORDS:
        coordinator_ended(fed, table, number)
    proxy_down(fed, table)
    for number in WORDS:
        supervisor_ended(fed, table, number)
    fed.done()
    fed.whole()
    table.row("none", "an undisturbed round, the median", 0, fed.quiet())


def ended(fed: Any, table: Any, name: str, number: int) -> None:
    """A child of the supervisor, while a site trains: it is started again, and the round goes on."""
    hurt = fed.training("east")
    fed.faulted.add(hurt)
    began = time.monotonic()
    before = fed.hit("server", name, number)
    fed.anew("server", name, before)
    back = time.monotonic() - began
    taken = fed.finished(hurt) - began
    assert f"{name} ended ({WORDS[number] if number == signal.SIGKILL else ''}" in fed.said("server")
    table.row(f"{WORDS[number]} of {name}", f"started again after {back:.0f} s; the round went on", 0, taken)


def coordinator_ended(fed: Any, table: Any, number: int) -> None:
    """The process of the ServerApp, when one of two updates is admitted: the other is asked for, this one is not."""
    hurt, south = fed.held("south")
    fed.faulted.add(hurt)
    kept = fed.until(fed.received, "the update of east is admitted")
    began = time.monotonic()
    before = fed.hit("server", "coordinate", number)
    os.kill(south, signal.SIGCONT)
    fed.anew("server", "coordinate", before)
    taken = fed.finished(hurt) - began
    assert len(kept) == 1
    happened = "resumed; the one of two updates that was on disk counted, nobody trained again"
    table.row(f"{WORDS[number]} of the ServerApp's process", happened, 0, taken)


def proxy_down(fed: Any, table: Any) -> None:
    """Killed as often as it is started, for half a minute."""
    hurt = fed.training("south")
    fed.faulted.add(hurt)
    began = time.monotonic()
    while time.monotonic() < began + DOWN_S:
        if fed.pid("server", "proxy"):
            fed.hit("server", "proxy", signal.SIGKILL)
        time.sleep(0.2)
    over = time.monotonic()
    fed.until(lambda: fed.pid("server", "proxy"), "the proxy is back")
    taken = fed.finished(hurt) - over
    table.row(f"proxy down for {DOWN_S:.0f} s", "sites waited; from the end of the outage", 0, taken)


def supervisor_ended(fed: Any, table: Any, number: int) -> None:
    """``fedvfm server start`` itself: all its processes end with it, and it goes on when it is started again."""
    hurt = fed.training("east")
    fed.faulted.add(hurt)
    began = time.monotonic()
    fed.started["server"].send_signal(number)
    fed.started["server"].wait(600)
    names = ("superlink", "proxy", "coordinate")
    fed.until(lambda: not any(fed.pid("server", name) for name in names), "its processes ended with it")
    fed.start("server")
    taken = fed.finished(hurt) - began
    happened = "all its processes ended; went on when `fedvfm server start` ran again (systemd does that)"
    table.row(f"{WORDS[number]} of `fedvfm server start`", happened, 0, taken)
