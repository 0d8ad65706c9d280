"""Two hospitals train under each mechanism by the real commands: charged, shown, marked at the coordinator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.client.adoption import decisions
from fedvfm.client.gate import policy, reply_cache
from fedvfm.ledger import ledger
from fedvfm.privacy import accountant
from fedvfm.protocol import protocol
from fedvfm.state import checkpoint
from fedvfm.storage import hash_chain
from tests.deployment import two_hospitals

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]
SITES = two_hospitals.SITES
ROUNDS, NOISE, DELTA = 2, 4.0, 1e-3


@dataclass(frozen=True)
class Way:
    """A mechanism, and what a round of it is at each hospital; the recipe's batch is 3.

    Attributes:
        units: that can be drawn.
        names: that a round is charged to.
        rate: the chance of each in a step.
        steps: of a round.
    """

    mechanism: str
    unit: str
    units: int
    names: int
    rate: float
    steps: int

    def epsilon(self, rounds: int) -> float:
        return accountant.epsilon(accountant.steps(self.rate, NOISE, self.steps * rounds), DELTA).value


WAYS = (
    Way("record-level", "record", 5, 5, 3 / 5, 2),
    Way("patient-level", "patient", 4, 4 + 6, 3 / 4, 2),
    Way("site-level", "site", 1, 1, 1.0, 1),
)


@dataclass
class Private:
    """The federation under one mechanism; every hospital has a budget."""

    two: two_hospitals.Two
    way: Way
    cli: Any

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        """What a command prints."""
        answer = self.cli(*arguments, "--json")
        assert answer.code == code, answer
        return json.loads(answer.out)

    def state(self, site: str) -> Path:
        return self.two.sites[site].folder

    def ledger(self, site: str) -> Path:
        return self.two.folder / f"{site}-ledger"


@pytest.fixture(params=WAYS, ids=lambda way: way.mechanism)
def private(request: pytest.FixtureRequest, tiny: Any, tmp_path: Path, cli: Any) -> Iterator[Private]:
    way: Way = request.param
    settings = f'mechanism = "{way.mechanism}"\nclip = 1.0\nnoise_multiplier = {NOISE}\ndelta = {DELTA}\n'
    recipe = tiny.recipe.replace("rounds = 3", f"rounds = {ROUNDS}")
    recipe += f'\n[aggregation]\nweighting = "uniform"\n\n[privacy]\n{settings}'
    data = tiny.with_patients(tmp_path / "data") if way.unit == "patient" else tiny.data
    with two_hospitals.enrolled(tiny, tmp_path, recipe) as two:
        facts = policy.Facts.of(two.locked, way.units)
        allowed = policy.accepting(facts).replace("units = 10", "units = 1")
        for site in SITES:
            # Where the table says nothing each image is drawn alone: with this seed both sites have 5, 1 and 2 of 8.
            own = f"{tiny.site(site, data)}[split]\nseed = 52\n{allowed}"
            budget = f'data_set = "discs"\nepsilon = 9.0\ndelta = {DELTA}\nunit = "{way.unit}"\n'
            two.settings(site).write_text(f'{own}\n[privacy]\n{budget}ledger = "{site}-ledger"\n')
        yield Private(two, way, cli)


def test_a_federation_under_a_mechanism(private: Private, until: Any) -> None:
    two = private.two
    if private.way.unit == "record":
        rehearse(private)
    clients = two.start_clients()
    server = two.start_server()
    assert until(lambda: server.poll() is not None, 1500), two.said()
    assert server.returncode == 0, two.said()
    check_rounds(private)
    if private.way.unit == "site":
        check_draws(private)
    for site in SITES:
        check_ledger(private, site)
        check_what_left(private, site)
        check_shown(private, site)
        check_delivered(private, site)
    for process in clients.values():
        process.terminate()
        process.wait(two_hospitals.END_S)
    if private.way.unit == "record":
        check_restored(private)


@pytest.mark.parametrize("private", [WAYS[1]], indirect=True, ids=lambda way: way.mechanism)
def test_scores_of_a_federation_leave_with_noise_and_are_charged(private: Private, until: Any) -> None:
    """``metrics_epsilon`` at one hospital of two: what the coordinator got is what the ledger was charged for."""
    two = private.two
    text = two.settings("east").read_text()
    two.settings("east").write_text(text.replace("[policy]\n", "[policy]\nmetrics_epsilon = 2.0\n", 1))
    clients, server = two.start_clients(), two.start_server()
    assert until(lambda: server.poll() is not None, 1500), two.said()
    assert server.returncode == 0, two.said()
    book, other = (ledger.reopen(private.ledger(site)).entries for site in SITES)
    scores = [line for line in book if line["event"] == "charged" and line["mechanism"] == "metrics"]
    assert not [line for line in other if line.get("mechanism") == "metrics"], "south's scores leave as they are"
    left = [line for line in two.sites["east"].audit.entries if line["event"] == "sent" and line["kind"] == "evaluate"]
    # Each round is validated, and the last adapter is tested: each is charged, by the hash of the numbers that left.
    assert len(scores) == len(left) == ROUNDS + 1
    rows = [line["validation"]["east"] for line in two.journal()]
    assert [row.pop("num_examples") for row in rows] == [1] * ROUNDS, "the number of images leaves as it is"
    came = [hash_chain.canonical(row) for row in rows]
    assert [line["update"] for line in scores[:ROUNDS]] == [hashlib.sha256(text.encode()).hexdigest() for text in came]
    for line, sent in zip(scores, left, strict=True):
        mark = hash_chain.Mark.parse(sent["ledger"])
        assert book[mark.length - 1]["hash"] == line["hash"] == mark.head, "charged before it left"
    assert {(line["sample_rate"], line["steps"]) for line in scores} == {(1.0, 1)}
    assert len({line["noise_multiplier"] for line in scores}) == 1
    noise = scores[0]["noise_multiplier"]
    assert accountant.epsilon(accountant.steps(1.0, noise, 1), DELTA).value <= 2.0
    for row in rows:
        assert {"dice", "iou"} <= set(row) <= {"dice", "dice_disc", "iou", "iou_disc", "nsd"}
        assert all(0.0 <= value <= 1.0 for value in row.values())
    for site, number in (("east", ROUNDS + 1), ("south", 0)):
        shown = private.json("ledger", "show", two.settings(site))["data_sets"][0]
        assert (shown["releases"], shown["scores"]) == (ROUNDS + number, number)
        assert 0.0 < shown["epsilon"] <= 9.0
        status = private.json("client", "status", "--state", private.state(site))["privacy"]
        assert status["data_sets"][0]["scores"] == number
        assert status["after"] == pytest.approx(private.way.epsilon(ROUNDS)), "scores take no round off"
        said = private.cli("client", "status", "--state", private.state(site)).out
        assert f"spent in {ROUNDS} updates{f' and {number} releases of scores' * bool(number)}, " in said
        receipt = two.folder / f"{site}-receipt.json"
        private.json("audit", "receipt", two.server.folder, "--output", receipt, "--peer", site)
        assert private.json("ledger", "verify", two.settings(site), "--against", receipt)["whole"]
    for process in clients.values():
        process.terminate()
        process.wait(two_hospitals.END_S)


def rehearse(private: Private) -> None:
    """One real private round: nothing is charged, and only the adapter would leave of training."""
    two = private.two
    answer = two.tiny.run("client", "rehearse", two.settings("east"), "--state", private.state("east"), "--json")
    assert answer.code == 0, answer
    found = json.loads(answer.out)
    (update,) = [one for one in found["replies"] if one["kind"].startswith("update")]
    assert set(update["numbers"]) == {"metrics.num_examples"}
    assert update["numbers"]["metrics.num_examples"] == 1
    assert update["arrays"]
    hello = found["replies"][0]["numbers"]
    assert (hello["metrics.train"], hello["metrics.test"] >= 1) == (1, True), "whether there are any, not how many"
    assert found["privacy"]["spent"] == 0.0
    assert 0.0 < found["privacy"]["after"] < 9.0
    assert not private.ledger("east").exists()


def check_rounds(private: Private) -> None:
    journal = private.two.journal()
    assert [line["round"] for line in journal] == list(range(1, ROUNDS + 1))
    for line in journal:
        assert not line["refused"]
        assert line["examples"] == dict.fromkeys(SITES, 1), "nobody says how many images it has"
        assert line["train"] == {site: {} for site in SITES}, "and nothing that training computed but the adapter"
    assert all("dice" in journal[-1]["validation"][site] for site in SITES), "from patients who are not trained on"


def check_draws(private: Private) -> None:
    """The coordinator drew once a round, kept what came of it, and went on from that."""
    kept = private.two.run / "private"
    assert sorted(path.name for path in kept.iterdir()) == ["round-00001.safetensors", "round-00002.safetensors"]
    for line in private.two.journal():
        number, told = line["round"], line["privacy"]
        assert (told["mechanism"], told["unit"], told["sites"], told["simulated"]) == ("site-level", "site", 2, False)
        assert (told["steps"], told["noise_multiplier"], told["delta"]) == (number, NOISE, DELTA)
        assert told["epsilon"] == pytest.approx(private.way.epsilon(number))
        mean, _, marks = checkpoint.read(checkpoint.path_of(kept, number))
        assert mean.fingerprint == line["fingerprint"]
        assert json.loads(marks["record"])["privacy"] == told


def check_ledger(private: Private, site: str) -> None:
    """Every round was charged once, as what it was, before it left: what left carries the hash of its charge."""
    two, way, book = private.two, private.way, ledger.reopen(private.ledger(site))
    assert [one["event"] for one in book.entries] == ["opened", *("reserved", "charged") * ROUNDS]
    assert book.entries[0]["unit"] == way.unit
    charged = [one for one in book.entries if one["event"] == "charged"]
    assert [one["round"] for one in charged] == list(range(1, ROUNDS + 1))
    release = (way.mechanism, NOISE, way.rate, way.steps, 1.0)
    told = ("mechanism", "noise_multiplier", "sample_rate", "steps", "clip")
    assert {tuple(one[name] for name in told) for one in charged} == {release}
    left = [one for one in two.sites[site].audit.entries if one["event"] == "sent" and one["kind"] == "train"]
    came = [
        one
        for one in two.server.audit.entries
        if one["event"] == "received" and one.get("peer") == site and one["kind"] == "train"
    ]
    assert {one["round"] for one in left} == set(range(1, ROUNDS + 1))
    for one in left:
        mark = hash_chain.Mark.parse(one["ledger"])
        line = book.entries[mark.length - 1]
        assert (line["event"], line["round"], line["hash"]) == ("charged", one["round"], mark.head)
        assert line["update"] == one["digest"]
    for name in ("digest", "ledger"):
        assert {one[name] for one in came} == {one[name] for one in left}, "what came is what was charged"


def check_what_left(private: Private, site: str) -> None:
    """Of training the adapter and nothing beside it, by the hospital's own log and in the bytes themselves."""
    two = private.two
    found = private.json("audit", "show", private.state(site), "--sent")
    updates = [row for row in found["messages"] if row["kind"] == "train"]
    assert {(row["numbers"], *row["metrics"]) for row in updates} == {(two.locked.manifest.parameters,)}
    assert found["totals"]["updates"] == ROUNDS
    content = reply_cache.Sent(two.sites[site].sent).last(two.locked.hash)
    assert content is not None
    assert protocol.digest(content) == updates[-1]["digest"]
    update = protocol.decode_update(content)
    assert (update.num_examples, update.metrics, update.extra) == (1, {}, {})


def check_shown(private: Private, site: str) -> None:
    """What people see is what the accountant says of these rounds, and both ends agree on the ledger."""
    two, way = private.two, private.way
    settings, spent = two.settings(site), pytest.approx(way.epsilon(ROUNDS))
    shown = private.json("ledger", "show", settings)["data_sets"][0]
    assert (shown["name"], shown["releases"], shown["allowed"], shown["names"]) == ("discs", ROUNDS, 9.0, way.names)
    assert shown["epsilon"] == spent
    status = private.json("client", "status", "--state", private.state(site))["privacy"]
    assert (status["mechanism"], status["noise_multiplier"], status["units"]) == (way.mechanism, NOISE, way.units)
    assert status["data_sets"][0]["epsilon"] == shown["epsilon"]
    assert status["after"] == spent, "all its rounds are spent"
    logs = b"".join(path.read_bytes() for path in private.state(site).rglob("*.log"))
    assert b"Traceback" not in logs
    receipt = two.folder / f"{site}-receipt.json"
    private.json("audit", "receipt", two.server.folder, "--output", receipt, "--peer", site)
    assert private.json("ledger", "verify", settings)["waiting"] == 0
    for witness, least in ((two.server.folder, ROUNDS), (private.state(site), ROUNDS), (receipt, 1)):
        verified = private.json("ledger", "verify", settings, "--against", witness)
        assert verified["whole"]
        assert verified["checked"] >= least


def check_delivered(private: Private, site: str) -> None:
    """The last global adapter came, was scored, and is taken by a person."""
    two, last = private.two, private.two.journal()[-1]["fingerprint"]
    done = json.loads((two.run / "evaluation.json").read_text())
    assert (done["fingerprint"], done["acceptance"][site]) == (last, "pending")
    ((verdict, _),) = decisions.kept(two.sites[site])
    assert (verdict.fingerprint, verdict.recipe, verdict.verdict) == (last, two.locked.hash, "pending")
    (row,) = private.json("client", "adapter", private.state(site), "--accept", last[:12])["adapters"]
    assert (row["verdict"], row["reason"]) == ("accepted", "person")


def check_restored(private: Private) -> None:
    """The ledger of the day before is put back: its chain is whole, the coordinator's log and receipt tell."""
    two = private.two
    path, settings = private.ledger("east") / "ledger.jsonl", two.settings("east")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    assert audit.verify(path)["length"] == 3
    for witness in (two.server.folder, two.folder / "east-receipt.json"):
        answer = private.cli("ledger", "verify", settings, "--against", witness)
        said = two.tiny.one_error(answer, errors.AuditError.exit_code, "was truncated or rolled back to an older copy")
        assert "east-ledger" in said
    waiting = private.json("ledger", "verify", settings, code=errors.LedgerError.exit_code)
    assert waiting["waiting"] >= 1
    assert private.json("ledger", "reconcile", settings, "--against", two.server.folder)["unknown"]
    assert private.json("ledger", "verify", settings, "--against", two.server.folder)["reconciled"] >= 1
