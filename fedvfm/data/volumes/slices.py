"""Slices of volumes as samples: cut, stacked and scaled as the recipe asks, the same in training and in prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedvfm.config import schema
from fedvfm.config import slides as slides_config
from fedvfm.data import defect
from fedvfm.data import sample as data
from fedvfm.data.volumes import geometry, volumes
from fedvfm.data.volumes import header as headers

LETTERS: dict[geometry.Plane, str] = {"axial": "z", "coronal": "y", "sagittal": "x", "acquired": "f"}


@dataclass(frozen=True, slots=True)
class View:
    """How volumes are looked at.

    Attributes:
        plane: across which they are cut.
        stack: 3 shows a slice between its neighbours, one a channel (2.5D).
        limits: the lowest and highest value shown, in the files' units; None shows the whole range of each volume.
        series: words that say which series of a DICOM folder is meant; see :mod:`fedvfm.data.volumes.series_selector`.
        slides: which tiles of whole slides are taken; None where no recipe says it.
    """

    plane: geometry.Plane = "axial"
    stack: int = 1
    limits: tuple[float, float] | None = None
    series: str = ""
    slides: slides_config.SlidesConfig | None = None

    @classmethod
    def of(cls, contract: schema.DataContract, series: str = "") -> Self:
        """The view a recipe asks for, of the series the owner of the files means."""
        return cls(contract.plane, contract.stack, contract.limits, series, contract.slides)


def plane_of(header: headers.Header, view: View) -> geometry.Plane:
    """The plane a volume is really cut in: one of the three by name where the file says how it lies.

    Radiographs, photographs and films have their own only, "acquired".
    """
    if not header.stored.placed:
        return "acquired"
    axis = header.axis(view.plane)
    return next(plane for plane, across in geometry.ACROSS.items() if across == axis)


def read(files: Sequence[Path], index: int, view: View = View()) -> data.Pixels:
    """One slice; several files are channels of one volume.

    Shapes: image (C, H, W) as shown (:func:`fedvfm.data.volumes.geometry.shown`): one channel a file, three in colour
    or in a
        stack.
    Units: 0 and 1 stand for the limits of the view, else for the smallest and largest value of the *volume*.

    Raises:
        DataError: for files that cannot be read, a stack of what has channels already, or a window on colour.
    """
    header = volumes.read_header(files[0], view.series)
    if view.stack > 1 and (len(files) > 1 or header.channels > 1):
        raise defect.CHANNELS.error(
            f"{files[0]}: has channels of its own, but recipe.data.stack = {view.stack} makes channels of neighbouring "
            "slices; choose one with data.options.channels = [0], or leave stack out of the recipe"
        )
    plane = plane_of(header, view)
    parts = [
        _scaled(file, indices, plane, view) for file in files for indices in [_indices(header, index, plane, view)]
    ]
    units = parts[0][1] if len({unit for _, unit, _ in parts}) == 1 else None
    image = np.ascontiguousarray(np.concatenate([part for part, _, _ in parts]), dtype=np.float32)
    orientation = header.stored.codes if header.stored.placed else None
    padding = [padded for _, _, padded in parts if padded is not None]
    # What is padding in one channel only still has a value in another.
    padded = np.logical_and.reduce(padding) if len(padding) == len(parts) else None
    return data.Pixels(image, None, header.spacing(plane), units, orientation, padded=padded)


def _indices(header: headers.Header, index: int, plane: geometry.Plane, view: View) -> tuple[int, ...]:
    return volumes.neighbours(header, index, plane) if view.stack > 1 else (index,)


def _scaled(
    file: Path, indices: Sequence[int], plane: geometry.Plane, view: View
) -> tuple[NDArray[np.float32], tuple[float, float] | None, NDArray[np.bool_] | None]:
    """Slices of one file as channels in [0, 1], what 0 and 1 stand for (None in colour), and where all are padding."""
    colour = volumes.read_header(file, view.series).channels > 1
    if colour and view.limits is not None:
        raise defect.CHANNELS.error(
            f"{file}: in colour, but recipe.data.window is for grey values; leave one of them out"
        )
    low, high = view.limits if view.limits is not None else volumes.value_range(file, view.series)
    read = [volumes.read_shown(file, index, plane, view.series) for index in indices]
    planes = [values for values, _ in read]
    values = np.stack(planes).astype(np.float64) if not colour else np.moveaxis(planes[0], -1, 0).astype(np.float64)
    scaled = (values - low) / (high - low) if high > low else np.zeros(values.shape)
    for channel, (_, padded) in enumerate(read):
        if padded is not None:
            scaled[channel][padded] = 0.0
    together = [padded for _, padded in read if padded is not None]
    where = np.logical_and.reduce(together) if len(together) == len(read) else None
    return np.asarray(np.clip(scaled, 0.0, 1.0), dtype=np.float32), None if colour else (low, high), where


def names(header: headers.Header, view: View) -> list[str]:
    """How the slices of a volume are called, in their order: by the axis across which they are cut, and number."""
    plane = plane_of(header, view)
    letter = LETTERS[plane]
    return [f"{letter}{index:03d}" for index in range(header.count(plane))]


def part_of(header: headers.Header, name: str, index: int, view: View) -> data.Part | None:
    """The place of a slice in its volume, or None where slices make no volume: one alone, or moments of a film."""
    plane = plane_of(header, view)
    step, of = header.step(plane), header.count(plane)
    return data.Part(name, index, of, step) if step is not None and of > 1 else None


def read_mask(file: Path, index: int, image: headers.Header, view: View = View()) -> NDArray[Any]:
    """One slice of a label volume on the grid of ``image``, its values as stored.

    Shapes: (H, W), as :func:`read` shows the image.

    Raises:
        DataError: if it cannot be read.
    """
    # The image's axis, by name: of a radiograph's mask the coarsest axis may be one of its rows.
    axis = image.axis(plane_of(image, view))
    plane = next(plane for plane, across in geometry.ACROSS.items() if across == axis)
    return volumes.read_slice(file, index, plane)
