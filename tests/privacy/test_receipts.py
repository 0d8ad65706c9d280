"""A ledger that was cut, restored or rewritten: found by what others hold, then refused, then reconciled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.ledger import entries as lines
from fedvfm.ledger import ledger, receipts, reconcile
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import keys, signed_documents
from tests.privacy.releases import AFTER, budget, claim, epsilon, sha


class Site:
    """A site that makes rounds, keeps a receipt after each, and whose ledger somebody tampers with."""

    def __init__(self, root: Path, key: keys.Private) -> None:
        self.root, self.folder, self.key, self.budget = root, root / "ledger", key, budget()
        self.public = keys.public_text(key)

    @property
    def book(self) -> ledger.Ledger:
        return ledger.Ledger(self.folder, "north", "record")

    def rounds(self, first: int, last: int, branch: str = "") -> None:
        for number in range(first, last + 1):
            with self.book.hold(claim(number), self.budget) as held:
                held.charge(sha(f"{branch} update {number}"))

    def receipt(self, name: str, *, spending: bool) -> Path:
        made = receipts.make(self.book, self.key, with_spending=spending)
        return signed_documents.write(self.root / f"{name}.json", made)

    def backup(self) -> Path:
        return shutil.copytree(self.folder, self.root / f"backup-{len(list(self.root.iterdir()))}")

    def restore(self, backup: Path) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(backup, self.folder)

    def said(self, *paths: Path) -> tuple[receipts.Statement, ...]:
        return reconcile.statements(self.folder, paths, self.public, "north")

    def verify(self, *paths: Path) -> dict[str, Any]:
        return receipts.verify(self.folder, [note for one in self.said(*paths) for note in one.notes])

    def reconcile(self, *paths: Path) -> dict[str, Any]:
        return reconcile.reconcile(self.folder, self.said(*paths), self.budget, "north")

    def refused(self) -> str:
        with pytest.raises(errors.LedgerError) as caught:
            self.book.check(claim(90), self.budget)
        return str(caught.value)


@pytest.fixture
def site(tmp_path: Path, key: keys.Private) -> Site:
    made = Site(tmp_path, key)
    made.rounds(1, 2)
    return made


def test_a_whole_ledger_holds_its_receipts(site: Site) -> None:
    first = site.receipt("plain", spending=False)
    site.rounds(3, 3)
    found = site.verify(first, site.receipt("full", spending=True))
    assert (found["checked"], found["waiting"], found["unit"]) == (2, 0, "record")
    assert site.reconcile(first) == {"changed": False}


def test_a_receipt_for_the_other_end_tells_only_length_and_head(site: Site) -> None:
    text = site.receipt("plain", spending=False).read_text()
    assert '"rows": null' in text
    assert "0.1" not in text.replace("fedvfm-ledger-receipt-1", "")
    assert '"sample_rate": 0.1' in site.receipt("full", spending=True).read_text()


@pytest.mark.parametrize("harm", ["restored", "truncated"])
def test_a_rollback_is_found_refused_and_made_good(site: Site, harm: str) -> None:
    old = site.backup()
    site.rounds(3, 3)
    full = site.receipt("full", spending=True)
    if harm == "restored":
        site.restore(old)
    else:
        kept = site.book.path.read_bytes().splitlines(keepends=True)[:5]
        site.book.path.write_bytes(b"".join(kept))
    audit.verify(site.book.path)  # the chain alone shows nothing
    with pytest.raises(errors.AuditError, match=r"truncated or rolled back"):
        site.verify(full)
    assert "Nothing is charged until 'fedvfm ledger reconcile --against RECEIPT'" in site.refused()
    with pytest.raises(errors.LedgerError):
        site.book.charge(claim(91), site.budget, sha("x"))
    made = site.reconcile(full)
    assert (made["adopted"], made["unknown"], made["floor"]) == (1, False, {"epsilon": 0.0, "delta": 0.0})
    assert epsilon(site.book) == pytest.approx(AFTER[3], abs=1e-3)
    site.rounds(4, 4)
    with pytest.raises(errors.BudgetExceeded):
        site.book.check(claim(5), site.budget)
    found = site.verify(full)
    assert (found["reconciled"], found["waiting"]) == (1, 0), "what was reconciled is no finding again"
    assert site.reconcile(full) == {"changed": False}


def test_a_ledger_that_went_on_after_a_rollback_pays_for_both_branches(site: Site) -> None:
    """As long as it was, so that only the head differs: the larger of both counts would be too little."""
    old = site.backup()
    site.rounds(3, 3)
    full = site.receipt("full", spending=True)
    site.restore(old)
    site.rounds(3, 3, "another")
    with pytest.raises(errors.AuditError, match="the log was rewritten"):
        site.verify(full)
    assert site.reconcile(full)["adopted"] == 1
    assert epsilon(site.book) == pytest.approx(AFTER[4], abs=1e-3), "four rounds: two, one lost, one since"


def test_without_knowing_what_was_lost_the_whole_budget_counts(site: Site) -> None:
    old, own = site.backup(), site.budget
    site.rounds(3, 3)
    plain = site.receipt("plain", spending=False)
    site.restore(old)
    with pytest.raises(errors.AuditError):
        site.verify(plain)
    made = site.reconcile(plain)
    assert (made["unknown"], made["floor"]) == (True, {"epsilon": 8.0, "delta": 1e-5})
    with pytest.raises(errors.BudgetExceeded, match=r"to epsilon infinity .*No noise fits what is left"):
        site.book.check(claim(4), own)
    raised = own.model_copy(update={"epsilon": 20.0, "delta": 2e-5})
    after = site.book.check(claim(4), raised)
    assert 8.0 + 6.0 < after.value < 20.0, "what was lost is added to what is known"


def test_a_rewritten_ledger_is_found(site: Site) -> None:
    site.rounds(3, 3)
    full = site.receipt("full", spending=True)
    entries = audit.read(site.book.path)
    site.book.path.unlink()
    written = hash_chain.Chain(site.folder / lines.FILE)
    for one in entries:
        body = {name: value for name, value in one.items() if name not in ("prev", "hash")}
        written.append({**body, "steps": 1} if body["event"] in ("charged", "reserved") else body)
    audit.verify(site.book.path)
    assert epsilon(site.book) < 3.0
    with pytest.raises(errors.AuditError, match="the log was rewritten"):
        site.verify(full)
    site.refused()
    assert site.reconcile(full)["adopted"] == 3
    assert epsilon(site.book) >= AFTER[3]


def test_an_edited_ledger_is_kept_as_evidence_and_made_good(site: Site) -> None:
    site.rounds(3, 3)
    full = site.receipt("full", spending=True)
    path = site.book.path
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*text[:4], text[4].replace('"steps":30', '"steps":1'), *text[5:]]))
    broken = path.read_bytes()
    with pytest.raises(errors.AuditError, match="line 5 does not continue the chain"):
        site.verify(full)
    made = site.reconcile(full)
    assert (made["adopted"], made["unknown"]) == (2, False)
    assert Path(made["evidence"]).read_bytes() == broken
    assert epsilon(site.book) == pytest.approx(AFTER[3], abs=1e-3)
    assert site.reconcile() == {"changed": False}


def test_an_edited_ledger_without_a_receipt_of_its_length_costs_the_budget(site: Site) -> None:
    full = site.receipt("full", spending=True)
    site.rounds(3, 3)
    path = site.book.path
    path.write_text(path.read_text().replace('"steps":30', '"steps":1', 1))
    assert site.reconcile(full)["unknown"]
    assert site.book.entries[-1]["event"] == "reconciled"


def test_a_receipt_that_nobody_vouches_for_adds_but_clears_nothing(site: Site) -> None:
    old = site.backup()
    site.rounds(3, 3)
    full = site.receipt("full", spending=True)
    site.restore(old)
    unsigned = reconcile.statements(site.folder, [full], "", "north")
    made = reconcile.reconcile(site.folder, unsigned, site.budget, "north")
    assert (made["adopted"], made["unknown"]) == (1, True)


def test_a_ledger_that_is_gone_comes_back_from_its_receipt(site: Site) -> None:
    site.rounds(3, 3)
    full = site.receipt("full", spending=True)
    site.book.path.unlink()
    with pytest.raises(errors.LedgerError, match="is gone"):
        ledger.Ledger(site.folder, "north", "record")
    with pytest.raises(errors.LedgerError, match="Name the site's file"):
        reconcile.reconcile(site.folder, site.said(full), None)
    assert site.reconcile(full)["adopted"] == 3
    assert epsilon(site.book) == pytest.approx(AFTER[3], abs=1e-3)
    fresh = site.book.check(claim(4, first=500, last=540), site.budget)
    assert fresh.value == pytest.approx(AFTER[1], abs=1e-3), "the sets are still here, so other records are free"


def test_a_lost_key_makes_all_that_was_spent_count_for_all(site: Site) -> None:
    site.book.records.key_path.unlink()
    made = site.reconcile()
    assert (made["rekeyed"], made["unknown"]) == (True, False)
    after = site.book.check(claim(3, first=500, last=540), site.budget)
    assert after.value == pytest.approx(AFTER[3], abs=1e-3)
    site.rounds(3, 3)
    assert epsilon(site.book) == pytest.approx(AFTER[3], abs=1e-3)


def test_marks_in_audit_logs_of_both_ends_find_a_rollback(site: Site, tmp_path: Path) -> None:
    own = audit.Audit(tmp_path / "site.jsonl", "hospital-north", "site")
    server = audit.Audit(tmp_path / "server.jsonl", "trial", "server")
    old = site.backup()
    site.rounds(3, 3)
    mark = str(site.book.mark)
    own.record("sent", kind="train", bytes=1, ledger=mark)
    server.record("received", kind="train", bytes=1, peer="north", ledger=mark)
    server.record("received", kind="train", bytes=1, peer="south", ledger=str(hash_chain.Mark(99, "0" * 64)))
    assert site.verify(own.path, server.path)["checked"] == 2
    site.restore(old)
    for log in (own.path, server.path):
        with pytest.raises(errors.AuditError, match=rf"entry 2 of {log}: it was truncated or rolled back"):
            site.verify(log)


def test_receipts_of_others_and_forged_ones(site: Site, tmp_path: Path) -> None:
    full = site.receipt("full", spending=True)
    with pytest.raises(errors.TrustError, match="signed with another key"):
        receipts.read(full, "north", keys.public_text(keys.make()))
    with pytest.raises(errors.NothingCompared, match="is of site 'north', this ledger is of 'south'"):
        receipts.read(full, "south", site.public)
    forged = tmp_path / "forged.json"
    storage.write_text(forged, full.read_text().replace('"steps": 30', '"steps": 3'))
    with pytest.raises(errors.TrustError, match="was changed after it was signed"):
        receipts.read(forged, "north", site.public)
    empty = audit.Audit(tmp_path / "empty.jsonl", "trial", "server")
    with pytest.raises(errors.NothingCompared, match="notes nothing of this ledger"):
        site.said(empty.path)


def test_there_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(errors.AuditError, match="there is no ledger"):
        receipts.verify(tmp_path / "nowhere", [])
    with pytest.raises(errors.AuditError, match="there is no ledger"):
        ledger.reopen(tmp_path / "nowhere")
