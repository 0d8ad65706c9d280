"""``fedvfm client rekey``: another key for a site that keeps all else: approvals, ledger, audit log.

The new key waits beside the old one until the coordinator lets it in; the client asks for that by itself. Then the new
one takes the old one's place in one step. Killed anywhere, the next start goes on there: ``rekeying.json`` is written
when the new key is on disk, and removed last.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedvfm import errors
from fedvfm.client import state_folder
from fedvfm.storage import storage
from fedvfm.trust import keys, rekeying, signed_documents

LOG = logging.getLogger(__name__)
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

    def asked(self) -> rekeying.Rekeying:
        """The document.

        Raises:
            TrustError: if it is damaged.
        """
        return signed_documents.read(self.document, rekeying.Rekeying, "rekeying")


def begin(where: state_folder.State) -> rekeying.Rekeying:
    """Make a new key and what to send; where one waits already, that.

    Raises:
        TrustError: if a key of this site is damaged.
    """
    new = NewKey(where)
    if new.waits:
        return new.asked()
    key, now = keys.make(), signed_documents.now()
    keys.write_private(new.private, key)
    asked = rekeying.make(where.about.federation, where.about.site, keys.read_private(where.key), key, now)
    where.audit.record("sent", kind="rekeying", bytes=len(signed_documents.to_text(asked)))
    signed_documents.write(new.document, asked)
    return asked


def finish(where: state_folder.State, let_in: LetIn) -> bool:
    """Take the new key where the coordinator lets it in, or a killed process had begun to; whether it was taken now.

    Raises:
        TrustError: if a key of this site is damaged.
    """
    new = NewKey(where)
    if not new.waits:
        return False
    asked = new.asked()
    if keys.public_text(keys.read_private(where.key)) != asked.public_key:
        if not let_in(keys.read_private(new.private)):
            return False
        with storage.guard(where.key):
            os.replace(new.private, where.key)
            storage.sync_folder(where.folder)
    storage.fault_point("key-replaced")
    storage.write_text(where.public_key, asked.public_key + "\n")
    _note(where, asked)
    storage.fault_point("rekeying-noted")
    new.document.unlink()
    LOG.info(f"site {where.about.site}: goes on under its new key {keys.spoken(asked.public_key)}")
    return True


def _note(where: state_folder.State, asked: rekeying.Rekeying) -> None:
    key = keys.fingerprint(asked.public_key)
    if not any(entry["event"] == "rekeyed" and entry["key"] == key for entry in where.audit.scan()):
        where.audit.record("rekeyed", site=where.about.site, key=key, base=keys.fingerprint(asked.old_key))


def waiting(where: state_folder.State) -> str:
    """The fingerprint of a new key that waits for the coordinator, as people compare it; empty where there is none."""
    new = NewKey(where)
    try:
        return keys.spoken(new.asked().public_key) if new.waits else ""
    except errors.TrustError:
        return "damaged"
