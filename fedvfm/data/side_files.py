"""Small text files of strangers beside the pixels, tables and JSON, and files that only stand for others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.data import defect

MOST_BYTES = 16 << 20
"""A datalist of 50,000 cases has 10 MB; parsed it takes about twenty times its size."""


POINTERS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file; git lfs pull fetches it",
    b"/annex/objects/": "a git-annex pointer in place of the file; git annex get fetches it",
}
"""First bytes of a file that only stands for another one -> what it is, and what to do."""
ARCHIVES = {
    b"PK\x03\x04": "an archive (ZIP); unpack it",
    b"\x1f\x8b": "packed with gzip; unpack it",
    b"BZh": "packed with bzip2; unpack it",
    b"\xfd7zXZ\x00": "packed with xz; unpack it",
    b"7z\xbc\xaf\x27\x1c": "an archive (7z); unpack it",
    b"Rar!\x1a\x07": "an archive (RAR); unpack it",
}
"""The same of a file that holds others."""


def head(path: Path, size: int = 32) -> bytes:
    """The first bytes of a file; nothing of one that cannot be read, which is told when it is read, nor of a pipe."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""


def instead(content: bytes, kinds: Mapping[bytes, str]) -> str:
    """What a file with these first bytes is in place of an image; empty where it is none of the kinds."""
    return next((what for begin, what in kinds.items() if content.startswith(begin)), "")


def unreadable(
    path: Path, kind: str, reason: object, remedy: str = "copy the file again or remove it"
) -> errors.DataError:
    """Why a file is no image of its kind: what it is instead, where that is known, else the reader's reason."""
    what = instead(head(path), POINTERS if path.name.lower().endswith(".gz") else {**POINTERS, **ARCHIVES})
    return defect.UNREADABLE.error(f"{path}: " + (what or f"unreadable {kind} ({reason}); {remedy}"))


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a file.

    Args:
        path: the file.
        most: bytes that are read at most.

    Raises:
        DataError: for what is no regular file (a pipe never ends), is larger, or no UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise defect.UNREADABLE.error(f"{path}: a pipe, device or folder, no regular file; take it out")
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise defect.TOO_LARGE.error(f"{path}: larger than {most >> 20} MiB, which no such text is; take it out")
        return content.decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise defect.UNREADABLE.error(f"{path}: cannot be read ({reason}); give this user the right to") from None
    except UnicodeDecodeError:
        raise defect.UNREADABLE.error(f"{path}: cannot be read as UTF-8 text; save it again or take it out") from None


class _Twice(Exception):
    """A key that an object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    distinct = dict[str, Any]()
    for key, value in pairs:
        if key in distinct:
            raise _Twice(ascii(key[:40])[1:-1])
        distinct[key] = value
    return distinct


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: as :func:`read_text`; also for what is no JSON, or nested deeper than anybody writes it.
    """
    try:
        return json.loads(read_text(path, most), object_pairs_hook=_once)
    except _Twice as error:
        raise defect.TABLE.error(
            f"{path}: '{error}' stands twice in one object, of which one would count; keep one"
        ) from None
    except (ValueError, RecursionError):
        raise defect.UNREADABLE.error(f"{path}: cannot be read as JSON; correct it or take it out") from None
