"""svd: the best rank-r approximation of the mean of the products B A (FlexLoRA), for any mix of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors, seeding, state
from fedvfm.server.aggregators import base

Matrix = NDArray[np.float64]

LEAST = 1e-12
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True, slots=True)
class Factors:
    """Stacked factors of every pair and the sums of the dense arrays."""

    manifest: state.Manifest
    dense: base.Sums
    left: dict[str, list[Matrix]]
    right: dict[str, list[Matrix]]


@dataclass(frozen=True)
class Svd:
    """Mean of the products scale B A, re-factored to the global rank.

    The m x n product is never formed: with the factors stacked, both stacks are QR-decomposed and only the small
    (sum of ranks)-sized core is decomposed. Singular values are split evenly between the factors, scales are those of
    the manifests. Dense arrays are averaged.

    Shapes: A (r, d_in), B (d_out, r); ranks may differ between sites, the result has the global manifest's.
    Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
        NeurIPS 2024 (FlexLoRA), eq. (3) and (4).
    """

    sum_only: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = True

    def init(self, manifest: state.Manifest, kept: Mapping[str, state.Array] | None = None) -> Factors:
        """Empty stacks."""
        return Factors(manifest, base.Sums(0.0, {}), {}, {})

    def fold(self, acc: Factors, contribution: base.Contribution) -> Factors:
        """Stack sqrt(weight scale) B and sqrt(weight scale) A of every pair."""
        left, right = dict(acc.left), dict(acc.right)
        for pair, (a, b) in contribution.manifest.pairs().items():
            root = np.sqrt(contribution.weight * a.scale)
            left[pair] = [*left.get(pair, []), root * contribution.state[b.name].astype(np.float64)]
            right[pair] = [*right.get(pair, []), root * contribution.state[a.name].astype(np.float64)]
        dense = [spec.name for spec in contribution.manifest if spec.role == "dense"]
        return Factors(acc.manifest, acc.dense.add(contribution, dense), left, right)

    def finish(self, acc: Factors) -> tuple[state.AdapterState, dict[str, state.Array]]:
        """Decompose every pair to the global rank; this rule keeps no state.

        Raises:
            EmptyCohort: if no update was admitted.
        """
        arrays = acc.dense.mean()
        for pair, (a, b) in acc.manifest.pairs().items():
            scale = a.scale * acc.dense.weight
            left, right = _split(acc.left[pair], acc.right[pair], a.shape[0], scale)
            arrays[b.name], arrays[a.name] = left, _revive(left, right, pair)
        return state.AdapterState(arrays), {}

    def for_site(self, adapter: state.AdapterState, manifest: state.Manifest) -> state.AdapterState:
        """The adapter with each pair cut to (or padded with zeros to) the site's rank, rescaled to the site's scale.

        ``finish`` leaves the singular directions in order, so the first r_k columns are the best rank r_k.
        """
        arrays = dict(adapter)
        for a, b in manifest.pairs().values():
            rank = adapter[a.name].shape[0]
            # The product must stay scale B A although the site multiplies by its own scale.
            ratio = np.sqrt(self._scale_of(rank, a) / a.scale)
            arrays[a.name] = _resize(adapter[a.name], a.shape[0], 0) * np.float32(ratio)
            arrays[b.name] = _resize(adapter[b.name], a.shape[0], 1) * np.float32(ratio)
        return state.AdapterState({spec.name: np.asarray(arrays[spec.name], dtype=np.float32) for spec in manifest})

    @staticmethod
    def _scale_of(rank: int, site: state.ArraySpec) -> float:
        """Scale of the global pair: alpha / rank with the site's alpha = scale x rank, the same for all."""
        return site.scale * site.shape[0] / rank


def _split(left: Sequence[Matrix], right: Sequence[Matrix], rank: int, scale: float) -> tuple[state.Array, state.Array]:
    """Best rank-``rank`` B, A with scale B A = sum of left_k right_k (left (m, r_k), right (r_k, n))."""
    q_left, r_left = np.linalg.qr(np.concatenate(left, axis=1))
    q_right, r_right = np.linalg.qr(np.concatenate(right, axis=0).T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    u, vt = _signs(u, vt)
    root = np.sqrt(np.where(s > LEAST * s[0], s, 0.0)[:rank] / scale)
    b = (q_left @ u[:, : len(root)]) * root
    a = root[:, None] * (vt[: len(root)] @ q_right.T)
    return _resize(b.astype(np.float32), rank, 1), _resize(a.astype(np.float32), rank, 0)


def _revive(b: state.Array, a: state.Array, pair: str) -> state.Array:
    """Rows of A whose column of B is zero start afresh, drawn as a first A is, but by the pair's name alone.

    Where the sites span fewer directions than the global rank both factors would be zero, and so their gradients for
    ever. The product does not change.
    """
    fresh = seeding.stream(0, "revive", pair).uniform(-1.0, 1.0, a.shape) / np.sqrt(a.shape[1])
    alive = np.count_nonzero(b, axis=0, keepdims=True).T > 0
    return np.where(alive, a, fresh).astype(np.float32)


def _signs(u: Matrix, vt: Matrix) -> tuple[Matrix, Matrix]:
    """Fix the sign of each singular pair, so that equal inputs give equal bytes."""
    pivot = np.abs(u).argmax(axis=0)
    sign = np.where(u[pivot, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    rows = min(len(sign), len(vt))
    flipped = vt.copy()
    flipped[:rows] *= sign[:rows, None]
    return u * sign, flipped


def _resize(array: NDArray[Any], rank: int, axis: int) -> NDArray[Any]:
    """Cut the rank axis to ``rank``, or pad it with zeros."""
    if array.shape[axis] >= rank:
        return array[:rank] if axis == 0 else array[:, :rank]
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, rank - array.shape[axis])
    return np.pad(array, missing)


def factor_error(contributions: Sequence[base.Contribution]) -> float | None:
    """How far averaging the factors apart is from the mean product, relative, over all pairs.

    ``|| mean(B) mean(A) - mean(B A) ||_F / || mean(B A) ||_F`` with the scales in, computed in the factors' small
    spaces. Below about 0.01 no exact rule can help.

    Returns: None where there is no pair, where the mean product is zero, or where ranks differ: factors of different
    shapes have no mean; see :func:`aggregate_error`.
    Raises: EmptyCohort: without any contribution.
    """
    if not contributions:
        raise errors.EmptyCohort("no update was admitted, so there is no factor-averaging error")
    if len({contribution.manifest.fingerprint for contribution in contributions}) > 1:
        return None
    total = sum(contribution.weight for contribution in contributions)
    weights = [contribution.weight / total for contribution in contributions]
    difference = whole = 0.0
    for a, b in contributions[0].manifest.pairs().values():
        left = np.stack([contribution.state[b.name].astype(np.float64) for contribution in contributions])
        right = np.stack([contribution.state[a.name].astype(np.float64) for contribution in contributions])
        own_difference, own_whole = _squares(left, right, np.asarray(weights)[:, None, None])
        # One factor is the same everywhere, as where the other one trains alone: then nothing but rounding is lost.
        own_difference = 0.0 if _same(left) or _same(right) else own_difference
        difference, whole = difference + a.scale**2 * own_difference, whole + a.scale**2 * own_whole
    return float(np.sqrt(difference / whole)) if whole > 0 else None


def aggregate_error(
    contributions: Sequence[base.Contribution], aggregate: state.AdapterState, manifest: state.Manifest
) -> float | None:
    """How far what a rule made is from the mean product, relative, over all pairs; ranks may differ.

    ``|| scale B A - mean(scale_k B_k A_k) ||_F / || mean(scale_k B_k A_k) ||_F``. Under the rule svd this is what the
    cut to the global rank loses. Computed by Gram matrices, so values below about 1e-7 are rounding.

    Args:
        contributions: what the rule was given.
        aggregate: what it made of them.
        manifest: of the aggregate.

    Returns: None where there is no pair or the mean product is zero.
    """
    total = sum(contribution.weight for contribution in contributions)
    difference = whole = 0.0
    for pair, (a, b) in manifest.pairs().items():
        left, right = [], []
        for one in contributions:
            own_a, own_b = one.manifest.pairs()[pair]
            left.append(one.weight / total * own_a.scale * one.state[own_b.name].astype(np.float64))
            right.append(one.state[own_a.name].astype(np.float64))
        whole += _square(np.concatenate(left, axis=1), np.concatenate(right))
        left.append(-a.scale * aggregate[b.name].astype(np.float64))
        right.append(aggregate[a.name].astype(np.float64))
        difference += _square(np.concatenate(left, axis=1), np.concatenate(right))
    return float(np.sqrt(difference / whole)) if whole > 0 else None


def _squares(left: Matrix, right: Matrix, share: Matrix) -> tuple[float, float]:
    """Squared Frobenius norms of mean(B A) - mean(B) mean(A), and of mean(B A).

    Shapes: left (K, m, r), right (K, r, n), share (K, 1, 1).
    """
    mean_left, mean_right = (share * left).sum(0), (share * right).sum(0)
    _, rows, rank = left.shape
    columns = right.shape[2]
    if len(left) * rank * (rows + columns) > rows * columns:
        # Many sites: their stacked factors are wider than the product, which is then the cheaper way.
        product = _tall(share * left) @ _wide(right)
        return float(np.square(product - mean_left @ mean_right).sum()), float(np.square(product).sum())
    # mean(B A) - mean(B) mean(A) = sum p (B - mean B)(A - mean A): no cancellation in this form.
    return _gram_square(share * (left - mean_left), right - mean_right), _gram_square(share * left, right)


def _same(factors: Matrix) -> bool:
    """Whether all sites hold the same factor. Shapes: factors (K, ., .)."""
    return bool((factors == factors[:1]).all())


def _tall(left: Matrix) -> Matrix:
    return left.transpose(1, 0, 2).reshape(left.shape[1], -1)


def _wide(right: Matrix) -> Matrix:
    return right.reshape(-1, right.shape[2])


def _gram_square(left: Matrix, right: Matrix) -> float:
    """Squared Frobenius norm of sum_k left_k right_k by Gram matrices, without forming the product.

    Shapes: left (K, m, r), right (K, r, n).
    """
    return _square(_tall(left), _wide(right))


def _square(tall: Matrix, wide: Matrix) -> float:
    """Squared Frobenius norm of ``tall @ wide``. Shapes: tall (m, R), wide (R, n)."""
    return max(float(np.sum((tall.T @ tall) * (wide @ wide.T))), 0.0)
