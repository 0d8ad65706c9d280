"""A site's privacy: no round without a budget, charged before it leaves, once, whatever is killed or restored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.client import privacy_report, recipe_review, site_file
from fedvfm.client.adoption import adoption
from fedvfm.client.gate import gate, policy, privacy_charge, reply_cache, steps
from fedvfm.config import privacy
from fedvfm.flower import internals
from fedvfm.ledger import receipts, reconcile
from fedvfm.protocol import protocol
from fedvfm.state import state
from tests.client import private_site

Site = private_site.Site
POINTS = ("trained", "update-on-disk", "update-charged", "ledger-charged", "line-half-written:6", "line-written:7")
ALL = (
    "trained",
    "update-on-disk",
    "update-charged",
    "ledger-key-made",
    "ledger-held",
    "ledger-set-kept",
    "ledger-reserved",
    "ledger-checked",
    "ledger-charged",
    *(f"line-half-written:{number}" for number in range(1, 8)),
    *(f"line-written:{number}" for number in range(1, 8)),
)
"""Lines 1 to 7: opened, received, decided, reserved, trained, charged, sent."""


def word(site: Site, task: protocol.Task, kind: str = protocol.TRAIN) -> str:
    """The word of a refusal, with nothing computed."""
    before = len(site.app.asked)
    reply = site.ask(task, kind)
    assert reply.has_error()
    assert len(site.app.asked) == before, "nothing is computed for what is refused"
    return protocol.error_word(reply)


def test_a_round_is_reserved_trained_kept_charged_and_sent(site: Site) -> None:
    seen: list[str] = []
    site.app.during = lambda: seen.extend(one["event"] for one in site.book.entries)
    reply = site.ask(private_site.train())
    assert seen == ["opened", "reserved"], "reserved before it trains, charged after"
    assert [one["event"] for one in site.book.entries] == ["opened", "reserved", "charged"]
    (line,) = site.charged()
    assert line["update"] == protocol.digest(reply.content)
    assert (line["data_set"], line["mechanism"], line["noise_multiplier"]) == ("discs", "record-level", 1.1)
    hospital = site_file.hospital(site.terms.config, private_site.make_recipe())
    assert line["sample_rate"] == pytest.approx(5 / len(hospital.train))
    update = protocol.decode_update(reply.content)
    assert (update.num_examples, dict(update.metrics)) == (1, {}), "nothing else that is computed from training images"
    assert protocol.find_ledger(reply) == site.book.mark
    went = [one for one in site.where.audit.entries if one["event"] == "sent"][-1]
    assert (went["ledger"], went["metrics"]) == (str(site.book.mark), [])
    assert went["digest"] == line["update"]


def test_asked_again_the_same_bytes_leave_and_nothing_is_charged(site: Site) -> None:
    first = site.ask(private_site.train())
    again = private_site.Site(site.folder)  # as after a restart
    second = again.ask(private_site.train())
    assert (len(site.app.asked), len(again.app.asked)) == (1, 0)
    assert protocol.digest(first.content) == protocol.digest(second.content)
    assert len(site.charged()) == 1
    assert protocol.find_ledger(second) == site.book.mark


def test_a_kept_update_that_was_not_charged_decides_nothing_of_the_final_adapter(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word on the final adapter leaves, and would be computed from training images that no budget paid for."""
    from types import SimpleNamespace

    model: Any = SimpleNamespace(
        leaving=lambda number: ("head.bias",), manifest=private_site.ROWS, task=SimpleNamespace(primary="dice")
    )
    whole: Any = SimpleNamespace(own=lambda model, recipe, adapter, number: adapter)
    answer = protocol.Evaluation("north", 1, 12, {"dice": 0.5})
    monkeypatch.setattr(adoption.evaluator, "evaluate", lambda *_: answer)
    finals = adoption.Finals(site.where, lambda: site.terms.config.policy)
    task = protocol.Task(private_site.make_recipe(), 1, private_site.adapter(1.0, 1.0), "test", final=True)
    pid = private_site.child(lambda: private_site.leave(site.folder), FEDVFM_FAULT_POINT="update-on-disk")
    os.waitpid(pid, 0)
    assert reply_cache.Sent(site.where.sent).last(task.recipe.hash) is not None
    assert finals._own(model, whole, task, 1e9) is None
    assert not private_site.Site(site.folder).ask(private_site.train()).has_error()
    assert finals._own(model, whole, task, 1e9) == 0.5, "charged, and it left"
    row = state.ArraySpec("q.residual.A", (1, 1), "residual")
    model.manifest = state.Manifest.of([*private_site.ROWS, row])
    whole.own = lambda model, recipe, adapter, number: state.AdapterState(
        {**adapter, row.name: np.zeros((1, 1), np.float32)}
    )
    assert finals._own(model, whole, task, 1e9) is None, "the server moved a residual since: these are no one's weights"


@pytest.mark.parametrize("points", [POINTS, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_anywhere_nothing_left_uncharged_and_nothing_is_charged_twice(
    tmp_path: Path, points: tuple[str, ...]
) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FEDVFM_")}
    command = [sys.executable, private_site.__file__, str(tmp_path), *points]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"killed": len(points), "wrong": {}}


def test_two_processes_cannot_spend_the_same(site: Site) -> None:
    """A budget for one round: while one process trains it, another recipe's round at the same data is refused."""
    other = private_site.make_recipe(seed=7)
    site.approve(other)
    site.settings.write_text(site.settings.read_text().replace("\nepsilon = 8.0", "\nepsilon = 5.5"))
    one, two = private_site.Site(site.folder), private_site.Site(site.folder)
    training, go, said = (site.folder / name for name in ("training", "go", "said"))

    def wait() -> None:
        training.touch()
        while not go.exists():
            time.sleep(0.01)

    def first() -> None:
        one.app.during = wait
        reply = one.ask(private_site.train())
        said.write_text(protocol.error_word(reply) if reply.has_error() else "sent")

    pid = private_site.child(first)
    while not training.exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it trains"
        time.sleep(0.01)
    assert word(two, private_site.train(seed=7)) == "privacy-budget"
    go.touch()
    os.waitpid(pid, 0)
    assert said.read_text() == "sent"
    assert word(two, private_site.train(seed=7)) == "privacy-budget"
    assert len(site.charged()) == 1


def test_a_round_beyond_the_budget_is_refused_before_training_with_numbers_and_the_remedy(
    site: Site,
) -> None:
    site.settings.write_text(site.settings.read_text().replace("\nepsilon = 8.0", "\nepsilon = 5.5"))
    site.ask(private_site.train())
    start = site.charged()
    assert word(site, private_site.train(2, private_site.adapter(1.0, 1.0))) == "privacy-budget"
    text = str(site.faults[-1])
    assert "round 2 would bring site 'north' to epsilon" in text
    assert "(record level, delta 1e-05); its ledger allows 5.50." in text
    assert "Raise noise-multiplier to" in text or "stop at round 1" in text
    assert site.charged() == start
    decided = [one for one in site.where.audit.entries if one["event"] == "decided"][-1]
    assert (decided["verdict"], decided["reason"]) == ("refused", "privacy-budget")
    reply = site.ask(private_site.train(2, private_site.adapter(1.0, 1.0)))
    assert b"5.5" not in internals.serialise(reply), "the numbers stay here"
    again = site.ask(private_site.train())
    assert not again.has_error(), "what was charged may be sent again"


@pytest.mark.parametrize("kind", [protocol.HANDSHAKE, protocol.TRAIN])
@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("", r"this site's file has no \[privacy\]. Write data_set, epsilon, delta and unit = \"record\" there"),
        (private_site.BUDGET.replace("record", "patient"), "counts by record, .* of this site by patient. Epsilons of"),
        (private_site.BUDGET.replace("1e-5", "1e-6"), "recipe.privacy.delta = 1e-05 is above 1e-06, the delta of this"),
    ],
)
def test_no_round_without_a_budget_that_fits(tmp_path: Path, kind: str, budget: str, said: str) -> None:
    made = private_site.Site(tmp_path, budget=budget)
    asked = private_site.train() if kind == protocol.TRAIN else protocol.Task(private_site.make_recipe())
    assert word(made, asked, kind) == "privacy-budget"
    with pytest.raises(errors.PolicyRefused, match=said):
        raise made.faults[-1]
    assert not (tmp_path / "fedvfm-ledger").exists()


def test_the_policy_caps_the_epsilon_that_a_stated_noise_comes_to_here(site: Site) -> None:
    text = site.settings.read_text()
    (line,) = [one for one in text.splitlines() if one.startswith("max_epsilon")]
    assert 4.0 < float(line.split()[2]) < 12.0
    site.settings.write_text(text.replace(line, "max_epsilon = 1.0"))
    assert word(site, private_site.train()) == "policy-privacy"


def test_nobody_learns_what_an_unapproved_recipe_comes_to(site: Site) -> None:
    assert word(site, private_site.train(seed=5)) == "approval-pending"


@pytest.mark.parametrize("how", ["restored", "removed", "edited"])
def test_a_ledger_that_was_put_back_is_refused_until_it_is_reconciled(site: Site, how: str) -> None:
    """The site's own audit log is enough to find it."""
    folder, safe = site.folder / "fedvfm-ledger", site.folder / "safe"
    site.ask(private_site.train())
    shutil.copytree(folder, safe)
    site.ask(private_site.train(2, private_site.adapter(1.0, 1.0)))
    shutil.rmtree(folder)
    if how != "removed":
        shutil.copytree(safe, folder)
    if how == "edited":
        path = folder / "ledger.jsonl"
        path.write_text(path.read_text().replace('"steps":', '"steps":1', 1))
    again = private_site.Site(site.folder)
    asked = private_site.train(3, private_site.adapter(2.0, 2.0))
    for _ in range(2):
        assert word(again, asked) == "privacy-ledger"
    said = str(again.faults[-1])
    assert ("does not continue the chain" if how == "edited" else "fedvfm ledger reconcile") in said
    kept = again.ask(private_site.train(2, private_site.adapter(1.0, 1.0)))
    assert protocol.error_word(kept) == "privacy-ledger", "what was kept neither"
    witness = reconcile.statements(folder, [site.where.folder], owner="north")
    reconcile.reconcile(folder, witness, site.terms.config.privacy, "north")
    # What was lost is known by its mark alone, so the whole budget counts as spent: more privacy, never less.
    assert word(private_site.Site(site.folder), asked) == "privacy-budget"


def test_evaluation_and_a_recipe_without_a_mechanism_charge_nothing(tmp_path: Path) -> None:
    made = private_site.Site(tmp_path)
    answer = made.ask(protocol.Task(private_site.make_recipe(), 1, private_site.START, "test"), protocol.EVALUATE)
    assert dict(protocol.decode_evaluation(answer.content).metrics) == {"dice": 0.5}
    assert protocol.find_ledger(answer) is None
    assert not (tmp_path / "fedvfm-ledger").exists()


def test_a_greeting_shows_the_ledger_before_anything_more_is_charged(site: Site) -> None:
    """One that was put back and reconciled: the coordinator sees it, and asks for no update to throw away."""
    hello = protocol.Task(private_site.make_recipe())

    def shown() -> Any:
        reply = site.ask(hello, protocol.HANDSHAKE)
        assert not reply.has_error()
        return protocol.find_ledger(reply)

    assert shown() is None
    assert not (site.folder / "fedvfm-ledger").exists(), "a greeting makes no ledger"
    for number in (1, 2, 3):
        site.ask(private_site.train(number, private_site.adapter(number - 1.0, 0.0)))
    before = site.book.mark
    assert shown() == before
    assert protocol.find_ledger(site.ask(private_site.train(), protocol.EVALUATE)) is None
    path = site.folder / "fedvfm-ledger" / "ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert shown() is None, "reconciled, it may be as long as it was"
    said = reconcile.statements(path.parent, [site.where.folder])
    assert reconcile.reconcile(path.parent, said, site.terms.config.privacy, "north")["changed"]
    assert shown() == site.book.mark
    assert site.book.mark.length < before.length


def test_an_update_that_was_charged_nowhere_does_not_leave(site: Site) -> None:
    """Whatever order somebody makes of the gate one day."""
    answer = tuple(step for step in gate.SITE.answer if step is not steps.reserve)
    site.door.order = gate.Order(gate.SITE.judge, answer, gate.SITE.leave)
    assert protocol.error_word(site.ask(private_site.train())) == "privacy-ledger"
    assert "was not charged, so it does not leave" in str(site.faults[-1])


def judge(site: Site) -> privacy_report.Judged:
    return privacy_report.judge(private_site.build(private_site.make_recipe()), site_file.read_policy(site.settings))


def test_what_a_recipe_comes_to_here_before_and_after_a_round(site: Site) -> None:
    locked = private_site.build(private_site.make_recipe())
    before = judge(site).here
    assert before is not None
    assert (before.spent, before.allowed, before.fits) == (0.0, 8.0, True)
    assert before.after == before.epsilon
    assert not (site.folder / "fedvfm-ledger").exists(), "looking makes no ledger"
    site.ask(private_site.train())
    after = judge(site).here
    assert after is not None
    assert after.after == before.after, "one round is spent, the others are left"
    assert 0.0 < (after.spent or 0.0) < (after.after or 0.0)
    text = "\n".join(privacy_report.words(after))
    assert (
        f"epsilon {privacy_charge.ledger.shown(after.spent or 0.0)} of 8.00 is spent (record level, delta 1e-05)"
        in text
    )
    found = privacy_report.status(site.where)
    assert found is not None
    assert (found["data_sets"][0]["releases"], found["noise_multiplier"]) == (1, 1.1)
    assert "of 8.00 spent in 1 updates" in "\n".join(privacy_report.status_lines(found))
    assert judge(site).facts.epsilon == pytest.approx(before.epsilon)
    assert privacy_report.judge(locked, None).facts.epsilon is None


def test_a_review_says_what_leaves_under_a_mechanism() -> None:
    rows = dict(recipe_review.words(private_site.build(private_site.make_recipe()), ["epsilon 3"]))
    assert rows["leaves at the start"].startswith("whether there are training images")
    assert "no loss, no count" in rows["leaves each round"]
    assert "outside epsilon" in rows["metrics that leave"]
    assert rows["privacy here"] == "epsilon 3"
    assert not set(policy.leaving(private_site.make_recipe())) & set(policy.TRAINING)


def test_a_plain_recipe_has_no_budget_and_a_budget_no_plain_recipe(site: Site) -> None:
    plain = private_site.make_recipe().model_copy(update={"privacy": privacy.NONE})
    assert privacy_charge.require(plain, None) is None
    with pytest.raises(errors.PolicyRefused, match="a plain update is more than any") as no:
        privacy_charge.require(plain, site.terms.config.privacy)
    assert no.value.reason == "privacy-budget"
    bare = private_site.enforcement.HospitalTerms.__new__(private_site.enforcement.HospitalTerms)
    with pytest.raises(errors.LedgerError, match="keep no ledger"):
        bare.account(private_site.train())


def test_the_doctor_says_whether_rounds_can_be_charged(site: Site) -> None:
    from fedvfm.client import doctor

    locked = private_site.build(private_site.make_recipe())

    def look() -> tuple[str, str]:
        here = site_file.read_site(site.settings)
        _, found = doctor._recipe(site.where, here, locked, site.settings, None)
        return found.severity, found.problem

    assert look()[0] == "ok"
    assert "the whole run of 3 rounds: epsilon 6.52 at delta 1e-05 (record level)" in look()[1]
    text = site.settings.read_text()
    site.settings.write_text(text.replace("\nepsilon = 8.0", "\nepsilon = 6.0"))
    assert look()[0] == "warning"
    assert "the round that would exceed it is refused before training" in look()[1]
    site.settings.write_text(text.partition("[privacy]")[0])
    assert look()[0] == "blocker"


def test_a_policy_that_is_printed_names_the_budget(site: Site) -> None:
    text = policy.accepting(judge(site).facts)
    assert "max_epsilon = 6.51" in text
    assert '# Its rounds are charged to a budget: [privacy] with data_set, epsilon, delta and unit = "record"' in text
    unknown = policy.accepting(policy.Facts.of(private_site.build(private_site.make_recipe())))
    assert "max_epsilon = 0.0  # of the whole run; what the recipe's noise comes to follows from the data" in unknown


@pytest.mark.parametrize("mark", ["", "1:" + "ab" * 32, f"{0:019d}:{'ab' * 32}", f"{3:019d}:{'ab' * 32} ", 7])
def test_a_ledgers_mark_of_no_known_form_is_refused(site: Site, mark: Any) -> None:
    from flwr.app import ConfigRecord

    reply = site.ask(private_site.train())
    good = reply.content.config_records["audit"]["mark"]
    for forged in ({"mark": good, "ledger": mark}, {"mark": good, "more": "x"}, {"ledger": good}):
        reply.content["audit"] = ConfigRecord(forged)
        with pytest.raises(errors.ProtocolError, match="is not of the known form"):
            protocol.decode_update(reply.content)
        with pytest.raises(errors.ProtocolError):
            protocol.find_ledger(reply)


def test_receipts_of_the_coordinator_find_an_old_ledger(site: Site, tmp_path: Path) -> None:
    """The mark that came with the update, in the coordinator's log and in the receipt it gives."""
    from fedvfm.audit import audit
    from fedvfm.trust import keys, signed_documents

    mark = protocol.find_ledger(site.ask(private_site.train()))
    log = audit.Audit(tmp_path / "log" / "audit.jsonl", "trial", "server")
    marks = {"peer_length": 4, "peer_head": private_site.SHA, "ledger": str(mark)}
    log.record("received", kind="train", bytes=1, peer="north", **marks)
    log.record("received", kind="train", bytes=1, peer="north", peer_length=5, peer_head="cd" * 32)
    signed_documents.write(tmp_path / "receipt.json", log.receipt(keys.make(), "north"))
    folder, shorter = site.folder / "fedvfm-ledger", site.folder / "shorter"
    for path in (tmp_path / "log", tmp_path / "receipt.json"):
        said = reconcile.statements(folder, [path])
        assert receipts.verify(folder, [note for one in said for note in one.notes])["checked"] == 1
        shutil.copytree(folder, shorter)
        lines = (shorter / "ledger.jsonl").read_text().splitlines(keepends=True)
        (shorter / "ledger.jsonl").write_text("".join(lines[:-1]))
        with pytest.raises(errors.AuditError, match="was truncated or rolled back"):
            receipts.verify(shorter, [note for one in reconcile.statements(shorter, [path]) for note in one.notes])
        shutil.rmtree(shorter)
    text = (tmp_path / "receipt.json").read_text().replace(str(mark)[-8:], "0" * 8)
    (tmp_path / "forged.json").write_text(text)
    with pytest.raises(errors.TrustError, match="was changed after it was signed"):
        receipts.read(tmp_path / "forged.json", "north")
