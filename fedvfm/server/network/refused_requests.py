"""Requests that the public port refused: from the proxy's file into the audit log, few lines however many there were.

The proxy has no key to the audit log and no time for it. It writes a small file that starts anew when it has grown; the
supervisor reads that file and writes into the chain who was refused what and how often. An attacker fills neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.audit import audit
from fedvfm.runtime import processes
from fedvfm.storage import storage

LOG = logging.getLogger(__name__)
FILE = "refused.jsonl"
LATELY_S = 600
"""How far back ``server status`` looks."""
MAX_BYTES = 1_000_000
"""Of the proxy's file; one that has grown over it is put aside once, so that there are twice as many at most."""
MOST_ADDRESSES = 8
"""Addresses told apart of one word between two writes of the file; an attacker has any number of them."""
PAUSE_S = 1.0

MOST_LINES = 16
"""Lines of the audit log at a time."""
MOST_HELD = 4096
"""Words with an address that are told apart until they are written."""
FIRST_S, LONGEST_S = 60.0, 3600.0
"""How long the audit log is left alone after such lines: doubled while refusals go on, at most 400 lines a day."""

Kind = tuple[str, str]


class Refusals:
    """The proxy's file: the first refusal of each word at once, then at most one write a second and word.

    Args:
        path: the file; empty for none.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._counts: Counter[Kind] = Counter()
        self._written: dict[str, float] = {}
        self._later: asyncio.TimerHandle | None = None

    def __call__(self, what: str, client: str) -> None:
        """Take one."""
        if self._path is None:
            return
        kept = [one for word, one in self._counts if word == what]
        full = client not in kept and len(kept) >= MOST_ADDRESSES
        self._counts[what, audit.OTHERS if full else client] += 1
        if time.monotonic() - self._written.get(what, -PAUSE_S) >= PAUSE_S:
            self._written[what] = time.monotonic()
            self.flush()
        elif self._later is None:
            with contextlib.suppress(RuntimeError):  # where no loop runs, the next refusal or the end writes it
                self._later = asyncio.get_running_loop().call_later(PAUSE_S, self.flush)

    def flush(self) -> None:
        """Write down what was counted and not written yet. A full disk must not stop those who are let in."""
        self._later = None
        if self._path is None or not self._counts:
            return
        now = int(time.time())
        lines = [
            json.dumps({"time": now, "refused": what, "client": client, "count": count})
            for (what, client), count in self._counts.items()
        ]
        self._counts.clear()
        with contextlib.suppress(errors.StorageError, OSError):
            if self._path.exists() and self._path.stat().st_size > MAX_BYTES:
                os.replace(self._path, aside(self._path))
            storage.append_line(self._path, "\n".join(lines))


def aside(path: Path) -> Path:
    """Where the file before this one lies."""
    return path.with_name(path.name + ".1")


def lately(path: Path, now: float | None = None) -> dict[str, int]:
    """Word -> how often a request was refused with it in the last ten minutes, the most frequent first.

    Args:
        path: the proxy's file.
        now: seconds since 1970.
    """
    since, counts = (time.time() if now is None else now) - LATELY_S, Counter[str]()
    for each in (aside(path), path):
        with contextlib.suppress(OSError):
            for line in each.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    line_of = json.loads(line)
                    if line_of["time"] >= since and audit.FIELDS["reason"](line_of["refused"]):
                        counts[line_of["refused"]] += int(line_of["count"])
    return dict(counts.most_common())


class Collector:
    """Carries refusals into the audit log.

    What was carried is noted beside the file, so that a server that starts again does not do it twice; if it dies
    between the two, some are told twice, and none is lost but those the proxy had not written.

    Args:
        path: the proxy's file.
        log: the coordinator's audit log.
        clock: seconds that never go back.
    """

    def __init__(self, path: Path, log: audit.Audit, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._log, self._clock = path, log, clock
        self._seen = path.with_name(path.name + ".seen")
        self._file, self._at = self._remembered()
        self._counts: Counter[Kind] = Counter()
        self._due, self._wait = clock(), FIRST_S

    def look(self) -> None:
        """Read what is new, and write it down if it is time.

        Raises:
            StorageError, AuditError: if the log cannot be written; what was read is kept for the next look.
        """
        self._read()
        now = self._clock()
        if now < self._due:
            return
        if self._counts:
            self.write()
            self._due, self._wait = now + self._wait, min(2 * self._wait, LONGEST_S)
        elif now > self._due + self._wait:
            self._wait = FIRST_S

    def write(self) -> None:
        """Write all that was read, the most frequent first; the rest is summed up by word.

        Raises:
            StorageError, AuditError: if the log cannot be written.
        """
        self._read()
        while self._counts:
            if len(self._counts) > MOST_LINES:
                self._sum_up()
            (what, client), count = self._counts.most_common(1)[0]
            self._log.record("refused", reason=what, address=client, count=count)
            del self._counts[what, client]
        with contextlib.suppress(errors.StorageError):
            storage.write_text(self._seen, json.dumps({"file": self._file, "at": self._at}) + "\n")

    def _sum_up(self) -> None:
        """Keep the most frequent apart; of each word one line is left for all other addresses."""
        words = {what for what, _ in self._counts}
        ranked = self._counts.most_common()
        room = max(0, MOST_LINES - len(words))
        kept = Counter(dict(ranked[:room]))
        for (what, _), count in ranked[room:]:
            kept[what, audit.OTHERS] += count
        self._counts = kept

    def _remembered(self) -> tuple[int, int]:
        try:
            found = json.loads(self._seen.read_text(encoding="utf-8"))
            return int(found["file"]), int(found["at"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0

    def _read(self) -> None:
        for path in (aside(self._path), self._path):
            try:
                about = path.stat()
            except OSError:
                continue
            number = about.st_ino
            if path == self._path and (number != self._file or about.st_size < self._at):  # it began anew
                self._file, self._at = number, 0
            if number == self._file:
                self._take(path)

    def _take(self, path: Path) -> None:
        with path.open("rb") as file:
            file.seek(self._at)
            data = file.read(2 * MAX_BYTES)
        whole = data.rfind(b"\n") + 1
        self._at += whole
        for line in data[:whole].splitlines():
            self._count(line)

    def _count(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found: dict[str, Any] = json.loads(line)
            what, count = found["refused"], found["count"]
            client = str(found["client"]).partition("%")[0].lower()
            client = client if audit.FIELDS["address"](client) else audit.UNKNOWN
            if audit.FIELDS["reason"](what) and audit.FIELDS["count"](count):
                self._counts[what, client] += count
        if len(self._counts) > MOST_HELD:
            self._sum_up()


@contextlib.contextmanager
def collected(path: Path, log: audit.Audit) -> Iterator[None]:
    """Carry refusals while the block runs, in a thread; the last ones when it ends.

    What cannot be written is told once and tried again: it stops nothing.
    """
    collector, said = Collector(path, log), ""

    def carry(work: Callable[[], None]) -> None:
        nonlocal said
        try:
            work()
        except errors.FedvfmError as error:
            if str(error) != said:
                LOG.error(f"refused requests are not in the audit log: {error}")
            said = str(error)

    try:
        with processes.repeated(lambda: carry(collector.look), PAUSE_S, "fedvfm-refused"):
            yield
    finally:
        carry(collector.write)
