"""trimmed-mean: of every number the mean over the sites without the largest and the smallest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm.aggregators import base, held
from fedvfm.state import state


@dataclass(frozen=True)
class TrimmedMean(held.Rule):
    """Of every number the ``bad`` largest and the ``bad`` smallest are left out, and the rest is averaged.

    With at most ``bad`` bad updates every number lies between two honest ones. Every site counts the same. It acts on
    the arrays as they travel, factors A and B of a pair apart.

    Attributes:
        bad: how many bad sites it withstands; left out, a quarter of the updates, and at least one of three or more.

    Memory: holds all updates of a round (:class:`held.Held`).
    Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, def. 2.
    """

    bad: int | None = None

    name: ClassVar[str] = "trimmed-mean"

    def __post_init__(self) -> None:
        base.check_bad(self.bad)

    @property
    def least(self) -> int:
        """More than are left out."""
        return 2 * (self.bad or 0) + 1

    def finish(self, acc: held.Held) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The trimmed means; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
            QuorumMissed: if ``bad`` at either end leave nothing.
        """
        updates = [one.state for one in acc.ordered(self.name, self.least)]
        number = len(updates)
        cut = self._cut(number)
        return held.combined(updates, lambda rows: np.sort(rows, axis=0)[cut : number - cut].mean(axis=0)), {}

    def _cut(self, number: int) -> int:
        if self.bad is not None:
            return self.bad
        return max(1, number // 4) if number >= 3 else 0
