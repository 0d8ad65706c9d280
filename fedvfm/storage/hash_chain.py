"""An append-only file of JSON lines, each carrying the hash of the one before it.

A line is one JSON object with ``prev`` (the hash of the previous line, or 64 zeros) and ``hash`` (sha256 of the line
without ``hash``). Inner edits, deletions and reordering are found by :func:`read`; a line cut short by a crash is
found and cut off by :func:`recover`. Whoever can write the file can rewrite all of it: only a head kept elsewhere
shows that.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedvfm import errors
from fedvfm.storage import storage

ZERO = "0" * 64
_MARK = re.compile(r"([0-9]{19}):([0-9a-f]{64})")


class Mark(NamedTuple):
    """Length and head of a chain at one time. Whoever keeps it sees later that the chain was cut or rewritten."""

    length: int
    head: str

    def __str__(self) -> str:
        return f"{self.length:019d}:{self.head}"

    @staticmethod
    def parse(text: Any) -> Mark:
        """The inverse of ``str``; always 84 characters.

        Raises:
            ValueError: if it is not of that form, or of a chain without entries.
        """
        found = _MARK.fullmatch(text) if isinstance(text, str) else None
        if found is None or not 0 < int(found[1]) < 2**63:
            raise ValueError("no mark of a chain")
        return Mark(int(found[1]), found[2])


NOWHERE = Mark(0, ZERO)
"""The mark of no chain: as long as any other."""


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def _hash(entry: dict[str, Any]) -> str:
    body = {name: value for name, value in entry.items() if name != "hash"}
    return hashlib.sha256(canonical(body).encode()).hexdigest()


def linked(value: Mapping[str, Any], head: str) -> dict[str, Any]:
    """An entry that continues a chain after the entry whose hash is ``head``."""
    entry = {**value, "prev": head}
    entry["hash"] = _hash(entry)
    return entry


def read(path: Path, head: str = ZERO) -> list[dict[str, Any]]:
    """All entries, verified. A last line without its newline is left out: it was never finished (see :func:`recover`).

    Args:
        path: the file.
        head: hash of the entry that the first one continues; that of a whole chain continues none.

    Raises:
        CheckpointError: naming the first line that is edited, missing or out of order.
    """
    entries, wrong = sound(path, head)
    if wrong:
        raise errors.CheckpointError(f"{path}: line {wrong} does not continue the chain; it was changed or is not ours")
    return entries


def sound(path: Path, head: str = ZERO) -> tuple[list[dict[str, Any]], int]:
    """The entries up to the first that does not continue the chain, and the number of that line; 0 where all do."""
    return follow(path.read_bytes(), head) if path.exists() else ([], 0)


def follow(data: bytes, head: str = ZERO) -> tuple[list[dict[str, Any]], int]:
    """The same of the bytes of a file."""
    entries: list[dict[str, Any]] = []
    for number, entry in walk(data.split(b"\n")[:-1], head):
        if entry is None:
            return entries, number
        entries.append(entry)
    return entries, 0


def walk(lines: Iterable[bytes], head: str = ZERO) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and entry of each line; None, and no more, at the first that does not continue the chain."""
    for number, line in enumerate(lines, start=1):
        entry = parse(line)
        if entry is None or entry.get("prev") != head or not (_as_written(entry, line) or _sealed(entry)):
            yield number, None
            return
        head = entry["hash"]
        yield number, entry


def _as_written(entry: dict[str, Any], line: bytes) -> bool:
    """Whether the line, its ``hash`` taken out, is what was hashed: it then need not be written out anew."""
    own = str(entry.get("hash")).encode()
    return hashlib.sha256(line.replace(b'"hash":"' + own + b'",', b"", 1)).hexdigest().encode() == own


def _sealed(entry: dict[str, Any]) -> bool:
    """Whether the entry's hash is its own; what canonical JSON cannot say (NaN, half a character) was never sealed."""
    try:
        return bool(entry.get("hash") == _hash(entry))
    except ValueError:
        return False


def parse(line: bytes) -> dict[str, Any] | None:
    """The object of a line, its hash not looked at; None where it holds none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def recover(path: Path, head: str = ZERO) -> list[dict[str, Any]]:
    """Cut off a last line without its newline (a crash inside a write), then :func:`read`.

    A file damaged in any other way is not repaired.
    """
    if path.exists():
        cut(path)
    return read(path, head)


def cut(path: Path) -> None:
    """Cut off a last line without its newline.

    Raises:
        StorageError: if the disk refuses.
    """
    with path.open("rb") as file:
        length = whole = file.seek(0, os.SEEK_END)
        while whole > 0:
            begin = max(0, whole - 4096)
            file.seek(begin)
            at = file.read(whole - begin).rfind(b"\n")
            if at >= 0:
                whole = begin + at + 1
                break
            whole = begin
    if whole != length:
        with storage.guard(path), path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())


class Chain:
    """An open chain, ready to append. One writer at a time.

    Args:
        path: the file.
        head: hash of the entry that the first one continues, where the file goes on from another.
    """

    def __init__(self, path: Path, head: str = ZERO) -> None:
        self.path = path
        self.entries = recover(path, head)

    @property
    def head(self) -> str:
        """Hash of the last entry."""
        return str(self.entries[-1]["hash"]) if self.entries else ZERO

    def append(self, value: dict[str, Any]) -> dict[str, Any]:
        """Write one entry and wait until it is on disk.

        Raises:
            StorageError: if the disk refuses; the file then ends in the line before, or in a part that ``recover``
            cuts.
        """
        entry = linked(value, self.head)
        storage.append_line(self.path, canonical(entry))
        self.entries.append(entry)
        return entry
