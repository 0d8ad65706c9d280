"""Which tiles of a slide are taken: those on tissue, found on a small level of it.

Tissue is stained and glass is not: a pixel is tissue where its saturation (of HSV, after a median filter of 3 x 3)
lies above Otsu's threshold of the slide, and above :data:`LEAST`, since Otsu's method finds two classes on empty glass
too. Nothing darker than :data:`DARK` is tissue: of black borders noise alone has a colour. Pen marks are stained as
well and are not told from tissue.

Source: Otsu, "A threshold selection method from gray-level histograms", IEEE Transactions on Systems, Man, and
Cybernetics 9(1), 1979; on saturation as in Lu et al., "Data-efficient and weakly supervised computational pathology on
whole-slide images" (CLAM), Nature Biomedical Engineering 5, 2021, Methods.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedvfm.config import slides as config
from fedvfm.data import defect
from fedvfm.data.slides import slide_file

SIDE = 1024
"""Pixels of the longer side of the map of tissue, at most."""
LEAST = 15
"""Of 255: what is less saturated is glass, dust or noise, whatever the threshold."""
DARK = 24
"""Of 255, the brightest channel: what is darker was not scanned, or lies beyond the slide."""
COARSER = 1.1
"""How much coarser than the recipe's scale a slide may be: scanners of one magnification differ by some per cent."""
FINER = 1.01
KEPT = 512


@dataclass(frozen=True, slots=True)
class Tile:
    """Where a tile lies.

    Attributes:
        left, top, side: in pixels of the slide's finest level.
    """

    left: int
    top: int
    side: float

    @property
    def name(self) -> str:
        """Of its upper left corner."""
        return f"x{self.left}y{self.top}"


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tiles of one slide under a recipe.

    Attributes:
        slide: what its header says.
        tiles: in reading order.
        on_tissue: how many lie on tissue, of which at most ``most`` are taken.
    """

    slide: slide_file.Slide
    tiles: tuple[Tile, ...]
    on_tissue: int


@functools.lru_cache(maxsize=KEPT)
def choose(slide: slide_file.Slide, wanted: config.SlidesConfig) -> Chosen:
    """The tiles of a slide that a recipe takes; remembered.

    Args:
        slide: what its header says, with its scale.
        wanted: the recipe's.

    Raises:
        DataError: for a slide of a coarser scale than is asked for, without a level to read from, or
            with no tile on tissue.
    """
    scale = slide.mpp
    if scale > COARSER * wanted.mpp:
        raise defect.SLIDE_SCALE.error(
            f"{slide.path}: scanned with {scale:g} micrometres a pixel, and recipe.data.slides.mpp is {wanted.mpp:g}: "
            "what was not scanned cannot be shown; leave it out, or ask for a recipe of a coarser scale"
        )
    side = wanted.tile * wanted.mpp / scale
    level = level_of(slide, side, wanted)
    if (side / min(slide.shrink(level))) ** 2 > slide_file.LARGEST_REGION:
        raise defect.SLIDE_LEVELS.error(
            f"{slide.path}: a tile takes {side:.0f} x {side:.0f} pixels and there is no smaller level to read it from; "
            "save it as a pyramidal TIFF"
        )
    tissue = find(slide)
    width, height = slide.levels[0]
    columns, rows = int(width // side), int(height // side)
    shares = _shares(tissue, (side * tissue.shape[0] / height, side * tissue.shape[1] / width), rows, columns)
    numbers = np.flatnonzero(shares.ravel() >= max(wanted.tissue, 1e-9))
    if not numbers.size:
        raise defect.NO_TISSUE.error(
            f"{slide.path}: no tile of {wanted.tile} pixels at {wanted.mpp:g} micrometres a pixel is on tissue by "
            f"{wanted.tissue:.0%} (recipe.data.slides); look at the slide, and take it out where it is empty or pale"
        )
    taken = numbers
    if numbers.size > wanted.most:
        taken = numbers[np.arange(wanted.most) * numbers.size // wanted.most]
    places = [divmod(int(number), columns) for number in taken]
    tiles = tuple(Tile(int(column * side), int(row * side), side) for row, column in places)
    return Chosen(slide, tiles, int(numbers.size))


def scale_of(slide: slide_file.Slide, mpp: float) -> float:
    """Micrometres a pixel of the finest level: the file's, else what the site says.

    Raises:
        DataError: where neither says it.
    """
    if not (slide.mpp or mpp):
        raise defect.SLIDE_SCALE.error(
            f"{slide.path}: does not say how large its pixels are (or between {config.FINEST:g} and "
            f"{config.COARSEST:g} micrometres no value); set data.options.mpp to the scanner's, as 0.25 for 40x, or "
            "take it out"
        )
    return slide.mpp or mpp


def level_of(slide: slide_file.Slide, side: float, wanted: config.SlidesConfig) -> int:
    """The coarsest level that is as fine as the tiles are, or the finest."""
    fine = [at for at in range(len(slide.levels)) if max(slide.shrink(at)) <= FINER * side / wanted.tile]
    return fine[-1] if fine else 0


def read(slide: slide_file.Slide, tile: Tile, wanted: config.SlidesConfig) -> NDArray[np.uint8]:
    """The pixels of one tile at the recipe's scale; from a finer level they are averaged (bilinear, antialiased).

    Shapes: (tile, tile, 3).

    Raises:
        DataError: if it cannot be read.
    """
    level = level_of(slide, tile.side, wanted)
    across, down = slide.shrink(level)
    width, height = (max(1, round(tile.side / shrink)) for shrink in (across, down))
    left, top = int(tile.left / across), int(tile.top / down)
    own_width, own_height = slide.levels[level]
    left, top = max(0, min(left, own_width - width)), max(0, min(top, own_height - height))
    pixels = slide_file.read_region(slide.path, level, left, top, width, height)
    if pixels.shape[:2] == (wanted.tile, wanted.tile):
        return pixels
    shown = Image.fromarray(pixels).resize((wanted.tile, wanted.tile), Image.Resampling.BILINEAR)
    return np.asarray(shown)


def small(slide: slide_file.Slide) -> NDArray[np.uint8]:
    """The slide at most :data:`SIDE` pixels wide and high, every so many pixels of a small level.

    Shapes: (h, w, 3).

    Raises:
        DataError: if it cannot be read, or its smallest level is too large to be looked at.
    """
    enough = [at for at, size in enumerate(slide.levels) if max(size) >= SIDE]
    level = enough[-1] if enough else 0
    width, height = slide.levels[level]
    if width * height > slide_file.LARGEST_REGION:
        raise defect.SLIDE_LEVELS.error(
            f"{slide.path}: its smallest usable level has {height} x {width} pixels, {slide_file.LARGEST_REGION:,} are "
            "looked at for tissue at most; save it as a pyramidal TIFF"
        )
    return slide_file.read_small(slide.path, level, max(1, -(-max(width, height) // SIDE)))


def find(slide: slide_file.Slide) -> NDArray[np.bool_]:
    """Where a slide has tissue, on its small picture; remembered.

    Shapes: (h, w), as :func:`small`.

    Raises:
        DataError: as :func:`small`.
    """
    shape, packed = _remembered(slide)
    return np.unpackbits(packed, count=shape[0] * shape[1]).reshape(shape).astype(bool)


@functools.lru_cache(maxsize=KEPT)
def _remembered(slide: slide_file.Slide) -> tuple[tuple[int, int], NDArray[np.uint8]]:
    tissue = mask(small(slide))
    return (tissue.shape[0], tissue.shape[1]), np.packbits(tissue)


def mask(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where a picture of a slide has tissue. Shapes: (h, w, 3) -> (h, w)."""
    from scipy import ndimage  # slow to load, and no other image needs it

    highest = picture.max(axis=2).astype(np.int64)
    lowest = picture.min(axis=2).astype(np.int64)
    saturation = np.where(highest > DARK, 255 * (highest - lowest) // np.maximum(highest, 1), 0).astype(np.uint8)
    smooth = ndimage.median_filter(saturation, size=3)
    return np.asarray(smooth > max(otsu(np.bincount(smooth.ravel(), minlength=256)), LEAST))


def otsu(histogram: NDArray[np.int64]) -> int:
    """The grey value up to which a histogram's first class goes, where two classes vary the most between them.

    Shapes: (levels,).
    """
    counts = histogram.astype(np.float64)
    below = np.cumsum(counts)
    sums = np.cumsum(counts * np.arange(len(counts)))
    above, total = below[-1] - below, sums[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (total - sums) / above) ** 2
    return int(np.argmax(np.nan_to_num(between)))


def _shares(tissue: NDArray[np.bool_], side: tuple[float, float], rows: int, columns: int) -> NDArray[np.float64]:
    """What part of each cell of a grid is tissue. Shapes: (h, w) -> (rows, columns)."""
    table = np.zeros((tissue.shape[0] + 1, tissue.shape[1] + 1))
    table[1:, 1:] = tissue.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)
    edges = []
    for count, length, most in ((rows, side[0], tissue.shape[0]), (columns, side[1], tissue.shape[1])):
        low = np.minimum(np.floor(np.arange(count) * length).astype(int), most - 1)
        high = np.minimum(np.ceil((np.arange(count) + 1) * length).astype(int), most)
        edges.append((low, np.maximum(high, low + 1)))
    (top, bottom), (left, right) = edges
    sums = table[np.ix_(bottom, right)] - table[np.ix_(top, right)] - table[np.ix_(bottom, left)]
    sums += table[np.ix_(top, left)]
    return np.asarray(sums / np.outer(bottom - top, right - left))
