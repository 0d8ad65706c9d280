"""Distances between the surfaces of two masks: HD95, ASSD and NSD from one search in each direction.

A mask's *edge* is its pixels that have a neighbour outside it: 4 neighbours in an image, 6 in a volume; outside the
array nothing is mask. Distances are those from each edge pixel to the nearest edge pixel of the other mask, between the
pixels' centres. Every edge pixel counts the same, whatever area of the surface it stands for: so MONAI computes NSD by
default. DeepMind's ``surface-distance`` and MONAI's ``use_subvoxels`` weight each by its area, and give other values
where slices are thick.

Importing this module is cheap: SciPy is loaded by the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

HAUSDORFF_PERCENTILE = 95.0
DENSE_SHARE = 0.25
"""Edge pixels of both masks by pixels of the array; above it a distance transform is quicker than a k-d tree."""

Mask = NDArray[np.bool_]
Distances = NDArray[np.float32]
Box = tuple[slice, ...]


def scores(
    predicted: Mask, truth: Mask, spacing: Sequence[float] | None, tolerance: float
) -> tuple[float, float, float]:
    """(HD95, ASSD, NSD) of two masks of which none is empty.

    HD95 is the larger of the two directed 95th percentiles of the distances, ASSD the mean of all distances in both
    directions, NSD the share of edge pixels within ``tolerance`` of the other edge.

    Shapes: both (H, W) or (D, H, W); a box around both masks (:func:`boxes`) gives what the whole array gives.
    Units: ``tolerance`` and the distances are in those of ``spacing``, pixels where it is None.
    """
    directed = distances(predicted, truth, spacing)
    both = np.concatenate(directed)
    hausdorff = max(float(np.percentile(one, HAUSDORFF_PERCENTILE)) for one in directed)
    return hausdorff, float(both.mean(dtype=np.float64)), float((both <= np.float32(tolerance)).mean())


def distances(predicted: Mask, truth: Mask, spacing: Sequence[float] | None) -> tuple[Distances, Distances]:
    """From each edge pixel of the prediction to the truth's edge, and the reverse; both in C order of the pixels.

    They are rounded to single precision, so that what is the tolerance in exact arithmetic counts as within it.
    """
    sizes = np.asarray(spacing or (1.0,) * truth.ndim, dtype=np.float64)
    edges = edge(predicted), edge(truth)
    search = _by_transform if sum(map(np.count_nonzero, edges)) > DENSE_SHARE * truth.size else _by_tree
    return search(*edges, sizes), search(*edges[::-1], sizes)


def edge(mask: Mask) -> Mask:
    """The pixels of a mask that have a neighbour outside it."""
    padded, inner = np.pad(mask, 1), mask.copy()
    for axis in range(mask.ndim):
        for shift in (0, 2):
            starts = [shift if at == axis else 1 for at in range(mask.ndim)]
            inner &= padded[tuple(slice(start, start + n) for start, n in zip(starts, mask.shape, strict=True))]
    return mask & ~inner


def boxes(predicted: NDArray[Any], truth: NDArray[Any], classes: int) -> list[tuple[Box | None, Box | None]]:
    """Of the classes 1 to ``classes`` - 1: the smallest boxes around each in both masks, None where it is absent."""
    from scipy import ndimage

    return list(zip(*(ndimage.find_objects(mask, classes - 1) for mask in (predicted, truth)), strict=True))


def around(one: Box, other: Box) -> Box:
    """The smallest box that holds two boxes."""
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))


def _by_tree(start: Mask, target: Mask, sizes: NDArray[np.float64]) -> Distances:
    """By a k-d tree of the target's pixels; pixels of both edges have distance 0 without a search."""
    from scipy import spatial

    apart = ~target[start]
    found = np.zeros(len(apart), dtype=np.float32)
    if apart.any():
        # What is built for one query is quickest without balance; the order of pixels keeps neighbours together.
        tree = spatial.cKDTree(np.argwhere(target) * sizes, leafsize=32, balanced_tree=False)
        found[apart] = tree.query(np.argwhere(start & ~target) * sizes)[0]
    return found


def _by_transform(start: Mask, target: Mask, sizes: NDArray[np.float64]) -> Distances:
    """By a Euclidean distance transform of the whole array."""
    from scipy import ndimage

    whole: NDArray[np.float64] = ndimage.distance_transform_edt(~target, sampling=sizes)
    return whole[start].astype(np.float32)
