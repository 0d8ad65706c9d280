"""The coordinator steers a running federation by the real commands: every order of one, on real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedvfm.audit import audit
from fedvfm.client import state_folder as joining
from fedvfm.client.gate import policy
from fedvfm.model import locking
from fedvfm.runtime import processes
from fedvfm.server import state_folder as enrolment
from fedvfm.storage import hash_chain

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
LONG = 900.0


class Federation:
    """A server in the background and the clients of its sites."""

    def __init__(self, tiny: Any, folder: Path, until: Callable[..., bool], rounds: int = 5000) -> None:
        self.tiny, self.folder, self._until = tiny, folder, until
        self.state = folder / "server"
        self.sites: dict[str, joining.State] = {}
        self.clients: dict[str, subprocess.Popen[bytes]] = {}
        locked = locking.open_recipe(self.recipe("first", rounds=rounds))
        address = f"127.0.0.1:{processes.free_port()}"
        self.server = enrolment.init(self.state, enrolment.Plan("steered", address, (), ("east", "south")), locked)
        self.policy = policy.accepting(policy.Facts.of(locked)).replace("units = 10", "units = 1")
        (folder / "server.toml").write_text("quorum = 1\njoin_timeout_s = 600.0\nround_timeout_s = 600.0\n")

    def recipe(self, name: str, **values: int) -> Path:
        text = self.tiny.recipe.replace("rounds = 3\n", "", 1).replace("surface = false", "surface = false\nevery = 0")
        path = self.folder / f"{name}.toml"
        path.write_text("".join(f"{key} = {value}\n" for key, value in values.items()) + text)
        return path

    def enrol(self, name: str) -> None:
        invite = joining.read_invite(self.server.invite_path(name), self.server.fingerprint())
        self.sites[name] = joining.join(self.folder / name, invite, invite.lock.hash)
        enrolment.approve(self.server, self.sites[name].request)
        (self.folder / f"{name}.toml").write_text(self.tiny.site(name) + self.policy)

    def connect(self, name: str) -> None:
        with (self.folder / f"{name}.txt").open("wb") as words:
            self.clients[name] = subprocess.Popen(
                self.tiny.command("client", "start", f"{name}.toml", "--state", name),
                cwd=self.folder,
                env=self.tiny.environment(),
                stdout=words,
                stderr=words,
            )

    def order(self, verb: str, *words: str | Path) -> dict[str, Any]:
        """A verb of the coordinator's."""
        answer = self.tiny.run("server", verb, *words, "--state", self.state, "--json")
        assert answer.code == 0, answer.err + self.said()
        found: dict[str, Any] = json.loads(answer.out)
        return found

    def status(self) -> dict[str, Any]:
        from fedvfm.server import status

        return status.of(enrolment.open_state(self.state))

    def wait(self, true: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def look() -> bool:
            found.clear()
            found.update(self.status())
            return bool(true(found)) or found["processes"]["server"] is None

        assert self._until(look, LONG), self.said()
        assert found["processes"]["server"] is not None, self.said()
        return found

    def lines(self, recipe: str = "") -> list[dict[str, Any]]:
        path = self.server.run_path(recipe or self.status()["recipe"]) / "journal.jsonl"
        return hash_chain.read(path)

    def wait_cohort(self, *sites: str) -> None:
        """Until a round ended that asked these sites."""
        assert self._until(lambda: self.lines() and self.lines()[-1]["cohort"] == list(sites), LONG), self.said()

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """A site that has begun to train stands still, so that no round ends, however long the block takes."""
        log = self.sites[name].audit

        def trains() -> bool:
            return any(row["event"] == "decided" and row.get("kind") == "train" for row in log.entries)

        assert self._until(trains, LONG), self.said()
        executor = processes.running(processes.pid_path(self.sites[name].folder / "run", "executor"))
        assert executor is not None, self.said()
        os.kill(executor, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(executor, signal.SIGCONT)

    def approve(self, name: str, recipe: str) -> None:
        where = self.sites[name]
        assert self._until(lambda: recipe in where.seen(), LONG), self.said()
        joining.approve(where, where.find(recipe))

    def said(self) -> str:
        logs = [self.state / "run" / "server.log", self.state / "run" / "coordinate.log", *self.folder.glob("*.txt")]
        return "\n".join(f"--- {path}\n{path.read_text()[-4000:]}" for path in logs if path.exists())

    def close(self) -> None:
        for client in self.clients.values():
            client.terminate()
        self.tiny.run("server", "stop", "--state", self.state)
        for client in self.clients.values():
            client.wait(300)


@pytest.fixture
def running(tiny: Any, tmp_path: Path, until: Callable[..., bool]) -> Iterator[Federation]:
    made = Federation(tiny, tmp_path, until)
    yield made
    made.close()


def test_a_federation_is_steered_from_its_first_round_to_its_last(running: Federation) -> None:
    for name in ("east", "south"):
        running.enrol(name)
        running.connect(name)
    told = running.order("start", "--config", running.folder / "server.toml", "--detach", "--stay")
    assert (told["address"], told["finished"]) == (running.server.about.address, False)
    again = running.tiny.run("server", "start", "--state", running.state, "--detach")
    running.tiny.one_error(again, 6, "the server did not start", "runs already")
    running.wait_cohort("east", "south")
    first = running.server.about.recipe

    # A third site is invited, approved and connected while rounds run.
    running.order("invite", "north")
    running.enrol("north")
    running.connect("north")
    running.wait_cohort("east", "north", "south")

    # No round while it is paused; the one in hand ended first.
    running.order("pause")
    paused = running.wait(lambda found: found["phase"] == "paused")
    assert paused["reason"].startswith("paused by ")
    assert paused["finished_rounds"] == len(running.lines())
    assert running.order("resume") == {"resumed": True}
    running.wait(lambda found: found["finished_rounds"] > paused["finished_rounds"])

    # A site that is dropped is asked no more; its client stays.
    running.order("drop", "south")
    running.wait_cohort("east", "north")
    rows = running.status()["sites"]
    on_roster = {name: row["roster"] for name, row in rows.items()}
    assert on_roster == {"east": "approved", "north": "approved", "south": "dropped"}
    assert running.clients["south"].poll() is None

    # Another recipe arrives over TLS; nobody computes for it before a person at his site approved it.
    later = running.order("recipe", running.recipe("later", rounds=4000, seed=5), "--now")["recipe"]
    waits = running.wait(lambda found: found["pending"] == ["east", "north"])
    assert (waits["recipe"], waits["phase"], waits["finished_rounds"]) == (later, "waiting", 0)
    assert "east (approval-pending), north (approval-pending)" in waits["reason"]
    assert running.lines(first), "what was done of the other one is kept"
    word = f"refused: handshake of recipe {later[:12]}: approval-pending"
    assert running._until(lambda: word in (running.folder / "east.txt").read_text(), LONG), "its people read why"
    for name in ("east", "north"):
        running.approve(name, later)
    running.wait_cohort("east", "north")
    assert running.lines()[0]["recipe"] == later

    # The key of a revoked site is worth nothing from now on.
    running.order("revoke", "north")
    running.wait_cohort("east")

    # Stopped early: the final test, and what the site says of the adapter.
    running.order("finish")
    done = running.wait(lambda found: found["finished"])
    found = json.loads((running.server.run_path(later) / "evaluation.json").read_text())
    assert found["round"] == done["finished_rounds"] == len(running.lines(later)) < 4000
    assert set(found["last"]["sites"]) == {"east"}
    assert set(found["acceptance"].values()) <= {"accepted", "declined", "pending"}

    # More rounds are another recipe, which goes on from that adapter once the site approved it.
    longer = running.order("extend", "--rounds", "1")["recipe"]
    running.approve("east", longer)
    running.wait(lambda found: found["recipe"] == longer and found["finished"])
    (line,) = running.lines(longer)
    assert line["cohort"] == ["east"]
    ends = enrolment.open_state(running.state).locked()
    assert ends.initial == ends.recipe.start == found["fingerprint"]

    # It stays for a further recipe until it is told to end; what it did is in its audit log.
    assert running.wait(lambda found: found["phase"] == "finished")["processes"]["proxy"] is not None
    assert running.order("stop") == {"stopped": True}
    assert set(running.status()["processes"].values()) == {None}
    kinds = [entry["kind"] for entry in running.server.audit.entries if entry["event"] == "steered"]
    assert kinds == ["pause", "resume", "drop", "recipe", "finish", "extend", "recipe"]
    for folder in (running.state, *(where.folder for where in running.sites.values())):
        assert audit.verify(folder / "audit.jsonl")["unfinished"] == 0


def test_a_rerun_without_a_site_that_withdrew_ends_as_if_it_had_never_been(
    tiny: Any, tmp_path: Path, until: Callable[..., bool]
) -> None:
    """Two federations of the same recipe on real processes: one where a third site came and withdrew, one without."""
    ends: dict[str, str] = {}
    for name in ("with", "never"):
        (tmp_path / name).mkdir()
        town = Federation(tiny, tmp_path / name, until, rounds=8)
        try:
            ends[name] = _to_the_end(town, third=name == "with")
        finally:
            town.close()
    assert ends["with"] == ends["never"]


def _to_the_end(town: Federation, *, third: bool) -> str:
    """Fingerprint of the final adapter."""
    first, there = town.server.about.recipe, {"takes-part"}
    for name in ("east", "south"):
        town.enrol(name)
        town.connect(name)
    town.order("start", "--config", town.folder / "server.toml", "--detach", "--stay")
    if third:
        with town.held("east"):
            town.order("pause")
        before = town.wait(lambda found: found["phase"] == "paused")["finished_rounds"]
        town.order("invite", "north")
        town.enrol("north")
        town.connect("north")
        town.wait(lambda found: {row["state"] for row in found["sites"].values()} == there)
        town.order("resume")
        town.wait(lambda found: found["finished"])
        assert [line["cohort"] for line in town.lines(first)].index(["east", "north", "south"]) == before
        assert 0 < before < 8, "it came between two rounds"
        told = town.order("withdraw", "north", "--rerun")
        assert told["rerun_after"] == before
        assert told["withdrawal"]["touched"][0]["rounds"] == list(range(before + 1, 9))
        for name in ("east", "south"):
            town.approve(name, told["recipe"])
        town.wait(lambda found: found["recipe"] == told["recipe"] and found["finished"])
        assert [line["cohort"] for line in town.lines()] == [["east", "south"]] * 8
        assert town.status()["sites"]["north"]["state"] == "withdrawn"
    else:
        town.wait(lambda found: found["finished"])
    return str(town.lines()[-1]["fingerprint"])
