"""Masks: streams of ChaCha20, read as numbers of Z/2^64. What one site adds another one takes away.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, section 4.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]

KEY_SIZE = 32
CHUNK = 1 << 16
"""Numbers that are made at once: 512 KiB stay in the processor's cache."""
_NONCE = bytes(16)  # a key makes one stream and no other


def apply(numbers: Numbers, key: bytes, sign: int) -> None:
    """Add the stream of ``key`` to the numbers, in place and modulo 2^64; take it away where ``sign`` is negative.

    Shapes: numbers (n,).
    """
    stream = Cipher(algorithms.ChaCha20(key, _NONCE), mode=None).encryptor()
    zeros, room = memoryview(bytes(8 * CHUNK)), bytearray(8 * CHUNK)
    for start in range(0, len(numbers), CHUNK):
        part = numbers[start : start + CHUNK]
        stream.update_into(zeros[: 8 * len(part)], room)
        mask = np.frombuffer(room, dtype="<u8", count=len(part))
        if sign < 0:
            np.subtract(part, mask, out=part)
        else:
            np.add(part, mask, out=part)
