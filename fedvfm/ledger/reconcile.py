"""After a rollback: a ledger takes over what receipts say was spent, and goes on.

What is known from a receipt is adopted line by line. What is only known to be missing counts as the whole budget. The
file is replaced in one step, so that a crash leaves the refused one or the reconciled one; a broken file is kept aside.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.config import privacy
from fedvfm.ledger import entries as lines
from fedvfm.ledger import receipts
from fedvfm.privacy import records
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import signed_documents


@dataclass(frozen=True)
class Found:
    """A ledger's folder as it was found.

    Attributes:
        entries: up to the first line that does not continue the chain.
        size: lines in the file.
        broken: whether a line does not continue the chain.
        gone: whether there is no line though there were releases.
        rekey: whether the key is not the ledger's.
    """

    entries: list[dict[str, Any]]
    size: int
    broken: bool
    gone: bool
    rekey: bool


def look(folder: Path) -> Found:
    """Look at a folder without changing it."""
    path, sets = folder / lines.FILE, folder / "sets"
    entries, wrong = hash_chain.sound(path)
    size = path.read_bytes().count(b"\n") if path.exists() else 0
    gone = not entries and sets.is_dir() and any(sets.iterdir())
    return Found(entries, size, bool(wrong), gone, bool(entries) and not _own_key(folder, entries))


def _own_key(folder: Path, entries: Sequence[Mapping[str, Any]]) -> bool:
    key = records.Records(folder)
    return not key.lost and key.key_id() == lines.current_key(entries)


@dataclass(frozen=True)
class Decision:
    """What reconciling comes to.

    Attributes:
        adopted: releases that were lost.
        floor: (epsilon, delta) on top; above 0 where something was lost that no receipt knows.
        marks: that are settled.
        unknown: whether something was lost that no receipt knows.
        rekey: whether records are hashed with a new key from now on.
    """

    adopted: tuple[receipts.Spent, ...]
    floor: tuple[float, float]
    marks: tuple[str, ...]
    unknown: bool
    rekey: bool


def decide(found: Found, said: Sequence[receipts.Statement], budget: privacy.Budget | None) -> Decision | None:
    """What to adopt; None where nothing is amiss.

    Raises:
        LedgerError: if something is unknown, and so is the budget it would count as.
    """
    entries = found.entries
    notes = [note for one in said for note in one.notes] + lines.waiting(entries)
    wrong = receipts.misfits(entries, notes)
    lost = _lost(entries, [row for one in said for row in one.rows or ()])
    if not (wrong or lost or found.broken or found.gone or found.rekey):
        return None
    points = {(one["number"], one["head"]) for one in entries if one["event"] == "adopted"}.union(
        *(one.points for one in said)
    )
    reach = max((note.length for one in said if one.points for note in one.notes), default=0)
    unknown = any((one.length, one.head) not in points for one in wrong)
    unknown |= (found.broken and reach < found.size) or (found.gone and not reach)
    epsilon, delta = lines.floor(entries)
    more = [(one.floor[0] - epsilon, one.floor[1] - delta) for one in said] + [(0.0, 0.0)]
    floor = max(one[0] for one in more), max(one[1] for one in more)
    if unknown:
        floor = _whole_budget(entries, budget)
    marks = tuple(sorted({str(hash_chain.Mark(one.length, one.head)) for one in wrong}))
    return Decision(tuple(lost), floor, marks, unknown, found.rekey)


def _lost(entries: Sequence[Mapping[str, Any]], rows: Sequence[receipts.Spent]) -> list[receipts.Spent]:
    """Rows that the ledger neither holds nor adopted before, each once."""
    have = {(number, str(one["hash"])) for number, one in enumerate(entries, start=1)}
    have |= {(int(one["number"]), str(one["head"])) for one in entries if one["event"] == "adopted"}
    return sorted(
        {(one.number, one.head): one for one in rows if (one.number, one.head) not in have}.values(),
        key=lambda one: (one.number, one.head),
    )


def _whole_budget(entries: Sequence[Mapping[str, Any]], budget: privacy.Budget | None) -> tuple[float, float]:
    known = [(float(one["budget_epsilon"]), float(one["budget_delta"])) for one in entries if "budget_epsilon" in one]
    known += [] if budget is None else [(budget.epsilon, budget.delta)]
    if not known:
        raise errors.LedgerError(
            "releases were lost that no receipt says anything of, and the budget they were bounded by is not known. "
            "Name the site's file, or give a receipt that was made with --with-spending"
        )
    return max(one[0] for one in known), max(one[1] for one in known)


def reconcile(
    folder: Path, said: Sequence[receipts.Statement], budget: privacy.Budget | None, owner: str = ""
) -> dict[str, Any]:
    """Adopt what was lost and let charging go on.

    Args:
        folder: the ledger's.
        said: by receipts and logs.
        budget: the site's; needed where the ledger is gone or what was lost is unknown.
        owner: the site's name, for a ledger that is gone.

    Returns: ``changed``, ``adopted`` (releases), ``unknown``, ``floor``, ``marks`` (settled), ``rekeyed``, ``evidence``
    (the broken file, kept aside).

    Raises:
        LedgerError: see :func:`decide`.
        StorageError: if the disk refuses; the ledger is then as it was.
    """
    path = folder / lines.FILE
    with storage.exclusive(path):
        found = look(folder)
        made = decide(found, said, budget)
        if made is None:
            return {"changed": False}
        if not found.entries and (budget is None or not owner):
            raise errors.LedgerError(f"{path}: nothing of it is left. Name the site's file, which says whose it was")
        evidence = _keep_aside(path) if found.broken else None
        _write(folder, found, made, (owner, "" if budget is None else budget.unit))
    return {
        "changed": True,
        "adopted": len(made.adopted),
        "unknown": made.unknown,
        "floor": {"epsilon": made.floor[0], "delta": made.floor[1]},
        "marks": len(made.marks),
        "rekeyed": made.rekey,
        "evidence": None if evidence is None else str(evidence),
    }


def _keep_aside(path: Path) -> Path:
    for number in range(1, 1000):
        aside = path.with_name(f"{path.stem}.broken-{number}.jsonl")
        if not aside.exists():
            break
    storage.write_bytes(aside, path.read_bytes())
    return aside


def _write(folder: Path, found: Found, made: Decision, opened: tuple[str, str]) -> None:
    """The whole new file beside the old one, then in its place."""
    path, key = folder / lines.FILE, records.Records(folder)
    if key.lost:
        key.make_key()
    fresh = path.with_name(f"{path.stem}.new.jsonl")
    storage.write_text(fresh, "".join(f"{hash_chain.canonical(one)}\n" for one in found.entries))
    written = hash_chain.Chain(fresh)
    if not found.entries:
        _line(written, "opened", owner=opened[0], end=lines.END, unit=opened[1], key=key.key_id())
    if made.rekey:
        _line(written, "rekeyed", key=key.key_id())
    for one in made.adopted:
        _line(written, "adopted", **one.model_dump(mode="json", exclude_none=True))
    if made.floor[0] > 0 and made.floor[1] > 0:
        _line(written, "floor", epsilon=made.floor[0], delta=made.floor[1])
    _line(written, "reconciled", marks=list(made.marks))
    storage.fault_point("ledger-reconciled")
    with storage.guard(path):
        os.replace(fresh, path)
        storage.sync_folder(folder)


def _line(written: hash_chain.Chain, event: str, **fields: Any) -> None:
    lines.require(event, fields)
    written.append({"event": event, "time": signed_documents.stamp(signed_documents.now()), **fields})


def statements(
    folder: Path, paths: Sequence[Path], public_key: str = "", owner: str = ""
) -> tuple[receipts.Statement, ...]:
    """What these files say of the ledger in a folder; see :func:`fedvfm.ledger.receipts.read`.

    Raises:
        NothingCompared: if none of them notes anything of it, or one is of another ledger.
    """
    entries, _ = hash_chain.sound(folder / lines.FILE)
    of = str(entries[0].get("owner")) if entries else owner
    said = tuple(receipts.read(path, of, public_key) for path in paths)
    if paths and not any(one.notes for one in said):
        raise errors.NothingCompared(
            f"{', '.join(map(str, paths))}: notes nothing of this ledger, so nothing was compared. A coordinator's "
            "receipt notes it where it was made for this site alone: fedvfm audit receipt STATE --peer SITE"
        )
    return said
