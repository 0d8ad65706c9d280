"""hetlora: factors of any rank, padded with zeros and averaged by the size of what they change (HetLoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm.aggregators import base, exact_sum, svd
from fedvfm.state import state

LEAST = 1e-6
"""Share of the weight that a pair has whose product is zero, as before the first step."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of the dense arrays, and of the padded factors of every pair."""

    manifest: state.Manifest
    dense: exact_sum.ExactSum
    pairs: dict[str, exact_sum.ExactSum]


@dataclass(frozen=True)
class HetLora:
    """Factors are padded with zeros to the global rank and averaged with weights ``w_k || s_k B_k A_k ||``.

    Every pair has weights of its own. A site gets the first r_k columns of B and rows of A. Sites of small rank thin
    out the directions beyond it, and the mean of factors is inexact as under ``mean``: ``svd`` is exact and serves the
    same sites; this rule is cheaper, and there to be compared. The paper's pruning of ranks at the sites is not done.

    Shapes: A (r, d_in), B (d_out, r); ranks may differ between sites, the result has the global manifest's.
    Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024,
        section 3.
    """

    sum_only: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True
    any_order: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    robust: ClassVar[bool] = False
    least: ClassVar[int] = 1

    def init(self, manifest: state.Manifest, kept: Mapping[str, state.Array] | None = None) -> Sums:
        """Empty sums."""
        return Sums(manifest, exact_sum.ExactSum(), {pair: exact_sum.ExactSum() for pair in manifest.pairs()})

    def fold(self, acc: Sums, contribution: base.Contribution) -> Sums:
        """Add the padded factors of every pair, brought to the global scale, and the dense arrays."""
        pairs, ours = dict(acc.pairs), acc.manifest.pairs()
        for pair, (a, b) in contribution.manifest.pairs().items():
            root, rank = np.sqrt(a.scale / ours[pair][0].scale), ours[pair][0].shape[0]
            left, right = (contribution.state[spec.name].astype(np.float64) for spec in (b, a))
            size = max(a.scale * _norm(left, right), LEAST)
            padded = {b.name: root * svd.resized(left, rank, 1), a.name: root * svd.resized(right, rank, 0)}
            pairs[pair] = pairs[pair].add(contribution.weight * size, padded)
        dense = {spec.name: contribution.state[spec.name] for spec in contribution.manifest if spec.role == "dense"}
        return Sums(acc.manifest, acc.dense.add(contribution.weight, dense), pairs)

    def finish(self, acc: Sums) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The means; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
        """
        arrays = acc.dense.mean()
        for own in acc.pairs.values():
            arrays |= own.mean()
        return state.AdapterState(arrays), {}

    def for_site(self, adapter: state.AdapterState, manifest: state.Manifest) -> state.AdapterState:
        """The adapter with each pair cut to the site's rank and brought to its scale."""
        return svd.at_rank(adapter, manifest)


def _norm(left: svd.Matrix, right: svd.Matrix) -> float:
    """Frobenius norm of their product, by Gram matrices."""
    return float(np.sqrt(max(np.sum((left.T @ left) * (right @ right.T)), 0.0)))
