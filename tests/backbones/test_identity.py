"""The hash of a file is made once a process while the file stays what it is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fedvfm.backbones import identity


def test_a_file_is_hashed_once_while_it_stays_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    assert identity.sha256_of(file) == hashlib.sha256(b"one").hexdigest()
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert identity.sha256_of(file) == hashlib.sha256(b"one").hexdigest(), "not read again"
    os.utime(file, ns=(2, 2))
    assert identity.sha256_of(file) == hashlib.sha256(b"two").hexdigest()
    file.write_bytes(b"three")
    os.utime(file, ns=(2, 2))
    assert identity.sha256_of(file) == hashlib.sha256(b"three").hexdigest(), "another size"
