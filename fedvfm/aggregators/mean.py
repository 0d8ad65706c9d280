"""mean: every array is averaged, low-rank factors A and B apart (FedAvg, FedIT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedvfm.aggregators import base, exact_sum
from fedvfm.state import state


@dataclass(frozen=True)
class Mean:
    """Weighted mean of every array.

    Sums are exact in fixed point (:mod:`fedvfm.aggregators.exact_sum`) and no update is held.
    For low-rank pairs it is inexact: mean(B) mean(A) != mean(B A); the journal carries the error of every round.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
        alg. 1; Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", ICASSP 2024.
    """

    sum_only: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = False
    any_order: ClassVar[bool] = True
    refactors: ClassVar[bool] = False
    robust: ClassVar[bool] = False
    least: ClassVar[int] = 1

    def init(self, manifest: state.Manifest, kept: Mapping[str, state.Array] | None = None) -> exact_sum.ExactSum:
        """Empty sums."""
        return exact_sum.ExactSum()

    def fold(self, acc: exact_sum.ExactSum, contribution: base.Contribution) -> exact_sum.ExactSum:
        """Add weight x array to every sum."""
        return acc.add(contribution.weight, contribution.state)

    def finish(self, acc: exact_sum.ExactSum) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The weighted mean; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
        """
        return state.AdapterState(acc.mean()), {}

    def for_site(self, adapter: state.AdapterState, manifest: state.Manifest) -> state.AdapterState:
        """See :func:`base.in_one_rank`."""
        return base.in_one_rank("mean", adapter, manifest)
