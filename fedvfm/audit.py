"""The audit log of one end: what was received, decided, trained and sent, append-only and hash-chained.

An entry holds hashes, sizes, numbers and names of a fixed form, never free text, so that nothing of a patient can get
in. Inner edits, deletions and reordering break the chain. Whoever can write the whole file can cut or rewrite it: that
shows against a *receipt*, which the other end keeps, and against the heads that the other end noted with each message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedvfm import chain, config, errors, storage
from fedvfm.trust import documents, keys

ENDS = ("server", "site")


def _matches(pattern: str) -> Callable[[Any], bool]:
    compiled = re.compile(pattern)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


_word = _matches(r"[a-z][a-z0-9-]{0,39}")
_site = _matches(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}")
_sha256 = _matches(r"[0-9a-f]{64}")
_time = _matches(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")


def _metrics(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 1000 and all(isinstance(one, str) and len(one) < 200 for one in value)
    )


FIELDS: dict[str, Callable[[Any], bool]] = {
    "owner": _site,
    "end": lambda value: value in ENDS,
    "site": _site,
    "peer": _site,
    "peer_head": _sha256,
    "peer_length": _count,
    "key": _sha256,
    "recipe": _sha256,
    "fingerprint": _sha256,
    "base": _sha256,
    "kind": _word,
    "verdict": _word,
    "reason": _word,
    "split": _word,
    "round": _count,
    "bytes": _count,
    "numbers": _count,
    "examples": _count,
    "steps": _count,
    "seconds": _number,
    "epsilon": _number,
    "expires": _time,
    "metrics": _metrics,
}
"""Every field that an entry may have, and the form of its value."""

EVENTS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    name: (frozenset(needed.split()), frozenset(free.split()))
    for name, needed, free in (
        ("opened", "owner end", ""),
        ("invited", "site expires", ""),
        ("enrolled", "site key recipe", ""),
        ("revoked", "site", "key"),
        ("received", "kind bytes", "recipe round fingerprint split peer peer_head peer_length"),
        ("decided", "kind verdict", "recipe round reason peer"),
        ("trained", "recipe round base fingerprint examples seconds", "steps numbers epsilon"),
        ("evaluated", "recipe round fingerprint split examples", "seconds"),
        ("sent", "kind bytes", "recipe round fingerprint split numbers metrics reason epsilon peer"),
        ("receipt", "peer", "peer_head peer_length"),
    )
}
"""Event -> fields it must have, fields it may have."""


class Audit:
    """The log of one end, to add to. Several processes may: each append takes the file for itself alone.

    Args:
        path: the file.
        owner: the site's or the federation's name.
        end: ``"site"`` or ``"server"``.

    Raises:
        AuditError: if the file is another's, or was edited.
    """

    def __init__(self, path: Path, owner: str, end: str) -> None:
        self.path, self.owner, self.end = path, owner, end
        self._chain: chain.Chain | None = None
        self._size = -1
        with storage.exclusive(path):
            written = self._open()
            if not written.entries:
                self._append(written, "opened", {"owner": owner, "end": end})
        first = written.entries[0]
        if (first.get("owner"), first.get("end")) != (owner, end):
            raise errors.AuditError(f"{path}: is the log of another end than {end} '{owner}'")

    def _open(self) -> chain.Chain:
        """The chain as it is on disk now, read again only if somebody else wrote. The file must be held."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if self._chain is not None and size == self._size:
            return self._chain
        try:
            found = chain.Chain(self.path)
        except errors.CheckpointError as error:
            raise errors.AuditError(f"{error}. Keep the file as it is, it is evidence, and find out why") from None
        before = self._chain.entries if self._chain is not None else []
        if before and (len(found.entries) < len(before) or found.entries[len(before) - 1] != before[-1]):
            raise errors.AuditError(f"{self.path}: was cut or rewritten while it was in use. Find out who did it")
        self._chain, self._size = found, self.path.stat().st_size if self.path.exists() else 0
        return found

    def _append(self, written: chain.Chain, event: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        self._size = -1  # a write that fails leaves a part behind, which only reading again finds
        line = written.append({"event": event, "time": documents.stamp(documents.now()), **fields})
        self._size = self.path.stat().st_size
        return line

    def record(self, event: str, **fields: Any) -> dict[str, Any]:
        """Add one entry and wait until it is on disk.

        Raises:
            ValueError: for an event or field that is not in the tables: free text must not get in.
            AuditError: if the file was edited since.
            StorageError: if the disk refuses.
        """
        needed, free = EVENTS.get(event, (frozenset(), frozenset()))
        wrong = [name for name, value in fields.items() if name not in needed | free or not FIELDS[name](value)]
        if event not in EVENTS or wrong or needed - set(fields):
            raise ValueError(f"no audit entry: {event} {sorted(fields)}, wrong: {wrong}")
        with storage.exclusive(self.path):
            return self._append(self._open(), event, fields)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All entries so far."""
        with storage.exclusive(self.path):
            return list(self._open().entries)

    @property
    def mark(self) -> tuple[int, str]:
        """Length and head: what travels with every update and reply."""
        with storage.exclusive(self.path):
            found = self._open()
            return len(found.entries), found.head

    def receipt(self, key: keys.Private) -> Receipt:
        """A signed receipt of the log as it is now, for the other end to keep."""
        length, head = self.mark
        draft = Receipt(
            owner=self.owner,
            end=self.end,
            length=length,
            head=head,
            time=documents.stamp(documents.now()),
            public_key=keys.public_text(key),
            signature="A" * 40,
        )
        return draft.model_copy(update={"signature": keys.sign(key, draft.signed_bytes())})


class Receipt(documents.Document):
    """What a log was at one time: length and head, signed by its owner. The other end keeps it."""

    SIGNATURES: ClassVar[tuple[str, ...]] = ("signature",)

    format: Literal["fedvfm-receipt-1"] = "fedvfm-receipt-1"
    owner: config.SiteName
    end: str
    length: Annotated[int, Field(ge=1)]
    head: config.Sha256
    time: documents.Time
    public_key: documents.PublicKey
    signature: documents.Signature


@dataclass(frozen=True)
class Noted:
    """Length and head of a log as somebody noted them, and who."""

    length: int
    head: str
    source: str


def read(path: Path) -> list[dict[str, Any]]:
    """All entries, verified; a last line that was never finished is left out.

    Raises:
        AuditError: if there is none, or inside it something was edited, taken out or moved.
    """
    if not path.is_file():
        raise errors.AuditError(f"{path}: there is no audit log")
    try:
        entries = chain.read(path)
    except errors.CheckpointError as error:
        raise errors.AuditError(f"{error}. It was edited, or lines were taken out or moved") from None
    if not entries or entries[0].get("event") != "opened":
        raise errors.AuditError(f"{path}: does not begin as an audit log; its beginning is missing")
    return entries


def verify(path: Path, noted: Iterable[Noted] = ()) -> dict[str, Any]:
    """Check a log from its first line, and against what others noted of it.

    Returns: owner, end, length, head, ``checked`` (how many notes) and ``unfinished`` (bytes of a line that a crash cut
    short).

    Raises:
        AuditError: naming what is wrong.
    """
    entries = read(path)
    hashes = {number: str(entry["hash"]) for number, entry in enumerate(entries, start=1)}
    checked = 0
    for note in noted:
        checked += 1
        if note.length > len(entries):
            raise errors.AuditError(
                f"{path}: has {len(entries)} entries, but had {note.length} by {note.source}: it was truncated or "
                "rolled back to an older copy"
            )
        if hashes[note.length] != note.head:
            raise errors.AuditError(
                f"{path}: entry {note.length} is not the one of {note.source}: the log was rewritten"
            )
    data = path.read_bytes()
    unfinished = len(data) - (data.rfind(b"\n") + 1)
    first = entries[0]
    return {
        "owner": first.get("owner"),
        "end": first.get("end"),
        "length": len(entries),
        "head": hashes[len(entries)],
        "checked": checked,
        "unfinished": unfinished,
    }


def from_receipt(path: Path, entries: list[dict[str, Any]], public_key: str = "") -> Noted:
    """What a receipt notes of the log with these entries.

    Args:
        path: the receipt's file.
        entries: of the log it should be of.
        public_key: the owner's key as the roster has it; empty leaves open who signed.

    Raises:
        TrustError: if the receipt is damaged, not signed by its key, or by another key.
        AuditError: if it is of another log.
    """
    found = documents.read(path, Receipt, "receipt")
    if not keys.verified(keys.read_public(found.public_key), found.signature, found.signed_bytes()):
        raise errors.TrustError(f"receipt {path}: was changed after it was signed")
    if public_key and found.public_key != public_key:
        raise errors.TrustError(f"receipt {path}: is signed with another key than the one given")
    owner = entries[0].get("owner"), entries[0].get("end")
    if (found.owner, found.end) != owner:
        raise errors.AuditError(
            f"receipt {path}: is of the log of {found.end} '{found.owner}', this one is of {owner[1]} '{owner[0]}'"
        )
    return Noted(found.length, found.head, f"the receipt of {found.time}")


def from_peer(path: Path, owner: str) -> list[Noted]:
    """What the other end's log notes of the log of ``owner``.

    Raises:
        AuditError: if the other end's log is itself not whole.
    """
    return [
        Noted(int(entry["peer_length"]), str(entry["peer_head"]), f"the other end's entry {number}")
        for number, entry in enumerate(read(path), start=1)
        if entry.get("peer") == owner and "peer_head" in entry and int(entry.get("peer_length", 0)) > 0
    ]


@dataclass(frozen=True)
class Usage:
    """What a recipe has used up at a site, by its hash: a new Flower run changes nothing.

    Attributes:
        trained: (round, base fingerprint) of every training.
        seconds: computing time of training and evaluation.
    """

    trained: frozenset[tuple[int, str]] = frozenset()
    seconds: float = 0.0


def usage(entries: Iterable[Mapping[str, Any]], recipe: str) -> Usage:
    """Count what these entries say of a recipe."""
    mine = [entry for entry in entries if entry.get("recipe") == recipe and entry["event"] in ("trained", "evaluated")]
    trained = {(int(entry["round"]), str(entry["base"])) for entry in mine if entry["event"] == "trained"}
    return Usage(frozenset(trained), sum(float(entry.get("seconds", 0.0)) for entry in mine))
