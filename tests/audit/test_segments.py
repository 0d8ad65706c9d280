"""A log in segments is one log: read whole, added to cheaply, killed anywhere; what is wrong with a segment shows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from fedvfm import errors
from fedvfm.audit import audit, cross_check, segments
from fedvfm.cli import audit as cli_audit
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import keys, signed_documents

SHA = "ab" * 32


class Log(audit.Audit):
    most = 4


def fill(log: audit.Audit, first: int, last: int) -> None:
    for number in range(first, last + 1):
        log.record("received", kind="update", recipe=SHA, round=number, bytes=1000 + number)


def rounds(entries: Any) -> list[int]:
    return [entry["round"] for entry in entries if entry["event"] == "received"]


@pytest.fixture
def log(tmp_path: Path) -> audit.Audit:
    made = Log(tmp_path / "audit.jsonl", "north", "site")
    fill(made, 1, 14)
    return made


def test_a_long_log_is_read_and_added_to_as_one(log: audit.Audit) -> None:
    assert segments.numbers(log.path) == [1, 2, 3, 4]
    entries = audit.read(log.path)
    assert rounds(entries) == list(range(1, 15))
    assert [entry["event"] for entry in entries].count("continued") == 4
    assert [at for at, entry in enumerate(entries) if entry["event"] == "continued"] == [
        entry["entries"] for entry in entries if entry["event"] == "continued"
    ]
    assert log.mark == (len(entries), entries[-1]["hash"])
    assert log.entries == entries == list(log.scan())
    assert log.last == entries[-1]
    again = Log(log.path, "north", "site")
    fill(again, 15, 15)
    assert again.mark.length == len(entries) + 1
    assert audit.verify(log.path)["length"] == len(entries) + 1
    for path in (log.path, *segments.folder(log.path).iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(segments.folder(log.path).stat().st_mode) == 0o700
    with pytest.raises(errors.AuditError, match="is the log of another end"):
        Log(log.path, "south", "site")


def test_a_log_of_before_goes_on_in_segments(tmp_path: Path) -> None:
    """One file of any length is the first segment, as it is."""
    path = tmp_path / "audit.jsonl"

    class Whole(audit.Audit):
        most = 0

    fill(Whole(path, "north", "site"), 1, 30)
    before, data = audit.read(path), path.read_bytes()
    log = Log(path, "north", "site")
    assert log.mark == (31, before[-1]["hash"])
    fill(log, 31, 40)
    assert segments.sealed(path, 1).read_bytes() == data
    assert audit.read(path)[:31] == before
    assert rounds(audit.read(path)) == list(range(1, 41))


def test_a_long_file_is_sealed_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of a log of before is held in memory; damaged, another's, or on a full disk it is treated as any other."""
    monkeypatch.setattr(audit, "_LONG", 2000)
    path, most = tmp_path / "audit.jsonl", audit.Audit.most
    fill(audit.Audit(path, "north", "site"), 1, 30)
    with path.open("ab") as file:
        file.write(b'{"cut short')
    data = path.read_bytes()
    with pytest.raises(errors.AuditError, match="is the log of another end"):
        audit.Audit(path, "south", "site")
    assert segments.numbers(path) == []
    real = storage.write_file

    def full(*_: Any, **__: Any) -> None:
        raise errors.StorageError("full")

    monkeypatch.setattr(storage, "write_file", full)
    assert audit.Audit(path, "north", "site").mark.length == 31
    monkeypatch.setattr(storage, "write_file", real)
    log = audit.Audit(path, "north", "site")
    assert (segments.numbers(path), len(log._open().entries), log.mark.length) == ([1], 1, 32)
    fill(log, 31, 32)
    assert rounds(audit.read(path)) == list(range(1, 33))
    assert audit.Audit.most == most
    path.write_bytes(data.replace(b"1005", b"9005"))
    segments.sealed(path, 1).unlink()
    with pytest.raises(errors.AuditError, match=r"does not continue the chain.*evidence"):
        audit.Audit(path, "north", "site")
    assert segments.numbers(path) == []


def test_continued_is_nobody_s_to_record(log: audit.Audit) -> None:
    with pytest.raises(ValueError, match="no audit entry"):
        log.record("continued", owner="north", end="site", segment=9, entries=3)


def test_several_writers_and_a_reader_see_one_log(log: audit.Audit) -> None:
    other, seen = Log(log.path, "north", "site"), list[Any]()
    other.follow(seen.append)
    tail, shown = segments.Tail(log.path), list[bytes]()
    for number in range(15, 40):
        fill(log if number % 3 else other, number, number)
        if number % 7 == 0:
            shown += tail.lines()
            other.catch_up()
            assert seen == audit.read(log.path)
    shown += tail.lines()
    assert [hash_chain.parse(line) for line in shown] == audit.read(log.path)[-len(shown) :]
    assert rounds(map(json.loads, shown)) == list(range(15, 40))
    assert log.mark == other.mark


def test_adding_reads_no_sealed_segment(log: audit.Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(log, 15, 300)
    read: list[int] = []
    real = hash_chain.parse
    monkeypatch.setattr(hash_chain, "parse", lambda line: (read.append(1), real(line))[1])
    opened = Log(log.path, "north", "site")
    fill(log, 301, 310)
    fill(opened, 311, 311)
    assert opened.mark.length == log.mark.length
    assert len(read) < 60


# -- faults ------------------------------------------------------------------------------------------------------------


def edited(path: Path) -> None:
    data = path.read_bytes()
    assert b"1005" in data
    path.write_bytes(data.replace(b"1005", b"9005"))


def rewritten(path: Path) -> None:
    """The segment alone, as a chain that is whole in itself."""
    rows = hash_chain.read(path, hash_chain.parse(path.read_bytes().splitlines()[0])["prev"])  # type: ignore[index]
    head = rows[0]["prev"]
    lines = []
    for row in rows:
        plain = {key: value for key, value in row.items() if key not in ("prev", "hash")}
        if "bytes" in plain:
            plain["bytes"] = 7
        row = hash_chain.linked(plain, head)
        head = row["hash"]
        lines.append(hash_chain.canonical(row) + "\n")
    path.write_text("".join(lines))


def swapped(path: Path) -> None:
    one, two = segments.sealed(path, 2), segments.sealed(path, 3)
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def renumbered(path: Path) -> None:
    """Segment 2 taken out, the later ones moved down."""
    segments.sealed(path, 2).unlink()
    for number in (3, 4):
        segments.sealed(path, number).rename(segments.sealed(path, number - 1))


FAULTS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "edited": (lambda path: edited(segments.sealed(path, 2)), False),
    "rewritten": (lambda path: rewritten(segments.sealed(path, 2)), False),
    "the last sealed one rewritten": (lambda path: rewritten(segments.sealed(path, 4)), True),
    "cut": (lambda path: segments.sealed(path, 2).write_bytes(segments.sealed(path, 2).read_bytes()[:-3]), False),
    "cut by a line": (
        lambda path: segments.sealed(path, 2).write_bytes(
            b"".join(segments.sealed(path, 2).read_bytes().splitlines(keepends=True)[:-1])
        ),
        False,
    ),
    "emptied": (lambda path: segments.sealed(path, 2).write_bytes(b""), False),
    "added to": (
        lambda path: segments.sealed(path, 2).write_bytes(segments.sealed(path, 2).read_bytes() + b"x"),
        False,
    ),
    "taken out": (lambda path: segments.sealed(path, 2).unlink(), True),
    "the first taken out": (lambda path: segments.sealed(path, 1).unlink(), True),
    "the last sealed one taken out": (lambda path: segments.sealed(path, 4).unlink(), True),
    "all taken out": (lambda path: shutil.rmtree(segments.folder(path)), True),
    "swapped": (swapped, False),
    "renumbered": (renumbered, True),
    "one repeated": (lambda path: shutil.copy(segments.sealed(path, 2), segments.sealed(path, 3)), False),
    "the open one gone": (lambda path: path.unlink(), True),
    "an older copy in place of the open one": (lambda path: shutil.copy(segments.sealed(path, 3), path), True),
    "the open one of another log": (lambda path: path.write_bytes(segments.sealed(path, 1).read_bytes()), True),
    "a copy of the open one that is another": (
        lambda path: segments.sealed(path, 5).write_bytes(segments.sealed(path, 4).read_bytes()),
        True,
    ),
}
"""Fault -> what makes it, and whether opening the log to add to it shows it too; reading and verifying always do."""


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_segment_shows(log: audit.Audit, fault: str) -> None:
    change, at_opening = FAULTS[fault]
    before = (audit.verify(log.path), log.mark)
    assert before[0]["length"] == before[1].length
    change(log.path)
    for look in (audit.read, audit.verify, lambda path: list(Log(path, "north", "site").scan())):
        with pytest.raises(errors.AuditError):
            look(log.path)
    with pytest.raises(errors.AuditError):
        Log(log.path, "north", "site").follow(lambda entry: None)
    if at_opening:
        with pytest.raises(errors.AuditError):
            Log(log.path, "north", "site")


@pytest.mark.parametrize("fault", [fault for fault, (_, opening) in FAULTS.items() if opening])
def test_whoever_has_the_log_open_sees_it_when_somebody_wrote(log: audit.Audit, fault: str) -> None:
    other = Log(log.path, "north", "site")
    fill(other, 15, 15)
    FAULTS[fault][0](log.path)
    if fault in ("the open one gone", "an older copy in place of the open one", "the open one of another log"):
        with pytest.raises(errors.AuditError):
            fill(other, 16, 16)
    with pytest.raises(errors.AuditError):
        list(other.scan())


def test_a_cut_and_a_rollback_of_segments_show_against_a_receipt(log: audit.Audit, tmp_path: Path) -> None:
    """Whoever can write all files can put the log back to an earlier end of a segment: receipts show it."""
    path = signed_documents.write(tmp_path / "receipt.json", log.receipt(keys.make()))
    held = segments.sealed(log.path, 4)
    shutil.move(held, log.path)
    entries = audit.read(log.path)
    with pytest.raises(errors.AuditError, match="truncated or rolled back"):
        audit.verify(log.path, cross_check.receipt(path, entries, "x").notes)
    fill(Log(log.path, "north", "site"), 50, 60)
    with pytest.raises(errors.AuditError, match="rewritten"):
        audit.verify(log.path, cross_check.receipt(path, audit.read(log.path), "x").notes)


# -- killed ------------------------------------------------------------------------------------------------------------

POINTS = [
    "file-opened:1", "file-written:1", "file-synced:1", "file-renamed:1", "segment-copied",
    "file-opened:2", "file-written:2", "file-synced:2", "file-renamed:2", "segment-begun",
    "line-half-written:1", "line-written:1",
]  # fmt: skip


def killed(work: Callable[[], object], point: str) -> bool:
    pid = os.fork()
    if not pid:
        os.environ["FEDVFM_FAULT_POINT"] = point
        try:
            work()
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_it_seals_a_log_loses_nothing(tmp_path: Path, point: str) -> None:
    log = Log(tmp_path / "audit.jsonl", "north", "site")
    fill(log, 1, 3)  # the next one seals
    before = audit.read(log.path)
    assert killed(lambda: fill(log, 4, 4), point)
    assert audit.read(log.path)[: len(before)] == before, "readable as it was left"
    assert rounds(audit.read(log.path)) in ([1, 2, 3], [1, 2, 3, 4])
    again = Log(log.path, "north", "site")
    fill(again, 5, 12)
    found = audit.read(log.path)
    assert found[: len(before)] == before
    assert rounds(found)[-8:] == list(range(5, 13))
    assert audit.verify(log.path)["unfinished"] == 0
    assert not list(tmp_path.rglob("*.part")) or point.startswith(("file-opened", "file-written", "file-synced"))
    fill(log, 13, 13)  # whoever had it open goes on
    assert log.mark == Log(log.path, "north", "site").mark


# -- commands ----------------------------------------------------------------------------------------------------------


def test_the_commands_read_a_log_of_many_segments(log: audit.Audit, tmp_path: Path) -> None:
    keys.write_private(tmp_path / "site.key", keys.make())
    run = typer.testing.CliRunner().invoke
    found = run(cli_audit.app, ["verify", str(tmp_path), "--json"])
    assert json.loads(found.stdout)["length"] == log.mark.length
    assert len(run(cli_audit.app, ["show", str(log.path)]).stdout.splitlines()) == log.mark.length
    assert run(cli_audit.app, ["receipt", str(tmp_path), "-o", str(tmp_path / "r.json")]).exit_code == 0
    fill(log, 15, 30)
    found = run(cli_audit.app, ["verify", str(tmp_path), "--against", str(tmp_path / "r.json"), "--json"])
    assert json.loads(found.stdout)["checked"] == 1
