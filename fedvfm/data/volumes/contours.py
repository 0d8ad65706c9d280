"""Closed contours to pixels: which pixel centres lie inside, holes, and the contours of one structure on one plane.

Points along a contour's line belong to the structure (DICOM PS3.3, C.8.8.6.3). So a mask whose border pixels were
traced from centre to centre (OpenCV's ``findContours``, which rt-utils writes) comes back as it was.

Coordinates are (x, y) in pixels: 0 is the centre of the first pixel, x runs along columns, y along rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LINE = 0.01
"""A pixel centre this near to a line, in pixels, lies on it: coordinates are rounded when they are written."""
EDGES = 1024
"""Edges that are worked on together: memory is bounded by this times the rows."""

Points = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Window:
    """The pixels around one contour, cut to the image: rows and columns from start to stop."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def of(self, image: Mask) -> Mask:
        """Its part of an image, as a view."""
        return image[slice(*self.rows), slice(*self.columns)]


def combined(rings: Sequence[Points], shape: tuple[int, int], *, exclusive: bool = False) -> tuple[Mask, Mask]:
    """The contours of one structure on one plane: the pixels inside, and those on a line.

    A contour inside of another is a hole, one inside of a hole an island. Contours that cross, or are given twice, are
    taken together. With ``exclusive`` (CLOSEDPLANAR_XOR) every pixel counts that an odd number of contours hold.

    Args:
        rings: closed contours, each (points, 2); the last point is joined to the first.
        shape: (rows, columns) of the image; what lies outside of it is cut off.
        exclusive: how contours come together.

    Shapes: both (rows, columns). A pixel on a line may be inside or not.

    Source: DICOM PS3.3, C.8.8.6.1 and C.8.8.6.3.
    """
    inside, line = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    parts = [(window, _inside(ring, window)) for ring in rings for window in [_around(ring, shape)]]
    for ring, (window, _) in zip(rings, parts, strict=True):
        window.of(line)[...] |= _on_line(ring, window)
    drawn: set[tuple[_Window, bytes]] = set()
    # The largest first: a hole is smaller than what it is cut from.
    for window, filled in sorted(parts, key=lambda part: -np.count_nonzero(part[1])):
        here, content = window.of(inside), (window, np.packbits(filled).tobytes())
        if exclusive or (here[filled].all() and content not in drawn):
            here ^= filled
        else:
            here |= filled
        drawn.add(content)
    return inside, line


def _around(ring: Points, shape: tuple[int, int]) -> _Window:
    low, high = np.ceil(ring.min(axis=0) - LINE), np.floor(ring.max(axis=0) + LINE) + 1
    (left, right), (top, bottom) = (
        np.clip([low[axis], high[axis]], 0, side).astype(int) for axis, side in enumerate((shape[1], shape[0]))
    )
    return _Window((int(top), int(bottom)), (int(left), int(right)))


def _edges(ring: Points) -> Iterator[tuple[Points, Points]]:
    """Lower and upper ends of the edges, so that an edge that is gone both ways (a keyhole) is the same both times."""
    following = np.roll(ring, -1, axis=0)
    turned = (ring[:, 1] > following[:, 1])[:, None]
    low, high = np.where(turned, following, ring), np.where(turned, ring, following)
    for start in range(0, len(ring), EDGES):
        yield low[start : start + EDGES], high[start : start + EDGES]


def _rows(start: Points, stop: Points, window: _Window) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Every edge with every row from its start to before its stop: numbers of edges, and rows."""
    first, last = (np.clip(side, *window.rows).astype(np.intp) for side in (start, stop))
    counts = np.maximum(last - first, 0)
    edge = np.repeat(np.arange(len(first)), counts)
    return edge, np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]


def _inside(ring: Points, window: _Window) -> Mask:
    """Pixels inside by the rule of even and odd: along its row every edge to the left turns inside to outside."""
    height, width = window.shape
    turns = np.zeros(height * (width + 1), dtype=np.int64)
    for low, high in _edges(ring):
        edge, row = _rows(np.ceil(low[:, 1]), np.ceil(high[:, 1]), window)
        rise = high[edge] - low[edge]
        crossing = low[edge, 0] + (row - low[edge, 1]) * (rise[:, 0] / rise[:, 1])
        column = np.clip(np.ceil(crossing), *window.columns).astype(np.intp) - window.columns[0]
        turns += np.bincount((row - window.rows[0]) * (width + 1) + column, minlength=len(turns))
    return np.asarray(np.cumsum(turns.reshape(height, width + 1), axis=1)[:, :-1] % 2 == 1)


def _on_line(ring: Points, window: _Window) -> Mask:
    """Pixels whose centre lies on an edge, to :data:`LINE`."""
    height, width = window.shape
    steps = np.zeros(height * (width + 1), dtype=np.int64)
    for low, high in _edges(ring):
        edge, row = _rows(np.ceil(low[:, 1] - LINE), np.floor(high[:, 1] + LINE) + 1, window)
        rise = high[edge] - low[edge]
        slope = np.divide(rise[:, 0], rise[:, 1], out=np.zeros(len(edge)), where=rise[:, 1] > 0)
        heights = [np.maximum(row - LINE, low[edge, 1]), np.minimum(row + LINE, high[edge, 1])]
        ends = np.stack([low[edge, 0] + (at - low[edge, 1]) * slope for at in heights])
        level = rise[:, 1] == 0
        ends[1, level] = high[edge[level], 0]
        first = np.clip(np.ceil(ends.min(axis=0) - LINE), *window.columns).astype(np.intp)
        last = np.clip(np.floor(ends.max(axis=0) + LINE) + 1, *window.columns).astype(np.intp)
        hit = last > first
        begin = (row[hit] - window.rows[0]) * (width + 1) - window.columns[0]
        steps += np.bincount(begin + first[hit], minlength=len(steps))
        steps -= np.bincount(begin + last[hit], minlength=len(steps))
    return np.asarray(np.cumsum(steps.reshape(height, width + 1), axis=1)[:, :-1] > 0)
