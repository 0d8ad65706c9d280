"""krum: the update that lies closest to most others, or the mean of the few that do (Multi-Krum)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm.aggregators import base, exact_sum, held
from fedvfm.state import state


@dataclass(frozen=True)
class Krum(held.Rule):
    """Score of an update = sum of its squared distances to the ``n - bad - 2`` others nearest to it; the least wins.

    With n >= 2 bad + 3 the winner is in the midst of honest updates. Distances are Euclidean over the whole flat
    update: all arrays as they travel, factors A and B of a pair apart, head and decoder parts among them, none scaled.
    One site's update is taken whole, so what the others learned in a round is lost: it suits sites that are alike.
    ``average`` above 1 takes the mean of so many of the best. Every site counts the same.

    Attributes:
        bad: how many bad sites it withstands; left out, as many as can be, (n - 3) / 2 rounded down.
        average: of how many of the best the mean is taken (Multi-Krum); at most n - bad count.

    Memory: holds all updates of a round (:class:`held.Held`).
    Source: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
        section 4 (Krum) and section 6 (Multi-Krum).
    """

    bad: int | None = None
    average: int = 1

    name: ClassVar[str] = "krum"

    def __post_init__(self) -> None:
        base.check_bad(self.bad)
        base.check_whole("average", self.average, 1)

    @property
    def least(self) -> int:
        """Without ``bad`` any number will do, and none withstands a bad site below five."""
        return 1 if not self.bad else 2 * self.bad + 3

    def finish(self, acc: held.Held) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The winner, or the mean of the best; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
            QuorumMissed: if fewer than ``2 bad + 3`` came.
        """
        updates = [one.state for one in acc.ordered(self.name, self.least)]
        number = len(updates)
        bad = max((number - 3) // 2, 0) if self.bad is None else self.bad
        order = np.argsort(_scores(held.squares(updates), max(number - bad - 2, 1)), kind="stable")
        chosen = [updates[int(index)] for index in order[: min(self.average, number - bad)]]
        if len(chosen) == 1:
            return chosen[0], {}
        total = exact_sum.ExactSum()
        for update in chosen:
            total = total.add(1.0, update)
        return state.AdapterState(total.mean()), {}


def _scores(squares: held.Matrix, neighbours: int) -> held.Matrix:
    """Sum of the least ``neighbours`` distances of each to others; its own, 0, comes first and is not one of them."""
    found: held.Matrix = np.sort(squares, axis=1)[:, 1 : 1 + neighbours].sum(axis=1)
    return found
