"""Durable writes: a file is either the old one or the whole new one, and a full disk is one clear error.

Everything is private by default: files are 0600, for their owner alone, because adapters, scores and names of samples
are not for every account of a machine. Who wants to share a run says so with ``chmod``.

Fault points: a test names one in ``FEDVFM_FAULT_POINT=name:count`` and the process is killed (SIGKILL) the count-th
time it comes there. Nothing else reads that variable, and it is read under pytest alone: nobody who can set a variable
for a service stops it so.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedvfm import errors

PART = ".part"
TESTED = "PYTEST_CURRENT_TEST"
"""What pytest sets while a test runs, for the processes of that test too."""

_visits: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Kill this process here if the test asked for it."""
    wanted = os.environ.get("FEDVFM_FAULT_POINT")
    if wanted is None or TESTED not in os.environ:
        return
    wanted_name, _, count = wanted.partition(":")
    if wanted_name == name:
        _visits[name] = _visits.get(name, 0) + 1
        if _visits[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Place:
    """What helps where a write was refused, by whose folder it is.

    Attributes:
        other: where else to write.
        allowed: what to do where this user may not.
        kept: what becomes of the work.
    """

    other: str
    allowed: str
    kept: str


_OWNER = "Work as the user whose state folder it is, or change its permissions"
OUTPUT = Place(
    "choose another --output",
    "Choose an --output that this user may write to, or change its permissions",
    "what was finished before is kept, and a run goes on with: fedvfm simulate --resume",
)
SERVER = Place(
    "move the state folder to another disk (--state)",
    _OWNER,
    "what was admitted is kept; a server that runs goes on by itself, any other command is given again",
)
SITE = Place(
    "move the state folder to another disk (--state)",
    _OWNER,
    "what was sent is kept; a client that runs goes on by itself, any other command is given again",
)
NEW_STATE = Place(
    "choose another --state",
    "Choose a --state that this user may write to, or change its permissions",
    "nothing was made",
)
MARKS = {"federation.json": SERVER, "authority.key": SERVER, "site.json": SITE, "site.key": SITE}
"""File of a state folder, of which there is one from the beginning -> whose folder it is."""

_FULL, _CLOSED, _FAILING = "full", "closed", "failing"
KINDS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.EROFS: _CLOSED,
    errno.EIO: _FAILING,
}
"""What the operating system says when a write fails, by what helps."""

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What only a write can meet: a disk that takes nothing more."""


def place_of(path: object) -> Place:
    """Whose folder a path lies in."""
    here = Path(str(path))
    if here.name in MARKS:
        return MARKS[here.name]
    with contextlib.suppress(OSError):
        for folder in (here, *here.parents):
            for mark, place in MARKS.items():
                if (folder / mark).is_file():
                    return place
    return OUTPUT


def _remedy(error: OSError, place: Place) -> str:
    kind = KINDS.get(error.errno or 0, "")
    capital = place.other[0].upper() + place.other[1:]
    first = {
        _FULL: f"Free space, raise the quota or {place.other}",
        _CLOSED: place.allowed,
        _FAILING: f"The disk or the network share is failing: mend it or {place.other}",
    }.get(kind, capital)
    return f"{first}; {place.kept}"


def refusal(path: object, error: OSError, place: Place | None = None) -> errors.StorageError:
    """The error of a write that the operating system refused, with the remedy for its kind and its place."""
    reason = error.strerror or type(error).__name__
    return errors.StorageError(f"cannot write {path}: {reason}. {_remedy(error, place or place_of(path))}")


@contextlib.contextmanager
def guard(path: Path, place: Place | None = None) -> Iterator[None]:
    """Turn an OSError of a write below ``path`` into a StorageError; ``place`` where the path does not tell it yet."""
    try:
        yield
    except OSError as error:
        raise refusal(path, error, place) from error


def is_part(path: Path) -> bool:
    """Whether this is the temporary file of a write that was killed."""
    return path.name.startswith(".") and path.name.endswith(PART)


def sweep(folder: Path) -> None:
    """Remove what killed writes left below ``folder``. Nobody else may be writing there."""
    with guard(folder):
        for path in folder.rglob(f".*{PART}"):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_file(path: Path, write: Callable[[IO[bytes]], object], *, mode: int = 0o600) -> None:
    """Write a file whole or not at all: a temporary file beside it, fsync, rename, fsync of the folder.

    Raises:
        StorageError: if the disk refuses; the old file, if any, is untouched.
    """
    with guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                fault_point("file-opened")
                write(file)
                fault_point("file-written")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            fault_point("file-synced")
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        fault_point("file-renamed")
        sync_folder(path.parent)


def write_bytes(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """:func:`write_file` for bytes."""
    write_file(path, lambda file: file.write(data), mode=mode)


def write_text(path: Path, text: str, *, mode: int = 0o600) -> None:
    """:func:`write_file` for text in UTF-8."""
    write_bytes(path, text.encode(), mode=mode)


def append_line(path: Path, line: str) -> None:
    """Append one line and wait until it, and the file's name where it is new, are on disk."""
    with guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            data = (line + "\n").encode()
            half = len(data) // 2
            _write_all(handle, data[:half])
            fault_point("line-half-written")
            _write_all(handle, data[half:])
            fault_point("line-written")
            os.fsync(handle)
        finally:
            os.close(handle)
        if new:
            sync_folder(path.parent)


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def private_folder(folder: Path) -> None:
    """A new state folder for its owner alone (0700), whatever the umask; an empty one that is there is taken.

    Raises:
        OutputInUse: if it holds anything: state is never overwritten.
        StorageError: if it cannot be made.
    """
    with guard(folder, NEW_STATE):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(folder.iterdir()):
            raise errors.OutputInUse(f"folder {folder} is not empty and is left as it is. Choose another one")
        folder.chmod(0o700)


def make_private(folder: Path) -> None:
    """A folder for its owner alone (0700), whatever the umask and whatever is in it.

    Raises:
        StorageError: if it cannot be made.
    """
    with guard(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, where there is one. Files are unlinked, not overwritten.

    Raises:
        StorageError: if something cannot be removed.
    """
    with guard(folder), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the only right to write ``path``, among all processes of this machine; waits for whoever holds it."""
    with guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_name(f".{path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What begins a formula in a spreadsheet, also as the wide characters of East Asian keyboards."""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A comma-separated table as text; the one writer of names that others gave.

    A text that a spreadsheet would take for a formula gets an apostrophe before it, and control characters are written
    out: names of files and classes come from strangers. Numbers stay numbers.

    Source: OWASP, "CSV Injection".
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_cell(name) for name in head])
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    plain = "".join(one if one.isprintable() else repr(one)[1:-1] for one in value)
    return f"'{plain}" if plain[:1] in FORMULA or value[:1] in ("\t", "\r", "\n") else plain
