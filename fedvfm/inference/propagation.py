"""Boxes that go on from slice to slice of a volume: the mask of one slice prompts its neighbours.

>>> boxes, masks = propagation.follow(given, count=40, steps=12, draw=draw)

A person or a detector gives a box on one slice, or on a few. The mask that it leads to has a box of its own, which,
with a margin (:data:`MARGIN`), is the prompt of the next slice, both ways. A box is followed until its mask has fewer
than :data:`LEAST` pixels, hardly lies on that of the slice before (:data:`TOGETHER`), is of quite another size
(:data:`CHANGE`), or the steps that were asked for are over; the slice where it ends so keeps nothing of it. Where one
object was drawn on two slices, nothing is followed between them: its box there lies between the two (:data:`APART`).
A model that was only shown boxes of what is there draws something in every box: without a limit it may follow an object
beyond its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedvfm.model import sliding_window

MARGIN = 0.05
"""How far each side of a mask's box moves out, as a share of the box's width or height. A model that fills its boxes
makes an object larger by it from slice to slice (``benchmarks/propagation.py``)."""
OUTWARDS = 0.5
"""Pixels that it moves at least: a small object may grow, too."""
LEAST = 8
"""Pixels of a mask that is still followed."""
TOGETHER = 0.2
"""Least share of the smaller of two neighbouring masks that lies on the other."""

CHANGE = 3.0
"""How many times as large, or as small, as that of the slice before a mask may be that is followed."""
APART = 2.0
"""Boxes of one object are so many times the steps apart at most; 0 takes every box for an object of its own."""

NOTE = (
    "boxes were followed from slice to slice, or lie evenly between two that show one object: look where each object "
    "ends, and whether it is all the way between, since nobody said so"
)

Box = NDArray[np.float64]
Step = tuple[int, int, Box, NDArray[np.bool_] | None]
"""Slice, number of a class, a box there, and the mask that led to it; None of a box of the file."""
Led = tuple[Box, NDArray[np.bool_]]
"""A box, and the mask that led to it."""
Reached = dict[tuple[int, int], list[Led]]
"""Slice and number of a class -> its boxes there."""
Draw = Callable[[Mapping[int, sliding_window.Boxes]], Mapping[int, NDArray[np.uint8]]]
"""Slice -> its boxes, to slice -> its mask of class numbers. Shapes: (H, W)."""


def follow(
    given: Mapping[int, sliding_window.Boxes], count: int, steps: int, draw: Draw
) -> tuple[dict[int, sliding_window.Boxes], dict[int, NDArray[np.uint8]]]:
    """Boxes and masks of all slices that boxes are given for, or that these lead to.

    Where a class has a box of the file, or was reached from a nearer slice, no other box of it comes there: slices are
    reached in the order of their distance. Of slices that several classes reach all boxes are drawn together, without
    those that ended there. Slices where all ended have a mask, and no boxes. A class with one box on each of two slices
    that may be of one object (:func:`between`) is on every slice between them.

    Args:
        given: slice -> boxes of each foreground class.
        count: slices of the volume.
        steps: slices that a box is followed at most, both ways.
        draw: computes masks.
    """
    given = between(given, steps)
    boxes, masks = dict(given), dict(draw(given))
    front: list[Step] = [
        (at, number, box, None) for at, own in given.items() for number, listed in enumerate(own) for box in listed
    ]
    known = {(at, number) for at, number, _, _ in front}
    for _ in range(steps):
        reached = _reached(front, masks, known, count)
        if not reached:
            break
        known |= reached.keys()
        fresh = sorted({to for to, _ in reached})
        boxes |= {to: _joined(boxes.get(to), to, reached, len(next(iter(given.values())))) for to in fresh}
        masks |= draw({to: boxes[to] for to in fresh})
        going = {place: _going(masks[place[0]] == place[1] + 1, own) for place, own in reached.items()}
        masks |= _without_ends(reached, going, masks)
        boxes |= {to: _joined(boxes[to], to, going, len(boxes[to])) for to in fresh}  # or an end would be drawn again
        # An end may have taken pixels of what stays there, which is drawn as if it had never come.
        ended = {to for (to, number), own in reached.items() if len(going[to, number]) < len(own)}
        again = {to: boxes[to] for to in sorted(ended) if any(map(len, boxes[to]))}
        masks |= draw(again) if again else {}
        boxes = {at: own for at, own in boxes.items() if at in given or any(map(len, own))}
        front = [(to, number, box, part) for (to, number), own in going.items() for box, part in own]
    return boxes, masks


def between(given: Mapping[int, sliding_window.Boxes], steps: int) -> dict[int, sliding_window.Boxes]:
    """The boxes, and those between two that show one object: each side moves evenly from one to the other.

    Two boxes of a class are of one object where no other box of it is on either slice nor between them, one is not
    beside the other (:func:`_near`), and following both would meet (:data:`APART`).

    Args:
        given: slice -> boxes of each foreground class.
        steps: slices that a box is followed at most.
    """
    filled = {at: list(own) for at, own in given.items()}
    for number in range(len(next(iter(given.values())))):
        drawn = sorted(at for at, own in given.items() if len(own[number]))
        for first, last in itertools.pairwise(drawn):
            start, end = given[first][number], given[last][number]
            if last - first > APART * steps or len(start) > 1 or len(end) > 1 or not _near(start[0], end[0]):
                continue
            for at in range(first + 1, last):
                share = (at - first) / (last - first)
                own = filled.setdefault(at, [np.zeros((0, 4)) for _ in next(iter(given.values()))])
                own[number] = (1 - share) * start + share * end
    return {at: tuple(own) for at, own in sorted(filled.items())}


def _near(start: Box, end: Box) -> bool:
    """Whether the middles of two boxes are no further apart than the larger one is wide and high."""
    middles = (start[:2] + start[2:] - end[:2] - end[2:]) / 2
    sides = np.maximum(start[2:] - start[:2], end[2:] - end[:2]) + 1
    return bool((np.abs(middles) <= sides).all())


def _going(mask: NDArray[np.bool_], own: Sequence[Led]) -> list[Led]:
    """Those boxes of one slice and class that are followed further."""
    return [(box, before) for box, before in own if goes_on(inside(mask, box), before)]


def _without_ends(
    reached: Reached, going: Reached, masks: Mapping[int, NDArray[np.uint8]]
) -> dict[int, NDArray[np.uint8]]:
    """Masks of the slices that were just reached, without what is not followed further."""
    kept = {at: masks[at].copy() for at, _ in reached}
    for (at, number), own in reached.items():
        drawn = masks[at] == number + 1
        whole, followed = (
            np.logical_or.reduce([np.zeros_like(drawn), *(inside(drawn, box) for box, _ in some)])
            for some in (own, going[at, number])
        )
        kept[at][whole & ~followed] = 0
    return kept


def _reached(
    front: Sequence[Step],
    masks: Mapping[int, NDArray[np.uint8]],
    known: Container[tuple[int, int]],
    count: int,
) -> Reached:
    """Where the boxes of the last slices lead to."""
    reached: Reached = {}
    for at, number, box, before in front:
        part = inside(masks[at] == number + 1, box)
        for to in (at - 1, at + 1) if goes_on(part, before) else ():
            if 0 <= to < count and (to, number) not in known:
                reached.setdefault((to, number), []).append((around(part), part))
    return reached


def _joined(old: sliding_window.Boxes | None, to: int, reached: Reached, classes: int) -> sliding_window.Boxes:
    """The boxes of a slice, those that reached it now beside those of other classes."""
    before = old or tuple(np.zeros((0, 4)) for _ in range(classes))
    return tuple(
        np.array([box for box, _ in reached[to, number]]).reshape(-1, 4) if (to, number) in reached else listed
        for number, listed in enumerate(before)
    )


def inside(mask: NDArray[np.bool_], box: Box) -> NDArray[np.bool_]:
    """What of a mask lies in a box: of several objects of a class each is followed by itself. Shapes: (H, W)."""
    left, top, right, bottom = box
    part = np.zeros_like(mask)
    where = slice(int(np.floor(top)), int(np.ceil(bottom)) + 1), slice(int(np.floor(left)), int(np.ceil(right)) + 1)
    part[where] = mask[where]
    return part


def goes_on(part: NDArray[np.bool_], before: NDArray[np.bool_] | None) -> bool:
    """Whether a mask is followed: large enough, on that of the slice it was reached from, and of about its size."""
    size = int(part.sum())
    if size < LEAST or before is None:
        return size >= LEAST
    other = int(before.sum())
    small, large = min(size, other), max(size, other)
    return large <= CHANGE * small and int((part & before).sum()) >= TOGETHER * small


def around(part: NDArray[np.bool_]) -> Box:
    """The box of a mask with its margin, cut at the middles of the outermost pixels. Shapes: (H, W) -> (4,)."""
    rows, columns = np.nonzero(part)
    sides = np.array([columns.min(), rows.min(), columns.max(), rows.max()], dtype=np.float64)
    out = np.maximum(MARGIN * (sides[2:] - sides[:2]), OUTWARDS)
    sides += np.concatenate([-out, out])
    height, width = part.shape
    return np.clip(sides, 0, [width - 1, height - 1] * 2)
