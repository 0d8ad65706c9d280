"""Box prompts from drawings: round each structure of a DICOM-SEG or RT structure set, on the slices it was drawn on.

The drawings are put on the images' own grid as masks are in training (:mod:`fedvfm.data.volumes.dicom_seg`): by the
images they name, checked in millimetres; what does not fit is refused, never resampled. Which class a structure is says
its name or code (:mod:`fedvfm.data.structures`); structures of no class are left alone. Every structure has one box a
slice, from its first to its last pixel, as in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import prompts as simulated
from fedvfm.data import structures
from fedvfm.data.volumes import dicom, dicom_seg, geometry, slices
from fedvfm.data.volumes import header as headers
from fedvfm.inference import inputs
from fedvfm.model import sliding_window

LEFT_OUT = "structure sets of the same images beside a DICOM-SEG in --boxes are left out: boxes go round its segments"

_ROUND = schema.TaskConfig(kind="segmentation", prompt="box", prompt_jitter=0.0)


@dataclass(frozen=True)
class Object:
    """One file of drawings.

    Attributes:
        file: where it lies.
        called: in messages, which never name files: these are often named after patients.
        named: SOP instance UIDs of the images that it says it was drawn on.
        held: its structures.
        contours: whether it is an RT structure set.
    """

    file: Path = field(repr=False)
    called: str
    named: frozenset[str] = field(repr=False)
    held: tuple[structures.Structure, ...] = field(repr=False)
    contours: bool


@dataclass(frozen=True)
class Drawn:
    """Boxes round what objects hold; see :class:`fedvfm.inference.boxes.Prompts`.

    Attributes:
        source: of the summary.
        class_names: of the recipe, background first.
        objects: all of them.
        table: class number of every structure, 0 for those of no class.
        alone: whether there is one input: an object that names no image may be meant for it.
    """

    source: Mapping[str, str]
    class_names: Sequence[str]
    objects: Sequence[Object] = field(repr=False)
    table: Mapping[structures.Key, int] = field(repr=False)
    alone: bool

    def of_picture(self, item: inputs.Item, size: tuple[int, int]) -> sliding_window.Boxes:
        """See :class:`fedvfm.inference.boxes.Prompts`."""
        raise errors.BoxesError(
            f"{item.name}: a picture, and drawings of DICOM belong to DICOM images; give its boxes as JSON, or take it "
            "out"
        )

    def of_slices(
        self, item: inputs.Item, header: headers.Header, view: slices.View
    ) -> dict[int, sliding_window.Boxes]:
        """See :class:`fedvfm.inference.boxes.Prompts`."""
        plane = slices.plane_of(header, view)
        axis = header.axis(plane)
        drawn: dict[int, dict[int, list[np.ndarray]]] = {}
        try:
            for drawing, key, number in self._structures(item, header):
                keys = {other.key: int(other.key == key) for other in drawing.held}
                dicom_seg.check(drawing.file, header)
                mask = dicom_seg.read(drawing.file, header, keys, dicom_seg.Merging(last=True))
                for at in np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis))):
                    shown = np.asarray(geometry.shown(mask, axis, int(at)), dtype=np.int64)
                    box = np.asarray(simulated.draw(shown, 2, _ROUND, np.random.default_rng(0)).boxes, np.float64)[0]
                    drawn.setdefault(int(at), {}).setdefault(number, []).append(box)
        except errors.DataError as error:
            raise _hidden(error, {known.file: known.called for known in self.objects}, f"{item.name}: ") from None
        if not drawn:
            raise errors.BoxesError(f"{item.name}: --boxes draws none of the classes on it, so nothing would be found")
        classes = range(1, len(self.class_names))
        return {
            at: tuple(np.array(here.get(number, np.zeros((0, 4)))) for number in classes)
            for at, here in sorted(drawn.items())
        }

    def notes(self, header: headers.Header | None) -> list[str]:
        """See :class:`fedvfm.inference.boxes.Prompts`."""
        fitting = [] if header is None else self._fitting(header)
        return [LEFT_OUT] if len({each.contours for each in fitting}) > 1 else []

    def _fitting(self, header: headers.Header) -> list[Object]:
        """The objects that were drawn on these images."""
        own = {frame.uid for frame in header.frames}
        return [each for each in self.objects if each.named & own or (self.alone and not each.named)]

    def _structures(self, item: inputs.Item, header: headers.Header) -> list[tuple[Object, structures.Key, int]]:
        """The structures drawn on an input that are a class, each with its object and class number.

        Raises:
            BoxesError: if no object was drawn on it, or two draw one class.
        """
        if header.kind != "dicom":
            raise errors.BoxesError(
                f"{item.name}: no DICOM, and drawings of DICOM belong to DICOM images; give its boxes as JSON"
            )
        fitting = self._fitting(header)
        if any(not each.contours for each in fitting):  # as in training: contours beside a segmentation are left out
            fitting = [each for each in fitting if not each.contours]
        if not fitting:
            raise errors.BoxesError(
                f"{item.name}: no object of --boxes was drawn on these images; bring the one that was, or take the "
                "input out"
            )
        drawn = [
            (each, key, self.table[key])
            for each in fitting
            for key in dict.fromkeys(structure.key for structure in each.held)
            if self.table[key]
        ]
        for number in {number for _, _, number in drawn}:
            by = {each.called for each, _, other in drawn if other == number}
            if len(by) > 1:
                raise errors.BoxesError(
                    f"{item.name}: class '{self.class_names[number]}' is drawn by {len(by)} objects of --boxes; keep "
                    "one"
                )
        return drawn


def holds(path: Path) -> bool:
    """Whether a path is a DICOM object, or a folder that may hold some."""
    return path.is_dir() or (path.is_file() and dicom.is_dicom(path))


def read(path: Path, items: Sequence[inputs.Item], contract: schema.DataContract) -> Drawn:
    """The drawings of a file, or of all objects in a folder.

    Args:
        path: a DICOM-SEG, an RT structure set, or a folder of these.
        items: what there is to predict.
        contract: of the recipe: its classes and their codes.

    Raises:
        BoxesError: if there are none, or their structures are none of the classes, or may be several.
        DataError: if one is damaged.
    """
    study = dicom.find(path)
    files = [(file, False) for file in study.segmentations] + [(file, True) for file in study.contours]
    if not files:
        raise errors.BoxesError(f"--boxes {path} holds no DICOM-SEG and no RT structure set; give such a file, or JSON")
    objects = []
    for at, (file, contours) in enumerate(files, 1):
        called = f"{'structure set' if contours else 'segmentation'} {at}"
        try:
            objects.append(Object(file, called, *dicom_seg.described(file, contours), contours))
        except errors.DataError as error:
            raise _hidden(error, {file: called}) from None
    names = contract.class_names
    assigned = structures.under({each.called: [each.held] for each in objects}, names, (), contract.codes)
    known = {} if assigned is None or assigned.table is None else dict(assigned.table)
    wanted = {key: number if number < len(names) else 0 for key, number in known.items()}
    if assigned is not None and assigned.faults:
        raise errors.BoxesError("--boxes: " + "; ".join(assigned.faults), assigned.faults)
    if assigned is None or assigned.names[: len(names)] != tuple(names) or not any(wanted.values()):
        raise errors.BoxesError(
            f"--boxes {path}: no structure has the name or code of a class ({', '.join(names[1:])}); name them so"
        )
    table = {structure.key: wanted.get(structure.key, 0) for each in objects for structure in each.held}
    digest = hashlib.sha256("".join(hashlib.sha256(each.file.read_bytes()).hexdigest() for each in objects).encode())
    kinds = sorted({"rtstruct" if each.contours else "dicom-seg" for each in objects})
    facts = {"kind": "+".join(kinds), "sha256": digest.hexdigest(), "coordinates": "mm-lps"}
    return Drawn(facts, names, objects, table, len(items) == 1)


def _hidden(error: errors.DataError, called: Mapping[Path, str], before: str = "") -> errors.BoxesError:
    """The same error, which calls files as messages may."""
    reason = str(error).removeprefix(before)
    for file, name in called.items():
        reason = reason.replace(str(file), f"--boxes, {name}")
    return errors.BoxesError(f"{before}{reason}")
