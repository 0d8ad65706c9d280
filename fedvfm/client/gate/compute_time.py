"""Computing time that no answer accounts for: of an executor that was killed, or whose machine went down, at work.

While it works on a message it writes down every few seconds for how long it has. The next start finds that, and notes
it in the audit log, where it counts towards ``max_hours``. So a message that brings the executor down each time uses up
the hours it takes, and a machine that was off over the weekend uses up none of it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.client import state_folder
from fedvfm.runtime import processes
from fedvfm.storage import storage
from fedvfm.trust import signed_documents

FILE = "working.json"
EVERY_S = 5.0
LONGEST_S = 3600.0
"""What counts at most where nothing was written down: a round's own limit, unless its coordinator set another."""

Asked = ParamSpec("Asked")
Reply = TypeVar("Reply")


def path_of(where: state_folder.State) -> Path:
    """The file that is there while a message is worked on."""
    return where.folder / "run" / FILE


def counted(where: state_folder.State, answer: Callable[Asked, Reply]) -> Callable[Asked, Reply]:
    """An answer whose time is written down while it is worked on."""

    def answered(*asked: Asked.args, **more: Asked.kwargs) -> Reply:
        with working(path_of(where)):
            return answer(*asked, **more)

    return answered


@contextlib.contextmanager
def working(path: Path, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Write down how long the block runs; once it has run there is nothing to tell."""
    began = clock()

    def write() -> None:
        with contextlib.suppress(errors.StorageError):  # a full disk takes no answer either
            storage.write_text(path, json.dumps({"seconds": round(clock() - began, 3)}) + "\n")

    write()
    with processes.repeated(write, EVERY_S, "fedvfm-working"):
        yield
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def settle(where: state_folder.State) -> float:
    """Note the time of a message that was accepted and never answered; the seconds, 0 where there is none.

    Raises:
        StorageError: if it cannot be noted; then nothing may be answered.
    """
    left, seconds = audit.unfinished(where.audit.scan()), 0.0
    if left is not None:
        seconds = _worked(where, signed_documents.moment(str(left["time"])).timestamp())
        about = {name: left[name] for name in ("kind", "recipe", "round") if name in left}
        where.audit.record("interrupted", seconds=seconds, **about)
    with contextlib.suppress(OSError):
        path_of(where).unlink(missing_ok=True)
    return seconds


def _worked(where: state_folder.State, accepted: float) -> float:
    """Seconds, rather a few too many: the last ones were not written down, nor any where the file is gone."""
    try:
        return float(json.loads(path_of(where).read_text(encoding="utf-8"))["seconds"]) + EVERY_S
    except (OSError, ValueError, KeyError, TypeError):
        return round(min(max(time.time() - accepted, EVERY_S), LONGEST_S), 3)
