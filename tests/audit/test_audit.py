"""The audit log: edits, deletions and reordering break the chain; cuts and rewriting show against receipts."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from fedvfm import errors
from fedvfm.audit import audit, cross_check
from fedvfm.cli import audit as cli_audit
from fedvfm.storage import hash_chain
from fedvfm.trust import keys, signed_documents

SHA = "ab" * 32


def fill(log: audit.Audit, first: int, last: int) -> None:
    for number in range(first, last + 1):
        log.record("received", kind="update", recipe=SHA, round=number, bytes=1000 + number)


@pytest.fixture
def log(tmp_path: Path) -> audit.Audit:
    made = audit.Audit(tmp_path / "audit.jsonl", "north", "site")
    fill(made, 1, 3)
    return made


def test_what_was_recorded_is_read(log: audit.Audit) -> None:
    entries = audit.read(log.path)
    assert [entry["event"] for entry in entries] == ["opened", "received", "received", "received"]
    assert entries[0]["owner"] == "north"
    assert log.mark == (4, entries[-1]["hash"])
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    found = audit.verify(log.path)
    assert (found["length"], found["head"], found["unfinished"]) == (4, log.mark[1], 0)


def test_a_log_goes_on_and_is_its_owners(log: audit.Audit) -> None:
    again = audit.Audit(log.path, "north", "site")
    fill(again, 4, 4)
    assert again.mark[0] == 5
    for owner, end in (("south", "site"), ("north", "server")):
        with pytest.raises(errors.AuditError, match="is the log of another end"):
            audit.Audit(log.path, owner, end)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("said", {"text": "patient Smith"}),
    ("received", {"kind": "update", "bytes": 1, "note": "patient Smith"}),
    ("received", {"kind": "patient Smith", "bytes": 1}),
    ("received", {"kind": "update", "bytes": -1}),
    ("received", {"kind": "update", "bytes": True}),
    ("received", {"kind": "update", "bytes": 1.5}),
    ("received", {"kind": "update"}),
    ("received", {"kind": "update", "bytes": 1, "recipe": SHA[:-1]}),
    ("received", {"kind": "update", "bytes": 1, "peer": "../x"}),
    ("trained", {"recipe": SHA, "round": 1, "base": SHA, "fingerprint": SHA, "examples": 1, "seconds": float("nan")}),
    ("sent", {"kind": "update", "bytes": 1, "metrics": "dice"}),
    ("sent", {"kind": "update", "bytes": 1, "hash": SHA}),
    ("refused", {"reason": "control", "address": "patient Smith", "count": 1}),
    ("refused", {"reason": "control", "address": "fe80::1%smith", "count": 1}),
    ("refused", {"reason": "control", "address": "1.2.3.4.5", "count": 1}),
    ("sent", {"kind": "update", "bytes": 1, "time": "2020-01-01T00:00:00Z"}),
]


@pytest.mark.parametrize(("event", "fields"), WRONG)
def test_free_text_does_not_get_in(log: audit.Audit, event: str, fields: dict[str, Any]) -> None:
    before = log.path.read_bytes()
    with pytest.raises(ValueError, match="no audit entry"):
        log.record(event, **fields)
    assert log.path.read_bytes() == before


def test_every_event_can_be_recorded(log: audit.Audit) -> None:
    values: dict[str, Any] = {
        "owner": "north", "end": "site", "site": "a b", "peer": "x.1", "peer_head": SHA, "peer_length": 3, "key": SHA,
        "recipe": SHA, "fingerprint": SHA, "base": SHA, "kind": "update", "verdict": "refused", "split": "val",
        "reason": "policy-rounds", "round": 0, "bytes": 1, "numbers": 2, "examples": 3, "steps": 4, "seconds": 0.5,
        "epsilon": 1, "score": 0.5, "norm": 0.5, "digest": SHA, "address": "2001:db8::1", "count": 3,
        "ledger": str(hash_chain.Mark(3, SHA)), "run": "18446744073709551615",
        "expires": "2026-01-01T00:00:00Z", "metrics": ["dice"],
    }  # fmt: skip
    assert set(values) == set(audit.FIELDS)
    for event, (needed, free) in audit.EVENTS.items():
        log.record(event, **{name: values[name] for name in needed | free})
        log.record(event, **{name: values[name] for name in needed})
    assert audit.verify(log.path)["length"] == 4 + 2 * len(audit.EVENTS)


# -- faults ------------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


INNER: dict[str, Any] = {
    "edited": lambda rows: [rows[0], rows[1].replace(b"1001", b"1009"), *rows[2:]],
    "deleted": lambda rows: [rows[0], *rows[2:]],
    "reordered": lambda rows: [rows[0], rows[2], rows[1], rows[3]],
    "repeated": lambda rows: [*rows, rows[-1]],
    "inserted": lambda rows: [rows[0], rows[2], *rows[1:]],
    "last edited": lambda rows: [*rows[:-1], rows[-1].replace(b"1003", b"1004")],
}


@pytest.mark.parametrize("fault", INNER)
def test_inner_faults_need_no_receipt(log: audit.Audit, fault: str) -> None:
    log.path.write_bytes(b"".join(INNER[fault](lines(log.path))))
    for look in (audit.read, audit.verify):
        with pytest.raises(
            errors.AuditError, match=r"line \d does not continue the chain.*edited, or lines were taken"
        ):
            look(log.path)
    with pytest.raises(errors.AuditError, match="it is evidence"):
        audit.Audit(log.path, "north", "site")


def test_a_missing_beginning(log: audit.Audit, tmp_path: Path) -> None:
    with pytest.raises(errors.AuditError, match="there is no audit log"):
        audit.verify(tmp_path / "none.jsonl")
    log.path.write_bytes(b"")
    with pytest.raises(errors.AuditError, match="its beginning is missing"):
        audit.verify(log.path)
    hash_chain.Chain(log.path).append({"event": "received"})
    with pytest.raises(errors.AuditError, match="its beginning is missing"):
        audit.verify(log.path)


def receipt(log: audit.Audit, path: Path, key: keys.Private) -> Path:
    return signed_documents.write(path, log.receipt(key))


def rewrite(path: Path, change: Any) -> None:
    """Somebody who may write the file makes a whole new chain of it."""
    rows = [{k: v for k, v in entry.items() if k not in ("prev", "hash")} for entry in hash_chain.read(path)]
    path.unlink()
    made = hash_chain.Chain(path)
    for row in change(rows):
        made.append(row)


OUTER: dict[str, tuple[Any, str]] = {
    "truncated": (lambda path: path.write_bytes(b"".join(lines(path)[:3])), "has 3 entries, but had 4 .*truncated"),
    "rewritten": (
        lambda path: rewrite(path, lambda rows: [*rows[:2], {**rows[2], "bytes": 7}, *rows[3:]]),
        "rewritten",
    ),
    "one taken out": (lambda path: rewrite(path, lambda rows: [*rows[:2], *rows[3:]]), "has 3 entries, but had 4"),
    "one more put in": (lambda path: rewrite(path, lambda rows: [*rows[:2], rows[1], *rows[2:]]), "rewritten"),
}


@pytest.mark.parametrize("fault", OUTER)
def test_outer_faults_show_against_a_receipt(log: audit.Audit, tmp_path: Path, fault: str) -> None:
    path = receipt(log, tmp_path / "receipt.json", keys.make())
    change, said = OUTER[fault]
    change(log.path)
    audit.verify(log.path)
    with pytest.raises(errors.AuditError, match=said):
        audit.verify(log.path, [*cross_check.receipt(path, audit.read(log.path), "x").notes])


def test_a_rollback_shows_against_a_receipt(log: audit.Audit, tmp_path: Path) -> None:
    """An older copy that went on: nothing inside it is wrong."""
    shutil.copy(log.path, tmp_path / "old.jsonl")
    fill(log, 4, 6)
    path = receipt(log, tmp_path / "receipt.json", keys.make())
    shutil.copy(tmp_path / "old.jsonl", log.path)
    fresh = audit.Audit(log.path, "north", "site")
    fill(fresh, 14, 18)
    assert audit.verify(log.path)["length"] > 7
    with pytest.raises(errors.AuditError, match=r"entry 7 is not the one of the receipt of .*: the log was rewritten"):
        audit.verify(log.path, [*cross_check.receipt(path, audit.read(log.path), "x").notes])


def test_a_log_that_went_on_agrees_with_older_receipts(log: audit.Audit, tmp_path: Path) -> None:
    paths = [receipt(log, tmp_path / f"{number}.json", keys.make()) for number in range(2)]
    fill(log, 4, 9)
    entries = audit.read(log.path)
    assert (
        audit.verify(log.path, [note for path in paths for note in cross_check.receipt(path, entries, "x").notes])[
            "checked"
        ]
        == 2
    )


def test_receipts_are_signed_and_of_one_log(log: audit.Audit, tmp_path: Path) -> None:
    key, entries = keys.make(), audit.read(log.path)
    path = receipt(log, tmp_path / "receipt.json", key)
    assert cross_check.receipt(path, entries, "x", keys.public_text(key)).notes[0].length == 4
    with pytest.raises(errors.TrustError, match="is signed with another key than the one given"):
        cross_check.receipt(path, entries, "x", keys.public_text(keys.make()))
    values = json.loads(path.read_text())
    for change in ({"length": 3}, {"head": SHA}, {"owner": "south"}, {"public_key": keys.public_text(keys.make())}):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(errors.TrustError, match="was changed after it was signed"):
            cross_check.receipt(path, entries, "x")
    other = audit.Audit(tmp_path / "other.jsonl", "south", "site")
    with pytest.raises(
        errors.NothingCompared, match="is of the log of site 'south' and says nothing that x, of site 'north'"
    ):
        cross_check.receipt(receipt(other, tmp_path / "r.json", key), entries, "x")


# -- two ends ----------------------------------------------------------------------------------------------------------


class Ends:
    """A coordinator's log and a site's, which tell each other their marks with every message, as the real ones do."""

    def __init__(self, folder: Path, rounds: int = 3) -> None:
        self.site = audit.Audit(folder / "site.jsonl", "north", "site")
        self.server = audit.Audit(folder / "server.jsonl", "trial", "server")
        self.key = keys.make()
        self.server.record("enrolled", site="north", key=keys.fingerprint(keys.public_text(self.key)), recipe=SHA)
        for number in range(1, rounds + 1):
            self.round(number)

    def round(self, number: int) -> None:
        asked, answer = (f"{2 * number + more:064x}" for more in (0, 1))
        self._travel(self.server, self.site, asked, number)
        self.site.record("decided", kind="train", verdict="accepted", recipe=SHA, round=number)
        self._travel(self.site, self.server, answer, number)

    @staticmethod
    def _travel(source: audit.Audit, to: audit.Audit, digest: str, number: int) -> None:
        about = {"kind": "train", "bytes": 1000 + number, "digest": digest, "round": number}
        source.record("sent", peer=to.owner, **about)
        mark = source.mark
        to.record("received", peer=source.owner, peer_length=mark.length, peer_head=mark.head, **about)

    def compare(self, mine: str, other: str) -> cross_check.Comparison:
        paths = {"site": self.site.path, "server": self.server.path}
        return cross_check.log(paths[other], audit.read(paths[mine]), mine)


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    return Ends(tmp_path)


def test_two_whole_logs_agree_both_ways(ends: Ends) -> None:
    for mine, other in (("site", "server"), ("server", "site")):
        found = ends.compare(mine, other)
        assert (len(found.notes), found.agreed) == (3, 3 + 6), "three marks each way and six messages"
    (row,) = cross_check.peers(audit.read(ends.site.path), "site").values()
    assert (row["messages"], row["marked"], row["back"]) == (3, 3, [])
    assert audit.check("site", audit.read(ends.site.path), ends.compare("site", "server").notes) is None


CUT: dict[str, tuple[Any, str]] = {
    "truncated": (
        lambda rows: rows[:-1],
        "has 9 entries, but had 10 by entry 8 of .*: it was truncated or rolled back",
    ),
    "rolled back": (lambda rows: rows[:4], "has 4 entries, but had 7 by entry 6 of"),
    "rewritten in the middle": (
        lambda rows: [*rows[:3], {**rows[3], "bytes": 7}, *rows[4:]],
        "entry 4 is not the one of entry 4 of .*: the log was rewritten",
    ),
    "one taken out": (lambda rows: [*rows[:2], *rows[3:]], "but had 10 by|entry 4 is not the one of entry 4"),
    "two swapped": (lambda rows: [*rows[:5], rows[6], rows[5], *rows[7:]], "entry 7 is not the one of entry 6"),
}


@pytest.mark.parametrize("fault", CUT)
def test_a_site_whose_chain_is_whole_again_is_found_out_by_the_other_end(ends: Ends, fault: str) -> None:
    change, said = CUT[fault]
    rewrite(ends.site.path, change)
    audit.verify(ends.site.path)
    for mine, other in (("site", "server"), ("server", "site")):
        with pytest.raises(errors.AuditError, match=said):
            ends.compare(mine, other)


def test_the_coordinator_is_found_out_by_the_site_the_same_way(ends: Ends) -> None:
    rewrite(ends.server.path, lambda rows: [*rows[:4], {**rows[4], "bytes": 7}, *rows[5:]])
    with pytest.raises(errors.AuditError, match=r"server.jsonl: entry 5 is not the one of entry 5 of site"):
        ends.compare("site", "server")
    rewrite(ends.server.path, lambda rows: rows[:3])
    with pytest.raises(errors.AuditError, match=r"has 3 entries, but had 5 by entry 5 of site"):
        ends.compare("site", "server")


def test_a_message_that_only_the_receiver_knows_of(ends: Ends) -> None:
    ends.server.record("received", kind="train", bytes=3, digest=SHA, peer="north")
    for mine, other in (("site", "server"), ("server", "site")):
        with pytest.raises(errors.AuditError, match="received a message that north does not say it sent to trial"):
            ends.compare(mine, other)


def test_two_heads_of_one_length_are_a_rewritten_log(ends: Ends) -> None:
    length, _ = ends.site.mark
    ends.server.record("received", kind="train", bytes=3, peer="north", peer_length=length, peer_head=SHA)
    with pytest.raises(errors.AuditError, match="hold different heads of the log of 'north' at 10 entries"):
        cross_check.peers(audit.read(ends.server.path), "server")


def test_a_step_back_is_told(ends: Ends) -> None:
    ends.server.record("received", kind="train", bytes=3, peer="north", peer_length=5, peer_head=SHA)
    (row,) = cross_check.peers(audit.read(ends.server.path), "server").values()
    assert row["back"] == [9]


def test_a_hospital_with_its_own_log_and_the_coordinators_receipt(ends: Ends, tmp_path: Path) -> None:
    """The receipt confirms what the coordinator held of the site's log, and what its own was."""
    path = receipt(ends.server, tmp_path / "receipt.json", keys.make())
    entries = audit.read(ends.site.path)
    found = cross_check.receipt(path, entries, "site")
    assert [note.length for note in found.notes] == [10]
    ends.round(4)
    audit.check("site", audit.read(ends.site.path), found.notes)
    rewrite(ends.site.path, lambda rows: rows[:9])
    with pytest.raises(
        errors.AuditError, match=r"has 9 entries, but had 10 by the receipt that server 'trial' gave at"
    ):
        audit.check("site", audit.read(ends.site.path), found.notes)


def test_a_receipt_of_the_other_end_against_the_marks_it_showed(ends: Ends, tmp_path: Path) -> None:
    """Without the coordinator's log: it signs now that its log is another than the one it showed with a message."""
    entries = audit.read(ends.site.path)
    shown = [note for _, note in cross_check.marks(entries, "trial", "site")][-1]
    rewrite(ends.server.path, lambda rows: rows[: shown.length])
    same = audit.Audit(ends.server.path, "trial", "server")
    found = cross_check.receipt(receipt(same, tmp_path / "same.json", keys.make()), entries, "site")
    assert found.agreed == 1
    rewrite(ends.server.path, lambda rows: [*rows[:2], {**rows[2], "bytes": 7}, *rows[3:]])
    other = audit.Audit(ends.server.path, "trial", "server")
    with pytest.raises(errors.AuditError, match=r"at 7 entries is not of the log in entry 8 of site: .* rewritten"):
        cross_check.receipt(receipt(other, tmp_path / "other.json", keys.make()), entries, "site")


def test_a_receipt_made_later_of_a_shorter_log(ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = audit.read(ends.site.path)
    rewrite(ends.server.path, lambda rows: rows[:4])
    short = audit.Audit(ends.server.path, "trial", "server")
    later = signed_documents.now() + cross_check.CLOCKS + datetime.timedelta(minutes=1)
    monkeypatch.setattr(signed_documents, "now", lambda: later)
    with pytest.raises(
        errors.AuditError, match=r"had 4 entries at .*, but 5 before that by entry 5 of site: it was trunc"
    ):
        cross_check.receipt(receipt(short, tmp_path / "short.json", keys.make()), entries, "site")


def test_the_coordinator_takes_a_sites_receipt_of_the_enrolled_key_alone(ends: Ends, tmp_path: Path) -> None:
    entries = audit.read(ends.server.path)
    found = cross_check.receipt(receipt(ends.site, tmp_path / "good.json", ends.key), entries, "server")
    assert found.agreed + len(found.notes) == 2
    with pytest.raises(errors.TrustError, match="another key than the one given or enrolled"):
        cross_check.receipt(receipt(ends.site, tmp_path / "bad.json", keys.make()), entries, "server")


def test_a_receipt_names_no_other_site(ends: Ends) -> None:
    ends.server.record("enrolled", site="south", key=SHA, recipe=SHA)
    ends.server.record("received", kind="train", bytes=3, peer="south", peer_length=5, peer_head=SHA)
    made = ends.server.receipt(keys.make())
    assert made.heard == ()
    assert {mark.key for mark in made.sites} == {SHA, keys.fingerprint(keys.public_text(ends.key))}
    assert "south" not in signed_documents.to_text(made)
    assert [one.owner for one in ends.server.receipt(keys.make(), "south").heard] == ["south"]
    assert ends.server.receipt(keys.make(), "south").sites == ()


def test_one_receipt_for_all_sites_is_compared_at_each(ends: Ends, tmp_path: Path) -> None:
    """The coordinator made one without --peer, of a log that is longer than any site was shown."""
    south = audit.Audit(tmp_path / "south.jsonl", "south", "site")
    ends.server.record("enrolled", site="south", key=SHA, recipe=SHA)
    ends._travel(south, ends.server, f"{99:064x}", 1)
    ends.server.record("enrolled", site="late", key="cd" * 32, recipe=SHA)
    path = receipt(ends.server, tmp_path / "all.json", keys.make())
    own = {"north": keys.fingerprint(keys.public_text(ends.key)), "south": SHA, "late": "cd" * 32}
    for log, length in ((ends.site, 10), (south, 2)):
        found = cross_check.receipt(path, audit.read(log.path), log.owner, own_key=own[log.owner])
        assert [note.length for note in found.notes] == [length]
        audit.check(log.owner, audit.read(log.path), found.notes)
    silent = audit.Audit(tmp_path / "late.jsonl", "late", "site")
    with pytest.raises(errors.NothingCompared, match="Ask server 'trial' for a receipt made after the next message"):
        cross_check.receipt(path, audit.read(silent.path), "late", own_key=own["late"])
    with pytest.raises(errors.NothingCompared, match="Give the state folder in place of the log"):
        cross_check.receipt(path, audit.read(ends.site.path), "north")
    rewrite(ends.site.path, lambda rows: rows[:9])
    with pytest.raises(errors.AuditError, match=r"no entry has the head .* truncated, rolled back .* or rewritten"):
        cross_check.receipt(path, audit.read(ends.site.path), "north", own_key=own["north"])


def test_a_site_that_was_enrolled_anew_has_another_log(ends: Ends, tmp_path: Path) -> None:
    """Marks of the log that it had before are none of the new one's, and no two heads of one log."""
    key = keys.make()
    ends.server.record("revoked", site="north")
    ends.server.record("enrolled", site="north", key=keys.fingerprint(keys.public_text(key)), recipe=SHA)
    ends.site = audit.Audit(tmp_path / "new.jsonl", "north", "site")
    assert ends.server.receipt(ends.key, "north").heard == ()
    path = receipt(ends.server, tmp_path / "early.json", ends.key)
    own = keys.fingerprint(keys.public_text(key))
    with pytest.raises(errors.NothingCompared):
        cross_check.receipt(path, audit.read(ends.site.path), "north", own_key=own)
    for number in range(1, 4):
        ends.round(number)
    path = receipt(ends.server, tmp_path / "late.json", ends.key)
    found = cross_check.receipt(path, audit.read(ends.site.path), "north", own_key=own)
    assert [note.length for note in found.notes] == [10]
    (row,) = cross_check.peers(audit.read(ends.server.path), "server").values()
    assert (row["length"], row["back"]) == (10, [])


def test_receipts_for_one_end_are_signed_as_before(ends: Ends) -> None:
    """A key that came later is left out where it is empty, so that what other releases signed still holds."""
    made = ends.site.receipt(ends.key)
    assert b'"sites"' not in made.signed_bytes()
    assert [one.owner for one in made.heard] == ["trial"]


# -- what left ---------------------------------------------------------------------------------------------------------


def test_every_departure_with_its_totals(log: audit.Audit) -> None:
    update = {"kind": "train", "recipe": SHA, "fingerprint": SHA, "digest": SHA, "numbers": 10, "metrics": ["loss"]}
    log.record("sent", bytes=100, round=1, **update)
    log.record("sent", bytes=101, round=1, **update)
    log.record("sent", kind="evaluate", bytes=50, recipe=SHA, round=1, split="test", metrics=["dice"])
    log.record("sent", kind="refusal", bytes=20, reason="policy-rounds", peer="trial")
    rows, totals = audit.departures(audit.read(log.path))
    assert [(row["entry"], row["kind"], row["bytes"]) for row in rows] == [
        (5, "train", 100), (6, "train", 101), (7, "evaluate", 50), (8, "refusal", 20)
    ]  # fmt: skip
    assert rows[0]["fingerprint"] == SHA
    assert totals == {
        "messages": 4, "bytes": 271, "kinds": {"evaluate": 1, "refusal": 1, "train": 2}, "updates": 1, "repeated": 1,
        "numbers": 10, "metrics": ["dice", "loss"],
    }  # fmt: skip


# -- crashes and several writers ---------------------------------------------------------------------------------------


def test_every_crash_in_the_middle_of_an_append_is_mended(log: audit.Audit) -> None:
    data = log.path.read_bytes()
    last = data[:-1].rfind(b"\n") + 1
    for stop in range(last, len(data)):
        log.path.write_bytes(data[:stop])
        found = audit.verify(log.path)
        assert (found["length"], found["unfinished"]) == (3, stop - last)
    fresh = audit.Audit(log.path, "north", "site")
    fill(fresh, 9, 9)
    assert [entry.get("round") for entry in audit.read(log.path)] == [None, 1, 2, 9]


def test_a_cut_under_an_open_log_is_found_at_the_next_entry(log: audit.Audit) -> None:
    log.path.write_bytes(b"".join(lines(log.path)[:2]))
    with pytest.raises(errors.AuditError, match="was cut or rewritten while it was in use"):
        fill(log, 4, 4)


def _write(path: Path, number: int) -> None:
    log = audit.Audit(path, "north", "site")
    for one in range(20):
        log.record("received", kind="update", round=one, bytes=number)


def test_several_processes_write_one_log(tmp_path: Path) -> None:
    """A person approves while the client runs: both add to the same chain."""
    path = tmp_path / "audit.jsonl"
    open_log = audit.Audit(path, "north", "site")
    workers = [multiprocessing.get_context("fork").Process(target=_write, args=(path, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    fill(open_log, 1, 20)
    for worker in workers:
        worker.join(timeout=60)
    assert audit.verify(path)["length"] == 81
    assert open_log.mark[0] == 81


# -- the verbs ---------------------------------------------------------------------------------------------------------


def verb(*words: object) -> Any:
    return typer.testing.CliRunner().invoke(cli_audit.app, [str(word) for word in words])


def test_show_sent_in_words(log: audit.Audit) -> None:
    update = {"kind": "train", "recipe": SHA, "fingerprint": SHA, "numbers": 1000, "metrics": ["loss", "steps"]}
    log.record("sent", bytes=4321, round=1, **update)
    log.record("sent", bytes=4321, round=1, **update)
    log.record("sent", kind="refusal", bytes=20, reason="policy-rounds")
    said = verb("show", log.path, "--sent").stdout.splitlines()
    assert len(said) == 6
    assert "round 1" in said[0]
    assert "1,000 numbers, sha256 abababababab; metrics loss, steps" in said[0]
    assert said[2].endswith("reason policy-rounds")
    assert said[3] == "3 messages (1 refusal, 2 train), 8,662 bytes in all"
    assert said[4] == "1 update of 1,000 numbers; 1 left once more with the same bytes"
    assert said[5] == "metrics that left: loss, steps"
    assert len(json.loads(verb("show", log.path, "--sent", "--last", 1, "--json").stdout)["messages"]) == 1


def test_verify_says_what_was_compared_and_what_was_not(ends: Ends, tmp_path: Path) -> None:
    said = verb("verify", ends.site.path, "--against", ends.server.path).stdout
    assert "10 entries, the chain is whole, 12 notes agree" in said
    assert "trial: 3 of 3 messages showed its log, last 7 entries" in said
    assert "a cut at the end or a rewritten file does not show" in verb("verify", ends.site.path).stdout
    ends.server.record("received", kind="train", bytes=3, peer="north", peer_length=5, peer_head=SHA)
    told = verb("verify", ends.server.path)
    assert "note: by entry 9 the log of 'north' was shorter than before; use --against" in told.stderr
    with pytest.raises(errors.NothingCompared, match="holds no mark of the log of 'south'"):
        raise verb("receipt", _state(ends, tmp_path), "-o", tmp_path / "r.json", "--peer", "south").exception


def test_what_cannot_be_compared_is_no_fault_of_the_log(ends: Ends, tmp_path: Path) -> None:
    """Its own exit code; but a fault that another file shows comes first."""
    third = audit.Audit(tmp_path / "third.jsonl", "elsewhere", "server")
    stranger = receipt(third, tmp_path / "stranger.json", keys.make())
    good = receipt(ends.server, tmp_path / "good.json", keys.make())
    said = verb("verify", ends.site.path, "--against", stranger, "--against", good).exception
    assert isinstance(said, errors.NothingCompared)
    assert said.exit_code == 17
    assert "of the log of server 'elsewhere'" in str(said)
    assert "10 entries, the chain is whole, 1 notes agree" in str(said)
    rewrite(ends.site.path, lambda rows: rows[:9])
    said = verb("verify", ends.site.path, "--against", stranger, "--against", good).exception
    assert isinstance(said, errors.AuditError)
    assert "truncated or rolled back" in str(said)


def _state(ends: Ends, folder: Path) -> Path:
    keys.write_private(folder / "server.key", ends.key, pem=True)
    shutil.copy(ends.server.path, folder / "audit.jsonl")
    return folder
