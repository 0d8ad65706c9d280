"""DICOM-SEG: segments as a label volume on the grid of the images they were drawn on.

A frame of a segmentation is put on the slice it refers to by SOP instance UID (and frame number), or, where it refers
to none, on the slice at its position. Both are checked against the images' own grid: what does not fit is refused, not
resampled. Which structure a segment is says its coded type and label (:mod:`fedvfm.data.structures`): these are
compared and never shown.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm.data import defect, structures
from fedvfm.data.volumes import dicom, dicom_frames, geometry
from fedvfm.data.volumes import header as headers

TAGS = (
    "BitsAllocated",
    "Columns",
    "MaximumFractionalValue",
    "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence",
    "PixelPaddingValue",
    "Rows",
    "SegmentSequence",
    "SegmentationType",
    "SharedFunctionalGroupsSequence",
)
KEPT = 4
HALF = 0.5
LARGEST = 65535
NEAR = 0.5
"""How far a frame may lie from its slice, in voxels."""

_kept: OrderedDict[tuple[Any, ...], NDArray[np.uint16]] = OrderedDict()


def is_segmentation(path: Path) -> bool:
    """Whether a mask is to be looked for as DICOM-SEG: a folder, or a file that ends as DICOM files do."""
    return path.is_dir() or path.name.lower().endswith(dicom.ENDINGS)


def read(path: Path, image: headers.Header, table: Mapping[structures.Key, int] | None = None) -> NDArray[np.uint16]:
    """The segments of a file, or of all segmentations in a folder, as numbers on the grid of ``image``.

    Args:
        path: the file or folder.
        image: the images it was drawn on.
        table: class number of every structure; without it the segment numbers are taken.

    Shapes: canonical axes, as :attr:`fedvfm.data.volumes.volumes.Volume.voxels`; 0 where no segment is. Not writeable.

    Raises:
        DataError: if there is none, one is damaged, on another grid, of other images, or segments overlap.
    """
    files = _of(path, image)
    first = image.frames[0].uid if image.frames else ""  # of one folder it may be another series
    stamps = ((str(file), file.stat().st_mtime_ns) for file in files)
    key = (image.path, first, tuple(sorted((table or {}).items())), table is None, *stamps)
    if key not in _kept:
        stored = _stored(path, files, image, table)
        stored.flags.writeable = False
        _kept[key] = stored
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return image.stored.turn().apply(_kept[key])


def held(path: Path, image: headers.Header) -> list[list[structures.Structure]]:
    """The structures of every segmentation of a file or folder, as their headers describe them.

    Raises:
        DataError: if a header is damaged.
    """
    files = _of(path, image)
    return [_described(_where(path, number, len(files)), file) for number, file in enumerate(files, 1)]


def _described(where: str, file: Path) -> list[structures.Structure]:
    tags = dicom.read_tags(file, where, ("SegmentSequence",))
    try:
        return [one for one in map(_structure, tags.get("SegmentSequence") or ()) if one.value != 0]
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None


def _structure(item: Any) -> structures.Structure:
    """A segment's number, coded type with modifiers and region, and label."""
    kind, meaning = _coded(item, "SegmentedPropertyTypeCodeSequence")
    modifier, modified = _coded(item, "SegmentedPropertyTypeModifierCodeSequence")
    for part in item.get("SegmentedPropertyTypeCodeSequence") or ():
        if not modifier:
            modifier, modified = _coded(part, "SegmentedPropertyTypeModifierCodeSequence")
    region, _ = _coded(item, "AnatomicRegionSequence")
    code = kind + (f"+{modifier}" if modifier else "") + (f"@{region}" if kind and region and region != kind else "")
    words = {structures.plain(f"{modified} {meaning}"), structures.plain(f"{meaning} {modified}")} - {""}
    label = structures.plain(str(item.get("SegmentLabel") or ""))
    return structures.Structure(int(item.SegmentNumber), code, label, tuple(sorted(words)))


def _coded(item: Any, name: str) -> tuple[str, str]:
    """A code, and what it means in words."""
    found = next(iter(item.get(name) or ()), None)
    if found is None:
        return "", ""
    value = found.get("CodeValue") or found.get("LongCodeValue") or ""
    code = structures.code_of(str(found.get("CodingSchemeDesignator") or ""), str(value))
    return code, str(found.get("CodeMeaning") or "")


def check(path: Path, image: headers.Header) -> None:
    """Refuse a segmentation that does not lie on the images, without reading its pixels.

    Raises:
        DataError: see :func:`read`.
    """
    files = _some(path, _of(path, image), image)
    for number, file in enumerate(files, 1):
        _frames(_where(path, number, len(files)), file, image)


def _of(path: Path, image: headers.Header) -> Sequence[Path]:
    """The segmentations of a file or folder; beside several series those of the one that was chosen."""
    files = dicom.find(path).segmentations
    if not image.among or path != image.path:
        return files
    own = {frame.uid for frame in image.frames}
    drawn_on = [_images(_where(path, number, len(files)), file) for number, file in enumerate(files, 1)]
    # One that names no image is kept: whether it lies on these is judged by position.
    return [file for file, named in zip(files, drawn_on, strict=True) if not named or named & own]


def _images(where: str, file: Path) -> set[str]:
    """SOP instance UIDs of the images that a segmentation names."""
    found = set()
    try:
        for one in dicom.read_tags(file, where, ("ReferencedSeriesSequence",)).get("ReferencedSeriesSequence") or ():
            found |= {str(item.ReferencedSOPInstanceUID) for item in one.get("ReferencedInstanceSequence") or ()}
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None
    return found


def _some(path: Path, files: Sequence[Path], image: headers.Header) -> Sequence[Path]:
    if not files:
        raise defect.MASK_MISSING.error(f"{path}: no segmentation (DICOM-SEG); add one, or a mask as NIfTI")
    if image.kind != "dicom":
        raise defect.KINDS_MIXED.error(
            f"{path}: a DICOM-SEG for images that are no DICOM; add a mask of the images' kind"
        )
    return files


def _where(path: Path, number: int, of: int) -> str:
    return f"{path}: segmentation {number} of {of}"


def _stored(
    path: Path, files: Sequence[Path], image: headers.Header, table: Mapping[structures.Key, int] | None
) -> NDArray[np.uint16]:
    labels = np.zeros(image.stored.shape, dtype=np.uint16)
    overlapping = 0
    _some(path, files, image)
    for number, file in enumerate(files, 1):
        where = _where(path, number, len(files))
        tags, places = _frames(where, file, image)
        classes = _classes(where, tags, table)
        # pydicom 3.0 cuts single frames wrongly where frames of packed bits do not end with a byte.
        together = int(tags.get("BitsAllocated", 1)) == 1 and int(tags.Rows) * int(tags.Columns) % 8 != 0
        whole = _decoded(where, file, None) if together else None
        for frame, (at, segment) in enumerate(places):
            values = _decoded(where, file, frame) if whole is None else whole.reshape(-1, *whole.shape[-2:])[frame]
            drawn = _numbers(where, values.T, segment, tags, classes)
            current = labels[:, :, at]
            overlapping += int(np.count_nonzero((current > 0) & (drawn > 0) & (current != drawn)))
            np.copyto(current, drawn, where=drawn > 0)
    if overlapping:
        raise defect.MASK_OVERLAP.error(
            f"{path}: segments overlap in {overlapping} voxels, but a voxel has one class; separate them, or give the "
            "mask as NIfTI"
        )
    return labels


def _classes(where: str, tags: Any, table: Mapping[structures.Key, int] | None) -> dict[int, int]:
    """Segment number -> what it becomes, for all segments that the file describes."""
    try:
        held = [one for one in map(_structure, tags.get("SegmentSequence") or ()) if one.value != 0]
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None
    return {
        one.value: one.value if table is None else table[one.key] for one in held if table is None or one.key in table
    }


def _decoded(where: str, file: Path, frame: int | None) -> NDArray[Any]:
    """One frame, (rows, columns), so that a large segmentation is never unpacked whole; or all of them."""
    from pydicom.pixels import utils as pixels

    try:
        with dicom.quietly():
            return np.asarray(pixels.pixel_array(file, index=frame))
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error, "damaged or cut short") from None


def _numbers(
    where: str, values: NDArray[Any], segment: int | None, tags: Any, classes: Mapping[int, int]
) -> NDArray[np.uint16]:
    """Class numbers of a frame; a fraction from one half on counts.

    In a label map the Pixel Padding Value is background, unless a segment has that number (PS3.3, C.8.20.4).

    Raises:
        DataError: for a number that no segment describes.
    """
    if segment is None:
        present = {int(value) for value in np.unique(values)} - {0}
        padding = dicom_frames.whole(tags.get("PixelPaddingValue"))
        drawn = np.zeros(values.shape, dtype=np.uint16)
        for value in sorted(present):
            if value in classes:
                drawn[values == value] = classes[value]
            elif value != padding:
                raise defect.MASK_VALUE.error(
                    f"{where}: number {value} is described by no segment; export it again", [value]
                )
        return drawn
    if segment not in classes:
        raise defect.MASK_VALUE.error(
            f"{where}: number {segment} is described by no segment; export it again", [segment]
        )
    fractional = tags.get("SegmentationType") == "FRACTIONAL"
    least = HALF * float(tags.get("MaximumFractionalValue") or 1) if fractional else 1
    return np.where(values >= least, classes[segment], 0).astype(np.uint16)


def _frames(where: str, file: Path, image: headers.Header) -> tuple[Any, list[tuple[int, int | None]]]:
    """(stored slice, segment number) of every frame; no number in a label map, whose values are the numbers.

    Raises:
        DataError: if a frame lies on no slice of the images.
    """
    tags = dicom.read_tags(file, where, TAGS)
    columns, rows, _ = image.stored.shape
    try:
        if (int(tags.Rows), int(tags.Columns)) != (rows, columns):
            raise defect.MASK_GEOMETRY.error(
                f"{where}: {tags.Rows} x {tags.Columns} pixels, the images have {rows} x {columns}: another grid; "
                "export it on the grid of the images"
            )
        groups = list(tags.PerFrameFunctionalGroupsSequence)
        shared = next(iter(tags.get("SharedFunctionalGroupsSequence") or ()), None)
        slices = {(frame.uid, frame.number): at for at, frame in enumerate(image.frames)}
        labelled = tags.get("SegmentationType") == "LABELMAP"
        return tags, [
            (_slice(where, [group, shared], image, slices), None if labelled else _segment([group, shared]))
            for group in groups
        ]
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None


def _items(levels: Sequence[Any], group: str) -> list[Any]:
    return next((list(level.get(group)) for level in levels if level is not None and level.get(group)), [])


def _segment(levels: Sequence[Any]) -> int:
    number = int(_items(levels, "SegmentIdentificationSequence")[0].ReferencedSegmentNumber)
    if not 0 < number <= LARGEST:
        raise ValueError
    return number


def _slice(where: str, levels: Sequence[Any], image: headers.Header, slices: Mapping[tuple[str, int], int]) -> int:
    """The stored slice of a frame, by reference and by position.

    Raises:
        DataError: if it has neither, or they disagree with the images.
    """
    named = _referred(levels, slices)
    place = _placed(levels, image)
    if place is None and image.stored.placed and named is None:
        raise defect.NO_GEOMETRY.error(f"{where}: a frame names no image and no position; export it again")
    if place is not None:
        at = round(place[2]) if named is None else named
        if np.abs(np.subtract(place, (0, 0, at))).max() > NEAR or not 0 <= at < image.stored.shape[2]:
            raise defect.MASK_GEOMETRY.error(
                f"{where}: a frame lies elsewhere than the images: another grid or other images; export it on the grid "
                "of the images"
            )
        return at
    if named is None:
        raise defect.MASK_GEOMETRY.error(f"{where}: made on other images; bring the segmentation of these")
    return named


def _referred(levels: Sequence[Any], slices: Mapping[tuple[str, int], int]) -> int | None:
    """The one slice that a frame names as its source.

    An instance named without frame numbers is meant with all its frames (PS3.3, table 10-3): of several none is named.
    """
    found = set()
    for derivation in _items(levels, "DerivationImageSequence"):
        for source in derivation.get("SourceImageSequence") or ():
            uid, numbers = str(source.get("ReferencedSOPInstanceUID", "")), source.get("ReferencedFrameNumber")
            if numbers is None or numbers == "":
                found |= {at for (other, _), at in slices.items() if other == uid}
                continue
            several = [numbers] if isinstance(numbers, int | str) else list(numbers)
            found |= {slices[uid, int(one) - 1] for one in several if (uid, int(one) - 1) in slices}
    return found.pop() if len(found) == 1 else None


def _placed(levels: Sequence[Any], image: headers.Header) -> tuple[float, ...] | None:
    """The stored voxel index of a frame's first pixel, or None where it or the images have no position.

    Rows and columns that run another way than those of the images lie far from their index.
    """
    position = _items(levels, "PlanePositionSequence")
    orientation = _items(levels, "PlaneOrientationSequence")
    measures = _items(levels, "PixelMeasuresSequence")
    if not position or not image.stored.placed:
        return None
    first = np.asarray(dicom_frames.numbers(position[0].get("ImagePositionPatient"), 3), dtype=np.float64)
    inverse = np.linalg.inv(geometry.from_lps(image.stored.affine))
    start = inverse[:3, :3] @ first + inverse[:3, 3]
    directions = dicom_frames.numbers(orientation[0].get("ImageOrientationPatient"), 6) if orientation else None
    spacing = dicom_frames.numbers(measures[0].get("PixelSpacing"), 2) if measures else None
    if directions is not None and spacing is not None:
        columns, rows, _ = image.stored.shape
        last = first + np.multiply(directions[:3], spacing[1] * (columns - 1))
        last = last + np.multiply(directions[3:], spacing[0] * (rows - 1))
        end = inverse[:3, :3] @ last + inverse[:3, 3]
        off = end - start - (columns - 1, rows - 1, 0)
        if np.abs(off).max() > NEAR:
            return float("inf"), float("inf"), 0.0
    return float(start[0]), float(start[1]), float(start[2])
