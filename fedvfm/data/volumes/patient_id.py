"""Which DICOM studies are of one patient, by a keyed hash of Patient ID whose key stays at the site.

An identifier has few values, so that a plain hash of one can be guessed; without the key this one cannot. It is used to
keep a patient in one split, and as the name that stays in the privacy ledger.

Sources: DICOM PS3.3, C.7.1.1 (Patient ID); RFC 2104 (HMAC).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from fedvfm import errors
from fedvfm.data.decoding import decoder
from fedvfm.data.volumes import dicom
from fedvfm.storage import storage

KEY_BYTES = 32
KEY_NAME = ".fedvfm-patients.key"
"""The key's file in the data folder, where no other is named; names that begin with a dot are not read as data."""
SHOWN = 16
"""Hexadecimal digits of the hash: 64 bits, so that two of a million patients are alike once in 40 million folders."""


def key(path: Path) -> bytes:
    """The site's key, made at the first call: a file that this user alone can read.

    Raises:
        ConfigError: if it is no such key, or others can read it.
        StorageError: if it cannot be written.
    """
    if not path.exists():
        with storage.exclusive(path):
            if not path.exists():
                storage.write_bytes(path, secrets.token_bytes(KEY_BYTES))
    try:
        content, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise storage.refusal(path, error) from None
    if len(content) != KEY_BYTES or mode & 0o077:
        what = "can be read by others; chmod 600 it" if mode & 0o077 else "is no key of 32 bytes; bring the right one"
        raise errors.ConfigError("data source 'folder'", [f"data.options.patients_key: {path} {what}"])
    return content


def keyed(file: Path, secret: bytes) -> str | None:
    """A name for the patient of a DICOM file, or None where it names none.

    Raises:
        DataError: if the file is damaged.
    """
    text = _said(file, str(file.parent)).strip().casefold()
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()[:SHOWN] if text else None


@decoder.apart
def _said(file: Path, where: str) -> str:
    """The Patient ID of a file, empty where it has none; the key is not in the process that reads it."""
    return str(dicom.read_tags(file, where, ("PatientID",)).get("PatientID") or "")
