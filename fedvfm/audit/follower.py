"""A log as somebody sees it who only looks on: every entry once, held against the one before it; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedvfm.audit import segments
from fedvfm.storage import hash_chain


class Follower:
    """The entries of a log, those that are there first, then what is added. Reads no line twice.

    Args:
        path: the log.

    Attributes:
        whole: False once a line did not continue the chain: the log was edited, and what was read is no record.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._tail = path, segments.Tail(path, whole=True)
        self._head, self.whole = hash_chain.ZERO, True

    def new(self) -> list[dict[str, Any]]:
        """What is new; what cannot be read now comes the next time. A log that begins anew is read from its beginning.

        Raises:
            OSError: if the log cannot be read.
        """
        if not self._path.exists():
            return []
        lines = list(self._tail.lines())
        first = hash_chain.parse(lines[0]) if lines else None
        if first is not None and first.get("prev") == hash_chain.ZERO:
            self._head, self.whole = hash_chain.ZERO, True
        entries: list[dict[str, Any]] = []
        for _, entry in hash_chain.walk(lines, self._head):
            if entry is None:
                self.whole = False
                break
            entries.append(entry)
            self._head = str(entry["hash"])
        return entries
