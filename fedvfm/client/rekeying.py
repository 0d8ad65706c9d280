"""``fedvfm client rekey``: another key for a site that keeps all else: approvals, ledger, audit log.

The new key waits beside the old one until the coordinator lets it in; the client asks for that by itself. Then the new
one takes the old one's place in one step. Killed anywhere, the next start goes on there: ``rekeying.json`` is written
when the new key is on disk, and put aside last. It is kept: a coordinator that goes back to a backup does not know the
new key, and is given the file again. One process at a time makes or takes a key.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedvfm import errors
from fedvfm.client import state_folder
from fedvfm.storage import storage
from fedvfm.trust import keys, rekeying, signed_documents

LOG = logging.getLogger(__name__)
SHORTEST_S, LONGEST_S = 20.0, 600.0
"""How often the coordinator is asked whether it lets a new key in, where one waits."""
LetIn = Callable[[keys.Private], bool]
"""Asks the coordinator whether it knows a key; False where it does not, or cannot be reached."""


@dataclass(frozen=True)
class NewKey:
    """The new key of a state folder, where there is one."""

    where: state_folder.State

    @property
    def private(self) -> Path:
        """Where it waits."""
        return self.where.folder / "site.key.new"

    @property
    def document(self) -> Path:
        """What goes to the coordinator."""
        return self.where.folder / "rekeying.json"

    @property
    def waits(self) -> bool:
        """Whether there is one."""
        return self.document.is_file()

    def kept(self, asked: rekeying.Rekeying) -> Path:
        """Where the document stays when the key was taken."""
        return self.where.folder / "rekeyed" / f"{keys.fingerprint(asked.public_key)[:16]}.json"

    def taken(self, asked: rekeying.Rekeying) -> bool:
        """Whether the site has the document's key already.

        Raises:
            TrustError: if its key is damaged.
        """
        return keys.public_text(keys.read_private(self.where.key)) == asked.public_key

    def fits(self, asked: rekeying.Rekeying) -> bool:
        """Whether the key that waits is the document's; not where it is lost or damaged."""
        try:
            return keys.public_text(keys.read_private(self.private)) == asked.public_key
        except errors.TrustError:
            return False

    def asked(self) -> rekeying.Rekeying:
        """The document.

        Raises:
            TrustError: if it is damaged.
        """
        return signed_documents.read(self.document, rekeying.Rekeying, "rekeying")


def begin(where: state_folder.State) -> rekeying.Rekeying:
    """Make a new key and what to send; where both wait already, that.

    A document whose key is lost is made anew: nobody can go on under that.

    Raises:
        TrustError: if a key of this site is damaged.
    """
    new = NewKey(where)
    with storage.exclusive(new.document):
        if new.waits:
            asked = new.asked()
            if new.taken(asked) or new.fits(asked):
                return asked
        return _made(new)


def _made(new: NewKey) -> rekeying.Rekeying:
    where, key, now = new.where, keys.make(), signed_documents.now()
    keys.write_private(new.private, key)
    asked = rekeying.make(where.about.federation, where.about.site, keys.read_private(where.key), key, now)
    where.audit.record("sent", kind="rekeying", bytes=len(signed_documents.to_text(asked)))
    signed_documents.write(new.document, asked)
    return asked


def finish(where: state_folder.State, let_in: LetIn) -> bool:
    """Take the new key where the coordinator lets it in, or a killed process had begun to; whether it was taken now.

    Raises:
        TrustError: if a key of this site is damaged, or the new one is not that which was sent.
    """
    new = NewKey(where)
    if not new.waits:
        return False
    asked = new.asked()
    if not new.taken(asked) and not let_in(_sent(new, asked)):  # it may take a while: nobody waits for it
        return False
    with storage.exclusive(new.document):
        if not new.waits or new.asked() != asked:
            return False  # another process was quicker
        _take(new, asked)
    LOG.info(f"site {where.about.site}: goes on under its new key {keys.spoken(asked.public_key)}")
    return True


def _take(new: NewKey, asked: rekeying.Rekeying) -> None:
    where = new.where
    if not new.taken(asked):
        _sent(new, asked)
        with storage.guard(where.key):
            os.replace(new.private, where.key)
            storage.sync_folder(where.folder)
    storage.fault_point("key-replaced")
    storage.write_text(where.public_key, asked.public_key + "\n")
    _note(where, asked)
    storage.fault_point("rekeying-noted")
    rekeying.keep(new.kept(asked), asked)
    new.document.unlink()


def _sent(new: NewKey, asked: rekeying.Rekeying) -> keys.Private:
    """The key that waits.

    Raises:
        TrustError: if it is not the one whose document was sent.
    """
    if not new.fits(asked):
        raise errors.TrustError(
            f"{new.private}: is not the key {keys.spoken(asked.public_key)} that {new.document} asks for. Nothing was "
            "taken. Make both anew, and send the new file: fedvfm client rekey"
        )
    return keys.read_private(new.private)


def _note(where: state_folder.State, asked: rekeying.Rekeying) -> None:
    key = keys.fingerprint(asked.public_key)
    if not any(entry["event"] == "rekeyed" and entry["key"] == key for entry in where.audit.scan()):
        where.audit.record("rekeyed", site=where.about.site, key=key, base=keys.fingerprint(asked.old_key))


def waiting(where: state_folder.State) -> str:
    """The fingerprint of a new key that waits for the coordinator, as people compare it; empty where there is none."""
    new = NewKey(where)
    try:
        if not new.waits:
            return ""
        asked = new.asked()
        return keys.spoken(asked.public_key) if new.taken(asked) or new.fits(asked) else "damaged"
    except errors.TrustError:
        return "damaged"


def pause_s(where: state_folder.State) -> float:
    """How long to wait until the coordinator is asked for the new key again: it notes each question as a wrong key.

    A tenth of the time since the key was made, so that the site is never away for much longer than its people waited.
    """
    try:
        age = time.time() - NewKey(where).document.stat().st_mtime
    except OSError:
        age = 0.0
    return min(LONGEST_S, max(SHORTEST_S, age / 10))
