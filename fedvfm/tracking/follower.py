"""The process of a tracker: follows journals and hands their numbers on; the parent of it, and how a fault is told.

The rounds know nothing of it: it reads what they wrote. What a tracker has taken is noted beside the journal, so a run
that is resumed goes on in the tracker too. A tracker that fails is tried again; that it fails is told once. One that
hangs is ended with the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedvfm.runtime import processes
from fedvfm.storage import hash_chain, storage
from fedvfm.tracking import base, targets, values

LOOK_S = 1.0
AGAIN_S = 30.0
"""How long a tracker that failed is left alone."""
GRACE_S = 20.0
"""What a tracker has for the last rows when the run ends."""
PREFIX = "track-"

Runs = Callable[[], Sequence[base.Run]]


class Follower:
    """Hands what journals say to one tracker.

    Args:
        target: the tracker.
        runs: those there are now.
        sites: whether the numbers of single sites go along.
        tell: takes a sentence when the tracker fails, and an empty one when it takes rows again.
    """

    def __init__(self, target: targets.Target, runs: Runs, tell: Callable[[str], object], *, sites: bool) -> None:
        self._target, self._runs, self._tell, self._sites = target, runs, tell, sites
        self._tracker: base.Tracker | None = None
        self._open: dict[Path, str] = {}
        self._failed = False

    def look(self) -> bool:
        """Hand on what is new; whether the tracker took it."""
        try:
            for run in self._runs():
                self._follow(run)
        except Exception as error:  # whatever a package raises, the run goes on
            if not self._failed:
                self._tell(self._sentence(error))
            self._failed = True
            return False
        if self._failed:
            self._tell("")
        self._failed = False
        return True

    def close(self) -> None:
        """End what is open."""
        if self._tracker is not None:
            with contextlib.suppress(Exception):
                self._tracker.close()

    def _sentence(self, error: Exception) -> str:
        text = targets.without_login(" ".join(str(error).split()))[:300]
        return (
            f"tracker {self._target.shown} takes nothing: {type(error).__name__}: {text}. The run goes on; it is tried "
            f"again every {AGAIN_S:g} s, and nothing is lost: the journal has it all"
        )

    def _follow(self, run: base.Run) -> None:
        path = run.folder / f"{PREFIX}{self._target.mark}.json"
        memory = _read(path)
        lines = hash_chain.read(run.folder / "journal.jsonl")
        new = [line for line in lines if int(line["round"]) > int(memory.get("round", 0))]
        tested = _read(run.folder / "evaluation.json")
        if not new and (memory.get("tested") or not tested):
            return
        if self._tracker is None:
            self._tracker = self._target.open()
        if run.folder not in self._open:
            self._open[run.folder] = self._tracker.begin(run, str(memory.get("known", "")))
        known = self._open[run.folder]
        for line in new:
            self._tracker.log(known, int(line["round"]), values.of_line(line, sites=self._sites))
            self._note(path, memory, known=known, round=int(line["round"]))
        if tested:
            step = int(tested.get("round", memory.get("round", 0)))
            numbers = values.of_test(tested, sites=self._sites)
            if numbers:
                self._tracker.log(known, step, numbers)
            self._open.pop(run.folder)  # should this be tried again, it is opened again
            self._tracker.end(known)
            self._note(path, memory, known=known, tested=True)

    def _note(self, path: Path, memory: dict[str, Any], **more: Any) -> None:
        memory.update(more)
        storage.write_text(path, json.dumps(memory) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def follow(settings: Path, runs: Runs) -> None:
    """Be a tracker's process until it is told to end; then the last rows are handed on.

    Args:
        settings: what :func:`followed` wrote.
        runs: those there are now.
    """
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    with contextlib.suppress(OSError):
        os.nice(10)
    asked = json.loads(settings.read_text(encoding="utf-8"))
    target = targets.Target(asked["kind"], asked["where"])
    fault = fault_path(settings)
    storage.write_text(fault, "")  # from now on it can be told to end
    follower = Follower(target, runs, lambda text: storage.write_text(fault, text), sites=bool(asked["sites"]))
    well = True
    while not over.wait(LOOK_S if well else AGAIN_S):
        well = follower.look()
    follower.look()
    follower.close()


class Watch:
    """Tells what trackers could not take, each fault once.

    Args:
        tell: takes a sentence.
    """

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell = tell
        self._said: set[str] = set()
        self._over = False
        self._followed: list[tuple[targets.Target, processes.Child, Path]] = []

    def add(self, target: targets.Target, child: processes.Child, fault: Path) -> None:
        """Look at one more tracker."""
        self._followed.append((target, child, fault))

    def look(self) -> None:
        """Tell what is new."""
        for target, child, fault in self._followed:
            with contextlib.suppress(OSError, ValueError):
                self._once(fault.read_text(encoding="utf-8"))
            if child.code and not self._over:
                last = targets.without_login(child.last_words(1))
                self._once(f"tracker {target.shown} ended: {last}. The run goes on without it")

    def stop(self) -> None:
        """Let all take the last rows, and end them."""
        self.look()
        self._over = True
        for target, child, fault in self._followed:
            _wait_ready(child, fault)
            child.stop()
            if child.code == -signal.SIGKILL:
                self._once(f"tracker {target.shown} did not take the last rows in {child.program.grace_s:g} s")
        self.look()

    def _once(self, text: str) -> None:
        if text and text not in self._said:
            self._said.add(text)
            self._tell(text)


def _wait_ready(child: processes.Child, fault: Path) -> None:
    """A run may be over before a tracker's process stands."""
    deadline = time.monotonic() + GRACE_S
    while child.code is None and not fault.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def fault_path(settings: Path) -> Path:
    """The file in which a tracker's process tells its fault; empty once it stands."""
    return settings.with_suffix(".fault")


@contextlib.contextmanager
def followed(
    wanted: Sequence[targets.Target],
    begin: Callable[[processes.Program], processes.Child],
    module: str,
    place: Path,
    tell: Callable[[str], object],
    *,
    sites: bool,
) -> Iterator[None]:
    """Follow runs with these trackers, a process each, while the block runs; faults are told as they come.

    Args:
        wanted: the trackers.
        begin: starts a program; the folder of its log and pid file is private.
        module: ends in :func:`follow`; its arguments are the settings and ``place``.
        place: where the runs are.
        tell: takes a sentence.
        sites: whether the numbers of single sites go along.

    Raises:
        StorageError: if the disk refuses.
    """
    watch = Watch(tell)
    with tempfile.TemporaryDirectory(prefix="fedvfm-track-") as held, contextlib.ExitStack() as ending:
        ending.callback(watch.stop)
        for target in wanted:
            settings = Path(held) / target.mark
            asked = {"kind": target.kind, "where": target.where, "sites": sites}
            storage.write_text(settings, json.dumps(asked) + "\n")
            command = processes.module(module, str(settings), str(place.absolute()))
            program = processes.Program(PREFIX + target.mark, command, grace_s=GRACE_S, restart=False)
            watch.add(target, begin(program), fault_path(settings))
        with processes.repeated(watch.look, 2.0, "fedvfm-trackers", patient=False):
            yield


def arguments() -> tuple[Path, Path]:
    """Settings and place, of the process of a tracker."""
    return Path(sys.argv[1]), Path(sys.argv[2])
