"""stack: every round's mean product moves into the residual, and the factors begin anew (FLoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm import seeding
from fedvfm.aggregators import paired_sums, residual
from fedvfm.state import state

_ROUND = "stack.round"


@dataclass(frozen=True)
class Stack(paired_sums.Shortening):
    """The residual D C of every pair takes ``mean(B A)``; A is drawn anew and B is zero.

    The sites' factors one above the other, ``[p_1 B_1 ... p_K B_K] [A_1; ...; A_K]``, are the mean product. In the
    paper they go into the backbone; here into the residual, as under ``residual``, whose bound and costs this rule has.
    Every round has r fresh directions; the optimiser begins anew with them, so a round should have many steps.

    Shapes: as in :class:`fedvfm.aggregators.residual.Residual`.
    Source: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
        NeurIPS 2024, section 3.2; one rank at all sites.
    """

    name: ClassVar[str] = "stack"
    refactors: ClassVar[bool] = True
    keeps_residual: ClassVar[bool] = True

    def finish(self, acc: paired_sums.Sums) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The residuals with the mean products, fresh factors, and the number of rounds so far.

        Raises:
            EmptyCohort: if no update was admitted.
            ProtocolError: if the adapter has no residual.
        """
        acc = self.settled(acc)
        arrays, total = acc.arrays.mean(), float(acc.arrays.weight)
        number = int(acc.kept[_ROUND][0]) + 1 if _ROUND in acc.kept else 1
        for pair, (a, b) in acc.manifest.pairs().items():
            arrays |= residual.moved_on(self.name, arrays, pair, acc.pairs[pair], total)
            bound = a.shape[1] ** -0.5  # as a first A is drawn
            fresh = seeding.stream(0, "stack", pair, number).uniform(-bound, bound, a.shape)
            arrays[a.name], arrays[b.name] = fresh.astype(np.float32), np.zeros(b.shape, np.float32)
        return state.AdapterState(arrays), {_ROUND: np.array([number], np.float32)}
