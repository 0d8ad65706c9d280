"""A federation of two hospitals by the real commands: approval waited for, kills, and nothing trained twice."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedvfm import audit, chain, errors, locking, processes, witness
from fedvfm.client import joining, policy
from fedvfm.server import enrolment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
SITES = ("east", "south")


@dataclass
class Two:
    """A federation of two sites, joined and approved."""

    tiny: Any
    folder: Path
    server: enrolment.State
    sites: dict[str, joining.State]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """A real command, its words in a file."""
        with (self.folder / f"{arguments[0]}-{len(self.started)}.txt").open("w") as words:
            process = subprocess.Popen(
                self.tiny.command(*arguments),
                cwd=self.folder,
                env=self.tiny.environment(environment),
                stdout=words,
                stderr=words,
                text=True,
            )
        self.started.append(process)
        return process

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("server-*.txt")))

    def log(self) -> list[dict[str, Any]]:
        path = self.server.folder / "run" / "coordinate.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["event"] == name]

    def trained(self, site: str) -> list[int]:
        return [entry["round"] for entry in self.sites[site].audit.entries if entry["event"] == "trained"]


@pytest.fixture
def two(tiny: Any, tmp_path: Path) -> Iterator[Two]:
    text = tiny.experiment.read_text()
    recipe = text[text.index("[recipe]") :].replace("[recipe]\n", "", 1).replace("[recipe.", "[")
    (tmp_path / "recipe.toml").write_text(recipe)
    locked, initial = locking.open_recipe(tmp_path / "recipe.toml")
    plan = enrolment.Plan("tiny", f"127.0.0.1:{processes.free_port()}", (), SITES)
    server = enrolment.init(tmp_path / "server", plan, locked, initial)
    joined = {}
    for site in SITES:
        invite = joining.read_invite(server.invite_path(site), server.fingerprint())
        joined[site] = joining.join(tmp_path / site, invite, locked.hash)
        enrolment.approve(server, joined[site].request)
        own = f'name = "{site}"\ninclude = ["{site}"]\n[data]\nsource = "folder"\npath = "{tiny.data}"\n'
        allowed = policy.accepting(policy.Facts.of(locked)).replace("min_samples = 10", "min_samples = 1")
        (tmp_path / f"{site}.toml").write_text(own + allowed)
    made = Two(tiny, tmp_path, server, joined)
    yield made
    for process in made.started:
        process.terminate()
    for process in made.started:
        process.wait(60)


def test_two_hospitals_an_approval_and_kills(two: Two, until: Any) -> None:
    hash_ = two.server.about.recipe
    joining.withdraw(two.sites["south"], hash_)
    clients = {site: two.start("client", "start", f"{site}.toml", "--state", site) for site in SITES}
    # The coordinator's process is killed each time it has written the third update since its start.
    crash = {"FEDVFM_FAULT_POINT": "update-kept:3"}
    server = two.start("server", "start", "--state", "server", **crash)

    # A person has not approved: the server says so and waits; the site keeps what it decided.
    assert until(lambda: any("'south' waits for a person's approval" in e["text"] for e in two.events("note")), 600)
    assert two.trained("south") == []
    refused = [e for e in two.sites["south"].audit.entries if e["event"] == "decided" and e["verdict"] == "refused"]
    assert refused[0]["reason"] == "approval-pending"

    # The public port, meanwhile: nothing of Control or Runtime, and no node without its key.
    context = ssl.create_default_context(cafile=two.sites["east"].authority)
    with httpx.Client(base_url=f"https://{two.server.about.address}", verify=context, trust_env=False) as stranger:
        proto = {"content-type": "application/protobuf"}
        assert stranger.post("/v1/control/list-nodes", headers=proto).status_code == 403
        assert stranger.post("/v1/runtime/acquire-task", headers=proto).status_code == 403
        assert stranger.get("/openapi.json").status_code == 403
        assert stranger.post("/v1/fleet/pull-messages", headers=proto).status_code == 401
        assert stranger.get("/health").status_code == 200
    refusals = (two.server.folder / "run" / "refused.jsonl").read_text()
    assert '"control"' in refusals
    assert '"runtime"' in refusals

    joining.approve(two.sites["south"], two.sites["south"].find(hash_))
    assert until(lambda: len(two.trained("south")) >= 2 and len(two.trained("east")) >= 2, 600), two.said()

    # Everything of the server is killed, as by a reboot, and started again.
    server.kill()
    server.wait()
    run = two.server.folder / "run"
    assert until(lambda: not any(processes.running(path) for path in run.glob("*.pid")), 60)
    executor = processes.running(processes.pid_path(two.folder / "east" / "run", "executor"))
    assert executor is not None
    os.kill(executor, signal.SIGKILL)
    server = two.start("server", "start", "--state", "server", **crash)
    assert until(lambda: server.poll() is not None, 900), two.said()
    assert server.returncode == 0, two.said()

    journal = two.tiny.lines(two.server.folder / "runs" / hash_ / "journal.jsonl")
    assert [line["round"] for line in journal] == [1, 2, 3]
    assert all(line["cohort"] == list(SITES) and not line["refused"] for line in journal)
    assert not list((two.server.folder / "runs" / hash_ / "received").glob("*"))
    for site in SITES:
        assert two.trained(site) == [1, 2, 3], f"{site} trained a round twice"
        assert audit.verify(two.folder / site / "audit.jsonl")["unfinished"] == 0
        assert clients[site].poll() is None, "the client waits for what comes next"
    answer = two.tiny.run("client", "stop", "--state", two.folder / "east", "--json")
    assert json.loads(answer.out) == {"stopped": True}
    found = json.loads(two.tiny.run("server", "status", "--state", two.server.folder, "--json").out)
    assert (found["finished_rounds"], found["finished"]) == (3, True)
    assert found["processes"] == {"server": None, "superlink": None, "proxy": None, "coordinate": None}
    check_audit(two)


def check_audit(two: Two) -> None:
    """Both logs are whole and fit each other; nobody can change one so that the other end does not see it."""
    verified = two.tiny.run("audit", "verify", two.folder / "east", "--against", two.server.folder, "--json")
    found = json.loads(verified.out)
    assert verified.code == 0, verified.err
    assert found["checked"] >= 8, "marks of the site's log that the coordinator holds"
    assert found["agreed"] > found["checked"], "marks the other way, and every message"
    peer = found["peers"]["tiny"]
    assert (peer["messages"], peer["back"]) == (peer["marked"], []), "every message of the coordinator had its mark"

    entries = two.server.audit.entries
    refused = {entry["reason"]: entry for entry in entries if entry["event"] == "refused"}
    assert {"control", "runtime", "openapi", "key"} <= set(refused)
    assert all(entry["address"] == "127.0.0.1" and entry["count"] >= 1 for entry in refused.values())
    peers = witness.peers(entries, "server")
    assert set(peers) == set(SITES)
    assert all(row["marked"] == row["messages"] for row in peers.values()), "refusals too"

    left = json.loads(two.tiny.run("audit", "show", two.folder / "south", "--sent", "--json").out)
    assert (left["totals"]["updates"], left["owner"]) == (3, "south")
    assert left["totals"]["kinds"]["train"] == 3 + left["totals"]["repeated"]
    assert left["totals"]["bytes"] == sum(row["bytes"] for row in left["messages"])
    journal = two.tiny.lines(two.server.folder / "runs" / two.server.about.recipe / "journal.jsonl")
    assert set(journal[0]["train"]["south"]) <= set(left["totals"]["metrics"])
    received = [entry for entry in entries if entry["event"] == "received" and entry["peer"] == "south"]
    came = {entry["fingerprint"] for entry in received if "fingerprint" in entry}
    assert {row["fingerprint"] for row in left["messages"] if "numbers" in row} == came, "what left is what came"
    check_tampering(two)


def chained(path: Path, rows: list[dict[str, Any]]) -> None:
    """A log made anew of these entries: every hash in it is right."""
    path.unlink(missing_ok=True)
    made = chain.Chain(path)
    for row in rows:
        made.append({key: value for key, value in row.items() if key not in ("prev", "hash")})


def check_tampering(two: Two) -> None:
    """Each way to change a log, at either end, on a copy; found by the chain, the other log, or a receipt."""
    paths = {"site": two.folder / "east" / "audit.jsonl", "server": two.server.audit_path}
    receipt = two.folder / "receipt.json"
    made = two.tiny.run("audit", "receipt", two.server.folder, "--output", receipt, "--peer", "east", "--json")
    assert [one["owner"] for one in json.loads(made.out)["heard"]] == ["east"]
    for end, other in (("site", "server"), ("server", "site")):
        path, copy = paths[end], two.folder / f"{end}-copy.jsonl"
        lines, rows = path.read_bytes().splitlines(keepends=True), audit.read(path)
        middle = next(n for n, row in enumerate(rows) if n > len(rows) // 2 and row["event"] == "received")
        inner = {
            "edit": [*lines[:middle], lines[middle].replace(b'"bytes":', b'"bytes":1'), *lines[middle + 1 :]],
            "deletion": [*lines[:middle], *lines[middle + 1 :]],
            "swap": [*lines[:middle], lines[middle + 1], lines[middle], *lines[middle + 2 :]],
        }
        for changed in inner.values():
            copy.write_bytes(b"".join(changed))
            with pytest.raises(errors.AuditError, match=f"line {middle + 1} does not continue the chain"):
                audit.verify(copy)
        last_told = max(note.length for _, note in witness.marks(audit.read(paths[other]), rows[0]["owner"], other))
        whole_again = {
            "truncated": (rows[: last_told - 1], "it was truncated or rolled back"),
            "rolled back": (rows[:middle], "it was truncated or rolled back"),
            "rewritten": ([*rows[:middle], {**rows[middle], "bytes": 7}, *rows[middle + 1 :]], "the log was rewritten"),
        }
        for forged, said in whole_again.values():
            chained(copy, forged)
            audit.verify(copy)
            with pytest.raises(errors.AuditError, match=said):
                witness.log(paths[other], audit.read(copy), str(copy))
            with pytest.raises(errors.AuditError, match=said):
                witness.log(copy, audit.read(paths[other]), str(paths[other]))
            if end == "site":  # the hospital's own log and the coordinator's receipt are enough
                with pytest.raises(errors.AuditError, match=said):
                    audit.check("copy", audit.read(copy), witness.receipt(receipt, audit.read(copy), "copy").notes)
    answer = two.tiny.run("audit", "verify", two.folder / "site-copy.jsonl", "--against", receipt)
    assert (answer.code, "was rewritten" in answer.err) == (errors.AuditError.exit_code, True)
