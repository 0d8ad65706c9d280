"""Whole slides: ``slides/NAME.svs`` (or .tif, .tiff, .btf) and a table with the columns ``id`` and ``label``.

A slide's images are its tiles of tissue (:mod:`fedvfm.data.slides.tissue`), as the recipe's ``[data.slides]`` says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.config import slides as config
from fedvfm.data import defect
from fedvfm.data import sample as data
from fedvfm.data.slides import slide_file, tissue
from fedvfm.data.sources import layouts

FOLDER = "slides"


def is_slide(file: Path) -> bool:
    """Whether a file may be a slide by its name."""
    return file.name.lower().endswith(slide_file.ENDINGS)


def stem(file: Path) -> str:
    """The name of a slide without its ending."""
    return next((file.name[: -len(end)] for end in slide_file.ENDINGS if file.name.lower().endswith(end)), file.stem)


def collect(folder: Path, options: layouts.Options) -> layouts.Layout:
    """The slides of ``slides/`` with the classes that a table gives them.

    Raises:
        DataError: if the table cannot be read.
    """
    layout = layouts.Layout("slides", options.class_names)
    where, rows = folder / FOLDER, layouts.rows_beside(layout, folder, FOLDER)
    if rows is None:
        return layout
    name, labels = rows
    files: dict[str, Path] = {}
    layout.faults += layouts.lost(where, f"{FOLDER}/")
    for path in sorted(where.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() in layouts.IGNORED or not path.exists():
            continue
        if not (path.is_file() and is_slide(path)):
            known = ", ".join(slide_file.ENDINGS)
            layout.faults.append(
                defect.ENDING.fault(f"{FOLDER}/{path.name}: of slides {known} are read; convert it, or move it away")
            )
        elif stem(path) in files:
            layout.faults.append(
                defect.NAME_TWICE.fault(f"{FOLDER}/{path.name}: same name as {files[stem(path)].name}; keep one")
            )
        else:
            files[stem(path)] = path
    every = layouts.with_imageless(layout, name, labels, files, layouts.imageless(folder))
    layout.faults += layouts.table_faults(folder, name, labels, every)
    layout.names = list(every)
    layout.left += layouts.beside(folder, [where])
    layouts.classify(layout, name, labels, every)
    layout.cases = [dataclasses.replace(each, mpp=options.mpp) if each.images else each for each in layout.cases]
    return layout


def look(path: Path, mpp: float) -> slide_file.Slide:
    """What a slide's header says, its scale among it; tissue is looked for on a small level.

    Raises:
        DataError: if it is unreadable, nobody says its scale, or it has no tissue.
    """
    slide = slide_file.read_header(path)
    slide = dataclasses.replace(slide, mpp=tissue.scale_of(slide, mpp))
    tiles(slide, None)
    return slide


def tiles(slide: slide_file.Slide, asked: config.SlidesConfig | None) -> tuple[tissue.Tile, ...]:
    """The tiles that a recipe takes; without one those on any tissue, at the usual scale or the slide's own.

    Raises:
        DataError: as :func:`fedvfm.data.slides.tissue.choose`.
    """
    return tissue.choose(slide, _wanted(slide, asked)).tiles


def _wanted(slide: slide_file.Slide, asked: config.SlidesConfig | None) -> config.SlidesConfig:
    """What a recipe asks for; without one what :func:`tiles` says."""
    usual = config.SlidesConfig()
    return asked or usual.model_copy(update={"mpp": max(usual.mpp, slide.mpp), "tissue": 0.0})


def faults_under(slide: slide_file.Slide | None, where: str, contract: schema.DataContract) -> list[errors.Fault]:
    """Why a slide cannot be used under a recipe, or another image under a recipe of slides."""
    if slide is None and contract.slides is not None:
        return [
            defect.SLIDE_NEEDED.fault(
                f"{where}: is no whole slide, and the recipe takes tiles of slides (recipe.data.slides); bring slides, "
                "or ask for a recipe without it"
            )
        ]
    if slide is None:
        return []
    if contract.slides is None:
        return [
            defect.SLIDE_NEEDED.fault(
                f"{where}: a whole slide, and the recipe does not say which tiles of it are taken; the recipe needs "
                "[data.slides], with task kind case-classification"
            )
        ]
    try:
        tiles(slide, contract.slides)
    except errors.DataError as error:
        text = str(error).removeprefix(f"{slide.path}: ")
        return [errors.Fault(f"{where}: {text}", error.code)]
    return []


def read(slide: slide_file.Slide, index: int, asked: config.SlidesConfig | None) -> data.Pixels:
    """One tile.

    Raises:
        DataError: if it cannot be read.
    """
    chosen = _wanted(slide, asked)
    pixels = tissue.read(slide, tissue.choose(slide, chosen).tiles[index], chosen)
    image = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(255.0)
    size = chosen.mpp / 1000.0
    return data.Pixels(image, spacing=(size, size))


def names(slide: slide_file.Slide, asked: config.SlidesConfig | None) -> Sequence[str]:
    """How its tiles are called, in their order: by their upper left corner in pixels of the slide."""
    return [tile.name for tile in tiles(slide, asked)]
