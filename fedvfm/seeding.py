"""One run seed -> named, independent random streams.

A stream is keyed by words (round, site name, purpose), never by the order of calls, so that the same site draws the
same numbers in every engine and after a resume.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.random import Generator


def key(seed: int, *words: str | int) -> int:
    """A 64-bit number that depends on the seed and on every word, with the types told apart."""
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in (seed, *words))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def stream(seed: int, *words: str | int) -> Generator:
    """An independent NumPy generator for these words."""
    return np.random.Generator(np.random.PCG64(key(seed, *words)))


def torch_seed(seed: int, *words: str | int) -> int:
    """A non-negative 63-bit seed for ``torch.manual_seed``."""
    return key(seed, *words) >> 1
