"""How the run stands, for whoever looks from outside: one small file beside its log, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvfm.storage import storage
from fedvfm.trust import signed_documents

RUN = "run"
"""The folder of the server's processes, in its state folder."""
FILE = "standing.json"
WAITING, PAUSED, ROUND, TEST = "waiting", "paused", "round", "final-test"


class Board:
    """Where the run writes how it stands, when that changed.

    Args:
        folder: of the server's processes; private.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._said = folder / FILE, ""
        self._stage, self._since = ("", 0), ""
        self._words: dict[str, tuple[str, str]] = {}

    def write(self, phase: str, reason: str, number: int, sites: Mapping[str, str]) -> None:
        """Say how it stands, since when, and since when each site does.

        Args:
            phase: one of the four of this module.
            reason: what it waits for, in words.
            number: of the round in hand.
            sites: approved site -> why it takes no part, or that it does.
        """
        now = signed_documents.stamp(signed_documents.now())
        if self._stage != (phase, number):
            self._stage, self._since = (phase, number), now
        before = self._words
        self._words = {
            name: before[name] if name in before and before[name][0] == word else (word, now)
            for name, word in sites.items()
        }
        values = {
            "phase": phase,
            "reason": reason,
            "round": number,
            "since": self._since,
            "sites": dict(sites),
            "sites_since": {name: since for name, (_, since) in self._words.items()},
        }
        text = json.dumps(values) + "\n"
        if text != self._said:
            storage.write_text(self._path, text)
            self._said = text


def read(folder: Path) -> dict[str, Any]:
    """What the run said last; nothing if it never did."""
    try:
        standing = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return standing if isinstance(standing, dict) else {}
