"""The audit log: edits, deletions and reordering break the chain; cuts and rewriting show against receipts."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from fedvfm import audit, chain, errors
from fedvfm.trust import documents, keys

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
        "epsilon": 1, "expires": "2026-01-01T00:00:00Z", "metrics": ["dice"],
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
    chain.Chain(log.path).append({"event": "received"})
    with pytest.raises(errors.AuditError, match="its beginning is missing"):
        audit.verify(log.path)


def receipt(log: audit.Audit, path: Path, key: keys.Private) -> Path:
    return documents.write(path, log.receipt(key))


def rewrite(path: Path, change: Any) -> None:
    """Somebody who may write the file makes a whole new chain of it."""
    rows = [{k: v for k, v in entry.items() if k not in ("prev", "hash")} for entry in chain.read(path)]
    path.unlink()
    made = chain.Chain(path)
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
        audit.verify(log.path, [audit.from_receipt(path, audit.read(log.path))])


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
        audit.verify(log.path, [audit.from_receipt(path, audit.read(log.path))])


def test_a_log_that_went_on_agrees_with_older_receipts(log: audit.Audit, tmp_path: Path) -> None:
    paths = [receipt(log, tmp_path / f"{number}.json", keys.make()) for number in range(2)]
    fill(log, 4, 9)
    entries = audit.read(log.path)
    assert audit.verify(log.path, [audit.from_receipt(path, entries) for path in paths])["checked"] == 2


def test_receipts_are_signed_and_of_one_log(log: audit.Audit, tmp_path: Path) -> None:
    key, entries = keys.make(), audit.read(log.path)
    path = receipt(log, tmp_path / "receipt.json", key)
    assert audit.from_receipt(path, entries, keys.public_text(key)).length == 4
    with pytest.raises(errors.TrustError, match="is signed with another key than the one given"):
        audit.from_receipt(path, entries, keys.public_text(keys.make()))
    values = json.loads(path.read_text())
    for change in ({"length": 3}, {"head": SHA}, {"owner": "south"}, {"public_key": keys.public_text(keys.make())}):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(errors.TrustError, match="was changed after it was signed"):
            audit.from_receipt(path, entries)
    other = audit.Audit(tmp_path / "other.jsonl", "south", "site")
    with pytest.raises(errors.AuditError, match="is of the log of site 'south', this one is of site 'north'"):
        audit.from_receipt(receipt(other, tmp_path / "r.json", key), entries)


def test_heads_that_the_other_end_noted(log: audit.Audit, tmp_path: Path) -> None:
    peer = audit.Audit(tmp_path / "peer.jsonl", "trial", "server")
    length, head = log.mark
    peer.record("received", kind="update", bytes=5, peer="north", peer_length=length, peer_head=head)
    peer.record("received", kind="update", bytes=5, peer="south", peer_length=99, peer_head=SHA)
    fill(log, 4, 4)
    notes = audit.from_peer(peer.path, "north")
    assert audit.verify(log.path, notes)["checked"] == 1
    log.path.write_bytes(b"".join(lines(log.path)[:2]))
    with pytest.raises(errors.AuditError, match="has 2 entries, but had 4 by the other end's entry 2"):
        audit.verify(log.path, notes)


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
