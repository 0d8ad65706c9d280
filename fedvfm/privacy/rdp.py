"""Renyi differential privacy of the Poisson-subsampled Gaussian mechanism. NumPy and SciPy alone: the server uses it.

SciPy is loaded by the first call: whoever trains without a mechanism does not pay for it.

Neighbours differ by one unit that is there or not; sensitivity is 1, so ``sigma`` is the noise multiplier.

Source: Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", arXiv 1908.10530,
section 3.3; composition is the sum (Mironov, "Renyi Differential Privacy", CSF 2017, prop. 1). Held equal to
``opacus.accountants.analysis.rdp`` (Opacus 1.6.0) by tests/privacy/test_accountant.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 65), 80, 96, 128, 192, 256, 512, 1024)
"""Orders that are tried. Opacus's, which end at 63, and larger ones, for much noise and few steps."""

_ENOUGH = -30.0
_TERMS = 1 << 22
_LEAST, _MOST = 1e-3, 1e100
"""Beyond these noise multipliers the series meet the ends of floating point; the bound without sampling still holds."""


def divergence(q: float, sigma: float, orders: Sequence[float] = ORDERS, *, summed: bool = False) -> Floats:
    """The divergence of one step at every order.

    Args:
        q: chance of a unit to be drawn, in [0, 1].
        sigma: noise multiplier, at least 0.
        orders: above 1.
        summed: whether the noise is a sum of discrete Gaussians. Without sampling its divergence is at most that of a
            Gaussian at every order; with it the binomial sum needs no more, and holds for any symmetric noise, at whole
            orders alone. The divergence never falls with the order, so between two of them the upper one's counts.

    Raises:
        ValueError: if a value is outside its range.
    """
    if not 0 <= q <= 1 or not sigma >= 0 or any(not order > 1 for order in orders):
        raise ValueError(f"no subsampled Gaussian: rate {q}, noise multiplier {sigma}, orders {list(orders)[:3]}")
    counted = [math.ceil(order) if summed and q < 1 else order for order in orders]
    return np.array([_one(q, sigma, float(order)) for order in counted])


@functools.lru_cache(maxsize=20_000)
def _one(q: float, sigma: float, order: float) -> float:
    """Never less than it is: what is no number is that of the mechanism without sampling, which is never less."""
    if q == 0 or math.isinf(sigma):
        return 0.0
    square = sigma * sigma
    if square == 0:  # no noise, or so little that its square is none
        return math.inf
    whole = order / (2 * square)
    if q == 1 or not _LEAST <= sigma <= _MOST:
        return whole
    log_a = _whole(q, sigma, int(order)) if order.is_integer() else _fractional(q, sigma, order)
    found = log_a / (order - 1)
    return max(0.0, found) if math.isfinite(found) else whole


def _log_binomial(order: float, i: Floats) -> Floats:
    """Of the absolute value; the sign is that of Gamma(order - i + 1)."""
    from scipy import special

    found: Floats = special.gammaln(order + 1) - special.gammaln(i + 1) - special.gammaln(order - i + 1)
    return found


def _whole(q: float, sigma: float, order: int) -> float:
    """Log A at a whole order: a binomial sum."""
    from scipy import special

    i = np.arange(order + 1, dtype=np.float64)
    terms = _log_binomial(order, i) + i * math.log(q) + (order - i) * math.log1p(-q) + (i * i - i) / (2 * sigma**2)
    return float(special.logsumexp(terms))


def _fractional(q: float, sigma: float, order: float) -> float:
    """Log A at a fractional order: two series, on either side of z0, whose terms shrink like a power of i."""
    from scipy import special

    z0, number = sigma**2 * math.log(1 / q - 1) + 0.5, 256
    while True:
        i = np.arange(number, dtype=np.float64)
        j, log_c, sign = order - i, _log_binomial(order, i), special.gammasgn(order - i + 1)
        below = special.log_ndtr((z0 - i) / sigma)  # log(erfc(x) / 2) = log_ndtr(-x sqrt(2))
        above = special.log_ndtr((j - z0) / sigma)
        first = log_c + i * math.log(q) + j * math.log1p(-q) + (i * i - i) / (2 * sigma**2) + below
        second = log_c + j * math.log(q) + i * math.log1p(-q) + (j * j - j) / (2 * sigma**2) + above
        if max(first[-1], second[-1]) < _ENOUGH:
            return float(special.logsumexp(np.concatenate([first, second]), b=np.concatenate([sign, sign])))
        if number >= _TERMS:
            return math.inf  # no number at this order
        number *= 4


def epsilon(divergences: Floats, delta: float, orders: Sequence[float] = ORDERS) -> tuple[float, float]:
    """The smallest epsilon at ``delta`` that summed divergences prove, and the order that proves it.

    Source: Balle et al., "Hypothesis Testing Interpretations and Renyi Differential Privacy", AISTATS 2020, theorem 21.

    Raises:
        ValueError: if delta is not in (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} is not between 0 and 1")
    alpha = np.asarray(orders, dtype=np.float64)
    found = divergences - (math.log(delta) + np.log(alpha)) / (alpha - 1) + np.log1p(-1 / alpha)
    found = np.where(np.isfinite(found), found, np.inf)  # what is no number proves nothing
    best = int(np.argmin(found))
    return max(0.0, float(found[best])), float(alpha[best])
