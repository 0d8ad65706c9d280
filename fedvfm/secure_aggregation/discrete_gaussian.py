"""Discrete Gaussian noise: an exact sampler, and what the sum of several sites' parts of it proves.

The sampler compares whole numbers alone. No logarithm, exponential or root of a floating point number is taken, so no
low bit tells what the noise was added to (Mironov, "On significance of the least significant bits for differential
privacy", CCS 2012). How long it takes depends on what it draws, not on what it is added to.

Source: Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020 (definition 1;
    algorithm 1 for a chance of exp(-x)); Karney, "Sampling Exactly from the Normal Distribution", ACM TOMS 42(1), 2016,
    section 5 (the order of draws); Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated
    Learning with Secure Aggregation", ICML 2021, theorem 1 and proposition 14.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

Whole = NDArray[np.int64]
Words = NDArray[np.unsignedinteger[Any]]
Marks = NDArray[np.bool_]

LEAST_SIGMA = 16
"""Below it the correction for summing discrete Gaussians is felt; theorem 1 itself needs 1/2."""
MOST_SIGMA = 1 << 56
KEY_SIZE = 32
_CHUNK = 1 << 16
_SMALLEST = 1e-300
_UP = 1 + 1e-9  # more than the rounding of a dozen products and roots


def drawn(key: bytes, sigma: int, size: int) -> Whole:
    """Independent numbers with a chance proportional to exp(-x^2 / (2 sigma^2)) for each whole x.

    Args:
        key: 32 bytes that nobody else knows; the same key gives the same numbers.
        sigma: the parameter, a whole number; the standard deviation is at most that, and from 16 on equal to 1e-15.
        size: how many.

    Shapes: returns (size,).

    Raises:
        ValueError: if ``sigma`` is out of bounds.
    """
    if not 1 <= sigma <= MOST_SIGMA:
        raise ValueError(f"sigma {sigma} is not between 1 and {MOST_SIGMA}")
    stream, after = _Stream(key), np.empty(size, np.int64)
    for start in range(0, size, _CHUNK):
        part = after[start : start + _CHUNK]
        missing = np.arange(len(part))
        while len(missing):
            values, right = _tries(stream, sigma, len(missing))
            part[missing[right]] = values[right]
            missing = missing[~right]
    return after


def spent(sigma: int, sites: int, sensitivity: float, numbers: int) -> float:
    """The epsilon with which the sum of so many sites' parts is (epsilon^2 / 2)-concentrated differentially private.

    A sum of discrete Gaussians is none itself; ``tau`` bounds how far off it is. At every order a this is at most
    ``a epsilon^2 / 2`` of Renyi divergence: what a Gaussian of noise multiplier ``1 / epsilon`` has.

    Args:
        sigma: of each part, in units of the whole numbers.
        sites: whose parts are certain to be in the sum.
        sensitivity: L2 norm of what one unit changes, in the same units, rounding included.
        numbers: of the vector.

    Source: Kairouz, Liu, Steinke 2021, theorem 1 and proposition 14, the third bound:
        ``sensitivity / (sqrt(n) sigma) + tau sqrt(d)``, ``tau = 10 sum_{k<n} exp(-2 pi^2 sigma^2 k / (k + 1))``.
    """
    tau = 10 * sum(max(math.exp(-2 * (math.pi * sigma) ** 2 * k / (k + 1)), _SMALLEST) for k in range(1, sites))
    return (sensitivity / (math.sqrt(sites) * sigma) + tau * math.sqrt(numbers)) * _UP


def least_sigma(multiplier: float, sensitivity: float, sites: int, numbers: int) -> int:
    """The least parameter of a part with which the sum keeps what a Gaussian of this noise multiplier does.

    Raises:
        ValueError: if that is more than can be drawn.
    """
    sigma = max(LEAST_SIGMA, math.ceil(multiplier * sensitivity / math.sqrt(sites)))
    while spent(sigma, sites, sensitivity, numbers) * multiplier > 1:
        sigma += max(1, sigma >> 20)
    if sigma > MOST_SIGMA:
        raise ValueError(f"sigma {sigma} is over {MOST_SIGMA}")
    return sigma


class _Stream:
    """Uniform numbers from ChaCha20."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_SIZE:
            raise ValueError(f"a key of {KEY_SIZE} bytes is needed")
        self._cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def below(self, limit: int, count: int) -> Words:
        """Each of 0 to ``limit - 1`` as likely; by rejection, so exactly."""
        bits = (limit - 1).bit_length()
        number = 1 if bits <= 8 else 8
        form = np.dtype(f"<u{number}")
        mask = form.type((1 << bits) - 1)

        def words(some: int) -> Words:
            numbers: Words = np.frombuffer(self._cipher.update(bytes(number * some)), dtype=form) & mask
            return numbers

        uniform = words(count)
        over = np.flatnonzero(uniform >= limit)
        while len(over):
            uniform[over] = words(len(over))
            over = over[uniform[over] >= limit]
        return uniform

    def rarely(self, limit: int, count: int) -> Marks:
        """True with a chance of 1 in ``limit``."""
        return np.ones(count, np.bool_) if limit == 1 else self.below(limit, count) == 0


def _exp_minus(count: int, goes_on: Callable[[NDArray[np.intp], int], Marks]) -> Marks:
    """True with a chance of exp(-x) for each x in [0, 1]; ``goes_on(which, k)`` is true with a chance of x / k.

    Source: Canonne, Kamath, Steinke 2020, algorithm 1.
    """
    right = np.zeros(count, np.bool_)
    running, k = np.arange(count), 1
    while len(running):
        more = goes_on(running, k)
        right[running[~more]] = k % 2 == 1
        running, k = running[more], k + 1
    return right


def _half(stream: _Stream, count: int) -> Marks:
    """True with a chance of exp(-1/2)."""
    return _exp_minus(count, lambda which, k: stream.rarely(2 * k, len(which)))


def _share(stream: _Stream, parts: Words, sigma: int) -> Marks:
    """True with a chance of exp(-part / sigma) for each part below sigma."""

    def goes_on(which: NDArray[np.intp], k: int) -> Marks:
        return stream.rarely(k, len(which)) & (stream.below(sigma, len(which)) < parts[which])

    return _exp_minus(len(parts), goes_on)


def _half_square(stream: _Stream, parts: Words, sigma: int) -> Marks:
    """True with a chance of exp(-(part / sigma)^2 / 2) for each part below sigma."""

    def goes_on(which: NDArray[np.intp], k: int) -> Marks:
        more = stream.rarely(2 * k, len(which))
        for _ in range(2):
            more &= stream.below(sigma, len(which)) < parts[which]
        return more

    return _exp_minus(len(parts), goes_on)


def _tries(stream: _Stream, sigma: int, count: int) -> tuple[Whole, Marks]:
    """So many candidates, and which of them count.

    A candidate is ``k sigma + part`` with a chance of exp(-k^2 / 2) for its level k; it counts with a chance of
    exp(-(part / sigma) k - (part / sigma)^2 / 2), which makes exp(-(k + part / sigma)^2 / 2) of both.
    """
    level, right = _levels(stream, count)
    part = stream.below(sigma, count)
    for k in range(1, int(level.max(initial=0)) + 1):
        which = np.flatnonzero(right & (level >= k))
        right[which] = _share(stream, part[which], sigma)
    which = np.flatnonzero(right)
    right[which] = _half_square(stream, part[which], sigma)
    values = level * sigma + part.astype(np.int64)
    negative = stream.below(2, count) == 1
    right &= ~(negative & (values == 0))  # else nought, which has no sign, would come twice as often
    return np.where(negative, -values, values), right


def _levels(stream: _Stream, count: int) -> tuple[Whole, Marks]:
    """A level each, and whether it counts: together k has a chance proportional to exp(-k^2 / 2)."""
    level = np.zeros(count, np.int64)
    running = np.arange(count)
    while len(running):
        running = running[_half(stream, len(running))]
        level[running] += 1
    right, left = np.ones(count, np.bool_), level * (level - 1)
    running = np.flatnonzero(left > 0)
    while len(running):
        good = _half(stream, len(running))
        right[running[~good]] = False
        running = running[good]
        left[running] -= 1
        running = running[left[running] > 0]
    return level, right
