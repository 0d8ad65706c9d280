"""How whole slides become cases: which tiles of a slide a recipe takes."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

from fedvfm.config import base

FINEST, COARSEST = 0.05, 20.0
"""Micrometres a pixel: what scanners and their levels have; what a file says beyond is taken as not said."""
SCALES = f"from {FINEST:g} to {COARSEST:g} micrometres a pixel"


class SlidesConfig(pydantic.BaseModel):
    """Square tiles on a grid from the slide's upper left corner, all of one scale; see :mod:`fedvfm.data.slides`."""

    model_config = base.SETTINGS

    tile: Annotated[int, Field(ge=16, le=4096)] = 224
    """(pixels) Side of a tile, before it is brought to input_size. Change: together with mpp, for what a tile shows."""
    mpp: Annotated[float, Field(ge=FINEST, le=COARSEST)] = 0.5
    """(micrometres a pixel) Scale of the tiles: 0.5 is 20x, 0.25 is 40x. Change: to 1 or 2 where the answer lies in
    tissue and not in cells; tiles get fewer."""
    tissue: base.Fraction = 0.25
    """(share) Least part of a tile that must be tissue. Change: down for small biopsies."""
    most: Annotated[int, Field(ge=1, le=100_000)] = 512
    """(tiles) Most that are taken of a slide; of more, tiles at even steps in reading order. Change: up where little of
    a slide decides."""
