"""Where the noise and the draws of privacy come from: the operating system, or a seed in a simulation alone.

Noise from a seed is no noise to whoever knows the seed, so a site that holds patients never takes it from one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedvfm import seeding

Numbers = NDArray[np.float64]
Size = int | Sequence[int]

_DRAWS = 4
"""Normal numbers that are summed into one: 2 n with n = 2, as in Opacus' secure mode."""

_BITS = 53
"""Bits of a uniform number: all that a double has."""


class Draws(Protocol):
    """A stream of random numbers."""

    def normal(self, size: Size) -> Numbers:
        """Independent standard normal numbers."""
        ...

    def uniform(self, size: Size) -> Numbers:
        """Independent numbers, uniform in [0, 1)."""
        ...


class System:
    """Every number from the operating system's entropy; nothing is seeded, kept, or drawn twice.

    One normal number from one pair of uniform ones has gaps that show which value it was added to. Each of ours is the
    sum of four, so that no value of the sum tells its parts, and the sum is rounded to float32 after it is added.

    Source: Holohan and Braghin, "Secure Random Sampling in Differential Privacy", ESORICS 2021, section 4 (sum of 2 n
        normal numbers over sqrt(2 n)); the attack is Mironov, "On significance of the least significant bits for
        differential privacy", CCS 2012. Opacus 1.6, ``opacus/optimizers/optimizer.py``, ``_generate_noise`` does so in
        its secure mode.
    """

    def normal(self, size: Size) -> Numbers:
        """See Draws."""
        count = int(np.prod(size))
        total = np.zeros(count)
        for _ in range(_DRAWS):
            total += _normal(count)
        total /= math.sqrt(_DRAWS)
        return total.reshape(_shape(size))

    def uniform(self, size: Size) -> Numbers:
        """See Draws."""
        return _uniform(int(np.prod(size))).reshape(_shape(size))


class Seeded:
    """Numbers from a seed, for a simulation whose engines must agree. Nothing is private with them.

    Args:
        seed: of the run.
        words: what the stream is for: "privacy", the round, the site's name.
    """

    def __init__(self, seed: int, *words: str | int) -> None:
        self._stream = seeding.stream(seed, *words)

    def normal(self, size: Size) -> Numbers:
        """See Draws."""
        return self._stream.standard_normal(_shape(size))

    def uniform(self, size: Size) -> Numbers:
        """See Draws."""
        return self._stream.random(_shape(size))


def _shape(size: Size) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def _uniform(count: int) -> Numbers:
    """Multiples of 2^-53 in [0, 1), each as likely."""
    words = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(64 - _BITS)
    found: Numbers = words.astype(np.float64)
    found *= 2.0**-_BITS
    return found


def _normal(count: int) -> Numbers:
    """By pairs, from two uniform numbers each (Box and Muller, 1958); 1 - u is never 0, where there is no logarithm."""
    half = -(-count // 2)
    radius = np.sqrt(-2.0 * np.log1p(-_uniform(half)))
    angle = 2.0 * np.pi * _uniform(half)
    both: Numbers = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return both[:count]
