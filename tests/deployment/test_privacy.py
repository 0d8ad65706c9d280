"""Two hospitals train under record-level privacy by the real commands: charged, shown, marked at the coordinator."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedvfm import audit, errors, locking, processes
from fedvfm.client import joining, policy
from fedvfm.privacy import ledger
from fedvfm.server import enrolment

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
SITES = ("east", "south")
ROUNDS = 2
PRIVACY = """
[aggregation]
weighting = "uniform"

[privacy]
mechanism = "record-level"
clip = 1.0
noise_multiplier = 4.0
delta = 1e-3
"""


@dataclass
class Two:
    """A federation of two sites, joined and approved, each with a budget."""

    tiny: Any
    folder: Path
    server: enrolment.State
    sites: dict[str, joining.State]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """A real command, its words in a file."""
        with (self.folder / f"{arguments[0]}-{len(self.started)}.txt").open("w") as words:
            process = subprocess.Popen(
                self.tiny.command(*arguments),
                cwd=self.folder,
                env=self.tiny.environment(),
                stdout=words,
                stderr=words,
                text=True,
            )
        self.started.append(process)
        return process

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.txt")))

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        """What a real command prints."""
        answer = self.tiny.run(*arguments, "--json")
        assert answer.code == code, answer
        return json.loads(answer.out)

    def settings(self, site: str) -> Path:
        return self.folder / f"{site}.toml"

    def book(self, site: str) -> ledger.Ledger:
        return ledger.reopen(self.folder / f"{site}-ledger")


@pytest.fixture
def two(tiny: Any, tmp_path: Path) -> Iterator[Two]:
    text = tiny.experiment.read_text()
    recipe = text[text.index("[recipe]") :].replace("[recipe]\n", "", 1).replace("[recipe.", "[")
    (tmp_path / "recipe.toml").write_text(recipe.replace("rounds = 3", f"rounds = {ROUNDS}") + PRIVACY)
    locked, initial = locking.open_recipe(tmp_path / "recipe.toml")
    plan = enrolment.Plan("tiny", f"127.0.0.1:{processes.free_port()}", (), SITES)
    server = enrolment.init(tmp_path / "server", plan, locked, initial)
    joined = {}
    for site in SITES:
        invite = joining.read_invite(server.invite_path(site), server.fingerprint())
        joined[site] = joining.join(tmp_path / site, invite, locked.hash)
        enrolment.approve(server, joined[site].request)
        own = f'name = "{site}"\ninclude = ["{site}"]\n[data]\nsource = "folder"\npath = "{tiny.data}"\n'
        own += "[split]\nseed = 52\n"  # each image is drawn alone; with it both sites have 5, 1 and 2 of their eight
        allowed = policy.accepting(policy.Facts.of(locked, 5)).replace("min_samples = 10", "min_samples = 1")
        lines = ["max_epsilon = 9.0" if one.startswith("max_epsilon") else one for one in allowed.splitlines()]
        budget = 'data_set = "discs"\nepsilon = 9.0\ndelta = 1e-3\nunit = "record"\n'
        spent = f'[privacy]\n{budget}ledger = "{site}-ledger"\n'
        (tmp_path / f"{site}.toml").write_text(own + "\n".join(lines) + "\n" + spent)
    made = Two(tiny, tmp_path, server, joined)
    yield made
    for process in made.started:
        process.terminate()
    for process in made.started:
        process.wait(60)


def test_a_federation_under_record_level_privacy(two: Two, until: Any) -> None:
    rehearse(two)
    for site in SITES:
        two.start("client", "start", f"{site}.toml", "--state", site)
    server = two.start("server", "start", "--state", "server")
    assert until(lambda: server.poll() is not None, 1500), two.said()
    assert server.returncode == 0, two.said()
    check_rounds(two)
    for site in SITES:
        check_ledger(two, site)
    for process in two.started[:-1]:
        process.terminate()
        process.wait(60)
    check_restored(two)


def rehearse(two: Two) -> None:
    """One real private round: nothing is charged, and only the adapter would leave of training."""
    found = two.json("client", "rehearse", two.settings("east"), "--state", two.folder / "east")
    (update,) = [one for one in found["replies"] if one["kind"].startswith("update")]
    assert set(update["numbers"]) == {"metrics.num_examples"}
    assert update["numbers"]["metrics.num_examples"] == 1
    assert update["arrays"]
    hello = found["replies"][0]["numbers"]
    assert (hello["metrics.train"], hello["metrics.test"] >= 1) == (1, True), "whether there are any, not how many"
    assert found["privacy"]["spent"] == 0.0
    assert 0.0 < found["privacy"]["after"] < 9.0
    assert not (two.folder / "east-ledger").exists()


def check_rounds(two: Two) -> None:
    journal = two.tiny.lines(two.server.folder / "runs" / two.server.about.recipe / "journal.jsonl")
    assert [line["round"] for line in journal] == list(range(1, ROUNDS + 1))
    for line in journal:
        assert not line["refused"]
        assert line["examples"] == dict.fromkeys(SITES, 1), "nobody says how many images it has"
        assert line["train"] == {site: {} for site in SITES}, "and nothing that training computed but the adapter"
    assert all("dice" in journal[-1]["validation"][site] for site in SITES), "from patients who are not trained on"


def check_ledger(two: Two, site: str) -> None:
    book = two.book(site)
    charged = [one for one in book.entries if one["event"] == "charged"]
    assert [one["round"] for one in charged] == list(range(1, ROUNDS + 1))
    came = [
        one
        for one in two.server.audit.entries
        if one["event"] == "received" and one.get("peer") == site and one["kind"] == "train"
    ]
    assert {one["digest"] for one in came} == {one["update"] for one in charged}, "what came is what was charged"
    marks = [f"{number:019d}:{one['hash']}" for number, one in enumerate(book.entries, start=1)]
    assert all(one["ledger"] in marks for one in came)
    shown = two.json("ledger", "show", two.settings(site))["data_sets"][0]
    assert (shown["name"], shown["releases"], shown["allowed"]) == ("discs", ROUNDS, 9.0)
    assert 0.0 < shown["epsilon"] <= 9.0
    status = two.json("client", "status", "--state", two.folder / site)["privacy"]
    assert status["data_sets"][0]["epsilon"] == shown["epsilon"]
    assert (status["mechanism"], status["noise_multiplier"]) == ("record-level", 4.0)
    assert status["after"] == pytest.approx(shown["epsilon"]), "all its rounds are spent"
    log = b"".join(path.read_bytes() for path in (two.folder / site).rglob("*.log"))
    assert b"Traceback" not in log
    verified = two.json("ledger", "verify", two.settings(site), "--against", two.server.folder)
    assert (verified["whole"], verified["checked"]) == (True, len(came))


def check_restored(two: Two) -> None:
    """The ledger of the day before is put back: its chain is whole, the coordinator's log and receipt tell."""
    path, receipt = two.folder / "east-ledger" / "ledger.jsonl", two.folder / "receipt.json"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    assert audit.verify(path)["length"] == 3
    two.json("audit", "receipt", two.server.folder, "--output", receipt, "--peer", "east")
    for witness in (two.server.folder, receipt):
        answer = two.tiny.run("ledger", "verify", two.settings("east"), "--against", witness)
        said = two.tiny.one_error(answer, errors.AuditError.exit_code, "was truncated or rolled back to an older copy")
        assert "east-ledger" in said
    waiting = two.json("ledger", "verify", two.settings("east"), code=errors.LedgerError.exit_code)
    assert waiting["waiting"] >= 1
    assert two.json("ledger", "reconcile", two.settings("east"), "--against", two.server.folder)["unknown"]
    assert two.json("ledger", "verify", two.settings("east"), "--against", two.server.folder)["reconciled"] >= 1
