"""A tracker: where the numbers of rounds go besides the journal; and which runs there are to follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Run:
    """One federation, or one arm of a simulation, as a tracker knows it.

    Attributes:
        name: for people; "brain-mri, seed 0, federated".
        folder: holds its journal and, at the end, its final test.
        place: relative path of its own in a folder of many runs.
        parameters: the recipe's keys and values.
    """

    name: str
    folder: Path
    place: str
    parameters: Mapping[str, str]


class Tracker(Protocol):
    """Takes numbers of runs. Whatever it raises is told once, and tried again later."""

    def begin(self, run: Run, known: str) -> str:
        """Open a run, or go on with it.

        Args:
            run: which.
            known: what this returned before, in this process or an earlier one; empty at first.

        Returns: by what it is known to the tracker.
        """
        ...

    def log(self, known: str, step: int, values: Mapping[str, float]) -> None:
        """Take the finite numbers of one round.

        Args:
            known: the run.
            step: number of the round.
            values: name -> number.
        """
        ...

    def end(self, known: str) -> None:
        """The run is finished."""
        ...

    def close(self) -> None:
        """Nothing more comes from this process; a run may be gone on with by another."""
        ...
