"""A new key for a site: one small file, signed with the old key and with the new one. It holds no secret.

The old key's signature says that the site wants it, the new key's that whoever wrote it holds that. A person at the
coordinator takes it, who was told the new key's fingerprint by another channel: a thief of the old key could write such
a file too, and lock the hospital out of its own place.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import ClassVar, Literal

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.storage import storage
from fedvfm.trust import invites, keys, signed_documents

_BLANK = "A" * 40


class Rekeying(signed_documents.Document):
    """A site's wish to go on under another key.

    Attributes:
        old_key, public_key: what it had, and what it will have.
        old_signature, signature: made with the private halves of both over all other fields.
    """

    SIGNATURES: ClassVar[tuple[str, ...]] = ("old_signature", "signature")

    format: Literal["fedvfm-rekeying-1"] = "fedvfm-rekeying-1"
    federation: invites.FederationName
    site: schema.SiteName
    old_key: signed_documents.PublicKey
    public_key: signed_documents.PublicKey
    created: signed_documents.Time
    old_signature: signed_documents.Signature
    signature: signed_documents.Signature


def make(federation: str, site: str, old: keys.Private, new: keys.Private, now: datetime.datetime) -> Rekeying:
    """The document."""
    draft = Rekeying(
        federation=federation,
        site=site,
        old_key=keys.public_text(old),
        public_key=keys.public_text(new),
        created=signed_documents.stamp(now),
        old_signature=_BLANK,
        signature=_BLANK,
    )
    message = draft.signed_bytes()
    return draft.model_copy(update={"old_signature": keys.sign(old, message), "signature": keys.sign(new, message)})


def keep(path: Path, asked: Rekeying) -> None:
    """Put a document that was taken where it stays.

    Raises:
        StorageError: if the disk refuses.
    """
    with storage.guard(path.parent):
        path.parent.mkdir(mode=0o700, exist_ok=True)
    signed_documents.write(path, asked)


def require_signed(asked: Rekeying) -> None:
    """Check both signatures.

    Raises:
        TrustError: if one is not its key's, or the two keys are one.
    """
    message, who = asked.signed_bytes(), f"new key of site '{asked.site}'"
    if asked.old_key == asked.public_key:
        raise errors.TrustError(f"{who}: is the one it has")
    if not keys.verified(keys.read_public(asked.old_key), asked.old_signature, message):
        raise errors.TrustError(f"{who}: is not signed with the key the site has, or was changed")
    if not keys.verified(keys.read_public(asked.public_key), asked.signature, message):
        raise errors.TrustError(f"{who}: whoever wrote the file does not hold it")
