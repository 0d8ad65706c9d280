"""What prediction leaves: masks in the form of the input, overlays, tables. File names are those of the items."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import colours, overlay
from fedvfm.data.volumes import header as headers
from fedvfm.data.volumes import volumes
from fedvfm.inference import inputs, segmentation_object
from fedvfm.storage import storage
from fedvfm.tasks import boxes as boxing

SUMMARY = "summary.json"
OVERLAYS = "overlays"
CLASSES = "classes.csv"
VALUES = "values.csv"
PARTS = "parts.csv"
VOLUMES = "volumes.csv"
SOURCES = "sources.csv"
OWN = {"picture": "png", "volume": "nifti", "dicom": "dicom-seg"}

BOXES = "boxes.csv"

Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class Detected:
    """Boxes of one image.

    Attributes:
        name: of the picture or slice.
        slice: its number in the volume, from 0; None of a picture.
        size: height and width of the image.
        boxes: on its own pixels, as it is shown.
        voxels: of each box of a volume, in the axes of its file: :func:`fedvfm.data.volumes.geometry.box_back`; None
            of a picture. Shapes: (N, 6).
    """

    name: str
    slice: int | None
    size: tuple[int, int]
    boxes: boxing.Boxes
    voxels: NDArray[np.float64] | None = None

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """A box a row, by falling score."""
        given = zip(self.boxes.classes, self.boxes.scores, self.boxes.edges, strict=True)
        rows: list[dict[str, Any]] = [
            {
                "image": self.name,
                **({} if self.slice is None else {"slice": self.slice}),
                "class": names[number],
                "score": round(float(score), 4),
                "box": [round(float(edge), 2) for edge in edges],
            }
            for number, score, edges in given
        ]
        for row, voxels in zip(rows, () if self.voxels is None else self.voxels, strict=self.voxels is not None):
            row["voxels"] = [round(float(edge), 2) for edge in voxels]
        return rows


def form_of(item: inputs.Item, asked: str) -> str:
    """The form of an item's mask.

    Raises:
        DataError: if its kind cannot have the form that was asked for.
    """
    if asked == "auto":
        return OWN[item.kind]
    if item.kind == "picture" and asked != "png":
        raise errors.DataError(
            f"a picture has no place in a patient, so its mask cannot be {asked}; write PNG: --as png"
        )
    if item.kind == "volume" and asked == "dicom-seg":
        raise errors.DataError("a DICOM-SEG object refers to DICOM images, and this is none; write NIfTI: --as nifti")
    return asked


def counts(labels: Labels, names: Sequence[str], header: headers.Header | None = None) -> dict[str, Any]:
    """Voxels of each class, and their volume where the input says how large a voxel is.

    Of a radiograph or photograph with known pixel size, and of one slice of unknown thickness, it is the area.
    """
    found = np.bincount(labels.ravel(), minlength=len(names))
    rows: dict[str, dict[str, Any]] = {name: {"voxels": int(count)} for name, count in zip(names, found, strict=True)}
    if header is not None and header.stored.sized:
        for row in rows.values():
            row |= _extent(row["voxels"], header)
    return rows


def _extent(voxels: int, header: headers.Header) -> dict[str, float]:
    spacing = header.stored.spacing
    if not header.stored.placed or header.moments or not header.thick:
        return {"mm2": round(voxels * spacing[0] * spacing[1], 6)}
    # Of a tilted grid it is the parallelepiped, not the product of the edges.
    volume = voxels * float(abs(np.linalg.det(header.stored.affine[:3, :3])))
    return {"mm3": round(volume, 6), "ml": round(volume / 1000.0, 9)}


def _png(mask: Labels, classes: int) -> bytes:
    """A picture of class numbers, each in a colour of its own so that a viewer shows them."""
    picture, out = Image.fromarray(mask, mode="P"), io.BytesIO()
    picture.putpalette(colours.palette(classes))
    # Written with 8 bits and the palette in the order of the classes: optimising could change the numbers.
    picture.save(out, format="PNG", bits=8, compress_level=9)
    return out.getvalue()


class Place:
    """The output folder while one input after the other is written.

    Args:
        folder: empty at first, so what is there already is another input's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[str] = []

    def begin(self) -> None:
        """The next input: ``files`` holds what is written of it."""
        self.files = []

    def discard(self) -> None:
        """Remove what was written of this input."""
        for name in self.files:
            with contextlib.suppress(OSError):  # not there, or no name that could be
                (self.folder / name).unlink()
        self.begin()

    def _new(self, name: str) -> Path:
        path = self.folder / name
        if name.casefold() == SUMMARY:
            raise errors.DataError(f"its result would be {name}, which tells of all inputs; rename it")
        if os.path.lexists(path):
            raise errors.DataError(f"its result {name} would replace that of another input; rename one of them")
        self.files.append(name)
        return path

    def picture(self, name: str, mask: Labels, classes: int) -> None:
        """A PNG of class numbers with a palette of colours."""
        storage.write_bytes(self._new(f"{name}.png"), _png(mask, classes))

    def boxes(self, name: str, images: Sequence[Detected], names: Sequence[str]) -> None:
        """A JSON of boxes (left, top, right, bottom) in pixels, by their edges: 0 is the left edge of the first one.

        Of a volume they are on its slices as shown, and each also says where it is in the axes of the file.
        """
        unit = "pixels; left, top, right, bottom, by edges"
        if any(each.voxels is not None for each in images):
            unit += ", on slices as shown; voxels: begin and end along the three axes of the file"
        written = {
            "id": name,
            "unit": unit,
            "images": [
                {"image": each.name, "size": list(each.size), **({} if each.slice is None else {"slice": each.slice})}
                for each in images
            ],
            "boxes": [row for each in images for row in each.rows(names)],
        }
        storage.write_text(self._new(f"{name}.json"), json.dumps(written, indent=2, ensure_ascii=False) + "\n")

    def nifti(self, name: str, labels: Labels, header: headers.Header) -> None:
        """A NIfTI on the input's own grid, packed unless the input is a NIfTI that is not."""
        ending = ".nii" if header.path.name.lower().endswith(".nii") else ".nii.gz"
        volumes.write_nifti(self._new(f"{name}{ending}"), labels, header)

    def dicom_seg(
        self,
        name: str,
        labels: Labels,
        header: headers.Header,
        contract: schema.DataContract,
        fingerprint: str,
        prompts: str = "",
    ) -> None:
        """A DICOM-SEG object of the source's study."""
        names, codes = contract.class_names, contract.codes
        segmentation_object.write(self._new(f"{name}.dcm"), labels, header, names, fingerprint, codes, prompts)

    def shown(
        self,
        name: str,
        image: NDArray[np.float32],
        lines: Sequence[str],
        scale: tuple[overlay.Colour, overlay.Colour] | None = None,
    ) -> None:
        """An image as it is, with what is to be known of it below: see :func:`fedvfm.data.overlay.captioned`."""
        pixels = overlay.captioned(overlay.as_shown(image), lines, scale)
        storage.write_bytes(self._new(f"{OVERLAYS}/{name}.png"), overlay.png(pixels))

    def overlay(self, name: str, image: NDArray[np.float32], mask: Labels) -> None:
        """The image with every class tinted and outlined, at its own size."""
        height, width = mask.shape
        shown = overlay.drawn(image, mask, (height, width))
        storage.write_bytes(self._new(f"{OVERLAYS}/{name}.png"), overlay.png(shown))


def write_tables(folder: Path, summary: Mapping[str, Any], numbered: Sequence[inputs.Item]) -> None:
    """``classes.csv``, ``values.csv`` or ``boxes.csv``; ``parts.csv`` of cases; ``volumes.csv``; ``sources.csv``.

    The first holds classes, the columns of a target that has columns, or boxes. The second says how much each answer
    rests on each image. The third, of masks, has the millilitres of each class but the first, the background, of every
    input whose voxels have a size, as ``recipe.inputs`` takes a table. The last holds paths of DICOM inputs as this
    site names them, for this site alone; nothing else repeats them.
    """
    rows = [row for row in summary["inputs"] if "probabilities" in row or "values" in row]
    if rows and "values" in rows[0]:
        columns = list(rows[0]["values"])
        lines = [[row["id"], *(row["values"][name] for name in columns)] for row in rows]
        storage.write_text(folder / VALUES, storage.table(["id", *columns], lines))
    elif rows:
        names = summary["class_names"]
        lines = [[row["id"], row["class"], *(row["probabilities"][name] for name in names)] for row in rows]
        storage.write_text(folder / CLASSES, storage.table(["id", "class", *(f"p_{name}" for name in names)], lines))
    detected = [(row["id"], box) for row in summary["inputs"] for box in row.get("boxes", ())]
    if summary["task"] == "detection":
        lines = [
            [name, box["image"], box["class"], box["score"], *box["box"], *box.get("voxels", [""] * 6)]
            for name, box in detected
        ]
        head = ["id", "image", "class", "score", "left", "top", "right", "bottom"]
        head += [f"{axis}_{end}" for end in ("begin", "end") for axis in "ijk"]
        storage.write_text(folder / BOXES, storage.table(head, lines))
    parts = [[row["id"], part["id"], part["weight"]] for row in rows for part in row.get("parts", ())]
    if parts:
        storage.write_text(folder / PARTS, storage.table(["id", "part", "weight"], parts))
    measured = [row for row in summary["inputs"] if any("ml" in each for each in row.get("classes", {}).values())]
    if measured:
        names = summary["class_names"][1:]
        lines = [[row["id"], *(row["classes"][name]["ml"] for name in names)] for row in measured]
        storage.write_text(folder / VOLUMES, storage.table(["id", *(f"{name}_ml" for name in names)], lines))
    if numbered:
        paths = [[item.name, str(item.path.absolute())] for item in numbered]
        storage.write_text(folder / SOURCES, storage.table(["id", "path"], paths))
