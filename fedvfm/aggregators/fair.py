"""fair: the factors are averaged apart, and B is corrected towards the mean of the products (LoRA-FAIR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm.aggregators import base, paired_sums, products
from fedvfm.state import state


@dataclass(frozen=True)
class Fair(paired_sums.Rule):
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

    name: ClassVar[str] = "fair"

    def __post_init__(self) -> None:
        base.check_positive("ridge", self.ridge)

    def finish(self, acc: paired_sums.Sums) -> tuple[state.AdapterState, dict[str, state.Array]]:
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
