"""What a site's own audit log says of recipes and coordinators, as far as the gate asks: a running state.

It is made from the log when the process starts and follows each entry that is added. So a message costs the same
however long the log is. What it holds grows with the rounds of recipes and with the marks of coordinators' logs, a few
numbers each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedvfm.audit import audit
from fedvfm.client.gate import lineage, rollback_detection
from fedvfm.ledger import receipts
from fedvfm.protocol import protocol


class History:
    """All that the gate needs of the log.

    Attributes:
        coordinators: what was noted of their logs.
        surveyed: hash of each survey that was answered here -> sha256 of the answer.
    """

    def __init__(self) -> None:
        self.coordinators = rollback_detection.Coordinators()
        self._usage: dict[str, audit.Tally] = {}
        self._taken: dict[str, lineage.Taken] = {}
        self._left: dict[str, str] = {}
        self._sums: dict[tuple[str, int], str] = {}
        self.surveyed: dict[str, str] = {}
        self._marks: dict[str, audit.Noted] = {}
        self._length = 0
        self._heads: set[str] = set()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take the next entry of the log."""
        self._length += 1
        recipe = str(entry.get("recipe", ""))
        if entry["event"] in audit.COUNTED:
            self._usage.setdefault(recipe, audit.Tally()).add(entry)
        if entry["event"] in lineage.EVENTS:
            self._taken.setdefault(recipe, lineage.Taken()).add(entry)
        if entry["event"] == "received":
            self.coordinators.add(entry)
        if entry["event"] == "sent" and entry.get("kind") == protocol.WORDS[protocol.TRAIN]:
            self._left[recipe] = str(entry.get("digest", ""))
        if entry["event"] == "sent":
            self._heads.add(entry["hash"])
        if entry["event"] == "surveyed":
            self.surveyed[str(entry["fingerprint"])] = str(entry["digest"])
        if entry["event"] == "agreed":
            self._sums.setdefault((recipe, int(entry["round"])), str(entry["digest"]))
        if "ledger" in entry:
            self._marks.setdefault(entry["ledger"], receipts.noted(entry["ledger"], self._length, OWN))

    def usage(self, recipe: str) -> audit.Usage:
        """What a recipe, by its hash, has used up here."""
        return self._usage[recipe].usage() if recipe in self._usage else audit.Usage()

    def taken(self, recipe: str) -> lineage.Taken:
        """The adapters of a recipe that were trained from or scored here."""
        return self._taken.get(recipe, lineage.Taken())

    def sum_of(self, recipe: str, number: int) -> str:
        """sha256 of the one sum of a round under secure aggregation that this site signed or opened; "" if none."""
        return self._sums.get((recipe, number), "")

    def left(self, recipe: str, digest: str) -> bool:
        """Whether the last update of a recipe that left has this sha256: an update is kept until the next is."""
        return self._left.get(recipe) == digest

    def sent(self, head: str) -> bool:
        """Whether a line of this log about something that was sent has this hash; marks on replies name such lines."""
        return head in self._heads

    def ledger_marks(self) -> list[audit.Noted]:
        """Every mark of the site's privacy ledger that was noted beside an update, each once."""
        return list(self._marks.values())


OWN = "this site's audit log"
