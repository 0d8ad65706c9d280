"""The audit log of one end: what was received, decided, trained and sent, append-only and hash-chained.

An entry holds hashes, sizes, numbers and names of a fixed form, never free text, so that nothing of a patient can get
in. Inner edits, deletions and reordering break the chain. Whoever can write the whole file can cut or rewrite it: that
shows against a *receipt*, which the other end keeps, and against the marks that the other end noted with each message
(:mod:`fedvfm.audit.cross_check`). It lies on disk in segments (:mod:`fedvfm.audit.segments`): adding to it costs the
same however long it is.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from fedvfm import errors
from fedvfm.audit import segments
from fedvfm.config import schema
from fedvfm.storage import hash_chain, storage
from fedvfm.trust import keys, signed_documents

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


OTHERS, UNKNOWN = "others", "unknown"
"""What stands for an address where there are too many of them, or none is known."""


def _address(value: Any) -> bool:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f:.]{2,45}|others|unknown", value):
        return False
    try:
        return value in (OTHERS, UNKNOWN) or ipaddress.ip_address(value) is not None
    except ValueError:
        return False


FIELDS: dict[str, Callable[[Any], bool]] = {
    "owner": _site,
    "end": lambda value: value in ENDS,
    "site": _site,
    "peer": _site,
    "peer_head": _sha256,
    "peer_length": _count,
    "run": _matches(r"[0-9]{1,20}"),
    "ledger": _matches(r"\d{19}:[0-9a-f]{64}"),
    "key": _sha256,
    "recipe": _sha256,
    "fingerprint": _sha256,
    "digest": _sha256,
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
    "score": _number,
    "norm": _number,
    "epsilon": _number,
    "expires": _time,
    "metrics": _metrics,
    "address": _address,
    "count": _count,
}
"""Every field that an entry may have, and the form of its value."""

_CAME = "recipe round fingerprint digest split reason"
_SENT = "recipe round fingerprint digest split numbers metrics reason epsilon peer seconds"

KEY_EVENTS = ("enrolled", "rekeyed")
"""Entries that say which key a site has from then on."""

EVENTS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    name: (frozenset(needed.split()), frozenset(free.split()))
    for name, needed, free in (
        ("opened", "owner end", ""),
        ("invited", "site expires", ""),
        ("enrolled", "site key recipe", "reason"),
        ("rekeyed", "site key base", "reason"),
        ("revoked", "site", "key"),
        ("certified", "key expires", ""),
        ("steered", "kind", "recipe site key round"),
        ("received", "kind bytes", f"{_CAME} peer peer_head peer_length ledger run"),
        ("refused", "reason address count", ""),
        ("decided", "kind verdict", "recipe round reason peer fingerprint digest examples score"),
        ("trained", "recipe round base fingerprint examples seconds", "steps numbers epsilon norm"),
        ("evaluated", "recipe round fingerprint split examples", "seconds"),
        ("interrupted", "kind recipe seconds", "round"),
        ("surveyed", "fingerprint digest seconds", "metrics"),
        ("agreed", "recipe round digest numbers", ""),
        ("unmasked", "recipe round digest numbers", ""),
        ("sent", "kind bytes", f"{_SENT} ledger"),
        ("rehearsed", "recipe bytes seconds", "examples metrics reason"),
        ("purged", "kind numbers bytes", ""),
        ("receipt", "peer", "peer_head peer_length"),
    )
}
"""Event -> fields it must have, fields it may have."""


_NEVER = (-1, -1, -1)
"""The stamp of a file that was not read yet."""
_LONG = 1 << 22
"""Bytes of a last segment from which on it is sealed before it is read."""


def _stamp(path: Path) -> tuple[int, int, int]:
    """Tells whether somebody wrote to a file, or put another one in its place."""
    try:
        now = path.stat()
    except FileNotFoundError:
        return (0, 0, 0)
    return (now.st_ino, now.st_size, now.st_mtime_ns)


def _now() -> str:
    return signed_documents.stamp(signed_documents.now())


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """All entries of a log.

    Raises:
        AuditError: if something in it was edited, taken out or moved.
    """
    try:
        yield from segments.entries(path)
    except errors.CheckpointError as error:
        raise errors.AuditError(f"{error}. It was edited, or lines were taken out or moved") from None


class Audit:
    """The log of one end, to add to. Several processes may: each append takes the file for itself alone.

    Args:
        path: the file.
        owner: the site's or the federation's name.
        end: ``"site"`` or ``"server"``.

    Raises:
        AuditError: if the file is another's, or was edited. Of sealed segments it is looked at whether they are there;
            :meth:`follow` and :meth:`scan` read them.

    Attributes:
        events: what may be recorded; another log of this form (the privacy ledger) has its own.
        forms: of the values.
        most: entries of a segment before it is sealed; 0 keeps all in one file.
    """

    most: ClassVar[int] = 1000

    events: ClassVar[Mapping[str, tuple[frozenset[str], frozenset[str]]]] = EVENTS
    forms: ClassVar[Mapping[str, Callable[[Any], bool]]] = FIELDS

    def __init__(self, path: Path, owner: str, end: str, **opened: Any) -> None:
        self.path, self.owner, self.end = path, owner, end
        self._chain: hash_chain.Chain | None = None
        self._place, self._stamp = segments.FIRST, _NEVER
        self._followers: list[Callable[[Mapping[str, Any]], None]] = []
        with storage.exclusive(path):
            written = self._open()
            if not written.entries:
                self._append(written, "opened", {"owner": owner, "end": end, **opened})
        first = written.entries[0]
        if (first.get("owner"), first.get("end")) != (owner, end):
            raise errors.AuditError(f"{path}: is the log of another end than {end} '{owner}'")

    def _open(self) -> hash_chain.Chain:
        """The last segment as it is on disk now, read again only if somebody else wrote. The file must be held."""
        stamp = _stamp(self.path)
        if self._chain is not None and stamp == self._stamp:
            return self._chain
        self._stamp = _NEVER
        place = segments.place(self.path)
        try:
            if self._chain is None or place != self._place:
                segments.require_present(self.path)
            if self._chain is None and self.most and stamp[1] > _LONG:
                place = self._seal_unread(place)
            chain = hash_chain.Chain(self.path, place.head)
            new = self._new(chain, place)
        except errors.CheckpointError as error:
            raise errors.AuditError(f"{error}. Keep the file as it is, it is evidence, and find out why") from None
        self._chain, self._place, self._stamp = chain, place, _stamp(self.path)
        self._tell(new)
        return chain

    def _new(self, chain: hash_chain.Chain, place: segments.Place) -> list[dict[str, Any]]:
        """What others added since this was last read.

        Raises:
            AuditError: if what was read then is there no more.
        """
        if self._chain is None or not self._chain.entries:
            return []
        before, rows = self._chain.entries, chain.entries
        if place.number > self._place.number:  # sealed meanwhile
            rows = hash_chain.read(segments.sealed(self.path, self._place.number), self._place.head)
        if (
            place.number < self._place.number
            or len(rows) < len(before)
            or rows[len(before) - 1] != before[-1]
            or (place.number == self._place.number and place != self._place)
        ):
            raise errors.AuditError(f"{self.path}: was cut or rewritten while it was in use. Find out who did it")
        new = rows[len(before) :]
        for number in range(self._place.number + 1, place.number):
            new += hash_chain.read(segments.sealed(self.path, number), str((new or before)[-1]["hash"]))
        return new + (chain.entries if place.number > self._place.number else [])

    def _all(self) -> Iterator[dict[str, Any]]:
        """All entries; the file must be held."""
        chain = self._open()
        try:
            yield from segments.before(self.path, self._place)
        except errors.CheckpointError as error:
            raise errors.AuditError(f"{error}. Keep the file as it is, it is evidence, and find out why") from None
        yield from chain.entries

    def _tell(self, entries: Iterable[Mapping[str, Any]]) -> None:
        for entry in entries:
            for take in self._followers:
                take(entry)

    def _append(self, written: hash_chain.Chain, event: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        needed, free = self.events.get(event, (frozenset(), frozenset()))
        wrong = [name for name, value in fields.items() if name not in needed | free or not self.forms[name](value)]
        if event not in self.events or wrong or needed - set(fields):
            raise ValueError(f"no audit entry: {event} {sorted(fields)}, wrong: {wrong}")
        self._stamp = _NEVER  # a write that fails leaves a part behind, which only reading again finds
        if self.most and len(written.entries) >= self.most:
            written = self._seal(written)
        line = written.append({"event": event, "time": _now(), **fields})
        self._stamp = _stamp(self.path)
        self._tell([line])
        return line

    def _seal(self, written: hash_chain.Chain) -> hash_chain.Chain:
        """Seal the last segment and begin another."""
        place = segments.Place(self._place.number + 1, self._place.before + len(written.entries), written.head)
        first = self._begin_segment(place)
        self._place, self._chain = place, hash_chain.Chain(self.path, place.head)
        self._tell([first])
        return self._chain

    def _seal_unread(self, place: segments.Place) -> segments.Place:
        """Seal a last segment that is long, as of a log of before segments, with none of it in memory.

        Returns: where the last segment stands now; as before where the log is another's or the disk takes nothing.
        """
        hash_chain.cut(self.path)
        before, head = place.before, place.head
        for entry in segments.follow(self.path, place):
            if before == place.before and (entry.get("owner"), entry.get("end")) != (self.owner, self.end):
                return place
            before, head = before + 1, str(entry["hash"])
        with contextlib.suppress(errors.StorageError):
            self._begin_segment(segments.Place(place.number + 1, before, head))
        return segments.place(self.path)

    def _begin_segment(self, place: segments.Place) -> dict[str, Any]:
        """Begin a segment here; each write whole or not at all, see :mod:`fedvfm.audit.segments`. Its first entry."""
        copy = segments.sealed(self.path, place.number - 1)
        with storage.guard(self.path):
            copy.parent.mkdir(mode=0o700, exist_ok=True)
            storage.sync_folder(self.path.parent)
        with self.path.open("rb") as file:
            storage.write_file(copy, lambda out: shutil.copyfileobj(file, out))
        storage.fault_point("segment-copied")
        about = {"owner": self.owner, "end": self.end, "segment": place.number, "entries": place.before}
        first = hash_chain.linked({"event": segments.CONTINUED, "time": _now(), **about}, place.head)
        storage.write_text(self.path, hash_chain.canonical(first) + "\n")
        storage.fault_point("segment-begun")
        return first

    def record(self, event: str, **fields: Any) -> dict[str, Any]:
        """Add one entry and wait until it is on disk.

        Raises:
            ValueError: for an event or field that is not in the tables: free text must not get in.
            AuditError: if the file was edited since.
            StorageError: if the disk refuses.
        """
        with storage.exclusive(self.path):
            return self._append(self._open(), event, fields)

    def follow(self, take: Callable[[Mapping[str, Any]], None]) -> None:
        """Show every entry once: those that are there now, then each one that is added. See :meth:`catch_up`.

        Raises:
            AuditError: if something in the log was edited, taken out or moved.
        """
        with storage.exclusive(self.path):
            for entry in self._all():
                take(entry)
            self._followers.append(take)

    def catch_up(self) -> None:
        """Show to whoever follows what others added since; reads no more than that and the last segment.

        Raises:
            AuditError: if the log was cut or rewritten meanwhile.
        """
        with storage.exclusive(self.path):
            self._open()

    def scan(self) -> Iterator[dict[str, Any]]:
        """All entries so far, verified as they come; one segment is in memory at a time.

        Raises:
            AuditError: if something in the log was edited, taken out or moved.
        """
        self.catch_up()
        return _entries(self.path)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All entries so far: of a long log a lot of memory."""
        with storage.exclusive(self.path):
            return list(self._all())

    @property
    def last(self) -> dict[str, Any]:
        """The last entry."""
        with storage.exclusive(self.path):
            return self._open().entries[-1]

    @property
    def mark(self) -> hash_chain.Mark:
        """Length and head: what travels with every message and reply."""
        with storage.exclusive(self.path):
            chain = self._open()
            return hash_chain.Mark(self._place.before + len(chain.entries), chain.head)

    def receipt(self, key: keys.Private, peer: str = "") -> Receipt:
        """A signed receipt of the log as it is now, for the other end to keep.

        Args:
            key: the owner's.
            peer: the other end whose log's last mark, as it was noted here, the receipt is to confirm. Empty confirms
                the only one there is or, where several sites are enrolled, the log of each of them by its key: names
                of sites, and how long their logs are, do not go into such a receipt.
        """
        entries = self.entries
        noted, enrolled = heard(entries), site_keys(entries)
        alone = not peer and len(noted) == 1 and len(enrolled) <= 1
        chosen = [mark for mark in noted if mark.owner == peer or alone]
        everyone = () if peer or alone else [mark for mark in noted if mark.owner in enrolled]
        draft = Receipt(
            owner=self.owner,
            end=self.end,
            length=len(entries),
            head=str(entries[-1]["hash"]),
            heard=tuple(chosen),
            sites=tuple(sorted((SiteMark(key=enrolled[m.owner], head=m.head) for m in everyone), key=lambda m: m.key)),
            time=signed_documents.stamp(signed_documents.now()),
            public_key=keys.public_text(key),
            signature="A" * 40,
        )
        return draft.model_copy(update={"signature": keys.sign(key, draft.signed_bytes())})


class Heard(schema.Strict):
    """The last mark of another's log that a log holds, and the longest of its privacy ledger where it has one."""

    owner: schema.SiteName
    length: Annotated[int, Field(ge=1)]
    head: schema.Sha256
    ledger: Annotated[str, Field(pattern=r"^\d{19}:[0-9a-f]{64}$")] | None = None

    @pydantic.model_serializer(mode="wrap")
    def _without_nothing(self, plain: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A log without a ledger's mark says nothing of it: receipts of before are signed so."""
        return {name: value for name, value in plain(self).items() if name != "ledger" or value is not None}


class SiteMark(schema.Strict):
    """The head of one site's log as the coordinator noted it last; the site is named by the fingerprint of its key."""

    key: schema.Sha256
    head: schema.Sha256


class Receipt(signed_documents.Document):
    """What a log was at one time, and what it held of the other's: signed by its owner. The other end keeps it.

    Attributes:
        heard: the mark of the one other end that it is for.
        sites: in a coordinator's receipt for all its sites, the head of each one's log.
    """

    SIGNATURES: ClassVar[tuple[str, ...]] = ("signature",)

    format: Literal["fedvfm-receipt-2"] = "fedvfm-receipt-2"
    owner: schema.SiteName
    end: str
    length: Annotated[int, Field(ge=1)]
    head: schema.Sha256
    heard: Annotated[tuple[Heard, ...], Field(strict=False, max_length=1)] = ()
    sites: Annotated[tuple[SiteMark, ...], Field(strict=False, max_length=10_000)] = ()
    time: signed_documents.Time
    public_key: signed_documents.PublicKey
    signature: signed_documents.Signature

    @pydantic.model_serializer(mode="wrap")
    def _without_nothing(self, plain: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A receipt for one end does not mention sites: receipts of before are signed so."""
        return {name: value for name, value in plain(self).items() if name != "sites" or value}


def site_keys(entries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Site -> fingerprint of the key it has, as a coordinator's log says."""
    return {str(entry["site"]): str(entry["key"]) for entry in entries if entry["event"] in KEY_EVENTS}


def enrolled_at(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Site -> number of the entry by which it was enrolled last: a site that was enrolled anew began another log."""
    return {str(one["site"]): number for number, one in enumerate(entries, start=1) if one["event"] == "enrolled"}


def heard(entries: Sequence[Mapping[str, Any]]) -> list[Heard]:
    """The last mark of every other end's log that these entries hold, by name; of a site since it was enrolled last."""
    began, ledgers = enrolled_at(entries), dict[str, str]()
    listed = [
        (str(entry["peer"]), number, entry)
        for number, entry in enumerate(entries, start=1)
        if "peer_head" in entry and entry.get("peer_length")
    ]
    for name, _, entry in listed:
        if "ledger" in entry:  # a ledger that was cut must not outdo what was noted of it before
            ledgers[name] = max(ledgers.get(name, ""), entry["ledger"])
    found = {
        name: Heard(owner=name, length=entry["peer_length"], head=entry["peer_head"], ledger=ledgers.get(name))
        for name, number, entry in listed
        if number > began.get(name, 0)
    }
    return [found[name] for name in sorted(found)]


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
        segments.require_present(path)
        raise errors.AuditError(f"{path}: there is no audit log")
    entries = list(_entries(path))
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
    entries, notes = read(path), list(noted)
    check(str(path), entries, notes)
    data = path.read_bytes()
    unfinished = len(data) - (data.rfind(b"\n") + 1)
    first = entries[0]
    return {
        "owner": first.get("owner"),
        "end": first.get("end"),
        "length": len(entries),
        "head": entries[-1]["hash"],
        "checked": len(notes),
        "unfinished": unfinished,
    }


def check(name: str, entries: Sequence[Mapping[str, Any]], noted: Iterable[Noted]) -> None:
    """Check that a log holds what others noted of it.

    Raises:
        AuditError: if it does not.
    """
    for note in noted:
        if note.length > len(entries):
            raise errors.AuditError(
                f"{name}: has {len(entries)} entries, but had {note.length} by {note.source}: it was truncated or "
                "rolled back to an older copy"
            )
        if entries[note.length - 1]["hash"] != note.head:
            raise errors.AuditError(
                f"{name}: entry {note.length} is not the one of {note.source}: the log was rewritten"
            )


@dataclass(frozen=True)
class Usage:
    """What a recipe has used up at a site, by its hash: a new Flower run changes nothing.

    Attributes:
        trained: (round, base fingerprint) of every training in order; the same again at once is one.
        seconds: computing time of training and evaluation, of what broke off or was killed before its end too.
        evaluated: (round, split, fingerprint) of every adapter that was scored, each once.
        answered: (round, split) of every score that left.
    """

    trained: tuple[tuple[int, str], ...] = ()
    seconds: float = 0.0
    evaluated: tuple[tuple[int, str, str], ...] = ()
    answered: frozenset[tuple[int, str]] = frozenset()


COUNTED = ("trained", "evaluated", "interrupted", "sent")
"""Events that use up what a recipe may."""


class Tally:
    """Counts what entries say of one recipe, one after the other."""

    def __init__(self) -> None:
        self._trained: list[tuple[int, str]] = []
        self._seconds = 0.0
        self._evaluated: dict[tuple[int, str, str], None] = {}
        self._answered: set[tuple[int, str]] = set()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take an entry of the recipe."""
        event = entry["event"]
        self._seconds += float(entry.get("seconds", 0.0))
        if event == "trained":
            pair = (int(entry["round"]), str(entry["base"]))
            self._trained += [pair] if self._trained[-1:] != [pair] else []
        elif event == "evaluated":
            self._evaluated[int(entry["round"]), str(entry["split"]), str(entry["fingerprint"])] = None
        elif event == "sent" and entry.get("kind") == "evaluate" and "split" in entry:
            self._answered.add((int(entry["round"]), str(entry["split"])))

    def usage(self) -> Usage:
        """What they come to so far."""
        return Usage(tuple(self._trained), self._seconds, tuple(self._evaluated), frozenset(self._answered))


def usage(entries: Iterable[Mapping[str, Any]], recipe: str) -> Usage:
    """Count what these entries say of a recipe."""
    tally = Tally()
    for entry in entries:
        if entry.get("recipe") == recipe and entry["event"] in COUNTED:
            tally.add(entry)
    return tally.usage()


def unfinished(entries: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry of a message that was accepted and never answered, as its process was killed; None if there is none.

    One process answers, one message at a time, so only the last that was accepted can be such.
    """
    found: Mapping[str, Any] | None = None
    for entry in entries:
        accepted = entry["event"] == "decided" and entry["verdict"] == "accepted"
        if accepted and entry["kind"] in ("handshake", "train", "evaluate"):
            found = entry
        elif entry["event"] in ("trained", "evaluated", "interrupted", "sent"):
            found = None
    return found


_LEFT = (
    "time",
    "kind",
    "recipe",
    "round",
    "split",
    "bytes",
    "fingerprint",
    "digest",
    "numbers",
    "metrics",
    "reason",
    "peer",
)


def departures(entries: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every message that left, and what they come to.

    Returns: a row for each, with the number of its entry (``entry``), and the totals: messages, bytes, by kind;
    ``updates`` counts adapters that differ, ``repeated`` those that left once more with the same bytes; ``metrics`` are
    the names of all that left.
    """
    rows = [
        {"entry": number, **{name: entry[name] for name in _LEFT if name in entry}}
        for number, entry in enumerate(entries, start=1)
        if entry["event"] == "sent"
    ]
    updates = [row for row in rows if "numbers" in row]
    different = {(row["fingerprint"], row["recipe"]): row["numbers"] for row in updates}
    kinds = Counter(str(row["kind"]) for row in rows)
    return rows, {
        "messages": len(rows),
        "bytes": sum(row["bytes"] for row in rows),
        "kinds": dict(sorted(kinds.items())),
        "updates": len(different),
        "repeated": len(updates) - len(different),
        "numbers": sum(different.values()),
        "metrics": sorted({name for row in rows for name in row.get("metrics", ())}),
    }
