"""residual: factors are averaged, and what that misses of the mean product is kept beside them (FedEx-LoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm import errors
from fedvfm.aggregators import paired_sums, products, svd
from fedvfm.state import factors, state

DUST = 2.0**-22
"""Singular values below this share of the size of what was averaged are rounding of float32."""


@dataclass(frozen=True)
class Residual(paired_sums.Shortening):
    """mean A, mean B, and ``mean(B A) - mean(B) mean(A)`` is added to the residual D C of the pair.

    A layer computes ``W + s (B A + D C)``. In the paper the residual goes into W, which here no rule may change: sites
    have approved the backbone by its hash. So it is a further pair of arrays of a bounded rank
    (``recipe.adapter.options.residual``) that goes down with the adapter, and that no site trains or sends. Over the
    rounds it grows by up to (K - 1) r directions a round of K sites; it is exact while its rank bears them, and the
    best approximation of that rank after that. What it loses stands in the journal (``aggregate_error``).

    Shapes: A (r, d_in), B (d_out, r), C (rank of the residual, d_in), D (d_out, rank of the residual).
    Source: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
        Models", ACL 2025, eq. (9) to (14), with the truncated SVD of its section on communication.
    """

    name: ClassVar[str] = "residual"
    refactors: ClassVar[bool] = True
    keeps_residual: ClassVar[bool] = True
    averages_factors: ClassVar[bool] = True

    def finish(self, acc: paired_sums.Sums) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The mean with every residual moved on; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
            ProtocolError: if the adapter has no residual.
        """
        acc = self.settled(acc)
        arrays, total = acc.arrays.mean(), float(acc.arrays.weight)
        for pair, (a, b) in acc.manifest.pairs().items():
            size = float(np.linalg.norm(arrays[a.name])) * float(np.linalg.norm(arrays[b.name]))
            missing = acc.pairs[pair].add(total, -arrays[b.name], arrays[a.name])
            arrays |= moved_on(self.name, arrays, pair, missing, total, size)
        return state.AdapterState(arrays), {}


def moved_on(
    rule: str, arrays: dict[str, state.Array], pair: str, missing: products.Product, total: float, size: float = 0.0
) -> dict[str, state.Array]:
    """The residual of a pair with ``missing / total`` added, cut to its rank; singular values are split evenly.

    Args:
        rule: its name, for errors.
        arrays: with the residual as it is.
        pair: which one.
        missing: what is added, times the sum of the weights.
        total: the sum of the weights.
        size: of what ``missing`` is a difference of: what is rounding beside it is zero.

    Raises:
        ProtocolError: if the adapter has no residual.
    """
    down, up = factors.residual_names(pair)
    if down not in arrays:
        raise errors.ProtocolError(f"rule '{rule}': pair '{pair}' has no residual; set recipe.adapter.options.residual")
    rank = arrays[down].shape[0]
    u, s, vt = missing.add(total, arrays[up], arrays[down]).decomposed(rank)
    u, vt = svd.signs(u, vt)
    s = s / total
    root = np.sqrt(np.where(s > DUST * max(size, s[0]), s, 0.0))
    left, right = (u * root + 0.0).astype(np.float32), (root[:, None] * vt + 0.0).astype(np.float32)  # no zero below 0
    return {up: svd.resized(left, rank, 1), down: svd.resized(right, rank, 0)}
