"""How the run stands, for whoever looks from outside: one small file beside its log, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedvfm.storage import storage

FILE = "standing.json"
WAITING, PAUSED, ROUND, TEST = "waiting", "paused", "round", "final-test"


class Board:
    """Where the run writes how it stands, when that changed.

    Args:
        folder: of the server's processes; private.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._said = folder / FILE, ""

    def write(self, phase: str, reason: str, number: int, sites: Mapping[str, str]) -> None:
        """Say how it stands.

        Args:
            phase: one of the four of this module.
            reason: what it waits for, in words.
            number: of the round in hand.
            sites: approved site -> why it takes no part, or that it does.
        """
        text = json.dumps({"phase": phase, "reason": reason, "round": number, "sites": dict(sites)}) + "\n"
        if text != self._said:
            storage.write_text(self._path, text)
            self._said = text


def read(folder: Path) -> dict[str, Any]:
    """What the run said last; nothing if it never did."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
