"""DICOM-SEG and RT structure sets: what they hold as a label volume on the grid of the images they were drawn on.

A frame of a segmentation is put on the slice it refers to by SOP instance UID (and frame number), or, where it refers
to none, on the slice at its position. Both are checked against the images' own grid: what does not fit is refused, not
resampled. Which structure a segment is says its coded type and label (:mod:`fedvfm.data.structures`): these are
compared and never shown. Contours of RT structure sets are drawn by :mod:`fedvfm.data.volumes.dicom_rtstruct`.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm.data import defect, structures
from fedvfm.data.decoding import decoder
from fedvfm.data.volumes import dicom, dicom_frames, dicom_pixels, dicom_rtstruct, dicom_series, geometry
from fedvfm.data.volumes import header as headers

TAGS = (
    "BitsAllocated",
    "Columns",
    "FrameOfReferenceUID",
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
UNLIKE = 1.5
"""Times that slices lie farther apart, or nearer together, from which on they are others than those of the images."""

_kept: OrderedDict[tuple[Any, ...], NDArray[np.uint16]] = OrderedDict()
_studies: OrderedDict[tuple[Path, tuple[int, ...]], dicom.Study] = OrderedDict()


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of a study that hold a mask.

    Attributes:
        files: of one kind.
        contours: whether they are RT structure sets; else DICOM-SEG.
        notes: what was left out, one sentence each.
    """

    files: Sequence[Path]
    contours: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Merging:
    """What becomes of classes where a voxel is in several.

    Attributes:
        numbers: class number -> the number it has in the end (``[labels]``): classes of one number do not overlap, and
            the background gives way.
        last: whether of two classes the one with the higher number counts; else they are refused.
    """

    numbers: tuple[int, ...] = ()
    last: bool = False


APART = Merging()
OTHER_IMAGES = "a segmentation was made on other images of the same place; it is put where its positions say"

OTHER_SERIES = "masks of other series of the study than the one that is read are left out"


def is_segmentation(path: Path) -> bool:
    """Whether a mask is to be looked for as DICOM-SEG or RT structure set: a folder, or a file that ends as DICOM."""
    return path.is_dir() or path.name.lower().endswith(dicom.ENDINGS)


def read(
    path: Path,
    image: headers.Header,
    table: Mapping[structures.Key, int] | None = None,
    merging: Merging = APART,
) -> NDArray[np.uint16]:
    """What a file, or all such objects in a folder, hold, as numbers on the grid of ``image``.

    Args:
        path: the file or folder.
        image: the images it was drawn on.
        table: class number of every structure; without it the segment numbers are taken, and of regions that overlap
            the last.
        merging: what becomes of classes that overlap.

    Shapes: canonical axes, as :attr:`fedvfm.data.volumes.volumes.Volume.voxels`; 0 where nothing is. Not writeable.

    Raises:
        DataError: if there is none, one is damaged, on another grid, of other images, or classes overlap.
    """
    objects = _of(path, image)
    first = image.frames[0].uid if image.frames else ""  # of one folder it may be another series
    stamps = ((str(file), file.stat().st_mtime_ns) for file in objects.files)
    key = (image.path, first, tuple(sorted((table or {}).items())), table is None, merging, *stamps)
    if key not in _kept:
        items = None if table is None else tuple(table.items())
        stored = _stored(path, objects, image, items, merging)
        stored.flags.writeable = False
        _kept[key] = stored
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return image.stored.turn().apply(_kept[key])


def held(path: Path, image: headers.Header) -> list[list[structures.Structure]]:
    """The structures of every such object of a file or folder, as their headers describe them.

    Raises:
        DataError: if a header is damaged.
    """
    return _held(path, _of(path, image))


def described(file: Path, contours: bool) -> tuple[frozenset[str], tuple[structures.Structure, ...]]:
    """SOP instance UIDs of the images that one object names, and its structures.

    Args:
        file: a DICOM-SEG, or an RT structure set.
        contours: whether it is the latter.

    Raises:
        DataError: if its header is damaged.
    """
    objects = Objects((file,), contours)
    (named,), (structures_of,) = _drawn_on(file, objects), _held(file, objects)
    return frozenset(named), tuple(structures_of)


@decoder.apart
def _held(path: Path, objects: Objects) -> list[list[structures.Structure]]:
    describe = dicom_rtstruct.held if objects.contours else _described
    return [describe(where, file) for where, file in _each(path, objects)]


def _described(where: str, file: Path) -> list[structures.Structure]:
    tags = dicom.read_tags(file, where, ("SegmentSequence",))
    try:
        return [one for one in map(_structure, tags.get("SegmentSequence") or ()) if one.value != 0]
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None


def _structure(item: Any) -> structures.Structure:
    """A segment's number, coded type with modifiers and region, and label."""
    kind, meaning = structures.coded(item, "SegmentedPropertyTypeCodeSequence")
    modifier, modified = structures.coded(item, "SegmentedPropertyTypeModifierCodeSequence")
    for part in item.get("SegmentedPropertyTypeCodeSequence") or ():
        if not modifier:
            modifier, modified = structures.coded(part, "SegmentedPropertyTypeModifierCodeSequence")
    region, _ = structures.coded(item, "AnatomicRegionSequence")
    side, sided = structures.coded(item, "AnatomicRegionModifierSequence")
    for part in item.get("AnatomicRegionSequence") or ():
        if not side:
            side, sided = structures.coded(part, "AnatomicRegionModifierSequence")
    code = structures.qualified(kind, modifier, region, side)
    modified = modified or (sided if region == kind else "")
    words = {structures.plain(f"{modified} {meaning}"), structures.plain(f"{meaning} {modified}")} - {""}
    label = structures.plain(str(item.get("SegmentLabel") or ""))
    return structures.Structure(int(item.SegmentNumber), code, label, tuple(sorted(words)))


def check(path: Path, image: headers.Header) -> tuple[str, ...]:
    """Refuse what does not lie on the images, without reading its pixels; what is to be said, one sentence each.

    Raises:
        DataError: see :func:`read`.
    """
    return _checked(path, _some(path, _of(path, image), image), image)


@decoder.apart
def _checked(path: Path, objects: Objects, image: headers.Header) -> tuple[str, ...]:
    notes = objects.notes
    for where, file in _each(path, objects):
        if objects.contours:
            notes += dicom_rtstruct.check(where, file, image)
        else:
            _frames(where, file, image)
            named = _images(where, file)
            notes += (OTHER_IMAGES,) if named and not named & {frame.uid for frame in image.frames} else ()
    return tuple(dict.fromkeys(notes))


def _of(path: Path, image: headers.Header) -> Objects:
    """The segmentations of a file or folder; structure sets only where there is no segmentation.

    Beside several series, of which one was chosen, they are those of that one; in a folder of masks only if there are
    any, else what lies at its place. Beside several images they are those of this one.
    """
    study = _study(path)
    contours = bool(study.contours) and not study.segmentations
    left = study.contours if study.segmentations else []
    notes = (f"{len(left)} structure set(s) left out beside DICOM-SEG",) if left else ()
    objects = Objects(study.contours if contours else study.segmentations, contours, notes)
    of_one = path.is_dir() and image.kind == "dicom" and image.path.is_file()
    if not of_one and not image.among:
        return objects
    own, drawn_on = {frame.uid for frame in image.frames}, _drawn_on(path, objects)
    # One that names no image is kept: whether it lies on these is judged by position.
    kept = [file for file, named in zip(objects.files, drawn_on, strict=True) if not named or named & own]
    if of_one or path == image.path or len(kept) == len(objects.files):
        return dataclasses.replace(objects, files=kept)
    return dataclasses.replace(objects, files=kept, notes=(*notes, OTHER_SERIES)) if kept else objects


@decoder.apart
def _drawn_on(path: Path, objects: Objects) -> list[set[str]]:
    """SOP instance UIDs of the images that each object names."""
    naming = dicom_rtstruct.images if objects.contours else _images
    return [naming(where, file) for where, file in _each(path, objects)]


def _study(path: Path) -> dicom.Study:
    """What a file or folder holds; asked for every slice, so the last few are kept."""
    stamp = dicom_series.stamp(path) if path.is_dir() else (path.stat().st_mtime_ns,) if path.exists() else ()
    if (path, stamp) not in _studies:
        _studies[path, stamp] = dicom.find(path)
        while len(_studies) > KEPT:
            _studies.popitem(last=False)
    return _studies[path, stamp]


def _each(path: Path, objects: Objects) -> Iterator[tuple[str, Path]]:
    """How messages call each file, and the file."""
    kind, of = "structure set" if objects.contours else "segmentation", len(objects.files)
    return ((f"{path}: {kind} {number} of {of}", file) for number, file in enumerate(objects.files, 1))


def _images(where: str, file: Path) -> set[str]:
    """SOP instance UIDs of the images that a segmentation names."""
    found = set()
    try:
        for one in dicom.read_tags(file, where, ("ReferencedSeriesSequence",)).get("ReferencedSeriesSequence") or ():
            found |= {str(item.ReferencedSOPInstanceUID) for item in one.get("ReferencedInstanceSequence") or ()}
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None
    return found


def _some(path: Path, objects: Objects, image: headers.Header) -> Objects:
    if not objects.files:
        raise defect.MASK_MISSING.error(
            f"{path}: no segmentation (DICOM-SEG) and no structure set (RTSTRUCT); add one, or a mask as NIfTI"
        )
    if image.kind != "dicom":
        raise defect.KINDS_MIXED.error(
            f"{path}: a DICOM-SEG or RTSTRUCT for images that are no DICOM; add a mask of the images' kind"
        )
    return objects


@decoder.apart
def _stored(
    path: Path,
    objects: Objects,
    image: headers.Header,
    items: tuple[tuple[structures.Key, int], ...] | None,
    merging: Merging,
) -> NDArray[np.uint16]:
    """What the objects hold, in stored axes; ``items`` are those of the table of :func:`read`."""
    table = None if items is None else dict(items)
    canvas = _Canvas(np.zeros(image.stored.shape, dtype=np.uint16), merging, len(objects.files))
    for where, file in _each(path, _some(path, objects, image)):
        canvas.begin()
        if objects.contours:
            _draw_contours(where, file, image, table, canvas)
        else:
            _draw_segments(where, file, image, table, canvas)
        if canvas.is_version() and not merging.last:
            raise defect.MASK_OVERLAP.error(
                f"{where}: draws a structure that another object of the study draws, too, and otherwise: two versions "
                'of one segmentation; keep one, or have both count together (data.options.overlap = "last")'
            )
    if canvas.overlapping and not (objects.contours and table is None):
        raise defect.MASK_OVERLAP.error(
            f"{path}: classes overlap in {canvas.overlapping} voxels, but a voxel has one class; separate them, give "
            "both one class in [labels], or let the class with the higher number count (data.options.overlap = "
            '"last")'
        )
    return canvas.labels


class _Canvas:
    """A label volume that classes are painted on, (columns, rows, slices), by one object of a study after the other."""

    def __init__(self, labels: NDArray[np.uint16], merging: Merging, objects: int = 1) -> None:
        self.labels, self._last, self.overlapping = labels, merging.last, 0
        self._painter = np.zeros(labels.shape, np.uint16) if objects > 1 else None
        self._object, self._earlier = 0, np.zeros(LARGEST + 1, np.int64)
        self._own, self._again = (np.zeros(LARGEST + 1, np.int64) for _ in range(2))
        self._final = np.arange(LARGEST + 1, dtype=np.uint16)
        self._final[: len(merging.numbers)] = merging.numbers

    def paint(self, at: int, drawn: NDArray[np.uint16]) -> None:
        """Put classes, (columns, rows) and 0 where none is, on a slice."""
        current = self.labels[:, :, at]
        if self._painter is not None:
            self._count(self._painter[:, :, at], current, drawn)
        old, new = self._final[current], self._final[drawn]
        clash = (current > 0) & (drawn > 0) & (old != new)
        # The background gives way to a class, whichever was painted first.
        both = clash & (old > 0) & (new > 0)
        take = (drawn > 0) & ~(clash & (new == 0))
        if self._last:
            take &= ~(both & (old > new))
        else:
            self.overlapping += int(np.count_nonzero(both))
        np.copyto(current, drawn, where=take)

    def begin(self) -> None:
        """The next object."""
        self._object += 1
        self._earlier += self._own - self._again
        self._own[:], self._again[:] = 0, 0

    def _count(self, painter: NDArray[np.uint16], current: NDArray[np.uint16], drawn: NDArray[np.uint16]) -> None:
        """Voxels of each class that this object draws, and those of them that others gave this class before."""
        self._own += np.bincount(drawn[drawn > 0], minlength=LARGEST + 1)
        again = (drawn > 0) & (drawn == current) & (painter > 0) & (painter != self._object)
        self._again += np.bincount(drawn[again], minlength=LARGEST + 1)
        painter[(drawn > 0) & (painter == 0)] = self._object

    def is_version(self) -> bool:
        """Whether this object draws most of a class that others drew already, but not just the same: a version of it.

        Objects that do not overlap, or by a margin, are parts of one structure (two lesions).
        """
        smaller = np.minimum(self._own, self._earlier)
        copy = (self._again == self._own) & (self._own == self._earlier)
        return bool(((self._again > HALF * smaller) & ~copy).any())

    def fill(self, at: int, number: int, where: NDArray[np.bool_]) -> None:
        """Give voxels of a slice that have no class yet one."""
        current = self.labels[:, :, at]
        np.copyto(current, np.uint16(number), where=where & (current == 0))


def _draw_segments(
    where: str, file: Path, image: headers.Header, table: Mapping[structures.Key, int] | None, canvas: _Canvas
) -> None:
    tags, places = _frames(where, file, image)
    classes = _classes(where, tags, table)
    for (at, segment), values in zip(places, dicom_pixels.stored(file, where, tags), strict=True):
        canvas.paint(at, _numbers(where, values.T, segment, tags, classes))


def _draw_contours(
    where: str, file: Path, image: headers.Header, table: Mapping[structures.Key, int] | None, canvas: _Canvas
) -> None:
    """Paint what lies inside of contours; their lines only where nothing else is: structures share them."""
    lines = []
    for number, at, inside, line in dicom_rtstruct.draw(where, file, image, table):
        canvas.paint(at, np.where(inside, np.uint16(number), np.uint16(0)))
        lines.append((at, number, line & ~inside))
    for at, number, line in lines:
        canvas.fill(at, number, line)


def _classes(where: str, tags: Any, table: Mapping[structures.Key, int] | None) -> dict[int, int]:
    """Segment number -> what it becomes, for all segments that the file describes."""
    try:
        held = [one for one in map(_structure, tags.get("SegmentSequence") or ()) if one.value != 0]
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None
    return {
        one.value: one.value if table is None else table[one.key] for one in held if table is None or one.key in table
    }


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
        if len(groups) != dicom_frames.count(tags):  # some frames would be left out
            raise ValueError
        shared = next(iter(tags.get("SharedFunctionalGroupsSequence") or ()), None)
        slices = {(frame.uid, frame.number): at for at, frame in enumerate(image.frames)}
        labelled = tags.get("SegmentationType") == "LABELMAP"
        named = [_referred([group, shared], slices) for group in groups]
        if None in named:
            _refuse_other_frame(where, tags, image)
        places = [
            (_slice(where, [group, shared], image, at), None if labelled else _segment([group, shared]))
            for group, at in zip(groups, named, strict=True)
        ]
        by_position = [place for place, at in zip(places, named, strict=True) if at is None]
        _refuse_other_steps(where, by_position, [groups[0], shared], image)
        return tags, places
    except dicom.BROKEN as error:
        raise dicom.damaged(where, error) from None


def _refuse_other_frame(where: str, tags: Any, image: headers.Header) -> None:
    """Refuse a segmentation of which frames name none of the images, and that lies in another frame of reference.

    Their positions then are not places in these images, however well they fit.

    Raises:
        DataError: with the remedy.
    """
    own = dicom.read_tags(image.frames[0].file, where, ("FrameOfReferenceUID",)).get("FrameOfReferenceUID") or ""
    theirs = tags.get("FrameOfReferenceUID") or ""
    if own and theirs and own != theirs:
        raise defect.MASK_GEOMETRY.error(
            f"{where}: made on other images, in another frame of reference; bring the segmentation of these"
        )


def _refuse_other_steps(
    where: str, places: Sequence[tuple[int, int | None]], levels: Sequence[Any], image: headers.Header
) -> None:
    """Refuse frames that name no image and were drawn on slices that lie nearer together, or farther apart.

    Every position fits a slice all the same: of thinner slices several would count as one, and of thicker ones the
    slices between would be background, which nobody drew.

    Args:
        where: for messages.
        places: stored slice and segment number of these frames.
        levels: functional groups, for their distance from slice to slice.
        image: the images.

    Raises:
        DataError: with the remedy.
    """
    measures = _items(levels, "PixelMeasuresSequence")
    said = dicom_frames.numbers(measures[0].get("SpacingBetweenSlices"), 1) if measures else None
    step, several = image.stored.spacing[2], image.stored.shape[2] > 1
    ratio = abs(said[0]) / step if said and said[0] and several else 1.0
    drawn: dict[int | None, list[int]] = {}
    for at, segment in places:
        drawn.setdefault(segment, []).append(at)
    for slices in drawn.values():
        gaps = np.diff(sorted(slices))
        thinner = ratio <= 1 / UNLIKE or (len(gaps) > 0 and gaps.min() == 0)
        sparse = len(gaps) >= dicom_rtstruct.FEWEST - 1 and gaps.min() > 1 and gaps.max() == gaps.min()
        if thinner or sparse or ratio >= UNLIKE:
            lie = "nearer together" if thinner else "farther apart"
            raise defect.MASK_GEOMETRY.error(
                f"{where}: made on images whose slices lie {lie} than the {step:g} mm of these; bring the segmentation "
                "of these images, or resample it onto them and save it as NIfTI"
            )


def _items(levels: Sequence[Any], group: str) -> list[Any]:
    return next((list(level.get(group)) for level in levels if level is not None and level.get(group)), [])


def _segment(levels: Sequence[Any]) -> int:
    number = int(_items(levels, "SegmentIdentificationSequence")[0].ReferencedSegmentNumber)
    if not 0 < number <= LARGEST:
        raise ValueError
    return number


def _slice(where: str, levels: Sequence[Any], image: headers.Header, named: int | None) -> int:
    """The stored slice of a frame, by reference (``named``) and by position.

    Raises:
        DataError: if it has neither, or they disagree with the images.
    """
    place = _placed(levels, image)
    if place is None and image.stored.placed and named is None:
        raise defect.NO_GEOMETRY.error(f"{where}: a frame names no image and no position; export it again")
    if place is not None:
        at = round(place[2]) if named is None else named
        beside = np.abs(np.subtract(place, (0, 0, at)))
        far = named is None and beside[2] > dicom_rtstruct.BESIDE
        if far or beside.max() > NEAR or not 0 <= at < image.stored.shape[2]:
            raise defect.MASK_GEOMETRY.error(
                f"{where}: a frame lies elsewhere than the images: another grid or other images; export it on the grid "
                "of the images"
            )
        return at
    if named is None:
        raise defect.MASK_GEOMETRY.error(f"{where}: made on other images; bring the segmentation of these")
    return named


def _referred(levels: Sequence[Any], slices: Mapping[tuple[str, int], int]) -> int | None:
    """The one slice that a frame names as its source."""
    sources = [
        source
        for derivation in _items(levels, "DerivationImageSequence")
        for source in derivation.get("SourceImageSequence") or ()
    ]
    return dicom.named_slice(sources, slices)


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
