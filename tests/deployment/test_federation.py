"""A federation of two hospitals by the real commands: approval waited for, kills, and nothing trained twice."""

from __future__ import annotations

import json
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedvfm import errors
from fedvfm.audit import audit, cross_check
from fedvfm.client import state_folder
from fedvfm.client.gate import policy
from fedvfm.runtime import processes
from fedvfm.storage import hash_chain
from tests.deployment import two_hospitals

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
SITES = two_hospitals.SITES

Two = two_hospitals.Two


def notes(two: Two) -> list[str]:
    """What the coordinator told its people."""
    path = two.server.folder / "run" / "coordinate.log"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.startswith("{")]
    return [one["text"] for one in records if "event" not in one]


def trained(two: Two, site: str) -> list[int]:
    return [entry["round"] for entry in two.sites[site].audit.entries if entry["event"] == "trained"]


@pytest.fixture
def two(tiny: Any, tmp_path: Path) -> Iterator[Two]:
    with two_hospitals.enrolled(tiny, tmp_path, tiny.recipe) as made:
        allowed = policy.accepting(policy.Facts.of(made.locked)).replace("units = 10", "units = 1")
        for site in SITES:
            made.settings(site).write_text(tiny.site(site) + allowed)
        yield made


def test_two_hospitals_an_approval_and_kills(two: Two, until: Any) -> None:
    hash_ = two.server.about.recipe
    state_folder.withdraw(two.sites["south"], hash_)
    clients = two.start_clients()
    # The coordinator's process is killed each time it has written the third update since its start.
    crash = {"FEDVFM_FAULT_POINT": "update-kept:3"}
    server = two.start_server(**crash)

    # A person has not approved: the server says so and waits; the site keeps what it decided.
    assert until(lambda: any("'south' waits for a person's approval" in one for one in notes(two)), 600)
    assert trained(two, "south") == []
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

    state_folder.approve(two.sites["south"], two.sites["south"].find(hash_))
    assert until(lambda: len(trained(two, "south")) >= 2 and len(trained(two, "east")) >= 2, 600), two.said()

    # Everything of the server is killed, as by a reboot, and started again.
    server.kill()
    server.wait()
    run = two.server.folder / "run"
    assert until(lambda: not any(processes.running(path) for path in run.glob("*.pid")), 300)
    executor = processes.running(processes.pid_path(two.folder / "east" / "run", "executor"))
    assert executor is not None
    os.kill(executor, signal.SIGKILL)
    server = two.start_server(**crash)
    assert until(lambda: server.poll() is not None, 900), two.said()
    assert server.returncode == 0, two.said()

    journal = two.journal()
    assert [line["round"] for line in journal] == [1, 2, 3]
    assert all(line["cohort"] == list(SITES) and not line["refused"] for line in journal)
    assert not list((two.run / "received").glob("*"))
    for site in SITES:
        assert trained(two, site) == [1, 2, 3], f"{site} trained a round twice"
        assert audit.verify(two.folder / site / "audit.jsonl")["unfinished"] == 0
        assert clients[site].poll() is None, "the client waits for what comes next"
    answer = two.tiny.run("client", "stop", "--state", two.folder / "east", "--json")
    assert json.loads(answer.out) == {"stopped": True}
    found = json.loads(two.tiny.run("server", "status", "--state", two.server.folder, "--json").out)
    assert (found["finished_rounds"], found["finished"]) == (3, True)
    assert found["processes"] == {"server": None, "superlink": None, "proxy": None, "coordinate": None}
    check_result(two, found["result"])
    check_audit(two)


def check_result(two: Two, result: str) -> None:
    """The coordinator's adapter predicts what a site's own copy does, and its run can be compared and exported."""
    folder = two.server.run_path(two.locked.hash)
    assert result == str(folder)
    (own,) = (path for path in (two.folder / "south" / "adapters").iterdir() if path.is_dir())
    image = next(path for path in sorted(two.tiny.data.rglob("*.png")))
    masks = []
    for name, adapter in (("here", folder / "adapter"), ("there", own)):
        answer = two.tiny.run("predict", adapter, image, "--output", two.folder / name, "--json")
        assert answer.code == 0, answer.err
        (mask,) = (two.folder / name).glob("*.png")
        masks.append((json.loads(answer.out)["adapter"]["fingerprint"], mask.read_bytes()))
    assert masks[0] == masks[1]
    answer = two.tiny.run("export", folder / "adapter", "--output", two.folder / "peft", "--format", "peft")
    assert answer.code == 0, answer.err
    tensors = "adapter_model.safetensors"
    assert (two.folder / "peft" / tensors).read_bytes() == (own / tensors).read_bytes()
    compared = json.loads(two.tiny.run("compare", folder, "--json").out)
    made = json.loads((folder / "summary.json").read_text())
    assert compared["runs"][0]["arms"]["federated"]["macro"] == made["arms"]["federated"]["macro"]
    assert made["acceptance"] == dict.fromkeys(SITES, "pending")
    assert "Federation tiny" in (folder / "report.html").read_text()


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
    peers = cross_check.peers(entries, "server")
    assert set(peers) == set(SITES)
    assert all(row["marked"] == row["messages"] for row in peers.values()), "refusals too"

    left = json.loads(two.tiny.run("audit", "show", two.folder / "south", "--sent", "--json").out)
    assert (left["totals"]["updates"], left["owner"]) == (3, "south")
    assert left["totals"]["kinds"]["train"] == 3 + left["totals"]["repeated"]
    assert left["totals"]["bytes"] == sum(row["bytes"] for row in left["messages"])
    assert set(two.journal()[0]["train"]["south"]) <= set(left["totals"]["metrics"])
    received = [entry for entry in entries if entry["event"] == "received" and entry["peer"] == "south"]
    came = {entry["fingerprint"] for entry in received if "fingerprint" in entry}
    assert {row["fingerprint"] for row in left["messages"] if "numbers" in row} == came, "what left is what came"
    check_tampering(two)


def chained(path: Path, rows: list[dict[str, Any]]) -> None:
    """A log made anew of these entries: every hash in it is right."""
    path.unlink(missing_ok=True)
    made = hash_chain.Chain(path)
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
        last_told = max(note.length for _, note in cross_check.marks(audit.read(paths[other]), rows[0]["owner"], other))
        whole_again = {
            "truncated": (rows[: last_told - 1], "it was truncated or rolled back"),
            "rolled back": (rows[:middle], "it was truncated or rolled back"),
            "rewritten": ([*rows[:middle], {**rows[middle], "bytes": 7}, *rows[middle + 1 :]], "the log was rewritten"),
        }
        for forged, said in whole_again.values():
            chained(copy, forged)
            audit.verify(copy)
            with pytest.raises(errors.AuditError, match=said):
                cross_check.log(paths[other], audit.read(copy), str(copy))
            with pytest.raises(errors.AuditError, match=said):
                cross_check.log(copy, audit.read(paths[other]), str(paths[other]))
            if end == "site":  # the hospital's own log and the coordinator's receipt are enough
                with pytest.raises(errors.AuditError, match=said):
                    audit.check("copy", audit.read(copy), cross_check.receipt(receipt, audit.read(copy), "copy").notes)
    answer = two.tiny.run("audit", "verify", two.folder / "site-copy.jsonl", "--against", receipt)
    assert (answer.code, "was rewritten" in answer.err) == (errors.AuditError.exit_code, True)
