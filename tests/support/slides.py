"""Drawn whole slides: glass with a patch of stained tissue, as pyramidal TIFF in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.simulation import drawn_cases

SIDE = 2048
STAINS = {"plain": (180, 60, 140), "spot": (60, 60, 200)}
PATCH = (512, 256, 1280, 1536)
"""Top, left, bottom, right of the tissue."""
DECODERS = ("tifffile", "imagecodecs")


def pixels(stain: Sequence[int] = STAINS["plain"], side: int = SIDE, seed: int = 0) -> np.ndarray:
    """Shapes: (side, side, 3)."""
    rng, made = np.random.default_rng(seed), np.full((side, side, 3), 240, dtype=np.uint8)
    top, left, bottom, right = (edge * side // SIDE for edge in PATCH)
    made[top:bottom, left:right] = np.asarray(stain) + rng.integers(-20, 21, (bottom - top, right - left, 3))
    return made


def write(
    path: Path,
    made: np.ndarray | None = None,
    *,
    mpp: float | None = 0.5,
    compression: str = "deflate",
    levels: int = 3,
    **more: Any,
) -> np.ndarray:
    """A slide of three levels, each half of the one before; what was drawn."""
    tifffile = pytest.importorskip("tifffile", reason="whole slides need the extra slides")
    pytest.importorskip("imagecodecs", reason="whole slides need the extra slides")
    made = pixels() if made is None else made
    shared = {"tile": (256, 256), "compression": compression, "photometric": "rgb", **more}
    scale = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as file:
        file.write(made, subifds=levels - 1, **shared, **scale)
        for level in range(1, levels):
            file.write(made[:: 2**level, :: 2**level], subfiletype=1, **{**shared, "description": None})
    return made


def folder(where: Path, sites: Sequence[str], side: int = 1024) -> Path:
    """``slides/`` with a slide a case, whose stain is its label, and ``index.csv``."""
    rows = [row for site in sites for row in drawn_cases.rows(site)]
    (where / "slides").mkdir(parents=True)
    for at, row in enumerate(rows):
        write(where / "slides" / f"{row['id']}.tif", pixels(STAINS[row["label"]], side, at))
    drawn_cases.table(where / "index.csv", rows)
    return where
