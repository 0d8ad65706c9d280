"""What left an end since midnight (UTC), as its audit log goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedvfm.trust import signed_documents


class Today:
    """Counts the messages that left on the present day; a new day begins with none."""

    def __init__(self) -> None:
        self._day, self._rows = "", list[dict[str, Any]]()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take the next entry of the log."""
        if entry["event"] != "sent":
            return
        day = str(entry["time"])[:10]
        if day != self._day:
            self._day, self._rows = day, []
        self._rows.append(dict(entry))

    def rows(self) -> list[dict[str, Any]]:
        """The entries of what left today, the oldest first."""
        return self._rows if self._day == signed_documents.stamp(signed_documents.now())[:10] else []

    def totals(self) -> dict[str, Any]:
        """How many messages and bytes that are, and how many of each kind."""
        rows = self.rows()
        kinds = Counter(str(row["kind"]) for row in rows)
        moved = Counter[str]()
        for row in rows:
            moved[str(row["kind"])] += int(row["bytes"])
        return {
            "day": signed_documents.stamp(signed_documents.now())[:10],
            "messages": len(rows),
            "bytes": sum(moved.values()),
            "kinds": {kind: {"messages": count, "bytes": moved[kind]} for kind, count in sorted(kinds.items())},
        }
