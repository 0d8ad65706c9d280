"""What the logs of two ends say of each other.

With every message an end shows the mark of its log, its length and head, and the other end writes it down. So each log
holds what the other's was, message by message: a log that was cut, rolled back or rewritten does not fit what was noted
of it. The marks cover the line of the very message they travel with, so nobody can deny later that it was sent.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.trust import keys, signed_documents

CLOCKS = datetime.timedelta(hours=1)
"""How far apart the clocks of two ends may be before a time of one counts as before that of the other."""

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """What a receipt or the other end's log says.

    Attributes:
        notes: of the log that is checked.
        agreed: how many statements of that log about the other one were compared, and hold.
    """

    notes: tuple[audit.Noted, ...] = ()
    agreed: int = 0


def _owner(entries: Entries) -> tuple[str, str]:
    return str(entries[0].get("end")), str(entries[0].get("owner"))


def marks(entries: Entries, owner: str, name: str) -> list[tuple[int, audit.Noted]]:
    """Every mark of ``owner``'s log that these entries hold, each with its entry's number; ``name`` is the file's."""
    return [
        (number, audit.Noted(int(entry["peer_length"]), str(entry["peer_head"]), f"entry {number} of {name}"))
        for number, entry in enumerate(entries, start=1)
        if entry.get("peer") == owner and "peer_head" in entry and int(entry.get("peer_length", 0)) > 0
    ]


def peers(entries: Entries, name: str) -> dict[str, dict[str, Any]]:
    """What a log alone shows of the others': messages, how many of them carried a mark, the last one, and steps back.

    ``back`` lists entries at which a peer's log was shorter than it had been before. Messages can overtake each other;
    if it stays so, ask for that log and compare.

    Raises:
        AuditError: if two entries hold different heads of one log at one length: it was rewritten. A site that was
            enrolled anew began another log.
    """
    began = audit.enrolled_at(entries)
    found: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry["event"] == "received" and "peer" in entry:
            row = found.setdefault(entry["peer"], {"messages": 0, "marked": 0, "length": 0, "head": "", "back": []})
            row["messages"] += 1
            row["marked"] += "peer_head" in entry
    for owner, row in found.items():
        seen: dict[int, audit.Noted] = {}
        for number, note in marks(entries, owner, name):
            if number < began.get(owner, 0):
                continue
            before = seen.setdefault(note.length, note)
            if before.head != note.head:
                raise errors.AuditError(
                    f"{note.source} and {before.source} hold different heads of the log of '{owner}' at {note.length} "
                    "entries: that log was rewritten"
                )
            row["back"] += [number] * (note.length < row["length"])
            row["length"], row["head"] = note.length, note.head
    return found


def receipt(path: Path, entries: Entries, name: str, public_key: str = "", own_key: str = "") -> Comparison:
    """Compare a log with a receipt, of the log itself or of the other end's.

    A receipt of the other end says what that log was and what it had noted of this one. A site's key is known to the
    server's log since it was enrolled: a receipt of another key is refused there, and one of an earlier key that is not
    from before the site got the next.

    Args:
        path: the receipt's file.
        entries: of the log that is checked.
        name: its file.
        public_key: the signer's as the roster has it; empty leaves open who signed.
        own_key: fingerprint of the key of the site whose log is checked: a coordinator's receipt for all its sites
            names each by that.

    Raises:
        TrustError: if the receipt is damaged, not signed by its key, or by another key.
        AuditError: if what it says does not fit what these entries noted.
        NothingCompared: if it is of a third log, or says nothing of this one.
    """
    found = signed_documents.read(path, audit.Receipt, "receipt")
    if not keys.verified(keys.read_public(found.public_key), found.signature, found.signed_bytes()):
        raise errors.TrustError(f"receipt {path}: was changed after it was signed")
    if not _had_then(found, entries) or (public_key and found.public_key != public_key):
        raise errors.TrustError(
            f"receipt {path}: is signed with another key than the one given or enrolled, or with one that the site "
            "had no more. Ask for a new receipt: fedvfm audit receipt STATE"
        )
    end, owner = _owner(entries)
    if (found.end, found.owner) == (end, owner):
        return Comparison((audit.Noted(found.length, found.head, f"the receipt of {found.time}"),))
    mine = tuple(
        audit.Noted(one.length, one.head, f"the receipt that {found.end} '{found.owner}' gave at {found.time}")
        for one in found.heard
        if one.owner == owner and found.end != end
    )
    mine += _of_own_key(found, entries, name, own_key)
    agreed = _shown_before(found, entries, name)
    if not mine and not agreed:
        raise errors.NothingCompared(
            f"receipt {path}: is of the log of {found.end} '{found.owner}' and says nothing that {name}, of {end} "
            f"'{owner}', can be compared with. {_what_can(found, end, own_key)}"
        )
    return Comparison(mine, agreed)


def _had_then(shown: audit.Receipt, entries: Entries) -> bool:
    """Whether the key of a site's receipt was the site's: a stolen one is good for nothing from before the next."""
    lines = [
        (number, entry)
        for number, entry in enumerate(entries, start=1)
        if entry["event"] in audit.KEY_EVENTS and entry["site"] == shown.owner
    ]
    if shown.end != "site" or not lines:
        return True
    key = keys.fingerprint(shown.public_key)
    given = [at for at, (_, entry) in enumerate(lines) if entry["key"] == key]
    if not given and lines[0][1].get("base") != key:
        return False
    later = lines[given[-1] + 1 :] if given else lines
    return not later or _before(shown, entries, later[0][0])


def _before(shown: audit.Receipt, entries: Entries, number: int) -> bool:
    """Whether a receipt is from before the entry by which its site got another key, as far as can be known."""
    line = entries[number - 1]
    if signed_documents.moment(shown.time) >= signed_documents.moment(str(line["time"])):
        return False
    if line["event"] == "enrolled":  # its log began anew, too
        return True
    if _owner(entries) == (shown.end, shown.owner):
        return shown.length < number
    after = [note.length for at, note in marks(entries, shown.owner, "") if at > number]
    return not after or shown.length <= after[0]


def _what_can(found: audit.Receipt, end: str, own_key: str) -> str:
    """What to compare with in place of a receipt that says nothing of this log."""
    if found.end == end:
        return "A log is compared with its own receipts and with those of the other end"
    if found.sites and not own_key:
        return "Give the state folder in place of the log: the key beside it (site.pub) says which mark is its own"
    return f"Ask {found.end} '{found.owner}' for a receipt made after the next message: fedvfm audit receipt STATE"


def _of_own_key(found: audit.Receipt, entries: Entries, name: str, own_key: str) -> tuple[audit.Noted, ...]:
    """This site's mark in a receipt for all sites.

    Raises:
        AuditError: if no entry of the log has the head that was noted.
    """
    heads = [mark.head for mark in found.sites if mark.key == own_key]
    if not heads:
        return ()
    source = f"the receipt that {found.end} '{found.owner}' gave at {found.time}"
    lengths = {str(entry["hash"]): number for number, entry in enumerate(entries, start=1)}
    if heads[0] not in lengths:
        raise errors.AuditError(
            f"{name}: no entry has the head {heads[0][:12]} that stands in {source}: the log was truncated, rolled "
            "back to an older copy or rewritten"
        )
    return (audit.Noted(lengths[heads[0]], heads[0], source),)


def _shown_before(found: audit.Receipt, entries: Entries, name: str) -> int:
    """How many marks of the receipt's log these entries hold that a log of that length must still hold."""
    agreed, signed = 0, signed_documents.moment(found.time)
    for number, note in marks(entries, found.owner, name):
        if note.length == found.length and note.head != found.head:
            raise errors.AuditError(
                f"the receipt of {found.end} '{found.owner}' at {found.length} entries is not of the log in "
                f"{note.source}: that log was rewritten"
            )
        if note.length > found.length and signed_documents.moment(str(entries[number - 1]["time"])) + CLOCKS < signed:
            raise errors.AuditError(
                f"the log of {found.end} '{found.owner}' had {found.length} entries at {found.time}, but {note.length} "
                f"before that by {note.source}: it was truncated or rolled back to an older copy"
            )
        agreed += note.length == found.length
    return agreed


def log(path: Path, entries: Entries, name: str) -> Comparison:
    """Compare a log with the other end's: marks both ways, and every message that one has from the other.

    Args:
        path: the other end's log.
        entries: of the log that is checked.
        name: its file.

    Raises:
        AuditError: if the other end's log is itself not whole, does not fit the marks in these entries, or one of both
            received what the other does not say it sent.
    """
    theirs = audit.read(path)
    (_, me), (_, them) = _owner(entries), _owner(theirs)
    mine = [note for _, note in marks(theirs, me, str(path))]
    others = [note for _, note in marks(entries, them, name)]
    audit.check(name, entries, mine)
    audit.check(str(path), theirs, others)
    agreed = _messages((name, me, entries), (str(path), them, theirs))
    agreed += _messages((str(path), them, theirs), (name, me, entries))
    return Comparison(tuple(mine), len(others) + agreed)


def _messages(receiver: tuple[str, str, Entries], sender: tuple[str, str, Entries]) -> int:
    """How many messages one end received; each must be among those that the other says it sent."""
    (name, me, entries), (other, them, theirs) = receiver, sender
    sent = {entry["digest"] for entry in theirs if entry["event"] == "sent" and "digest" in entry}
    count = 0
    for number, entry in enumerate(entries, start=1):
        if entry["event"] == "received" and entry.get("peer") == them and "digest" in entry:
            if entry["digest"] not in sent:
                raise errors.AuditError(
                    f"{name}: entry {number} received a message that {them} does not say it sent to {me}, by {other}"
                )
            count += 1
    return count
