"""Boxes of objects in two dimensions: made of a mask, compared, thinned out. NumPy only.

A box is (left, top, right, bottom) in pixels, by its edges: 0 is the left edge of the first pixel, and the box of one
pixel alone has an area of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Boxes:
    """Objects of one image.

    Attributes:
        edges: of each. Shapes: (N, 4).
        classes: number of the class of each, from 1. Shapes: (N,).
        scores: how sure a prediction is of each, 0 to 1; 1 in the truth. Shapes: (N,).
    """

    edges: Floats
    classes: NDArray[np.int64]
    scores: Floats

    def __len__(self) -> int:
        return len(self.edges)

    def __getitem__(self, chosen: NDArray[np.intp] | NDArray[np.bool_] | slice) -> Boxes:
        return Boxes(self.edges[chosen], self.classes[chosen], self.scores[chosen])

    def scaled(self, size: Sequence[int], to: Sequence[int]) -> Boxes:
        """The same on an image that is resized from ``size`` (height, width) ``to`` another one."""
        (height, width), (other_height, other_width) = size, to
        factors = np.array([other_width / width, other_height / height] * 2)
        return Boxes(self.edges * factors, self.classes, self.scores)


def of_mask(mask: NDArray[np.int64], least: int = 0) -> Boxes:
    """The box of every connected part of every class; pixels that touch at a corner are connected.

    Args:
        mask: class numbers, 0 the background.
        least: (pixels) a part of fewer is no object.

    Shapes: mask (h, w).
    """
    from scipy import ndimage

    edges, classes = list[tuple[int, int, int, int]](), list[int]()
    for number in np.unique(mask[mask > 0]):
        parts, count = ndimage.label(mask == number, structure=np.ones((3, 3)))
        sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        for (rows, columns), pixels in zip(ndimage.find_objects(parts), sizes, strict=True):
            if pixels >= least:
                edges.append((columns.start, rows.start, columns.stop, rows.stop))
                classes.append(int(number))
    return Boxes(
        np.array(edges, dtype=np.float64).reshape(-1, 4), np.array(classes, dtype=np.int64), np.ones(len(edges))
    )


def overlaps(first: Floats, second: Floats) -> Floats:
    """Intersection over union of every pair; 0 where neither has an area. Shapes: (N, 4), (M, 4) -> (N, M)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both: Floats = np.clip(high - low, 0.0, None).prod(axis=2)
    areas = [np.clip(each[:, 2:] - each[:, :2], 0.0, None).prod(axis=1) for each in (first, second)]
    either = areas[0][:, None] + areas[1][None] - both
    shares: Floats = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    return shares


def suppressed(boxes: Boxes, overlap: float) -> Boxes:
    """Non-maximum suppression: of boxes of one class that overlap by more, only that of the highest score stays.

    Args:
        boxes: of one image.
        overlap: intersection over union.

    Returns: by falling score; of equal scores in the order given.

    Source: Felzenszwalb et al., "Object Detection with Discriminatively Trained Part-Based Models", TPAMI 2010, 3.2.2.
    """
    waiting = boxes[np.argsort(-boxes.scores, kind="stable")]
    kept = np.ones(len(waiting), dtype=np.bool_)
    alike = (overlaps(waiting.edges, waiting.edges) > overlap) & (waiting.classes[:, None] == waiting.classes[None])
    for at in range(len(waiting)):
        if kept[at]:
            kept[at + 1 :] &= ~alike[at, at + 1 :]
    return waiting[kept]


def matched(predicted: Boxes, truth: Boxes, overlap: float) -> NDArray[np.bool_]:
    """Which predicted boxes meet an object: by falling score, each the object of its class that it overlaps most.

    An object is met once; what is left over, or overlaps by less, is a false alarm.

    Args:
        predicted: by falling score.
        truth: of the same image.
        overlap: the least intersection over union.

    Shapes: (N,).
    Source: Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010, section 4.2; that an object
        which is taken leaves the next best one, as in COCO's evaluation.
    """
    met = np.zeros(len(predicted), dtype=np.bool_)
    pairs = np.where(predicted.classes[:, None] == truth.classes[None], overlaps(predicted.edges, truth.edges), -1.0)
    free = np.ones(len(truth), dtype=np.bool_)
    for at, row in enumerate(pairs):
        best = np.where(free, row, -1.0)
        if len(best) and best.max() >= overlap:
            met[at], free[best.argmax()] = True, False
    return met


def framed(boxes: Boxes, size: Sequence[int]) -> NDArray[np.int64]:
    """A mask of class numbers that holds the frame of every box, for pictures. Shapes: ``size`` (h, w) -> (h, w)."""
    height, width = size
    mask, thick = np.zeros((height, width), dtype=np.int64), max(1, round(max(height, width) / 400))
    for (left, top, right, bottom), number in zip(np.round(boxes.edges), boxes.classes, strict=True):
        x0, y0 = (int(np.clip(value, 0, side - 1)) for value, side in ((left, width), (top, height)))
        x1, y1 = (int(np.clip(value, low + 1, side)) for value, low, side in ((right, x0, width), (bottom, y0, height)))
        frame = mask[y0:y1, x0:x1]
        inside = frame[thick:-thick, thick:-thick].copy()
        frame[:] = number
        frame[thick:-thick, thick:-thick] = inside
    return mask
