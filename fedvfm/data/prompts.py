"""Prompts simulated from the truth: what a person would click or draw for each class of an image.

They are told to the model in training and in evaluation alike, so every score reached with them is one of an oracle and
is marked "oracle prompt" wherever it is shown: nobody draws boxes round what a model is asked to find.

* ``box``: one box round all pixels of a class (several objects share it). Each side is moved by a uniform draw of up to
  ``prompt_jitter`` times the box's width (left, right) or height (top, bottom), and stays inside the image.
* ``points``: ``prompt_points`` pixels of the class, each drawn uniformly and with replacement.

A class the image does not show has no prompt, and the model says background for it. In a window of a larger image,
prompts are those of what the window shows of the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fedvfm.config import schema
from fedvfm.data import defect

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Simulated:
    """Prompts of one image, for P foreground classes in their order.

    Shapes: present (P,), whether the class is there; boxes (P, 4) as (left, top, right, bottom) or None; points
    (P, N, 2) as (x, y) or None. Where a class is absent its numbers are 0 and mean nothing.
    Units: pixels of the input; 0 is the middle of the first.
    """

    present: NDArray[np.bool_]
    boxes: Floats | None = None
    points: Floats | None = None


def draw(mask: NDArray[np.int64] | None, classes: int, settings: schema.TaskConfig, rng: Generator) -> Simulated:
    """Prompts for an image's mask (H, W) as ``settings`` asks; the draws depend on ``rng`` alone.

    Raises:
        DataError: if there is no mask to draw them from.
    """
    if mask is None:
        raise defect.MASK_MISSING.error(
            f"recipe.task.prompt = '{settings.prompt}' draws prompts from the mask, and this image has none; give "
            "every image a mask"
        )
    where = [np.nonzero(mask == number) for number in range(1, classes)]
    present = np.array([len(rows) > 0 for rows, _ in where])
    if settings.prompt == "points":
        count = settings.prompt_points
        return Simulated(present, points=np.stack([_points(rows, columns, count, rng) for rows, columns in where]))
    jitter = settings.prompt_jitter
    return Simulated(present, boxes=np.stack([_box(rows, columns, mask.shape, jitter, rng) for rows, columns in where]))


def describe(settings: schema.TaskConfig) -> str:
    """One sentence for reports and cards; empty where there are no prompts."""
    if not settings.oracle:
        return ""
    number = settings.prompt_points
    how = f"each side moved by up to {settings.prompt_jitter:g} of the box's width or height"
    if settings.prompt == "points":
        how = "drawn uniformly from its pixels"
    what = "one box" if settings.prompt == "box" else "one point" if number == 1 else f"{number} points"
    return (
        f"Scores here are of an oracle ({settings.oracle}): the model is told {what} for each class that is there, "
        f"from the truth, {how}. They say nothing of what it finds by itself."
    )


def _box(
    rows: NDArray[np.intp], columns: NDArray[np.intp], size: Sequence[int], jitter: float, rng: Generator
) -> Floats:
    """Sides are middles of the outermost pixels. Up to a jitter of 0.5 opposite sides cannot pass each other."""
    moves = rng.uniform(-jitter, jitter, 4)
    if not len(rows):
        return np.zeros(4, dtype=np.float32)
    sides = np.array([columns.min(), rows.min(), columns.max(), rows.max()], dtype=np.float64)
    sides += moves * np.tile(sides[2:] - sides[:2], 2)
    return np.clip(sides, 0, np.tile([size[1] - 1, size[0] - 1], 2)).astype(np.float32)


def _points(rows: NDArray[np.intp], columns: NDArray[np.intp], count: int, rng: Generator) -> Floats:
    shares = rng.random(count)
    if not len(rows):
        return np.zeros((count, 2), dtype=np.float32)
    chosen = (shares * len(rows)).astype(np.int64)
    return np.stack([columns[chosen], rows[chosen]], axis=-1).astype(np.float32)
