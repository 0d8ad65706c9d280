"""Receipts of a ledger, and whether a ledger still holds what was noted of it.

A chain alone does not show that its end was cut, an older copy restored, or the whole rewritten. What others hold does:
a receipt that the site signed, and the mark of the ledger that stands in audit logs beside every update.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.config import schema
from fedvfm.ledger import entries as lines
from fedvfm.ledger import ledger
from fedvfm.storage import hash_chain
from fedvfm.trust import keys, signed_documents

Whole = Annotated[int, Field(ge=0, lt=2**63)]


class Spent(schema.Strict):
    """One line of a ledger that counts, as far as an accountant needs it."""

    number: Annotated[int, Field(ge=1)]
    head: schema.Sha256
    noise_multiplier: schema.Positive
    sample_rate: Annotated[float, Field(gt=0.0, le=1.0)]
    steps: Annotated[int, Field(ge=1)]
    honest: Annotated[int, Field(ge=1)] | None = Field(None, exclude_if=lambda value: value is None)
    records: schema.Sha256 | None = None
    key: schema.Sha256 | None = None


class Receipt(signed_documents.Document):
    """What a ledger was at one time, signed by its site.

    Attributes:
        rows: what was spent, from which a lost ledger is made good; None in a receipt for the other end: sample rates
            tell how many records there are.
        floor: epsilon and delta that counted on top.
    """

    SIGNATURES: ClassVar[tuple[str, ...]] = ("signature",)

    format: Literal["fedvfm-ledger-receipt-1"] = "fedvfm-ledger-receipt-1"
    owner: schema.SiteName
    length: Annotated[int, Field(ge=1)]
    head: schema.Sha256
    rows: Annotated[tuple[Spent, ...], Field(strict=False)] | None = None
    floor: Annotated[tuple[schema.NonNegative, schema.NonNegative], Field(strict=False)] = (0.0, 0.0)
    time: signed_documents.Time
    public_key: signed_documents.PublicKey
    signature: signed_documents.Signature


@dataclass(frozen=True)
class Statement:
    """What one file says of a ledger.

    Attributes:
        notes: lengths and heads.
        rows: what was spent, where it says so.
        floor: see :class:`Receipt`.
        trusted: whether it is signed with the key that was asked for.
    """

    notes: tuple[audit.Noted, ...]
    rows: tuple[Spent, ...] | None = None
    floor: tuple[float, float] = (0.0, 0.0)
    trusted: bool = False

    @property
    def points(self) -> set[tuple[int, str]]:
        """Marks whose spending it knows whole."""
        if self.rows is None or not self.trusted:
            return set()
        return {(one.length, one.head) for one in self.notes} | {(one.number, one.head) for one in self.rows}


def make(of: ledger.Ledger, key: keys.Private, *, with_spending: bool = False) -> Receipt:
    """A signed receipt of a ledger as it is now.

    Args:
        of: the ledger.
        key: the site's.
        with_spending: for the site's own safe, not for the other end.

    Raises:
        LedgerError: if it is too long to be read again.
    """
    entries = of.entries
    rows = tuple(_spent(number, one) for number, one in enumerate(entries, start=1) if lines.counts(one))
    draft = Receipt(
        owner=of.owner,
        length=len(entries),
        head=str(entries[-1]["hash"]),
        rows=rows if with_spending else None,
        floor=lines.floor(entries) if with_spending else (0.0, 0.0),
        time=signed_documents.stamp(signed_documents.now()),
        public_key=keys.public_text(key),
        signature="A" * 40,
    )
    if len(signed_documents.to_text(draft)) > signed_documents.MAX_BYTES - 1000:
        raise errors.LedgerError(f"{len(rows)} releases do not fit into one receipt. Keep a copy of {of.path} instead")
    return draft.model_copy(update={"signature": keys.sign(key, draft.signed_bytes())})


def _spent(number: int, entry: Mapping[str, Any]) -> Spent:
    return Spent(
        number=number,
        head=entry["hash"],
        noise_multiplier=float(entry["noise_multiplier"]),
        sample_rate=float(entry["sample_rate"]),
        steps=entry["steps"],
        honest=entry.get("honest"),
        records=entry.get("records"),
        key=entry.get("key"),
    )


def read(path: Path, owner: str, public_key: str = "") -> Statement:
    """What a file says of a ledger.

    Args:
        path: a receipt of the ledger or of the coordinator's audit log (.json), an audit log of either end (.jsonl), or
            a state folder that holds one.
        owner: of the ledger.
        public_key: that receipts must be signed with; empty leaves open who signed.

    Raises:
        TrustError: if a receipt is damaged, or signed with another key.
        AuditError: if the log is not whole.
        NothingCompared: if it is of another ledger.
    """
    log = path / "audit.jsonl" if path.is_dir() else path
    if log.suffix == ".jsonl":
        return Statement(tuple(marks(audit.read(log), owner, str(log))))
    if (
        signed_documents.format_of(signed_documents.read_bytes(path, "file"))
        == audit.Receipt.model_fields["format"].default
    ):
        return Statement(_heard(path, owner))
    found = signed_documents.read(path, Receipt, "ledger receipt")
    if not keys.verified(keys.read_public(found.public_key), found.signature, found.signed_bytes()):
        raise errors.TrustError(f"ledger receipt {path}: was changed after it was signed")
    if public_key and found.public_key != public_key:
        raise errors.TrustError(f"ledger receipt {path}: is signed with another key than the one given")
    if found.owner != owner:
        raise errors.NothingCompared(f"ledger receipt {path}: is of site '{found.owner}', this ledger is of '{owner}'")
    note = audit.Noted(found.length, found.head, f"the receipt of {found.time}")
    return Statement((note,), found.rows, found.floor, bool(public_key))


def _heard(path: Path, owner: str) -> tuple[audit.Noted, ...]:
    """The ledger's last mark in a receipt of the coordinator's audit log; nothing is known of what was spent then."""
    found = signed_documents.read(path, audit.Receipt, "receipt")
    if not keys.verified(keys.read_public(found.public_key), found.signature, found.signed_bytes()):
        raise errors.TrustError(f"receipt {path}: was changed after it was signed")
    source = f"the receipt that {found.owner} gave at {found.time}"
    try:
        said = [
            hash_chain.Mark.parse(one.ledger) for one in found.heard if one.owner == owner and one.ledger is not None
        ]
    except ValueError:
        raise errors.TrustError(f"receipt {path}: what it says of the ledger is no mark") from None
    return tuple(audit.Noted(one.length, one.head, source) for one in said)


def marks(entries: Sequence[Mapping[str, Any]], owner: str, name: str) -> Iterable[audit.Noted]:
    """Marks of the site's ledger in its own audit log, or in the server's."""
    own = entries[0].get("end") == "site"
    for number, one in enumerate(entries, start=1):
        if "ledger" in one and (own or one.get("peer") == owner):
            yield noted(one["ledger"], number, name)


def noted(mark: str, number: int, name: str) -> audit.Noted:
    """A mark of the ledger as it stands in an entry of the audit log ``name``."""
    parsed = hash_chain.Mark.parse(mark)
    return audit.Noted(parsed.length, parsed.head, f"entry {number} of {name}")


def misfits(entries: Sequence[Mapping[str, Any]], notes: Iterable[audit.Noted]) -> list[audit.Noted]:
    """Notes that a ledger does not hold and that were not reconciled."""
    done = lines.settled(entries)
    return [
        one
        for one in notes
        if (one.length, one.head) not in done
        and (one.length > len(entries) or entries[one.length - 1]["hash"] != one.head)
    ]


def verify(folder: Path, notes: Sequence[audit.Noted]) -> dict[str, Any]:
    """Check a ledger from its first line and against what others noted; what does not fit stops all charging.

    Returns: as :func:`fedvfm.audit.audit.verify`, and ``unit``, ``reconciled`` (notes that were settled), ``waiting``.

    Raises:
        AuditError: naming what is wrong.
    """
    path = folder / lines.FILE
    if not path.is_file():
        raise errors.AuditError(f"{path}: there is no ledger")
    entries = audit.read(path)
    wrong = misfits(entries, notes)
    if wrong:
        worst = max(wrong, key=lambda one: one.length)
        ledger.reopen(folder).suspend(worst)
        audit.check(str(path), entries, [worst])
    done = lines.settled(entries)
    fits = [one for one in notes if (one.length, one.head) not in done]
    found = audit.verify(path, fits)
    return {
        **found,
        "unit": entries[0].get("unit"),
        "reconciled": len(notes) - len(fits),
        "waiting": len(lines.waiting(entries)),
    }
