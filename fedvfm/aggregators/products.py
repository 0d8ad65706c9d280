"""Sums of the products of low-rank pairs: as stacked factors while those are smaller, then as one matrix."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import threadpoolctl
from numpy.typing import NDArray

from fedvfm.state import state

Matrix = NDArray[np.float64]

BATCH = 256
"""Sum of ranks that is multiplied at once; so many columns of B and rows of A are held at most beside the matrix."""


@functools.cache
def blas() -> threadpoolctl.ThreadpoolController:
    """Handle on NumPy's and SciPy's BLAS. One thread: quicker for small products, and the same bits on any CPU."""
    import scipy.linalg  # noqa: F401 - loads its own BLAS, which must be there to be found

    return threadpoolctl.ThreadpoolController()


@dataclass(frozen=True, slots=True)
class Product:
    """``sum of factor x B A``; adding makes another one.

    Shapes: B (m, r), A (r, n), r of any size; stacks (m, R) and (R, n), whole (m, n).
    """

    left: tuple[Matrix, ...] = ()
    right: tuple[Matrix, ...] = ()
    whole: Matrix | None = None

    def add(self, factor: float, b: state.Array, a: state.Array) -> Product:
        """With ``factor x B A`` added; both factors are weighted by its root."""
        root = np.sqrt(factor)
        left = (*self.left, root * b.astype(np.float64))
        right = (*self.right, root * a.astype(np.float64))
        rank, rows, columns = sum(one.shape[1] for one in left), b.shape[0], a.shape[1]
        larger = rank * (rows + columns) > rows * columns
        if larger or (self.whole is not None and rank >= BATCH):
            return Product((), (), _sum(left, right, self.whole))
        return Product(left, right, self.whole)

    def matrix(self) -> Matrix:
        """The sum itself."""
        return _sum(self.left, self.right, self.whole)

    def times(self, other: Matrix) -> Matrix:
        """The sum times a matrix (n, k), without forming the sum where it is held as stacks."""
        if self.whole is not None:
            return self.matrix() @ other
        found: Matrix = np.concatenate(self.left, axis=1) @ (np.concatenate(self.right) @ other)
        return found

    def decomposed(self, rank: int) -> tuple[Matrix, Matrix, Matrix]:
        """The first singular vectors and values, at most ``rank``: u (m, k), s (k,) from the largest, vt (k, n)."""
        if self.whole is not None:
            return _of_matrix(self.matrix(), rank)
        q_left, r_left = np.linalg.qr(np.concatenate(self.left, axis=1))
        q_right, r_right = np.linalg.qr(np.concatenate(self.right).T)
        u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
        return q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T


def _sum(left: tuple[Matrix, ...], right: tuple[Matrix, ...], whole: Matrix | None) -> Matrix:
    if not left and whole is not None:
        return whole
    product: Matrix = np.concatenate(left, axis=1) @ np.concatenate(right)
    if whole is not None:
        product += whole
    return product


def _of_matrix(whole: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """By the eigenvectors of the smaller Gram matrix; singular values come from the projected matrix itself."""
    import scipy.linalg

    if whole.shape[0] > whole.shape[1]:
        u, s, vt = _of_matrix(whole.T, rank)
        return vt.T, s, u.T
    side = whole.shape[0]
    last = [max(side - rank, 0), side - 1]
    _, basis = scipy.linalg.eigh(whole @ whole.T, subset_by_index=last, driver="evr", check_finite=False)
    u, s, vt = np.linalg.svd(basis.T @ whole, full_matrices=False)
    return basis @ u, s, vt
