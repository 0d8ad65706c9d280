"""Durable writes: a file is either the old one or the whole new one, and a full disk is one clear error.

Fault points: a test names one in ``FEDVFM_FAULT_POINT=name:count`` and the process is killed (SIGKILL) the count-th
time it comes there. Nothing else reads that variable.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from fedvfm import errors

PART = ".part"

_visits: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Kill this process here if the test asked for it."""
    wanted = os.environ.get("FEDVFM_FAULT_POINT")
    if wanted is None:
        return
    wanted_name, _, count = wanted.partition(":")
    if wanted_name == name:
        _visits[name] = _visits.get(name, 0) + 1
        if _visits[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What the operating system says when a disk takes nothing more."""


@contextlib.contextmanager
def guard(path: Path) -> Iterator[None]:
    """Turn an OSError of a write below ``path`` into a StorageError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise errors.StorageError(
            f"cannot write {path}: {reason}. Free space or choose another --output; what was finished before is kept, "
            "go on with --resume"
        ) from error


def is_part(path: Path) -> bool:
    """Whether this is the temporary file of a write that was killed."""
    return path.name.startswith(".") and path.name.endswith(PART)


def sweep(folder: Path) -> None:
    """Remove what killed writes left below ``folder``. Nobody else may be writing there."""
    with guard(folder):
        for path in folder.rglob(f".*{PART}"):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
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
        _sync_folder(path.parent)


def write_bytes(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """:func:`write_file` for bytes."""
    write_file(path, lambda file: file.write(data), mode=mode)


def write_text(path: Path, text: str, *, mode: int = 0o600) -> None:
    """:func:`write_file` for text in UTF-8."""
    write_bytes(path, text.encode(), mode=mode)


def append_line(path: Path, line: str) -> None:
    """Append one line and wait until it is on disk."""
    with guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
