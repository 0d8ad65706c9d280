"""Kills a site's process at one line after another and looks at what the ledger says. Run by test_ledger_kill.py.

Each victim is a real child process that does what a site does in round 2: hold, train, keep the update, charge, send.
It is killed (SIGKILL) by a trace function at its n-th line inside the ledger's modules, or by a named fault point. Then
the round is asked for again, as a coordinator does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from fedvfm import errors
from fedvfm.ledger import ledger, receipts, reconcile
from fedvfm.storage import storage
from tests.privacy import releases

TRACED = (
    "audit.py",
    "entries.py",
    "hash_chain.py",
    "ledger.py",
    "privacy_charge.py",
    "reconcile.py",
    "records.py",
    "spending.py",
    "storage.py",
)
BUDGET = releases.budget()


def claim(number: int) -> ledger.Claim:
    return releases.claim(number, first=number, last=30)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def site(folder: Path) -> None:
    """Round 2, asked for now or again."""
    kept, book = folder / "sent", ledger.Ledger(folder / "ledger", "north", "record")
    if kept.exists():
        token, update = kept.read_bytes()[:32].decode(), sha(kept.read_bytes())
        if not book.known(claim(2), BUDGET, update, token):
            raise SystemExit("what was kept under its own reservation is not known")
        book.charge(claim(2), BUDGET, update, token=token)
    else:
        with book.hold(claim(2), BUDGET) as held:
            made = held.token.encode() + os.urandom(32)
            storage.write_bytes(kept, made)
            held.charge(sha(made))
    (folder / "left").write_bytes(kept.read_bytes())


def mend(folder: Path) -> None:
    reconcile.reconcile(folder / "ledger", [_statement(folder)], BUDGET, "north")


def _statement(folder: Path) -> receipts.Statement:
    row = json.loads((folder / "receipt").read_text())
    note = receipts.audit.Noted(row["length"], row["head"], "a receipt")
    return receipts.Statement((note,), tuple(receipts.Spent(**one) for one in row["rows"]), trusted=True)


def traced(work: Callable[[], None], stop: int) -> int:
    """Do it and count its lines; at line ``stop`` kill this process."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if os.path.basename(frame.f_code.co_filename) not in TRACED or "fedvfm" not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == stop:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return seen


def child(work: Callable[[], object]) -> int:
    """The wait status of a child process that does it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def fresh(root: Path, name: str) -> Path:
    """A copy of a site that has done round 1."""
    folder = root / name
    shutil.copytree(root / "begun", folder)
    return folder


def examine(folder: Path) -> list[str]:
    """What is wrong after the kill, and after the round was asked for again."""
    found = []
    book = ledger.Ledger(folder / "ledger", "north", "record")
    charged = {one["update"] for one in book.entries if one["event"] == "charged"}
    left = folder / "left"
    if left.exists() and left.read_bytes() and sha(left.read_bytes()) not in charged:
        found.append("an update left that was not charged")
    before = (folder / "sent").read_bytes() if (folder / "sent").exists() else None
    site(folder)
    second = [one for one in book.entries if one["event"] == "charged" and one["round"] == 2]
    if len(second) != 1:
        found.append(f"round 2 was charged {len(second)} times")
    if before is not None and left.read_bytes() != before:
        found.append("a retry sent other bytes")
    held = book.spending(book.entries)
    if len(held.rows) != 2:
        found.append(f"{len(held.rows)} releases count")
    return found


def rounds(root: Path, points: list[str]) -> dict[str, list[str]]:
    wrong = {}
    for number, point in enumerate(points):
        folder = fresh(root, f"kill-{number}")
        if point.isdigit():
            status = child(lambda folder=folder, point=point: traced(lambda: site(folder), int(point)))
        else:
            status = child(
                lambda folder=folder, point=point: (os.environ.update(FEDVFM_FAULT_POINT=point), site(folder))
            )
        faults = [] if os.WIFSIGNALED(status) else [f"was not killed: {status}"]
        faults += examine(folder)
        if faults:
            wrong[point] = faults
    return wrong


def mending(root: Path, points: list[str]) -> dict[str, list[str]]:
    """A ledger that was rolled back to round 1 and is reconciled with a receipt of round 2."""
    wrong = {}
    for number, point in enumerate(points):
        folder = fresh(root, f"mend-{number}")
        status = child(lambda folder=folder, point=point: traced(lambda: mend(folder), int(point)))
        faults = [] if os.WIFSIGNALED(status) else [f"was not killed: {status}"]
        book = ledger.Ledger(folder / "ledger", "north", "record")
        events = [one["event"] for one in book.entries]
        try:
            book.check(claim(3), BUDGET)
            if "adopted" not in events:
                faults.append("goes on though nothing was adopted")
        except errors.LedgerError:
            if "reconciled" in events:
                faults.append("is reconciled and does not go on")
            mend(folder)
        if len(book.spending(book.entries).rows) != 2:
            faults.append(f"{len(book.spending(book.entries).rows)} releases count")
        if faults:
            wrong[point] = faults
    return wrong


def begin(root: Path) -> None:
    begun = root / "begun"
    begun.mkdir(parents=True)
    book = ledger.Ledger(begun / "ledger", "north", "record")
    with book.hold(claim(1), BUDGET) as held:
        held.charge(sha(b"round 1"))


def suspend(root: Path) -> None:
    """Turn what was begun into a ledger that lost its second round and knows it."""
    ahead = fresh(root, "ahead")
    site(ahead)
    book = ledger.Ledger(ahead / "ledger", "north", "record")
    rows = [
        receipts._spent(number, one).model_dump(mode="json")
        for number, one in enumerate(book.entries, start=1)
        if one["event"] == "charged"
    ]
    (root / "begun" / "receipt").write_text(
        json.dumps({"length": book.mark.length, "head": book.mark.head, "rows": rows})
    )
    note = receipts.audit.Noted(book.mark.length, book.mark.head, "a receipt")
    ledger.Ledger(root / "begun" / "ledger", "north", "record").suspend(note)


def main() -> None:
    os.fsync = lambda handle: None  # what is killed leaves to the kernel what it wrote; no machine stops here
    what, root, stride = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    begin(root)
    if what == "points":
        print(json.dumps({"killed": len(sys.argv[4:]), "wrong": rounds(root, sys.argv[4:])}))
        return
    work, victim = (rounds, site) if what == "lines" else (mending, mend)
    if what == "mend":
        suspend(root)
    total = traced(lambda: victim(fresh(root, "counted")), 0)
    points = [str(line) for line in range(1, total + 1, stride)]
    print(json.dumps({"lines": total, "killed": len(points), "wrong": work(root, points)}))


main()
