"""The server's record of rounds: one hash-chained line a round, written as the round ends."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.storage import hash_chain

DRAWN_FROM = "drawn_from"
"""The sites that a round's cohort was drawn from, where it was not all of them."""


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


def parties(line: Mapping[str, Any]) -> set[str]:
    """The sites that had a part in how a round came out: asked, admitted, or among those that were drawn from."""
    return {*line.get("cohort", ()), *line["examples"], *line.get(DRAWN_FROM, ())}


def first_part(lines: Sequence[Mapping[str, Any]], site: str) -> int:
    """Number of the first round in which a site had a part; 0 where it had none."""
    return next((int(line["round"]) for line in lines if site in parties(line)), 0)


def bases(lines: Sequence[Mapping[str, Any]]) -> set[int]:
    """Rounds after which some site came in: what is left of a federation should that site withdraw.

    As many as there are sites at most; 0 stands for the initial adapter.
    """
    known: set[str] = set()
    rounds: set[int] = set()
    for line in lines:
        new = parties(line) - known
        known |= new
        rounds |= {int(line["round"]) - 1} if new else set()
    return rounds


def peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 if sys.platform != "darwin" else 1024 * 1024), 1)
