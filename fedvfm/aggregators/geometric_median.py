"""geometric-median: the point whose distances to all updates are least in sum (RFA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm.aggregators import base, held
from fedvfm.state import state

ITERATIONS = 1000
CLOSE = 1e-10
"""Iterations end where no share changes by more."""


@dataclass(frozen=True)
class GeometricMedian(held.Rule):
    """``argmin_z sum_k w_k ||z - x_k||`` over the whole flat update, by the smoothed Weiszfeld iteration.

    ``z <- sum_k b_k x_k / sum_k b_k`` with ``b_k = w_k / max(smoothing, ||z - x_k||)``. As long as bad updates have
    less than half of the weight it stays within a bounded distance of the honest ones, wherever the bad ones lie. Every
    z is a mixture of the updates, so the iteration runs on their distances alone: with shares p that sum to 1,
    ``||z - x_k||^2 = (D p)_k - p D p / 2``, D the squared distances. The updates are read twice, for D and for the last
    mixture. Distances are Euclidean over all arrays as they travel, factors A and B of a pair apart, none scaled.

    Attributes:
        smoothing: the distance below which all updates pull alike, in units of the adapter's numbers.

    Memory: holds all updates of a round (:class:`held.Held`).
    Source: Pillutla et al., "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing 70,
        2022, alg. 2.
    """

    smoothing: float = 1e-6

    name: ClassVar[str] = "geometric-median"
    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        base.check_positive("smoothing", self.smoothing)

    def finish(self, acc: held.Held) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The geometric median; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
        """
        ordered = acc.ordered(self.name)
        updates = [one.state for one in ordered]
        shares = self.shares(held.squares(updates), np.array([one.weight for one in ordered]))
        return held.combined(updates, lambda rows: np.asarray(shares @ rows)), {}

    def shares(self, squares: held.Matrix, weights: held.Matrix) -> held.Matrix:
        """How much of each update the geometric median is made of; sums to 1.

        Shapes: squares (sites, sites), weights (sites,).
        """
        weights = weights / weights.sum()
        shares = weights
        for _ in range(ITERATIONS):
            reach = squares @ shares
            distances = np.sqrt(np.maximum(reach - 0.5 * float(shares @ reach), 0.0))
            pull = weights / np.maximum(distances, self.smoothing)
            before, shares = shares, pull / pull.sum()
            if np.abs(shares - before).max() < CLOSE:
                break
        return _or_update(squares, weights, shares)


def _or_update(squares: held.Matrix, weights: held.Matrix, shares: held.Matrix) -> held.Matrix:
    """The shares, or one update whole where its distances to all are less in sum.

    Where the geometric median is one of the updates, the iteration only creeps towards it: of two updates it is the one
    of more weight, and the sum hardly changes from one to the other.
    """
    reach = squares @ shares
    reached = float(weights @ np.sqrt(np.maximum(reach - 0.5 * float(shares @ reach), 0.0)))
    sums = np.sqrt(squares) @ weights
    nearest = int(np.argmin(sums))
    return np.asarray(np.eye(len(weights))[nearest]) if sums[nearest] < reached else shares
