"""An image with its mask as a person sees it: contrast stretched, classes tinted and outlined, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from fedvfm.data import colours, transforms

WIDEST, NARROW = 360, 240
FILL = 0.42

FONT, LINE, MARGIN, BAR = 12, 15, 4, 8
"""Pixels of a caption: size of its letters, from line to line, around it, and height of a scale."""

Picture8 = NDArray[np.uint8]
Colour = tuple[int, int, int]


def as_shown(image: NDArray[np.float32], size: tuple[int, int] | None = None) -> Picture8:
    """An image at ``size``, or that of the report, contrast stretched. Shapes: (C, H, W) in [0, 1] -> (h, w, 3)."""
    stretched = transforms.stretch(image)
    coloured = np.repeat(stretched, 3, axis=0) if len(stretched) == 1 else stretched
    height, width = size or display_size(*image.shape[1:])
    if width < image.shape[2]:
        coloured = transforms.resize(coloured, (height, width))
    else:
        coloured = np.repeat(np.repeat(coloured, width // image.shape[2], axis=2), height // image.shape[1], axis=1)
    return np.asarray(np.round(np.moveaxis(coloured, 0, -1) * 255), dtype=np.uint8)


def display_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) in the report: wide images shrunk to 360, thumbnails enlarged by a whole number."""
    if width > WIDEST:
        return max(1, round(height * WIDEST / width)), WIDEST
    factor = max(1, NARROW // width)
    return height * factor, width * factor


def drawn(image: NDArray[np.float32], mask: NDArray[Any], size: tuple[int, int] | None = None) -> Picture8:
    """The grey image with every foreground class tinted and outlined, see :func:`as_shown`.

    Shapes: (C, H, W), (H, W) -> (h, w, 3).
    """
    grey = as_shown(transforms.to_grey(image), size).astype(np.float64)
    height, width = grey.shape[:2]
    shown = transforms.resize_mask(mask, (height, width))
    edges = _edges(shown)
    for number in np.unique(shown[shown > 0]):
        paint = np.array([int(colours.of(int(number))[at : at + 2], 16) for at in (1, 3, 5)], dtype=np.float64)
        inside = shown == number
        grey[inside] = (1 - FILL) * grey[inside] + FILL * paint
        grey[inside & edges] = paint
    return np.asarray(np.round(grey), dtype=np.uint8)


def _edges(mask: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Pixels with a neighbour (up, down, left, right) of another class. Shapes: (H, W)."""
    framed = np.pad(mask, 1, mode="edge")
    around = (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:])
    return np.asarray(np.logical_or.reduce([near != mask for near in around]), dtype=np.bool_)


def captioned(pixels: Picture8, lines: Sequence[str], scale: tuple[Colour, Colour] | None = None) -> Picture8:
    """A picture with text below it, on white, and above the text a scale from one colour to the other.

    No pixel of the picture is covered. Shapes: (h, w, 3) -> (h + more, at least w, 3).
    """
    font = ImageFont.load_default(FONT) if features.check("freetype2") else ImageFont.load_default()
    height, width = pixels.shape[:2]
    wide = max(width, 2 * MARGIN + math.ceil(max(font.getlength(line) for line in lines)))
    bar = 0 if scale is None else BAR + MARGIN
    shown = Image.new("RGB", (wide, height + bar + 2 * MARGIN + LINE * len(lines)), "white")
    shown.paste(Image.fromarray(pixels), (0, 0))
    if scale is not None:
        share = np.linspace(0.0, 1.0, wide - 2 * MARGIN)[None, :, None]
        ramp = np.round((1 - share) * scale[0] + share * scale[1]).astype(np.uint8).repeat(BAR, axis=0)
        shown.paste(Image.fromarray(ramp), (MARGIN, height + MARGIN))
    draw = ImageDraw.Draw(shown)
    for at, line in enumerate(lines):
        draw.text((MARGIN, height + bar + MARGIN + at * LINE), line, fill="black", font=font)
    return np.asarray(shown, dtype=np.uint8)


def png(pixels: Picture8) -> bytes:
    """PNG file of (h, w, 3) bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", optimize=True)
    return out.getvalue()
