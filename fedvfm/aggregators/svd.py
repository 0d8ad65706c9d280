"""svd: the best rank-r approximation of the mean of the products B A (FlexLoRA), for any mix of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedvfm import seeding
from fedvfm.aggregators import base, exact_sum, products
from fedvfm.state import state

Matrix = products.Matrix

LEAST = 1e-12
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Sums of the products of every pair, and of the dense arrays."""

    manifest: state.Manifest
    dense: exact_sum.ExactSum
    pairs: dict[str, products.Product]


@dataclass(frozen=True)
class Svd:
    """Mean of the products scale B A, re-factored to the global rank.

    While all factors of a pair together are smaller than its m x n product, they are stacked, both stacks are
    QR-decomposed and only the small (sum of ranks)-sized core is decomposed. From there on the products are summed:
    memory no longer grows with the number of sites, and the singular vectors are found from the smaller Gram matrix of
    the sum, which is exact to about 1e-8 of the largest singular value. Singular values are split evenly between the
    factors, scales are those of the manifests. Dense arrays are averaged.

    Shapes: A (r, d_in), B (d_out, r); ranks may differ between sites, the result has the global manifest's.
    Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
        NeurIPS 2024 (FlexLoRA), eq. (3) and (4).
    """

    sum_only: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True
    any_order: ClassVar[bool] = False
    refactors: ClassVar[bool] = True
    robust: ClassVar[bool] = False
    least: ClassVar[int] = 1

    def init(self, manifest: state.Manifest, kept: Mapping[str, state.Array] | None = None) -> Factors:
        """Empty sums."""
        return Factors(manifest, exact_sum.ExactSum(), {pair: products.Product() for pair in manifest.pairs()})

    def fold(self, acc: Factors, contribution: base.Contribution) -> Factors:
        """Add weight scale B A of every pair, and the dense arrays."""
        pairs = dict(acc.pairs)
        for pair, (a, b) in contribution.manifest.pairs().items():
            factors = contribution.state[b.name], contribution.state[a.name]
            pairs[pair] = pairs[pair].add(contribution.weight * a.scale, *factors)
        dense = {spec.name: contribution.state[spec.name] for spec in contribution.manifest if spec.role == "dense"}
        return Factors(acc.manifest, acc.dense.add(contribution.weight, dense), pairs)

    def finish(self, acc: Factors) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """Decompose every pair to the global rank; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
        """
        arrays = acc.dense.mean()
        for pair, (a, b) in acc.manifest.pairs().items():
            scale = a.scale * float(acc.dense.weight)
            left, right = split(acc.pairs[pair], a.shape[0], scale)
            arrays[b.name], arrays[a.name] = left, _revive(left, right, pair)
        return state.AdapterState(arrays), {}

    def for_site(self, adapter: state.AdapterState, manifest: state.Manifest) -> state.AdapterState:
        """``finish`` leaves the singular directions in order, so the first r_k columns are the best rank r_k."""
        return at_rank(adapter, manifest)


def at_rank(adapter: state.AdapterState, manifest: state.Manifest) -> state.AdapterState:
    """The adapter with each pair cut to (or padded with zeros to) the site's rank, rescaled to the site's scale."""
    arrays = dict(adapter)
    for a, b in manifest.pairs().values():
        rank = adapter[a.name].shape[0]
        # The product must stay scale B A although the site multiplies by its own scale.
        ratio = np.sqrt(_scale_of(rank, a) / a.scale)
        arrays[a.name] = resized(adapter[a.name], a.shape[0], 0) * np.float32(ratio)
        arrays[b.name] = resized(adapter[b.name], a.shape[0], 1) * np.float32(ratio)
    return state.AdapterState({spec.name: np.asarray(arrays[spec.name], dtype=np.float32) for spec in manifest})


def _scale_of(rank: int, site: state.ArraySpec) -> float:
    """Scale of the global pair: alpha / rank with the site's alpha = scale x rank, the same for all."""
    return site.scale * site.shape[0] / rank


def split(product: products.Product, rank: int, scale: float) -> tuple[state.Array, state.Array]:
    """Best rank-``rank`` B, A with scale B A = the product."""
    u, s, vt = product.decomposed(rank)
    u, vt = signs(u, vt)
    root = np.sqrt(np.where(s > LEAST * s[0], s, 0.0) / scale)
    b, a = u * root, root[:, None] * vt
    return resized(b.astype(np.float32), rank, 1), resized(a.astype(np.float32), rank, 0)


def _revive(b: state.Array, a: state.Array, pair: str) -> state.Array:
    """Rows of A whose column of B is zero start afresh, drawn as a first A is, but by the pair's name alone.

    Where the sites span fewer directions than the global rank both factors would be zero, and so their gradients for
    ever. The product does not change.
    """
    fresh = seeding.stream(0, "revive", pair).uniform(-1.0, 1.0, a.shape) / np.sqrt(a.shape[1])
    alive = np.count_nonzero(b, axis=0, keepdims=True).T > 0
    return np.where(alive, a, fresh).astype(np.float32)


def signs(u: Matrix, vt: Matrix) -> tuple[Matrix, Matrix]:
    """Fix the sign of each singular pair, so that equal inputs give equal bytes."""
    pivot = np.abs(u).argmax(axis=0)
    sign = np.where(u[pivot, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    return u * sign, vt * sign[:, None]


def resized(array: NDArray[Any], rank: int, axis: int) -> NDArray[Any]:
    """Cut the rank axis to ``rank``, or pad it with zeros."""
    if array.shape[axis] >= rank:
        return array[:rank] if axis == 0 else array[:, :rank]
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, rank - array.shape[axis])
    return np.pad(array, missing)
