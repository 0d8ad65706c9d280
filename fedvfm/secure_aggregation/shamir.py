"""Shamir's secret sharing over a prime field: any ``threshold`` shares give the secret, fewer say nothing of it.

Own code, about thirty lines of it: the packages at hand share 16 bytes in GF(2^128) (PyCryptodome), and what is shared
here has 32.

Source: Shamir, "How to Share a Secret", Communications of the ACM 22(11), 1979.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

SIZE = 32
"""Bytes of a secret."""
PRIME = 2**256 + 297
"""The smallest prime above every secret."""
SHARE_SIZE = 33
"""Bytes of a share: a number below :data:`PRIME`."""


def split(secret: bytes, threshold: int, points: Sequence[int]) -> dict[int, bytes]:
    """A share for each point.

    Args:
        secret: 32 bytes.
        threshold: how many shares give it back.
        points: different numbers from 1.

    Raises:
        ValueError: if there are fewer points than the threshold, or the secret has another size.
    """
    if len(secret) != SIZE or not 1 <= threshold <= len(points):
        raise ValueError(f"a secret of {SIZE} bytes and a threshold of 1 to {len(points)} are needed")
    _check(points)
    polynomial = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: _value(polynomial, point).to_bytes(SHARE_SIZE) for point in points}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, by Lagrange interpolation at zero from the first ``threshold`` shares in the order of their points.

    Raises:
        ValueError: if there are too few shares, or they are not of one secret of 32 bytes.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares came and {threshold} are needed")
    _check(list(shares))
    points = sorted(shares)[:threshold]
    secret = 0
    for point in points:
        share = int.from_bytes(shares[point])
        if len(shares[point]) != SHARE_SIZE or share >= PRIME:
            raise ValueError("a share is no number of the field")
        above = below = 1
        for other in points:
            if other != point:
                above, below = above * other % PRIME, below * (other - point) % PRIME
        secret = (secret + share * above * pow(below, -1, PRIME)) % PRIME
    if secret >= 2 ** (8 * SIZE):
        raise ValueError("the shares are not of one secret")
    return secret.to_bytes(SIZE)


def _value(polynomial: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * point + coefficient) % PRIME
    return value


def _check(points: Sequence[int]) -> None:
    if len(set(points)) < len(points) or any(not 1 <= point < PRIME for point in points):
        raise ValueError("points are different numbers from 1")
