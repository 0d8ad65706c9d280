"""fair: the factors are averaged apart, and B is corrected towards the mean of the products (LoRA-FAIR)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm.aggregators import base, exact_sum, products
from fedvfm.state import state


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of all arrays, and of the products of every pair."""

    manifest: state.Manifest
    arrays: exact_sum.ExactSum
    pairs: dict[str, products.Product]


@dataclass(frozen=True)
class Fair:
    """mean A and ``mean B + dB``, ``dB = (W - mB mA) mA^T (mA mA^T + l I)^-1`` with W the mean of the products B A.

    The ridge solution of ``min || W - (mB + dB) mA ||^2 + l ||dB||^2``: the product comes nearer to the mean product
    than that of the mean factors, and A and B stay near those that the sites trained. What lies outside the rows of
    mean A is lost. The product W is never formed while its stacked factors are smaller. Dense arrays are averaged.

    Shapes: A (r, d_in), B (d_out, r), one rank at all sites.

    Attributes:
        ridge: l as a share of the mean diagonal of mA mA^T.

    Source: Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", ICCV
        2025, eq. (6) and (7), with the ridge in place of its cosine term.
    """

    ridge: float = 0.01

    sum_only: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False
    any_order: ClassVar[bool] = False
    refactors: ClassVar[bool] = False
    joins_factors: ClassVar[bool] = True
    robust: ClassVar[bool] = False
    least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        base.check_positive("ridge", self.ridge)

    def init(self, manifest: state.Manifest, kept: Mapping[str, state.Array] | None = None) -> Sums:
        """Empty sums."""
        return Sums(manifest, exact_sum.ExactSum(), {pair: products.Product() for pair in manifest.pairs()})

    def fold(self, acc: Sums, contribution: base.Contribution) -> Sums:
        """Add the weighted arrays, and the weighted product of every pair."""
        pairs = {
            pair: acc.pairs[pair].add(contribution.weight, contribution.state[b.name], contribution.state[a.name])
            for pair, (a, b) in contribution.manifest.pairs().items()
        }
        return Sums(acc.manifest, acc.arrays.add(contribution.weight, contribution.state), pairs)

    def finish(self, acc: Sums) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """The mean with every B corrected; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
        """
        arrays, total = acc.arrays.mean(), float(acc.arrays.weight)
        for pair, (a, b) in acc.manifest.pairs().items():
            mean_a, mean_b = arrays[a.name].astype(np.float64), arrays[b.name].astype(np.float64)
            missing = acc.pairs[pair].times(mean_a.T) / total - mean_b @ (mean_a @ mean_a.T)
            arrays[b.name] = np.asarray(mean_b + self._correction(missing, mean_a), dtype=np.float32)
        return state.AdapterState(arrays), {}

    def _correction(self, missing: products.Matrix, a: products.Matrix) -> products.Matrix:
        """dB; zero where A is."""
        gram = a @ a.T
        level = self.ridge * float(np.trace(gram)) / len(gram)
        if level == 0.0:
            return np.zeros_like(missing)
        found: products.Matrix = np.asarray(np.linalg.solve(gram + level * np.eye(len(gram)), missing.T).T, np.float64)
        return found

    def for_site(self, adapter: state.AdapterState, manifest: state.Manifest) -> state.AdapterState:
        """See :func:`base.in_one_rank`."""
        return base.in_one_rank("fair", adapter, manifest)
