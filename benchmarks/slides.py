"""A large whole slide: seconds to find its tissue and to read its tiles, and the most memory that it takes.

    python benchmarks/slides.py [--side 40000] [--tile 224] [--mpp 0.5]

The slide is drawn: glass with 12 patches of stained noise on 2 % of it, four levels in tiles of 256 pixels, packed by
deflate and written tile by tile, so that it is never in memory either. Memory is that of this process, which chooses
the tiles, and of the child process, which decodes; beside it, what the pixels of the finest level would take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile

from fedvfm.config import slides as config
from fedvfm.data.decoding import decoder
from fedvfm.data.slides import slide_file, tissue

CELL, LEVELS, MPP = 256, 4, 0.25
PATCHES = 12


def tiles(side: int, patches: list[tuple[int, int]], radius: int) -> Iterator[np.ndarray]:
    """The tiles of a level in their order: noise where a patch is, else glass."""
    rng, glass = np.random.default_rng(0), np.full((CELL, CELL, 3), 240, dtype=np.uint8)
    stained = (np.array([180, 60, 140]) + rng.integers(-20, 21, (CELL, CELL, 3))).astype(np.uint8)
    for top, left in itertools.product(range(0, side, CELL), repeat=2):
        inside = any(abs(top - row) < radius and abs(left - column) < radius for row, column in patches)
        yield stained if inside else glass


def draw(path: Path, side: int) -> None:
    """Write the slide."""
    rng = np.random.default_rng(1)
    patches = [(int(row), int(column)) for row, column in rng.integers(0, side, (PATCHES, 2))]
    radius = int(side * (0.02 / PATCHES) ** 0.5 / 2)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(LEVELS):
            shrink = 2 ** (2 * level)
            own = side // shrink
            file.write(
                tiles(own, [(row // shrink, column // shrink) for row, column in patches], max(radius // shrink, CELL)),
                shape=(own, own, 3),
                dtype=np.uint8,
                tile=(CELL, CELL),
                compression="deflate",
                photometric="rgb",
                subifds=LEVELS - 1 if level == 0 else 0,
                subfiletype=int(level > 0),
                resolution=(1e4 / MPP, 1e4 / MPP),
                resolutionunit="CENTIMETER",
            )


def _peak(who: int) -> float:
    return round(resource.getrusage(who).ru_maxrss / 1024, 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=40_000)
    parser.add_argument("--tile", type=int, default=224)
    parser.add_argument("--mpp", type=float, default=0.5)
    chosen = parser.parse_args()
    wanted = config.SlidesConfig(tile=chosen.tile, mpp=chosen.mpp)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        draw(path, chosen.side)
        before = _peak(resource.RUSAGE_SELF)
        begun = time.perf_counter()
        slide = slide_file.read_header(path)
        picked = tissue.choose(slide, wanted)
        found_s = time.perf_counter() - begun
        begun = time.perf_counter()
        for tile in picked.tiles:
            tissue.read(slide, tile, wanted)
        read_s = time.perf_counter() - begun
        decoder.close()
        print(
            json.dumps(
                {
                    "levels": slide.levels,
                    "file_mib": round(path.stat().st_size / 2**20, 1),
                    "whole_slide_mib": round(chosen.side**2 * 3 / 2**20),
                    "tiles_on_tissue": picked.on_tissue,
                    "tiles_read": len(picked.tiles),
                    "choose_s": round(found_s, 2),
                    "ms_a_tile": round(1000 * read_s / len(picked.tiles), 2),
                    "process_mib_before": before,
                    "process_mib": _peak(resource.RUSAGE_SELF),
                    "decoder_mib": _peak(resource.RUSAGE_CHILDREN),
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
