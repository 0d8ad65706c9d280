"""What the coordinator's live page costs: CPU of its process while a federation of many sites goes on, with it open.

python benchmarks/live_page.py --sites 20 --rounds 30 --round-s 10

The federation's files are written as a coordinator writes them, a line of the journal a round and five entries of the
audit log a site and round, at the pace that is asked for (a real round takes minutes; shorter ones cost more). Printed:
seconds of CPU of the page's process and its share of one core, with the page open and with nobody looking.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from fedvfm.runtime import page_server, processes
from fedvfm.server import live_page
from fedvfm.server import state_folder as enrolment
from fedvfm.server.coordinator import status_file
from fedvfm.server.rounds import journal as journals
from tests.server import numpy_sites


def federation(folder: Path, sites: int, rounds: int) -> enrolment.State:
    """A state folder with all sites approved, as far as a page sees."""
    from fedvfm.client import state_folder as joining

    names = tuple(f"site-{number:02d}" for number in range(sites))
    recipe = {"rounds": rounds, "backbone": {"name": "none", "sha256": numpy_sites.SHA}}
    locked = numpy_sites.lock(numpy_sites.make_recipe(**recipe))
    server = enrolment.init(folder / "server", enrolment.Plan("town", "127.0.0.1:8443", (), names), locked)
    for name in names:
        invite = joining.read_invite(server.invite_path(name), server.fingerprint())
        enrolment.approve(server, joining.join(folder / name, invite, locked.hash).request)
    return server


def line(number: int, names: list[str]) -> dict[str, Any]:
    """A round of the journal."""
    return {
        "round": number,
        "cohort": names,
        "refused": {},
        "train": {name: {"loss": 1.0 / number, "seconds": 30.0, "steps": 20.0} for name in names},
        "validation": {name: {"num_examples": 30, "dice": 1 - 1 / (number + 1)} for name in names},
        "bytes": {"up": 4_000_000, "down": 4_000_000},
        "seconds": 30.0,
        "ended": time.time(),
    }


def play(server: enrolment.State, sites: int, rounds: int, round_s: float) -> None:
    """Write what a coordinator writes."""
    recipe, run = server.about.recipe, server.folder / status_file.RUN
    names = [f"site-{number:02d}" for number in range(sites)]
    arm = server.run_path(recipe)
    arm.mkdir(parents=True, exist_ok=True)
    book, log, board = journals.Journal(arm / "journal.jsonl", recipe), server.audit, status_file.Board(run)
    for number in range(1, rounds + 1):
        board.write(status_file.ROUND, "", number, dict.fromkeys(names, "takes-part"))
        about = {"recipe": recipe, "round": number}
        for name in names:
            for kind in ("train", "evaluate"):
                log.record("sent", kind=kind, bytes=200_000, peer=name, **about)
                log.record("received", kind=kind, bytes=200_000, peer=name, **about)
            log.record("decided", kind="update", verdict="admitted", peer=name, **about)
            time.sleep(round_s / sites)
        book.append(line(number, names))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--round-s", type=float, default=10.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "server").mkdir(mode=0o700)
        server = federation(folder, given.sites, given.rounds)
        run = server.folder / status_file.RUN
        run.mkdir(mode=0o700)
        processes.write_pid(processes.pid_path(run, "coordinate"), processes.own_pid())
        family = processes.Family(run)
        with family.watched():
            page_server.start(family.start, run, live_page.__name__, str(server.folder))
            address = page_server.read_address(run)
            process = psutil.Process(family.children[page_server.NAME].process.pid)
            time.sleep(5)
            alone = process.cpu_times()
            time.sleep(10)
            idle = process.cpu_times()
            over = threading.Event()
            reader = threading.Thread(target=read, args=(address, over), daemon=True)
            reader.start()
            began, first = time.monotonic(), process.cpu_times()
            play(server, given.sites, given.rounds, given.round_s)
            last, wall = process.cpu_times(), time.monotonic() - began
            over.set()
            memory = process.memory_info().rss / 2**20
    nobody = idle.user + idle.system - alone.user - alone.system
    used = last.user + last.system - first.user - first.system
    print(f"{given.sites} sites, {given.rounds} rounds of {given.round_s:g} s: {used:.2f} s of CPU in {wall:.0f} s")
    print(f"share of a core with the page open: {used / wall:.2%}; nobody looking: {nobody / 10:.2%}; {memory:.0f} MiB")


def read(address: page_server.Address, over: threading.Event) -> None:
    """A browser's stream."""
    connection = http.client.HTTPConnection("127.0.0.1", address.port)
    connection.request("GET", f"/{address.token}/events")
    answer = connection.getresponse()
    with contextlib.suppress(OSError):
        while not over.is_set():
            text = answer.readline()
            if text.startswith(b"data: "):
                json.loads(text[6:])


if __name__ == "__main__":
    main()
