"""RT structure sets: closed contours of named regions of interest, drawn as masks on the grid of the images.

A contour is put on the slice it refers to by SOP instance UID (and frame number), or, where it refers to none, on the
slice at its place. Both are checked against the images' own grid: contours of other images, between the slices or
across them, and a structure drawn on every second slice only, are refused. Regions are called by their names
(:mod:`fedvfm.data.structures`), which are compared and never shown.

Sources: DICOM PS3.3, C.8.8.5 (Structure Set), C.8.8.6 (ROI Contour), C.8.8.8 (RT ROI Observations).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import defect, structures
from fedvfm.data.volumes import contours, dicom, geometry
from fedvfm.data.volumes import header as headers

TAGS = (
    "FrameOfReferenceUID",
    "ROIContourSequence",
    "RTROIObservationsSequence",
    "ReferencedFrameOfReferenceSequence",
    "StructureSetROISequence",
)
DATA = 0x30060050
"""Contour Data, read as the bytes it is stored in: pydicom makes an object of every number."""
CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
OPENED = ("OPEN_PLANAR", "OPEN_NONPLANAR")
FLAT = 0.25
"""How far the points of a contour may lie beside its plane, in slices."""
BESIDE = 0.4
"""How far a contour that names no image may lie from its slice, in slices; beyond it is as near to the next one."""
NAMED = 0.5
"""The same of one that names its image."""
SAME_PLANE = 0.05
"""How far, in slices, contours of one plane may lie from the next of it: millimetres are rounded when written."""
NOTED = 0.1
FEWEST = 3
"""Planes that are needed to say that a structure was drawn on every second slice only."""
BETWEEN = "contours lie between the slices; the nearest slice was taken, of several contours near it the nearest"
GAPS = "a structure has slices without a contour between slices with one; nothing is drawn there"
UNDRAWN = "a structure set names structures that have no closed contour; they count as not drawn"
OPEN = "a structure has open contours beside closed ones; the open ones hold no area and are left out"

Points = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Plane:
    """The contours of one region on one plane.

    Attributes:
        slice: the stored slice it is drawn on.
        beside: how far it lies from that slice, in slices.
        items: its contours as pydicom has them.
    """

    slice: int
    beside: float
    items: tuple[Any, ...]


def held(where: str, file: Path) -> list[structures.Structure]:
    """The regions of a structure set that have a closed contour, as its header describes them.

    Raises:
        DataError: if it is damaged.
    """
    return [structure for structure, _, _ in _regions(where, file)]


def images(where: str, file: Path) -> set[str]:
    """SOP instance UIDs of the images that a structure set names.

    Raises:
        DataError: if it is damaged.
    """
    tags = dicom.read_tags(file, where, TAGS)
    try:
        named = {
            str(item.ReferencedSOPInstanceUID)
            for frame in tags.get("ReferencedFrameOfReferenceSequence") or ()
            for study in frame.get("RTReferencedStudySequence") or ()
            for series in study.get("RTReferencedSeriesSequence") or ()
            for item in series.get("ContourImageSequence") or ()
        }
        drawn = (_named(region.get("ContourSequence") or ()) for region in tags.get("ROIContourSequence") or ())
        return named.union(*drawn)
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None


def _named(drawn: Sequence[Any]) -> set[str]:
    """SOP instance UIDs of the images that contours name."""
    items = (item for contour in drawn for item in contour.get("ContourImageSequence") or ())
    return {str(item.get("ReferencedSOPInstanceUID", "")) for item in items}


def check(where: str, file: Path, image: headers.Header) -> tuple[str, ...]:
    """Refuse a structure set that was made on other images; what is to be said of the others, one sentence each.

    Raises:
        DataError: also for images without a place in the patient.
    """
    if not image.stored.placed:
        raise defect.NO_GEOMETRY.error(
            f"{where}: contours in millimetres of the patient, but the images do not say where they lie in him; give "
            "the mask as PNG or DICOM-SEG"
        )
    named, own = images(where, file), {frame.uid for frame in image.frames}
    if (named and not named & own) or (not named and _other_frame(where, file, image)):
        raise defect.MASK_GEOMETRY.error(f"{where}: made on other images; bring the structure set of these")
    notes: list[str] = []
    for _, closed, _ in _regions(where, file, notes):
        try:
            planes = _planes(where, closed, image)
        except errors.DataError:
            continue  # told when it is drawn, if it counts
        taken = [plane.slice for plane in planes]
        if max(plane.beside for plane in planes) > NOTED or len(taken) > len(set(taken)):
            notes.append(BETWEEN)
        if np.diff(sorted(set(taken))).max(initial=1) > 1:
            notes.append(GAPS)
    return tuple(dict.fromkeys(notes))


def draw(
    where: str, file: Path, image: headers.Header, chosen: Mapping[structures.Key, int] | None
) -> Iterator[tuple[int, int, NDArray[np.bool_], NDArray[np.bool_]]]:
    """The regions as masks: class number, stored slice, the pixels inside and those on a line.

    Args:
        where: for messages.
        file: the structure set.
        image: the images it was drawn on.
        chosen: class number of every structure; what is not in it is not drawn. Without it all are, by their place in
            the file, from 1.

    Shapes: masks (columns, rows).

    Raises:
        DataError: for contours between or across the slices, outside of the images, or in another frame of reference;
            a structure drawn on every second slice only; coordinates that are no numbers.
    """
    columns, rows, _ = image.stored.shape
    own = _frame_of(where, image)
    for at, (structure, closed, frame) in enumerate(_regions(where, file), 1):
        number = at if chosen is None else chosen.get(structure.key)
        if not number:
            continue
        elsewhere = own and frame and frame != own
        if elsewhere and not _named(closed) & {each.uid for each in image.frames}:
            raise defect.MASK_GEOMETRY.error(
                f"{where}: {structure.shown} was drawn on other images, in another frame of reference; bring the "
                "structure set of these"
            )
        covered = 0
        for plane in _nearest(_checked(where, structure, _planes(where, closed, image))):
            try:
                rings = [_ring(where, item, image) for item in plane.items]
                exclusive = any(item.ContourGeometricType == CLOSED[1] for item in plane.items)
            except dicom.BROKEN as error:
                raise dicom.damaged(where, error) from None
            inside, line = contours.combined(rings, (rows, columns), exclusive=exclusive)
            covered += int(np.count_nonzero(inside | line))
            yield number, plane.slice, inside.T, line.T
        if not covered:
            raise defect.MASK_GEOMETRY.error(
                f"{where}: {structure.shown} covers no pixel: it lies beside the images, or is smaller than a pixel; "
                "correct or remove it"
            )


def _regions(
    where: str, file: Path, notes: list[str] | None = None
) -> list[tuple[structures.Structure, tuple[Any, ...], str]]:
    """Every region that has closed contours, with these and its frame of reference (empty where none is said).

    Where others are left out a note is added.
    """
    tags = dicom.read_tags(file, where, TAGS)
    try:
        listed = {int(item.ROINumber): item for item in tags.get("StructureSetROISequence") or ()}
        names = {number: str(item.get("ROIName") or "") for number, item in listed.items()}
        frames = {number: str(item.get("ReferencedFrameOfReferenceUID") or "") for number, item in listed.items()}
        codes = {
            int(item.ReferencedROINumber): structures.coded(item, "RTROIIdentificationCodeSequence")
            for item in tags.get("RTROIObservationsSequence") or ()
        }
        regions, partly = [], False
        for item in tags.get("ROIContourSequence") or ():
            number, drawn = int(item.ReferencedROINumber), item.get("ContourSequence") or ()
            closed = tuple(contour for contour in drawn if contour.ContourGeometricType in CLOSED)
            partly |= bool(closed) and any(contour.ContourGeometricType in OPENED for contour in drawn)
            code, meaning = codes.get(number, ("", ""))
            words = tuple({structures.plain(meaning)} - {""})
            name = structures.plain(names.get(number, ""))
            if closed:
                structure = structures.Structure(number, code, name, words, region=True)
                regions.append((structure, closed, frames.get(number, "")))
        if notes is not None and set(names) - {structure.value for structure, _, _ in regions}:
            notes.append(UNDRAWN)
        if notes is not None and partly:
            notes.append(OPEN)
        return regions
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None


def _frame_of(where: str, image: headers.Header) -> str:
    """The frame of reference of images, empty where they do not say it."""
    return str(dicom.read_tags(image.frames[0].file, where, ("FrameOfReferenceUID",)).get("FrameOfReferenceUID") or "")


def _other_frame(where: str, file: Path, image: headers.Header) -> bool:
    """Whether structure set and images say that they lie in different frames of reference."""
    tags = dicom.read_tags(file, where, TAGS)
    own = _frame_of(where, image)
    said = {
        str(item.get(name) or "")
        for sequence, name in (
            ("StructureSetROISequence", "ReferencedFrameOfReferenceUID"),
            ("ReferencedFrameOfReferenceSequence", "FrameOfReferenceUID"),
        )
        for item in tags.get(sequence) or ()
    } - {""}
    return bool(own and said and own not in said)


def _numbers(item: Any, most: int = -1) -> Points:
    """The coordinates of a contour, or the first of them, (points, 3) in LPS millimetres.

    Raises:
        ValueError: for what is no finite number, or no triplets.
    """
    stored = item.get_item(DATA).value
    if isinstance(stored, bytes):
        parts = stored.split(b"\\", most)[: most if most > 0 else None]
    else:
        parts = list(stored)[: most if most > 0 else None]
    points = np.array([float(part) for part in parts], dtype=np.float64)
    if points.size == 0 or points.size % 3 or not np.isfinite(points).all():
        raise ValueError
    return points.reshape(-1, 3)


def _indices(points: Points, image: headers.Header) -> Points:
    """Stored voxel indices (column, row, slice) of points in LPS millimetres."""
    inverse = np.linalg.inv(geometry.from_lps(image.stored.affine))
    return np.asarray(points @ inverse[:3, :3].T + inverse[:3, 3], dtype=np.float64)


def _planes(where: str, closed: Sequence[Any], image: headers.Header) -> list[Plane]:
    """The contours of a region by their planes, told by the first point of each.

    Raises:
        DataError: for a contour that lies beyond the images, or as near to one slice as to the next.
    """
    if any(item.get("ContourOffsetVector") for item in closed):
        raise defect.MASK_GEOMETRY.error(
            f"{where}: contours that are shifted by a Contour Offset Vector (retired), which is not read; export it "
            "again"
        )
    slices = {(frame.uid, frame.number): at for at, frame in enumerate(image.frames)}
    placed: dict[int, list[tuple[float, Any]]] = {}
    try:
        depths = [float(_indices(_numbers(item, 3), image)[0, 2]) for item in closed]
        for depth, item in zip(depths, closed, strict=True):
            named = dicom.named_slice(item.get("ContourImageSequence") or (), slices)
            at = round(depth) if named is None else named
            if not 0 <= at < len(image.frames) or abs(depth - at) > (BESIDE if named is None else NAMED):
                raise defect.MASK_GEOMETRY.error(
                    f"{where}: contours lie between the slices of the images, or beyond them; bring the structure set "
                    "that was drawn on these images"
                )
            placed.setdefault(at, []).append((depth - at, item))
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None
    return [
        Plane(at, max(abs(beside) for beside, _ in members), tuple(item for _, item in members))
        for at, own in sorted(placed.items())
        for members in _flat(own)
    ]


def _flat(own: Sequence[tuple[float, Any]]) -> Iterator[list[tuple[float, Any]]]:
    """Contours of one slice, with how far each lies from it, plane by plane: those of one are near to each other."""
    ordered = sorted(own, key=operator.itemgetter(0))
    ends = [at for at in range(1, len(ordered)) if ordered[at][0] - ordered[at - 1][0] > SAME_PLANE]
    for first, last in itertools.pairwise((0, *ends, len(ordered))):
        yield ordered[first:last]


def _nearest(planes: Sequence[Plane]) -> list[Plane]:
    """Of several planes that fall on one slice the nearest: contours of two planes are no hole in each other."""
    best: dict[int, Plane] = {}
    for plane in planes:
        if plane.slice not in best or plane.beside < best[plane.slice].beside:
            best[plane.slice] = plane
    return list(best.values())


def _checked(where: str, structure: structures.Structure, planes: Sequence[Plane]) -> Sequence[Plane]:
    """Planes of a structure that was not drawn on every second (third, ...) slice only.

    Raises:
        DataError: if it was, because nobody drew what lies between.
    """
    gaps = np.diff(sorted({plane.slice for plane in planes}))
    if len(gaps) >= FEWEST - 1 and gaps.min() > 1 and gaps.max() - gaps.min() <= 1:
        raise defect.MASK_GEOMETRY.error(
            f"{where}: {structure.shown} is drawn on every {gaps.min()}. slice only; let the planning system fill in "
            "the contours between, and export it again"
        )
    return planes


def _ring(where: str, item: Any, image: headers.Header) -> Points:
    """A contour in pixels, (points, 2) as (column, row).

    Raises:
        DataError: for one that does not lie in the plane of its slice.
    """
    points = _numbers(item)
    indices = _indices(points, image)
    if np.ptp(indices[:, 2]) > FLAT:
        raise defect.MASK_GEOMETRY.error(
            f"{where}: contours that do not lie in the plane of the slices; bring the structure set that was drawn on "
            "these images"
        )
    return indices[:, :2]
