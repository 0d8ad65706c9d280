"""Masks of instances: each object has a number of its own, as QuPath, Cellpose and StarDist write them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))
"""Of a pixel to the right and below; each pair of pixels that touch, at corners too, is met once."""


def apart(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """A mask of 0 and 1 in which objects do not touch: where two do, each loses the pixels at the other.

    Of what falls into pieces so the largest is left. An object of which nothing would be left keeps all of its pixels;
    they touch no other object's that are left, but those of another such object.

    Args:
        numbers: 0 the background, any other number an object.

    Shapes: (H, W) -> (H, W).
    """
    touching = np.zeros(numbers.shape, dtype=np.bool_)
    height, width = numbers.shape
    for down, right in NEIGHBOURS:
        here = (slice(0, height - down), slice(max(0, -right), width - max(0, right)))
        there = (slice(down, height), slice(max(0, right), width - max(0, -right)))
        differ = (numbers[here] != numbers[there]) & (numbers[here] != 0) & (numbers[there] != 0)
        touching[here] |= differ
        touching[there] |= differ
    left = (numbers != 0) & ~touching
    _drop_pieces(left, numbers, touching)
    gone = np.setdiff1d(numbers[touching], numbers[left])
    return np.asarray(left | np.isin(numbers, gone[gone != 0]), dtype=np.int64)


def _drop_pieces(left: NDArray[np.bool_], numbers: NDArray[np.int64], touching: NDArray[np.bool_]) -> None:
    """Of what was connected and no longer is, only the largest piece stays in ``left``: a truth has no new objects."""
    from scipy import ndimage

    dense = np.unique(numbers, return_inverse=True)[1]
    dense, corners = dense.reshape(numbers.shape), np.ones((3, 3))
    places = ndimage.find_objects(dense + 1)
    for at in np.unique(dense[touching & (numbers != 0)]):
        where = places[at]
        own = dense[where] == at
        pieces, count = ndimage.label(own & left[where], structure=corners)
        if count < 2:
            continue
        wholes, _ = ndimage.label(own, structure=corners)
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        largest = {int(wholes[pieces == piece][0]): piece for piece in np.argsort(sizes, kind="stable") if sizes[piece]}
        left[where] &= ~(own & ~np.isin(pieces, list(largest.values())))
