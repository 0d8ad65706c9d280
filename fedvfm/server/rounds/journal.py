"""The server's record of rounds: one hash-chained line a round, written as the round ends."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.storage import hash_chain


class Journal:
    """The journal of one federation.

    A round is finished when its line is here; its checkpoint was on disk before.

    Raises:
        CheckpointError: if the file was edited, or belongs to another recipe.
    """

    def __init__(self, path: Path, recipe_hash: str) -> None:
        self._chain = hash_chain.Chain(path)
        for entry in self._chain.entries:
            if entry.get("recipe") != recipe_hash:
                raise errors.CheckpointError(
                    f"{path}: was written for recipe {str(entry.get('recipe'))[:12]}, this run has "
                    f"{recipe_hash[:12]}. Choose another output folder"
                )
        self._recipe = recipe_hash

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return self._chain.entries

    @property
    def last_round(self) -> int:
        """Number of the last finished round, 0 if none."""
        return int(self.rounds[-1]["round"]) if self.rounds else 0

    @property
    def head(self) -> str:
        """Hash of the last line."""
        return self._chain.head

    def append(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write the line of a finished round and wait until it is on disk."""
        return self._chain.append({"recipe": self._recipe, **record})


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform != "darwin" else 1024 * 1024), 1)
