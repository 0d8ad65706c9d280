"""Faults that may cost a site's round, and only that: a slow site, a full disk at a site and at the coordinator.

Here one of two sites is quorum enough, so that the other goes on alone; its round is then its own update, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
DEADLINE_S = 75.0
SITE_MIB, SERVER_MIB = 12, 48
FULL = "No space left on device"


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "fedvfm-test", str(folder)], capture_output=True, text=True
    )
    if made.returncode != 0:
        pytest.skip(f"a full disk needs a small one, and this user may not mount: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all space that is left; the file to remove later."""
    path = folder / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return path


def test_a_slow_site_and_full_disks(federation: Any, table: Any, tmp_path: Path) -> None:
    with small_disk(tmp_path / "a", SITE_MIB) as site, small_disk(tmp_path / "b", SERVER_MIB) as server:
        places = {"south": site, "server": server}
        fed = federation(rounds=96, settings=f"quorum = 1\nround_timeout_s = {DEADLINE_S}\n", places=places)
        fed.start_all()
        fed.until(lambda: whole(fed, 0), "a round with both sites", "server")
        slow(fed, table)
        site_full(fed, table, site)
        server_full(fed, table, server)
        finish(fed)
        ends(fed)
        fed.stop()


def whole(fed: Any, after: int) -> int:
    """The first round after one that has the updates of both sites; 0 if there is none yet."""
    found = [line["round"] for line in fed.journal() if line["round"] > after and len(line["examples"]) == 2]
    return found[0] if found else 0


def alone(fed: Any, after: int) -> list[int]:
    """Rounds after one that have no update of south."""
    return [line["round"] for line in fed.journal() if line["round"] > after and "south" not in line["examples"]]


def slow(fed: Any, table: Any) -> None:
    """A site that is not ready in time: its round is made without it, and it stops by itself."""
    hurt, pid = fed.held("south")
    began = time.monotonic()
    fed.finished(hurt)
    line = fed.journal()[hurt - 1]
    assert line["refused"]["south"]["reason"] in ("no-answer", "site-deadline", "site-away"), line["refused"]
    (own,) = [e for e in fed.entries("east", "trained") if e["round"] == hurt]
    assert line["fingerprint"] == own["fingerprint"], "what one site alone made is the new adapter, bit for bit"
    os.kill(pid, signal.SIGCONT)
    back = fed.until(lambda: whole(fed, hurt), "south takes part again", "server")
    taken = time.monotonic() - began
    late = fed.entries("south", "sent", round=hurt)
    # Where it was stopped after its last step it has an update, which comes too late; else it broke off at the next.
    assert late
    assert all(one["kind"] == "train" or one["reason"] == "deadline" for one in late), late
    why = line["refused"]["south"]["reason"]
    happened = f"not waited for (`{why}`) after the deadline of {DEADLINE_S:.0f} s; the site broke off"
    table.row("slow site, past the deadline", happened, len([n for n in alone(fed, hurt - 1) if n < back]), taken)


def site_full(fed: Any, table: Any, disk: Path) -> None:
    """What cannot be written down does not leave; the others go on."""
    after = fed.round()
    filler = fill(disk)
    fed.until(lambda: alone(fed, after), "a round without south", "server")
    _, east = fed.held("east")  # or the rounds would be over before the disk is free
    fed.until(lambda: FULL in fed.said("south"), "the site says that its disk is full", "server", "south")
    assert "Traceback" not in fed.said("south")
    lost = alone(fed, after)
    assert fed.journal()[lost[0] - 1]["examples"].keys() == {"east"}
    filler.unlink()
    freed = time.monotonic()
    os.kill(east, signal.SIGCONT)
    back = fed.until(lambda: whole(fed, max(alone(fed, after))), "south takes part again", "server")
    taken = time.monotonic() - freed
    missed = [n for n in alone(fed, after) if n < back]
    happened = "one line names the disk; what is not written down does not leave; from the freed disk"
    table.row("full disk at a site", happened, len(missed), taken)


def server_full(fed: Any, table: Any, disk: Path) -> None:
    """Nothing that is not on disk counts; the run waits and goes on by itself when there is room."""
    fed.training("east")
    after = fed.round()
    filler = fill(disk)
    began = time.monotonic()
    fed.until(lambda: FULL in fed.said("server"), "the server says that its disk is full", "server")
    told = time.monotonic() - began
    kept = fed.received()
    filler.unlink()
    freed = time.monotonic()
    fed.until(lambda: whole(fed, after + 1), "a round with both sites", "server")
    taken = time.monotonic() - freed
    assert "Traceback" not in fed.said("server")
    for name in kept:  # hex of the site's name after the round
        number, site = int(name[:5]), bytes.fromhex(name[6 : -len(".safetensors")]).decode()
        assert site in fed.journal()[number - 1]["examples"], "what was admitted counts"
    happened = f"told after {told:.0f} s; nothing counted that was not on disk; went on by itself; from the freed disk"
    missed = [n for n in alone(fed, after) if n <= fed.round()]
    table.row("full disk at the coordinator", happened, len(missed), taken)


def finish(fed: Any) -> None:
    """The coordinator's order to end after the round in hand: what is left of so many rounds would show no more."""
    answer = fed.discs.tiny.run("server", "finish", "--state", fed.server.folder)
    assert answer.code == 0, answer.err
    fed.done()
    assert fed.round() < fed.rounds


def ends(fed: Any) -> None:
    """All rounds are there, nobody trained one twice, logs are whole."""
    assert [line["round"] for line in fed.journal()] == list(range(1, fed.round() + 1))
    for site in fed.sites:
        counts = fed.trained(site)
        assert set(counts.values()) == {1}, f"{site} trained a round twice: {counts}"
    fed.sound()
