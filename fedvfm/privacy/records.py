"""Which records a release was made from, as hashes that tell nothing to whoever has no key.

    ledger.key           32 random bytes, made here, 0600, never sent
    sets/<sha256>        the sorted hashes of one set of records, 16 bytes each

A hash is an HMAC of the unit's id under the ledger's key, without the data set's name: a record has one budget,
whatever it is filed under. A set that is missing or damaged counts as holding every record.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedvfm import errors
from fedvfm.data import sample as samples
from fedvfm.storage import storage

BYTES = 16
Hashes = frozenset[bytes]


def stable(sample: samples.Sample, source: object = None) -> tuple[str, str | None]:
    """A sample and its patient by names that do not depend on which others there are.

    Args:
        sample: which.
        source: where it comes from. One whose ids are numbers (a hospital's folder) has a method ``stable``, because
            numbers shift when a file is added, and a shifted number would be another record.
    """
    found = getattr(source, "stable", None)
    if found is None:
        return sample.id, sample.patient
    named: tuple[str, str | None] = found(sample)
    return named


def group(sample: samples.Sample, source: object = None) -> str:
    """The patient that a sample is of, or the sample itself, by its stable name."""
    record, patient = stable(sample, source)
    return f"sample {record}" if patient is None else f"patient {patient}"


def ids(unit: str, own: Sequence[samples.Sample], source: object = None) -> list[str]:
    """Names of the units among these samples: of each image, patient (an image without one is its own), or the site.

    The site is not called by its name: a hospital may have two names in two federations, and has one ledger.

    Args:
        unit: "record", "patient" or "site".
        own: the samples that can be drawn.
        source: see :func:`stable`.

    Raises:
        ValueError: for an unknown unit.
    """
    if unit == "record":
        return sorted({f"sample {stable(one, source)[0]}" for one in own})
    if unit == "patient":
        return sorted({group(one, source) for one in own})
    if unit == "site":
        return ["site"] if own else []
    raise ValueError(f"unit '{unit}' is none of record, patient, site")


def charged(unit: str, own: Sequence[samples.Sample], source: object = None) -> list[str]:
    """All names that a release of these samples is charged to.

    The units; and with patients their images too, so that a new pseudonym, or a table of patients that comes later,
    opens no fresh budget. Of cases the images too: a recipe that takes them one by one draws from the same budget.
    """
    cases = ids("record", own, source) if unit == "patient" else []
    images = ids("record", [image for case in own for image in case.images], source) if unit != "site" else []
    return sorted({*ids(unit, own, source), *cases, *images})


class Records:
    """The key and the sets of one ledger's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sets: dict[str, Hashes | None] = {}

    @property
    def key_path(self) -> Path:
        """The secret key."""
        return self._folder / "ledger.key"

    def make_key(self) -> str:
        """A new key on disk; its id."""
        storage.write_text(self.key_path, secrets.token_hex(32) + "\n")
        return self.key_id()

    @property
    def lost(self) -> bool:
        """Whether there is no key, or nothing that can be one."""
        try:
            return len(bytes.fromhex(self.key_path.read_text().strip())) < 2 * BYTES
        except (OSError, ValueError):
            return True

    def _key(self) -> bytes:
        if self.lost:
            raise errors.LedgerError(
                f"{self.key_path}: the key of the ledger is missing or damaged, so its records cannot be told apart. "
                "Restore it from a backup, or run 'fedvfm ledger reconcile': then all that was spent counts for all"
            )
        mode = stat.S_IMODE(self.key_path.stat().st_mode)
        if mode & 0o077:
            raise errors.LedgerError(
                f"{self.key_path}: has permissions {mode:04o}; others can read it. Run: chmod 600 {self.key_path}"
            )
        return bytes.fromhex(self.key_path.read_text().strip())

    def key_id(self) -> str:
        """What the ledger knows its key by.

        Raises:
            LedgerError: if the key is missing, damaged, or open to others.
        """
        return hmac.new(self._key(), b"fedvfm ledger key", hashlib.sha256).hexdigest()

    def hashes(self, names: Iterable[str]) -> Hashes:
        """The hashes of these units."""
        key = self._key()
        return frozenset(hmac.new(key, name.encode(), hashlib.sha256).digest()[:BYTES] for name in names)

    def keep(self, hashes: Hashes) -> str:
        """Put a set on disk, if it is not there; its name."""
        data = b"".join(sorted(hashes))
        name = hashlib.sha256(data).hexdigest()
        if self.find(name) is None:
            path = self._path(name)
            with storage.guard(path):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            storage.write_bytes(path, data)
            self._sets[name] = hashes
        return name

    def find(self, name: str) -> Hashes | None:
        """A set, or None where it is missing or not what its name says: then it must count as every record."""
        if self._sets.get(name) is None:
            self._sets[name] = self._read(name)
        return self._sets[name]

    def _read(self, name: str) -> Hashes | None:
        try:
            data = self._path(name).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != name or len(data) % BYTES:
            return None
        return frozenset(data[start : start + BYTES] for start in range(0, len(data), BYTES))

    def _path(self, name: str) -> Path:
        return self._folder / "sets" / os.path.basename(name)
