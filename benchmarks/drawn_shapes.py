"""Drawn images with many objects, and slices of one average brain: what ``sam_shaped.py`` pretrains on.

Discs, ellipses, convex polygons and wavy blobs with a texture of their own, bright on dark or dark on bright, grey or
coloured, blurred and noisy. No image of any bundled federation but the demo's brain slices is among them, and those
only here; the nuclei never are. Every image depends on seed and number alone.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from fedvfm import seeding
from fedvfm.config import schema
from fedvfm.data import sample, transforms
from fedvfm.data.sources import table

SIZE = 256
BRAIN_SHARE = 0.2
LEAST_PIXELS = 60

Grey = NDArray[np.float64]
Image = NDArray[np.float32]
Labels = NDArray[np.int64]


class Drawn:
    """Image number ``n`` of a seed.

    Args:
        seed: of all draws.
        brains: whether slices of ICBM152 are among the images (needs the extra ``demo``).
    """

    def __init__(self, seed: int, *, brains: bool = True) -> None:
        self.seed = seed
        self._contract = schema.DataContract(class_names=("rest", "grey", "white"), input_size=(SIZE, SIZE))
        settings = schema.SourceConfig(source="brain-mri", options={"appearance": False})
        self._brain: sample.Source | None = table.make(settings, self._contract) if brains else None
        self._slices = self._brain.samples() if self._brain is not None else ()

    def image(self, number: int) -> tuple[Image, Labels]:
        """Image (3, SIZE, SIZE) in [0, 1] and the number of the object at every pixel (SIZE, SIZE), 0 for none."""
        rng = seeding.stream(self.seed, "drawn", number)
        if self._brain is not None and rng.random() < BRAIN_SHARE:
            return self._slice(rng)
        return draw(rng)

    def _slice(self, rng: Generator) -> tuple[Image, Labels]:
        """Grey and white matter are the objects."""
        assert self._brain is not None
        pixels = self._brain.read(self._slices[int(rng.integers(len(self._slices)))])
        prepared = transforms.prepare(pixels, self._contract, 3)
        image, mask = transforms.augment(
            prepared.image, prepared.mask, ("flip", "rot90", "invert", "intensity", "noise"), rng
        )
        assert mask is not None
        return image, mask


def draw(rng: Generator) -> tuple[Image, Labels]:
    """One drawn image."""
    radius = float(np.exp(rng.uniform(np.log(8.0), np.log(50.0))))
    number = int(np.clip(rng.uniform(0.05, 0.45) * SIZE**2 / (np.pi * radius**2), 1, 40))
    ground = rng.uniform(0.05, 0.95)
    lift = rng.uniform(0.15, 0.6) * (1 if rng.random() < 1 - ground else -1)
    grey = ground + rng.uniform(0.0, 0.2) * (texture(rng) - 0.5)
    _clutter(grey, rng)
    labels = np.zeros((SIZE, SIZE), dtype=np.int64)
    relief = rng.uniform(0.0, 0.3) * (texture(rng) - 0.5)
    for index in range(1, number + 1):
        window, inside = shape(radius * rng.uniform(0.6, 1.6), rng)
        labels[window][inside] = index
        grey[window][inside] = ground + lift * rng.uniform(0.6, 1.2) + relief[window][inside]
    grey = ndimage.gaussian_filter(grey, rng.uniform(0.3, 1.6))
    image = _coloured(np.clip(grey, 0.0, 1.0), rng)
    image += rng.uniform(0.0, 0.07) * rng.standard_normal(image.shape)
    return np.clip(image, 0.0, 1.0).astype(np.float32), labels


def texture(rng: Generator) -> Grey:
    """Smooth noise of several grains, about 0 to 1, (SIZE, SIZE)."""
    total = np.zeros((SIZE, SIZE))
    for cells in (2, 8, 32):
        coarse = rng.random((cells, cells))
        total += rng.random() * ndimage.zoom(coarse, SIZE / cells, order=1, mode="nearest", grid_mode=True)
    low, high = total.min(), total.max()
    return np.asarray((total - low) / max(high - low, 1e-9))


def shape(radius: float, rng: Generator) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """A window of the image, and where in it one object lies."""
    row, column = rng.uniform(0, SIZE, 2)
    turn, flat = rng.uniform(0, np.pi), rng.uniform(0.5, 1.0)
    rows, columns = (
        slice(max(0, int(middle - 1.5 * radius)), min(SIZE, int(middle + 1.5 * radius) + 2)) for middle in (row, column)
    )
    y, x = np.mgrid[rows, columns]
    return (rows, columns), _inside(x - column, y - row, turn, flat, radius, rng)


def _inside(x: Grey, y: Grey, turn: float, flat: float, radius: float, rng: Generator) -> NDArray[np.bool_]:
    along, across = x * np.cos(turn) + y * np.sin(turn), (y * np.cos(turn) - x * np.sin(turn)) / flat
    kind = rng.integers(3)
    if kind == 0:
        return np.asarray(np.hypot(along, across) <= radius)
    if kind == 1:
        return _polygon(along, across, radius, rng)
    angle, reach = np.arctan2(across, along), np.ones(along.shape)
    for waves in range(2, 6):
        reach += rng.uniform(0.0, 0.25) / waves * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    return np.asarray(np.hypot(along, across) <= radius * reach)


def _polygon(along: Grey, across: Grey, radius: float, rng: Generator) -> NDArray[np.bool_]:
    sides = int(rng.integers(3, 8))
    inside = np.ones(along.shape, dtype=bool)
    for angle in np.arange(sides) * 2 * np.pi / sides + rng.uniform(-0.3, 0.3, sides):
        inside &= along * np.cos(angle) + across * np.sin(angle) <= radius * rng.uniform(0.6, 1.0)
    return inside


def _clutter(grey: Grey, rng: Generator) -> None:
    """Now and then lines across the ground, which are no objects."""
    if rng.random() > 0.3:
        return
    y, x = np.mgrid[:SIZE, :SIZE]
    for _ in range(int(rng.integers(1, 6))):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(0, SIZE)
        near = np.abs((x - offset) * np.cos(angle) + (y - offset) * np.sin(angle)) < rng.uniform(0.5, 2.0)
        grey[near] += rng.uniform(-0.3, 0.3)


def _coloured(grey: Grey, rng: Generator) -> NDArray[np.float64]:
    """(3, SIZE, SIZE): grey half of the time, else from one colour at 0 to another at 1."""
    if rng.random() < 0.5:
        return np.repeat(grey[None], 3, axis=0)
    dark, bright = np.sort(rng.random((2, 3)), axis=0)[:, :, None, None]
    return np.asarray(dark + (bright - dark) * grey)


def objects(labels: Labels) -> list[int]:
    """Numbers of the objects that are large enough to be found."""
    counts = np.bincount(labels.ravel())
    return [number for number in range(1, len(counts)) if counts[number] >= LEAST_PIXELS]
