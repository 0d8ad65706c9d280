"""Box prompts for prediction: where each class is, said by a file in place of the truth.

>>> prompts = boxes.read(path, source, items, class_names)
>>> prompts.of_picture(item, (480, 640))          # boxes of each foreground class
>>> prompts.of_slices(item, header, view)         # slice -> boxes of each foreground class

The file is JSON::

    {"coordinates": "pixels", "boxes": {"images/a": {"tumour": [[12, 30, 40, 52]]}, "scan/z012": {"liver": [...]}}}
    {"coordinates": "mm-lps", "boxes": {"scan": {"liver": [[-20.5, 10, -310, 42, 88, -250]]}}}

Images are called as their results are, without ending; of DICOM the folder or file below the input may stand, too. With
``pixels`` a box is left, top, right, bottom of a picture or a slice as it is shown and before it is resized: numbers of
the first and the last pixel of the object, 0 the first of all, fractions allowed. With ``mm-lps`` (DICOM) or ``mm-ras``
(NIfTI) it is the two ends of a cuboid, x, y, z of the smaller numbers first, in millimetres of the patient; every slice
that it crosses is shown the box round its section. A class without a box is told to be absent, as in training.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
import pydantic
from numpy.typing import NDArray
from pydantic import Field

from fedvfm import errors
from fedvfm.config import base, schema
from fedvfm.data import side_files
from fedvfm.data.volumes import geometry, slices
from fedvfm.data.volumes import header as headers
from fedvfm.inference import inputs
from fedvfm.model import sliding_window

SHOWN = 10
"""Faults that a message lists."""
BORDER = 0.5
"""How far a box may reach beyond the middle of the outermost pixel: its edge."""
SAME_SLICE = 1e-3
"""How far, in slices, a box may end before a slice that it still counts to: rounding of millimetres."""
NUMBERS = {"pixels": 4, "mm-lps": 6, "mm-ras": 6}
NOTE = "prompted with boxes from a file: the masks are drawn where these say, and a class without a box is left out"

Floats = NDArray[np.float64]


class File(pydantic.BaseModel):
    """What the JSON file holds."""

    model_config = base.SETTINGS
    coordinates: Literal["pixels", "mm-lps", "mm-ras"]
    boxes: Annotated[dict[str, dict[str, list[list[float]]]], Field(min_length=1)]


class Prompts(Protocol):
    """Boxes of the inputs of one prediction."""

    @property
    def source(self) -> Mapping[str, str]:
        """Of the summary: the kind of the file, its sha256, its coordinates."""
        ...

    def of_picture(self, item: inputs.Item, size: tuple[int, int]) -> sliding_window.Boxes:
        """Boxes on a picture of ``size`` (height, width).

        Raises:
            BoxesError: if there is none, or one is wrong.
        """
        ...

    def of_slices(
        self, item: inputs.Item, header: headers.Header, view: slices.View
    ) -> dict[int, sliding_window.Boxes]:
        """Slice -> boxes on it as it is shown; slices without a box are left out.

        Raises:
            BoxesError: if there is none, or one is wrong.
        """
        ...

    def notes(self, header: headers.Header | None) -> list[str]:
        """What was left out of what is said of an input, one sentence each; ``header`` is None for a picture."""
        ...


Given = dict[str, dict[str, list[list[float]]]]
"""Slice ("" for all of the input) -> class -> boxes."""


@dataclass(frozen=True)
class Listed:
    """Boxes of a JSON file.

    Attributes:
        source: see :class:`Prompts`.
        class_names: of the recipe, background first.
        coordinates: see :class:`File`.
        given: item -> its boxes.
    """

    source: Mapping[str, str]
    class_names: Sequence[str]
    coordinates: str
    given: Mapping[str, Given] = field(repr=False)

    def of_picture(self, item: inputs.Item, size: tuple[int, int]) -> sliding_window.Boxes:
        """See :class:`Prompts`."""
        own = self._of(item)
        if self.coordinates != "pixels":
            raise errors.BoxesError(
                f"{item.name}: a picture has no place in a patient, so its boxes cannot be in millimetres "
                f"({self.coordinates}); give them with coordinates = pixels"
            )
        return self._on(item.name, own[""], size)

    def of_slices(
        self, item: inputs.Item, header: headers.Header, view: slices.View
    ) -> dict[int, sliding_window.Boxes]:
        """See :class:`Prompts`."""
        own, plane, names = self._of(item), slices.plane_of(header, view), slices.names(header, view)
        if self.coordinates != "pixels":
            return self._cut(item.name, own[""], header, plane)
        faults = [
            f"{item.name}: slice '{name}' is not there; they are {names[0]} to {names[-1]}"
            for name in own
            if name and name not in names
        ]
        if "" in own and len(names) > 1:
            faults.append(
                f"{item.name}: a volume of {len(names)} slices; give pixels of single ones ('{item.name}/{names[0]}'), "
                "or millimetres of the patient (mm-lps, mm-ras)"
            )
        _refuse(faults)
        size = header.size(plane)
        return {
            names.index(name) if name else 0: self._on(f"{item.name}/{name}" if name else item.name, classes, size)
            for name, classes in own.items()
        }

    def notes(self, header: headers.Header | None) -> list[str]:
        """See :class:`Prompts`."""
        return []

    def _of(self, item: inputs.Item) -> Given:
        if item.name not in self.given:
            raise errors.BoxesError(
                f"{item.name}: --boxes has none for it, so nothing would be found; add them, or take the image out"
            )
        return self.given[item.name]

    def _on(self, where: str, classes: Mapping[str, list[list[float]]], size: tuple[int, int]) -> sliding_window.Boxes:
        """Boxes in pixels, checked against an image of ``size`` (height, width) and cut at its outermost middles."""
        last = np.array([size[1] - 1, size[0] - 1] * 2, dtype=np.float64)
        _refuse(
            f"{where}: box {box} of class '{name}' reaches beyond the image; columns are 0 to {size[1] - 1}, rows 0 to "
            f"{size[0] - 1}, as left, top, right, bottom"
            for name, listed in classes.items()
            for box in listed
            if (np.asarray(box) < -BORDER).any() or (np.asarray(box) > last + BORDER).any()
        )
        return _sorted(self.class_names, {name: np.clip(listed, 0, last) for name, listed in classes.items()})

    def _cut(
        self, where: str, classes: Mapping[str, list[list[float]]], header: headers.Header, plane: geometry.Plane
    ) -> dict[int, sliding_window.Boxes]:
        """Sections of cuboids in millimetres with the slices of a volume."""
        if not (header.stored.placed and header.stored.sized) or header.moments:
            raise errors.BoxesError(
                f"{where}: the file does not say where it lies in the patient, so boxes cannot be in millimetres "
                f"({self.coordinates}); give them with coordinates = pixels"
            )
        sign = -1.0 if self.coordinates == "mm-lps" else 1.0
        last, back = np.asarray(header.grid.shape) - 1, np.linalg.inv(header.grid.affine)
        cut: dict[int, dict[str, list[Floats]]] = {}
        faults = []
        for name, listed in classes.items():
            for box in listed:
                ends = np.array(box).reshape(2, 3)
                corners = np.array(list(itertools.product(*ends.T))) * (sign, sign, 1.0)
                index = corners @ back[:3, :3].T + back[:3, 3]
                if (index < -BORDER - SAME_SLICE).any() or (index > last + BORDER + SAME_SLICE).any():
                    faults.append(
                        f"{where}: box {box} of class '{name}' reaches beyond the volume ({self.coordinates}), which "
                        f"holds {_extent(header.grid, sign)}"
                    )
                    continue
                sections = _sections(index, header.grid, header.axis(plane))
                if not sections:
                    faults.append(f"{where}: box {box} of class '{name}' lies between two slices; make it thicker")
                for at, section in sections.items():
                    cut.setdefault(at, {}).setdefault(name, []).append(section)
        _refuse(faults)
        return {
            at: _sorted(self.class_names, {name: np.stack(own) for name, own in sections.items()})
            for at, sections in sorted(cut.items())
        }


def read(
    path: Path,
    source: Path,
    items: Sequence[inputs.Item],
    class_names: Sequence[str],
    others: Container[str] = (),
) -> Prompts:
    """The boxes of a file, checked as far as can be without the images.

    Args:
        path: the file.
        source: the input that ``items`` were found in.
        items: what there is to predict.
        class_names: of the recipe, background first.
        others: names of inputs that are not predicted; boxes of these are left alone.

    Raises:
        ConfigError: if the file is not of its form.
        BoxesError: listing images and classes that are not there, and boxes that are none.
        DataError: if it cannot be read.
    """
    content = side_files.read_json(path)
    if not isinstance(content, dict):
        raise errors.ConfigError(f"--boxes {path}", ["holds no object with 'coordinates' and 'boxes'; see 'predict'"])
    file = schema.parse(File, content, f"--boxes {path}")
    called = {item.name: item for item in items}
    called |= {os.path.relpath(item.path, source): item for item in items if item.kind == "dicom"}
    given: dict[str, Given] = {}
    faults = []
    for image, classes in file.boxes.items():
        if image in others or image.rpartition("/")[0] in others:
            continue
        name, part = (image, "") if image in called else (image.rpartition("/")[0], image.rpartition("/")[2])
        in_slices = file.coordinates == "pixels" and name in called and called[name].kind != "picture"
        if image not in called and not in_slices:
            faults.append(f"'{image}' is no input, as '{items[0].name}' is; correct the name or take it out")
            continue
        own = given.setdefault(called[name].name, {})
        if part in own:
            faults.append(f"'{image}' stands under two names; keep one")
        own[part] = classes
        faults += _faults(image, classes, class_names[1:], file.coordinates)
    _refuse(faults)
    facts = {"kind": "json", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "coordinates": file.coordinates}
    return Listed(facts, class_names, file.coordinates, given)


def _faults(image: str, classes: Mapping[str, list[list[float]]], known: Sequence[str], coordinates: str) -> list[str]:
    """What is wrong with the boxes of one image whatever it looks like."""
    if not classes:
        return [f"'{image}' has no box at all; add one, or take the image out"]
    count = NUMBERS[coordinates]
    faults = [f"'{image}': '{name}' is no class of {', '.join(known)}" for name in classes if name not in known]
    for name, listed in classes.items():
        if not listed:
            faults.append(f"'{image}': class '{name}' has an empty list; leave it out where the class is not there")
        for box in listed:
            if len(box) != count:
                faults.append(
                    f"'{image}': box {box} of class '{name}' has {len(box)} numbers, {coordinates} take {count}"
                )
            elif any(low > high for low, high in zip(box[: count // 2], box[count // 2 :], strict=True)):
                faults.append(f"'{image}': box {box} of class '{name}' ends before it begins; smaller numbers first")
    return faults


def scaled(boxes: sliding_window.Boxes, size: Sequence[int], to: Sequence[int]) -> sliding_window.Boxes:
    """Boxes of an image of ``size`` (height, width) on the same image resized ``to``, cut at its outermost middles."""
    factor = np.array([to[1] / size[1], to[0] / size[0]] * 2)
    last = np.array([to[1] - 1, to[0] - 1] * 2)
    return tuple(np.clip((own + 0.5) * factor - 0.5, 0, last) for own in boxes)


def counted(class_names: Sequence[str], boxes: Sequence[sliding_window.Boxes]) -> dict[str, int]:
    """How many boxes each class has."""
    return {name: sum(len(each[at]) for each in boxes) for at, name in enumerate(class_names[1:])}


def _sorted(class_names: Sequence[str], given: Mapping[str, Floats]) -> sliding_window.Boxes:
    return tuple(np.asarray(given.get(name, np.zeros((0, 4))), dtype=np.float64) for name in class_names[1:])


def _refuse(faults: Iterable[str]) -> None:
    listed = list(faults)
    if listed:
        more = f"; and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        raise errors.BoxesError("; ".join(listed[:SHOWN]) + more, listed)


def _extent(grid: geometry.Grid, sign: float) -> str:
    """The smallest and largest millimetres of a grid's voxels along each axis."""
    corners = grid.world(np.array(list(itertools.product(*[(0, side - 1) for side in grid.shape])))) * (sign, sign, 1.0)
    ends = zip("xyz", corners.min(axis=0), corners.max(axis=0), strict=True)
    return ", ".join(f"{axis} {low:.1f} to {high:.1f}" for axis, low, high in ends)


def _sections(corners: Floats, grid: geometry.Grid, axis: int) -> dict[int, Floats]:
    """Slice -> the box, as shown, round its section with a parallelepiped.

    Shapes: corners (8, 3), voxel indices in canonical axes in the order of ``itertools.product`` -> (4,) each.
    """
    edges = [(a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b) in (1, 2, 4)]
    low, high = float(corners[:, axis].min()), float(corners[:, axis].max())
    first, last = max(0, math.ceil(low - SAME_SLICE)), min(grid.shape[axis] - 1, math.floor(high + SAME_SLICE))
    across, down = (kept for kept in range(3) if kept != axis)
    sections = {}
    for at in range(first, last + 1):
        level, points = min(max(float(at), low), high), []
        for start, end in ((corners[a], corners[b]) for a, b in edges):
            if min(start[axis], end[axis]) <= level <= max(start[axis], end[axis]):
                along = end[axis] - start[axis]
                points += [start, end] if along == 0 else [start + (level - start[axis]) / along * (end - start)]
        section = np.array(points)
        x, y = grid.shape[across] - 1 - section[:, across], grid.shape[down] - 1 - section[:, down]
        ends = np.array([x.min(), y.min(), x.max(), y.max()])
        sections[at] = np.clip(ends, 0, [grid.shape[across] - 1, grid.shape[down] - 1] * 2)
    return sections
