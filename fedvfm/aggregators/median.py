"""median: of every number the middle one of the sites' (coordinate-wise median)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm.aggregators import held
from fedvfm.state import state


@dataclass(frozen=True)
class Median(held.Rule):
    """Of every number the median over the sites; of an even number of sites the mean of the two middle ones.

    As long as fewer than half of the updates are bad, every number lies between two honest ones. Every site counts the
    same. It acts on the arrays as they travel, factors A and B of a pair apart: it is robust for each factor and, as
    the mean is, inexact for their product. Where all sites are honest it costs accuracy if they differ much, since it
    knows nothing of the sites at either side.

    Memory: holds all updates of a round (:class:`held.Held`).
    Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, def. 1.
    """

    name: ClassVar[str] = "median"
    least: ClassVar[int] = 1

    def finish(self, acc: held.Held) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The medians; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
        """
        updates = [one.state for one in acc.ordered(self.name)]
        return held.combined(updates, lambda rows: np.asarray(np.median(rows, axis=0))), {}
