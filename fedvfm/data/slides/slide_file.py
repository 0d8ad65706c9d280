"""Whole-slide files by region: pyramidal TIFF in tiles, Aperio's SVS among them, decoded in the child process.

Read are 8-bit colour (RGB, or YCbCr in JPEG), tiles without compression, or packed by deflate, LZW, JPEG or JPEG 2000.
Levels are the pages, and pages below the first one, that are in tiles and have the first one's shape; labels, macro
photographs and thumbnails in strips are never looked at. Tiles that a writer left out are white.

Sources: TIFF 6.0, Section 15 (tiled images); Aperio Technologies, "Digital Slides and Third-Party Data Interchange",
2009 (SVS: ``MPP`` in the image description).
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedvfm import errors
from fedvfm.config import slides as config
from fedvfm.data import defect, side_files
from fedvfm.data.decoding import decoder

ENDINGS = (".svs", ".tif", ".tiff", ".btf")
PACKINGS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate", 33003: "J2K", 33005: "J2K", 34712: "J2K"}
"""Compression tags that are read."""
RGB, YCBCR, JPEG = 2, 6, 7
APERIO_YCBCR, APERIO_RGB = 33003, 33005
"""Aperio's JPEG 2000: what these hold says the compression, whatever else the header says."""
MOST_PAGES = 64
LARGEST_TILE = 2**24
LARGEST_REGION = 2**26
"""Pixels that are read in one piece, and of the level that tissue is looked for on, at most."""
LARGEST_SIDE = 2**20
ALIKE = 0.02
"""How far the shape of a level may differ from the slide's: sides are rounded."""
ISOTROPIC = 0.05
OPEN = 4
WHITE = 255
UNITS = {2: 25_400.0, 3: 10_000.0}
"""Micrometres of TIFF's ResolutionUnit: inch, centimetre."""
MPP = re.compile(r"(?:^|\|)\s*MPP\s*=\s*([0-9]{1,6}(?:\.[0-9]{1,12})?)\s*(?:\||$)", re.ASCII | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Slide:
    """What a slide's header says.

    Attributes:
        path: of the file.
        levels: (width, height) of each, the finest first.
        mpp: micrometres a pixel of the finest level; 0 where the file does not say.
        state: of the file, which is another one once it changes.
    """

    path: Path
    levels: tuple[tuple[int, int], ...]
    mpp: float
    state: tuple[int, int, int]

    def shrink(self, level: int) -> tuple[float, float]:
        """How many pixels of the finest level one of this level is, across and down."""
        (width, height), (own_width, own_height) = self.levels[0], self.levels[level]
        return width / own_width, height / own_height


@decoder.apart
def read_header(path: Path) -> Slide:
    """Levels and scale of a slide.

    Raises:
        DataError: if it is missing, damaged, or none of the files that are read here.
    """
    pages = _pages(path)
    sizes = tuple((int(page.imagewidth), int(page.imagelength)) for page in pages)
    return Slide(path, sizes, _scale(pages[0]), _state(path))


@decoder.apart
def read_small(path: Path, level: int, step: int) -> NDArray[np.uint8]:
    """Every ``step``-th pixel of every ``step``-th row of a level, tile by tile.

    Shapes: (ceil(H / step), ceil(W / step), 3).

    Raises:
        DataError: if it cannot be read.
    """
    page = _pages(path)[level]
    height, width = int(page.imagelength), int(page.imagewidth)
    small = np.full((-(-height // step), -(-width // step), 3), WHITE, dtype=np.uint8)
    down, across = int(page.tilelength), int(page.tilewidth)
    for number, (top, left) in enumerate(itertools.product(range(0, height, down), range(0, width, across))):
        tile = _tile(path, page, number)
        if tile is not None:
            first_row, first_column = -top % step, -left % step
            part = tile[first_row : height - top : step, first_column : width - left : step]
            row, column = (top + first_row) // step, (left + first_column) // step
            small[row : row + part.shape[0], column : column + part.shape[1]] = part
    return small


@decoder.apart
def read_region(path: Path, level: int, left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
    """A rectangle of a level; what lies beyond the level is white.

    Shapes: (height, width, 3).
    Units: all in pixels of the level.

    Raises:
        DataError: if it cannot be read.
    """
    page = _pages(path)[level]
    down, across = int(page.tilelength), int(page.tilewidth)
    rows, columns = -(-int(page.imagelength) // down), -(-int(page.imagewidth) // across)
    region = np.full((height, width, 3), WHITE, dtype=np.uint8)
    for row in range(top // down, min(rows - 1, (top + height - 1) // down) + 1):
        for column in range(left // across, min(columns - 1, (left + width - 1) // across) + 1):
            tile = _tile(path, page, row * columns + column)
            if tile is None:
                continue
            y, x = row * down - top, column * across - left
            tile = tile[max(0, -y) : height - y, max(0, -x) : width - x]
            region[max(0, y) : max(0, y) + tile.shape[0], max(0, x) : max(0, x) + tile.shape[1]] = tile
    return region


_opened: OrderedDict[tuple[str, int, int, int], tuple[Any, list[Any]]] = OrderedDict()


def _pages(path: Path) -> list[Any]:
    """The levels of a slide as pages of its file, which stays open until others are read.

    Raises:
        DataError: if it is none of the files that are read.
    """
    import imagecodecs  # noqa: F401 - the extra "slides"; tifffile unpacks with it
    import tifffile

    key = (str(path), *_state(path))
    if key in _opened:
        _opened.move_to_end(key)
        return _opened[key][1]
    while len(_opened) >= OPEN:
        _opened.popitem(last=False)[1][0].close()
    try:
        file = tifffile.TiffFile(path)
    except Exception as error:
        remedy = f"of slides {', '.join(ENDINGS)} are read: tiled TIFF and Aperio SVS; convert or remove it"
        raise side_files.unreadable(path, "slide", type(error).__name__, remedy) from None
    try:
        pages = _levels(path, file)
    except Exception as error:
        file.close()
        if isinstance(error, errors.DataError | MemoryError):
            raise
        raise defect.damaged(path, type(error).__name__) from None
    _opened[key] = file, pages
    return pages


def _state(path: Path) -> tuple[int, int, int]:
    """What differs once a file was changed.

    Raises:
        DataError: if there is none.
    """
    try:
        state = path.stat()
    except OSError:
        raise defect.NOT_FOUND.error(f"{path}: no such file; check the path, or remove its row") from None
    return state.st_mtime_ns, state.st_size, state.st_ino


def _levels(path: Path, file: Any) -> list[Any]:
    tops = list(itertools.islice(file.pages, MOST_PAGES))
    below = list(itertools.islice(tops[0].pages or (), MOST_PAGES)) if tops else []
    tiled = [page for page in (*tops[:1], *below, *tops[1:]) if page.is_tiled]
    if not tops or not tops[0].is_tiled:
        raise defect.SLIDE_LEVELS.error(
            f"{path}: its first page is not in tiles, so no region can be read without all of it; save it as a tiled, "
            "pyramidal TIFF"
        )
    first = tiled[0]
    width, height = int(first.imagewidth), int(first.imagelength)
    if max(width, height) > LARGEST_SIDE:
        raise defect.TOO_LARGE.error(f"{path}: {height} x {width} pixels, sides of {LARGEST_SIDE:,} are read at most")
    levels: list[Any] = []
    for page in tiled:
        across, down = width / max(1, int(page.imagewidth)), height / max(1, int(page.imagelength))
        smaller = not levels or int(page.imagewidth) < int(levels[-1].imagewidth)
        if min(across, down) >= 1 and abs(across / down - 1) <= ALIKE and smaller:
            _require_read(path, page)
            levels.append(page)
    return levels


def _require_read(path: Path, page: Any) -> None:
    """Refuse pixels of another kind than are read.

    Raises:
        DataError: saying which.
    """
    packing = int(page.compression)
    if packing not in PACKINGS:
        raise defect.COMPRESSED.error(
            f"{path}: TIFF compression {packing} is not read; save it with JPEG, JPEG 2000, deflate, LZW or none"
        )
    kind = int(page.photometric)
    colour = kind == RGB or (kind == YCBCR and packing == JPEG) or packing in (APERIO_YCBCR, APERIO_RGB)
    if not colour or page.dtype != np.uint8 or int(page.samplesperpixel) != 3 or int(page.planarconfig) != 1:
        raise defect.CHANNELS.error(
            f"{path}: {page.samplesperpixel} channel(s) of {page.bitspersample} bits; slides in colour are read, three "
            "channels of 8 bits in one plane; convert it, or take it out"
        )
    if int(page.tilewidth) * int(page.tilelength) > LARGEST_TILE or len(page.dataoffsets) != int(
        -(-int(page.imagewidth) // int(page.tilewidth)) * -(-int(page.imagelength) // int(page.tilelength))
    ):
        raise defect.UNREADABLE.error(
            f"{path}: its tiles do not cover its pixels, or have more than {LARGEST_TILE:,}; save it again"
        )


def _tile(path: Path, page: Any, number: int) -> NDArray[np.uint8] | None:
    """The pixels of one tile, cut at the edge of the image; None of one that the writer left out.

    Raises:
        DataError: if it is damaged.
    """
    place, length = int(page.dataoffsets[number]), int(page.databytecounts[number])
    if not length:
        return None
    try:
        file = page.parent.filehandle
        if place + length > file.size:
            raise EOFError
        file.seek(place)
        content = file.read(length)
        values, _, _ = page.decode(content, number, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        tile: NDArray[np.uint8] = np.asarray(values)[0]
    except MemoryError:
        raise
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise defect.damaged(path, f"tile {number}: {type(error).__name__}") from None
    if tile.ndim != 3 or tile.shape[2] != 3 or tile.dtype != np.uint8:
        raise defect.damaged(path, f"tile {number}: {tile.dtype} {tile.shape}")
    if int(page.compression) == APERIO_YCBCR:  # the decoder gives components as they are
        tile = np.asarray(Image.fromarray(np.ascontiguousarray(tile), "YCbCr").convert("RGB"))
    return tile


def _scale(page: Any) -> float:
    """Micrometres a pixel, as Aperio's description or TIFF's resolution says; 0 for none, or what no scanner has.

    Raises:
        DataError: if pixels are no squares.
    """
    said: tuple[float, float] = (0.0, 0.0)
    text = str(page.description or "")
    stated = MPP.search(text) if text.startswith("Aperio ") else None
    if stated:
        said = (float(stated[1]), float(stated[1]))
    else:
        with contextlib.suppress(KeyError, ZeroDivisionError, TypeError, ValueError):
            unit = UNITS[int(page.tags["ResolutionUnit"].value)]
            sides = (page.tags[name].value for name in ("XResolution", "YResolution"))
            across, down = (unit * below / above for above, below in sides)
            said = (across, down)
    if not all(config.FINEST <= side <= config.COARSEST for side in said):
        return 0.0
    if abs(said[0] / said[1] - 1) > ISOTROPIC:
        raise defect.SLIDE_SCALE.error(
            f"{page.parent.filehandle.path}: pixels of {said[0]:g} x {said[1]:g} micrometres are no squares; scan or "
            "convert it with one scale"
        )
    return float(np.mean(said))
