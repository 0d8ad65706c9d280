"""clipped-mean: no update moves the mean by more than a bound (norm clipping)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fedvfm.aggregators import base, exact_sum, held
from fedvfm.state import state


@dataclass(frozen=True, slots=True)
class Clipped:
    """The exact sum under a stated bound, or all updates where the bound is made of them."""

    total: exact_sum.ExactSum = field(default_factory=exact_sum.ExactSum)
    held: held.Held = field(default_factory=held.Held)


@dataclass(frozen=True)
class ClippedMean:
    """Weighted mean of ``start + min(1, bound / ||u||) u`` with the update ``u = state - start``.

    The norm is that of the whole flat update: all arrays as they travel, factors A and B of a pair apart. A bad site
    moves the mean by its share of the weight times the bound at most, in any direction: it stops scaled updates, and
    slows others down. It gives nothing away where honest updates are of one size.

    Attributes:
        bound: the largest norm; then the rule is a sum and holds no update. 0, the default: the median of the norms of
            the round's updates, which are held for it.

    Memory: with a bound that of ``mean``, else all updates of a round (:class:`held.Held`).
    Source: Sun et al., "Can You Really Backdoor Federated Learning?", 2019 (arXiv 1911.07963), section 4 (norm
        thresholding); the median as the bound: Nguyen et al., "FLAME: Taming Backdoors in Federated Learning", USENIX
        Security 2022, section 4.2.
    """

    bound: float = 0.0

    mixed_ranks: ClassVar[bool] = False
    any_order: ClassVar[bool] = True
    refactors: ClassVar[bool] = False
    robust: ClassVar[bool] = True
    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.bound != 0.0:
            base.check_positive("bound", self.bound)

    @property
    def sum_only(self) -> bool:
        """Whether the bound is stated."""
        return self.bound > 0.0

    def init(self, manifest: state.Manifest, kept: Mapping[str, state.Array] | None = None) -> Clipped:
        """Nothing summed, nothing held."""
        return Clipped()

    def fold(self, acc: Clipped, contribution: base.Contribution) -> Clipped:
        """Add the clipped update to the sums, or hold the update."""
        if self.sum_only:
            return Clipped(_added(acc.total, contribution, _norm(contribution), self.bound), acc.held)
        return Clipped(acc.total, acc.held.add(contribution))

    def finish(self, acc: Clipped) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The mean of the clipped updates; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
        """
        total = acc.total
        if not self.sum_only:
            updates = acc.held.ordered("clipped-mean")
            norms = [_norm(one) for one in updates]
            bound = float(np.median(norms))
            for one, norm in zip(updates, norms, strict=True):
                total = _added(total, one, norm, bound)
        return state.AdapterState(total.mean()), {}

    def for_site(self, adapter: state.AdapterState, manifest: state.Manifest) -> state.AdapterState:
        """See :func:`base.in_one_rank`."""
        return base.in_one_rank("clipped-mean", adapter, manifest)


def _norm(contribution: base.Contribution) -> float:
    return held.norm(contribution, "clipped-mean")


def _added(total: exact_sum.ExactSum, contribution: base.Contribution, norm: float, bound: float) -> exact_sum.ExactSum:
    """The sums with an update that is within the bound as it is, and another one shortened to it."""
    if norm <= bound:
        return total.add(contribution.weight, contribution.state)
    return total.add(contribution.weight, held.shortened(contribution, "clipped-mean", bound / norm))
