"""A log in segments, so that nobody who adds to it has to read all of it: sealed files, and the last one.

    audit.jsonl               the last segment, added to; a log that was never long is this file alone
    audit-sealed/000001.jsonl the first segment; sealed, it never changes again
    audit-sealed/000002.jsonl ...

One chain goes through all of them: the first entry of a segment ("continued") carries the hash of the last entry of the
segment before, its own number, and how many entries there are before it. So a segment that was edited, taken out or put
in another place does not fit.

Sealing is a copy, then a new last segment in place of the old one, each whole or not at all. Killed in between, the
same entries are there twice, and the next sealing writes the copy again.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from fedvfm import errors
from fedvfm.storage import hash_chain

CONTINUED = "continued"
_NAME = re.compile(r"[0-9]{6,}")
_EVIDENCE = "Keep the files as they are, they are evidence, and find out why"


class Place(NamedTuple):
    """Where a segment stands: its number, from 1, how many entries are before it, and the hash of the last of them."""

    number: int
    before: int
    head: str


FIRST = Place(1, 0, hash_chain.ZERO)


def folder(path: Path) -> Path:
    """Where the sealed segments of a log lie."""
    return path.with_name(f"{path.stem}-sealed")


def sealed(path: Path, number: int) -> Path:
    """A sealed segment of a log."""
    return folder(path) / f"{number:06d}.jsonl"


def numbers(path: Path) -> list[int]:
    """Numbers of the sealed segments that lie beside a log."""
    return sorted(int(file.stem) for file in folder(path).glob("*.jsonl") if _NAME.fullmatch(file.stem))


def place_of(first: Mapping[str, Any] | None) -> Place:
    """Where the segment stands that begins with this entry."""
    if first is None or first.get("event") != CONTINUED or first.get("prev") == hash_chain.ZERO:
        return FIRST
    number, before = first.get("segment"), first.get("entries")
    if type(number) is not int or type(before) is not int or number < 2 or before < 1:
        return FIRST  # whose chain it does not begin: reading it says so
    return Place(number, before, str(first.get("prev")))


def place(path: Path) -> Place:
    """Where the last segment of a log stands."""
    try:
        with path.open("rb") as file:
            return place_of(hash_chain.parse(file.readline()))
    except FileNotFoundError:
        return FIRST


def require_present(path: Path) -> None:
    """Check that all segments of a log are there, and the last sealed one is what the open one continues.

    Raises:
        AuditError: naming what is missing, or too much.
    """
    here, there = place(path), numbers(path)
    if not path.exists() and there:
        raise errors.AuditError(f"{path}: is gone, and its sealed segments are in {folder(path)}. {_EVIDENCE}")
    _require_numbers(path, here, there)
    if here.number in there:
        _require_same(path, path.read_bytes(), here)
    if here.number > 1:
        last = _last(sealed(path, here.number - 1))
        if last is None or last.get("hash") != here.head:
            raise errors.AuditError(f"{path}: does not continue {sealed(path, here.number - 1)}. {_EVIDENCE}")


def _require_numbers(path: Path, here: Place, there: list[int]) -> None:
    missing = sorted(set(range(1, here.number)) - set(there))
    if missing:
        raise errors.AuditError(
            f"{path}: its segment {sealed(path, missing[0])} is missing. A log is all of its files: put the folder "
            f"{folder(path).name} back beside it"
        )
    if there and there[-1] > here.number:
        raise errors.AuditError(
            f"{path}: is segment {here.number}, and {sealed(path, there[-1])} is a later one: an older copy was put in "
            f"its place. {_EVIDENCE}"
        )


def _last(path: Path) -> dict[str, Any] | None:
    """The last entry of a sealed segment, found from its end."""
    with path.open("rb") as file:
        end, data = file.seek(0, 2), b""
        while end and data.count(b"\n") < 2:
            begin = max(0, end - 4096)
            file.seek(begin)
            data, end = file.read(end - begin) + data, begin
    lines = data.splitlines()
    return hash_chain.parse(lines[-1]) if data.endswith(b"\n") and lines else None


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """All entries of a log in order, verified as they come; one segment is in memory at a time.

    A last line that was never finished is left out. Somebody may add to the log meanwhile, and seal.

    Raises:
        AuditError: naming what is missing.
        CheckpointError: naming the first line that is edited, missing or out of order.
    """
    data, here, there = _look(path)
    _require_numbers(path, here, there)
    yield from before(path, here)
    yield from _follow(path, data.split(b"\n")[:-1], here)


def before(path: Path, here: Place) -> Iterator[dict[str, Any]]:
    """The entries of the sealed segments before the one that stands here, as :func:`entries`."""
    at = FIRST
    for number in range(1, here.number):
        at = yield from follow(sealed(path, number), at)
    if at != here:
        raise errors.AuditError(f"{path}: does not continue {sealed(path, here.number - 1)}. {_EVIDENCE}")


def _look(path: Path) -> tuple[bytes, Place, list[int]]:
    """The last segment as it is now, and the numbers of the sealed ones; anew where it was sealed meanwhile."""
    while True:
        data = path.read_bytes()
        here, there = place_of(hash_chain.parse(data.partition(b"\n")[0])), numbers(path)
        if not there or there[-1] < here.number or place(path) == here:
            _require_same(path, data, here)
            return data, here, there


def _require_same(path: Path, data: bytes, here: Place) -> None:
    """What a sealing that was cut short left is what the last segment was then."""
    copy = sealed(path, here.number)
    left = copy.read_bytes() if copy.exists() else b""
    if not (data.startswith(left) or left.startswith(data)):
        raise errors.AuditError(f"{path}: is another segment {here.number} than {copy}. {_EVIDENCE}")


def follow(path: Path, at: Place) -> Generator[dict[str, Any], None, Place]:
    """Entries of a segment that nobody adds to now, line by line; returns where the next one must stand."""
    return (yield from _follow(path, _lines(path), at))


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                raise errors.AuditError(f"{path}: its end is missing, and it was sealed. {_EVIDENCE}")
            yield line[:-1]


def _follow(path: Path, lines: Iterable[bytes], at: Place) -> Generator[dict[str, Any], None, Place]:
    for number, entry in hash_chain.walk(lines, at.head):
        begins = number == 1 and at.number > 1
        if entry is None or (entry.get("event") == CONTINUED) != begins or (begins and place_of(entry) != at):
            raise errors.CheckpointError(
                f"{path}: line {number} does not continue the chain; it was changed or is not ours"
            )
        yield entry
        at = Place(at.number, at.before + 1, str(entry["hash"]))
    return Place(at.number + 1, at.before, at.head)


class Tail:
    """What is added to a log from now on, for somebody who only looks at it.

    Args:
        path: the log; what is in it already is not shown.
        whole: show that too, once.
    """

    def __init__(self, path: Path, *, whole: bool = False) -> None:
        self._path, self._number = path, FIRST.number if whole else place(path).number
        self._at = path.stat().st_size if path.exists() and not whole else 0

    def lines(self) -> Iterator[bytes]:
        """Lines that were added since; not verified.

        Raises:
            OSError: if the log cannot be read now.
        """
        with self._path.open("rb") as file:
            number = place_of(hash_chain.parse(file.readline())).number
            while self._number < number:  # sealed meanwhile
                with sealed(self._path, self._number).open("rb") as before:
                    yield from self._rest(before)
                self._number, self._at = self._number + 1, 0
            if number < self._number or file.seek(0, 2) < self._at:  # another log
                self._number, self._at = number, 0
            yield from self._rest(file)

    def _rest(self, file: IO[bytes]) -> list[bytes]:
        file.seek(self._at)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        self._at += whole
        return data[:whole].splitlines()
