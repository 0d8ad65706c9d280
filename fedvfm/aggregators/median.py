"""median: of every number the middle one of the sites' (coordinate-wise median)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm.aggregators import base, held
from fedvfm.state import state


@dataclass(frozen=True)
class Median:
    """Of every number the median over the sites; of an even number of sites the mean of the two middle ones.

    As long as fewer than half of the updates are bad, every number lies between two honest ones. Every site counts the
    same. It acts on the arrays as they travel, factors A and B of a pair apart: it is robust for each factor and, as
    the mean is, inexact for their product. Where all sites are honest it costs accuracy if they differ much, since it
    knows nothing of the sites at either side.

    Memory: holds all updates of a round (:class:`held.Held`).
    Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018, def. 1.
    """

    sum_only: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False
    any_order: ClassVar[bool] = True
    refactors: ClassVar[bool] = False
    robust: ClassVar[bool] = True
    least: ClassVar[int] = 1

    def init(self, manifest: state.Manifest, kept: Mapping[str, state.Array] | None = None) -> held.Held:
        """Nothing held."""
        return held.Held()

    def fold(self, acc: held.Held, contribution: base.Contribution) -> held.Held:
        """Hold the update."""
        return acc.add(contribution)

    def finish(self, acc: held.Held) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The medians; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
        """
        updates = [one.state for one in acc.ordered("median")]
        return held.combined(updates, lambda rows: np.asarray(np.median(rows, axis=0))), {}

    def for_site(self, adapter: state.AdapterState, manifest: state.Manifest) -> state.AdapterState:
        """See :func:`base.in_one_rank`."""
        return base.in_one_rank("median", adapter, manifest)
