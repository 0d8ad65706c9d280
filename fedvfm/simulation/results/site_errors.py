"""What a researcher is told of a site that broke: the site's own error, which a real coordinator never sees."""

from __future__ import annotations

import builtins
import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.storage import storage


def debugging() -> bool:
    """Whether ``FEDVFM_DEBUG`` asks for tracebacks."""
    return os.environ.get("FEDVFM_DEBUG", "") not in ("", "0")


def explain(where: str, error: Exception) -> errors.FedvfmError:
    """The error itself where it is one of ours, else one that names the place and what to do."""
    if isinstance(error, errors.FedvfmError):
        return error
    if isinstance(error, OSError) and error.errno in storage.REFUSALS:
        made: errors.FedvfmError = storage.refusal(error.filename or where, error)
    else:
        made = errors.EngineError(
            f"{where}: {type(error).__name__}: {error}. This is a fault in the program or in a part registered with "
            "it; FEDVFM_DEBUG=1 shows the traceback. What was finished before is kept, go on with --resume"
        )
    made.__cause__ = error
    return made


@contextlib.contextmanager
def shown(last: Callable[[], errors.FedvfmError | None]) -> Iterator[None]:
    """Where sites stopped a federation, raise the ``last`` error of a site in place of the coordinator's word for it.

    Raises:
        QuorumMissed, HandshakeRefused: where no site reported an error.
    """
    try:
        yield
    except (errors.QuorumMissed, errors.HandshakeRefused):
        error = last()
        if error is None:
            raise
        raise error from error.__cause__


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn an exception that is none of ours into an error with a place and a remedy."""
    try:
        yield
    except Exception as error:
        made = explain(where, error)
        raise made from made.__cause__


def leave(folder: Path, where: str, error: Exception) -> None:
    """Leave a site's error where the simulation looks for it; on another machine nobody does."""
    if not folder.is_dir():
        return
    kind, text, *_ = pack(where, error)
    storage.write_text(folder / f"{time.time_ns()}-{os.getpid()}.txt", f"{kind}\n{text}")


def last(folder: Path) -> errors.FedvfmError | None:
    """The last error that a site left, as the class it was."""
    found = sorted(folder.glob("*.txt"))
    if not found:
        return None
    kind, _, text = found[-1].read_text(encoding="utf-8").partition("\n")
    return unpack((kind, text, "", ""))


Packed = tuple[str, str, str, str]
"""An error on its way between processes: its class and text, and those of its cause where there is one."""


def pack(where: str, error: Exception) -> Packed:
    """A site's error for another process of this simulation; with its traceback where that is asked for."""
    ours = explain(where, error)
    trace = "\n" + "".join(traceback.format_exception(error)) if debugging() else ""
    cause = ours.__cause__
    return type(ours).__name__, f"{ours}{trace}", "" if cause is None else type(cause).__name__, str(cause or "")


def unpack(packed: Packed) -> errors.FedvfmError:
    """The error as the class it was, with a cause of its class where that is one of Python's own."""
    kind, text, cause, cause_text = packed
    made: errors.FedvfmError = _of_class(getattr(errors, kind, errors.FedvfmError), text)
    if cause:
        python = getattr(builtins, cause, None)
        known = isinstance(python, type) and issubclass(python, Exception)
        made.__cause__ = _of_class(python, cause_text) if known else RuntimeError(f"{cause}: {cause_text}")
    return made


def _of_class(kind: Any, text: str) -> Any:
    made = kind.__new__(kind)
    Exception.__init__(made, text)
    return made
