"""Frames of a DICOM file: where each lies, how its values are scaled, and whether frames are places, moments or views.

Sources: DICOM PS3.3, Sections C.7.6.2 (Image Plane), C.7.6.5 (Cine), C.7.6.6 (Multi-frame), C.7.6.16 (functional
groups), C.8.4.8 to C.8.4.15 (nuclear medicine), C.8.24 (enhanced ultrasound volumes), C.11.1 (Modality LUT),
C.7.5.1.1.2 (pixel padding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm.data import defect
from fedvfm.data.volumes import geometry
from fedvfm.data.volumes import header as headers

TAGS = (
    "AcquisitionNumber",
    "BitsAllocated",
    "BitsStored",
    "Columns",
    "DetectorInformationSequence",
    "DetectorVector",
    "EnergyWindowVector",
    "EstimatedRadiographicMagnificationFactor",
    "DoubleFloatPixelPaddingRangeLimit",
    "DoubleFloatPixelPaddingValue",
    "FloatPixelPaddingRangeLimit",
    "FloatPixelPaddingValue",
    "FrameIncrementPointer",
    "FrameOfReferenceUID",
    "HighBit",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "ImagerPixelSpacing",
    "Modality",
    "ModalityLUTSequence",
    "NumberOfFrames",
    "PatientOrientation",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "PixelAspectRatio",
    "PixelPaddingRangeLimit",
    "PixelPaddingValue",
    "PixelPresentation",
    "PixelRepresentation",
    "PixelSpacing",
    "PresentationIntentType",
    "PresentationLUTShape",
    "RedPaletteColorLookupTableDescriptor",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "Rows",
    "SOPClassUID",
    "SOPInstanceUID",
    "SamplesPerPixel",
    "SequenceOfUltrasoundRegions",
    "SharedFunctionalGroupsSequence",
    "SliceThickness",
    "SliceVector",
    "SpacingBetweenSlices",
    "Units",
)
"""Elements of a file that are asked here."""
NEEDED = {
    "BitsAllocated": "Bits Allocated",
    "BitsStored": "Bits Stored",
    "PhotometricInterpretation": "Photometric Interpretation",
    "PixelRepresentation": "Pixel Representation",
    "SamplesPerPixel": "Samples per Pixel",
}
"""Elements without which nobody knows what pixels mean (PS3.3, C.7.6.3), as people write them."""
TILES = {"SIEMENS MR HEADER": (0x00190010, 0x0019100A), "Image Private Header": (0x00650010, 0x00651050)}
"""Private block of Siemens and United Imaging -> its creator's tag and that of the number of slices in one picture.

A copy that lost its Image Type still says by these that it is a mosaic.
"""
CENTIMETRES = 3
GREY = "MONOCHROME2"
UNITS = ("HU", "US", "OD", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT")
"""Rescale types of PS3.3, C.11.1.1.2; others are shown as "other"."""
PET_UNITS = (
    "BQML",
    "CNTS",
    "PROPCNTS",
    "GML",
    "CM2ML",
    "PCNT",
    "CPS",
    "MGMINML",
    "UMOLMINML",
    "MLMING",
    "MLG",
    "STDDEV",
    "ML1",
)
"""Units of PET, PS3.3, C.8.9.1.1.3; others are shown as "other"."""
ANGIOGRAPHY = ("XA", "RF")
"""A Modality LUT of theirs leads back to X-ray intensity and is not for showing: PS3.3, C.8.7.1.1.2."""

Begin = tuple[int, tuple[int, int]]
MOMENTS = frozenset({0x00181063, 0x00181065, 0x00540030, 0x00540060, 0x00540070, 0x00540100})
"""Frame Time, Frame Time Vector, and nuclear medicine's phases, R-R intervals, time slots and time slices."""
VIEWS = frozenset({0x00540010, 0x00540020, 0x00540050})
"""Energy windows, detectors and rotations."""
ANGLES = 0x00540090
SLICES = frozenset({0x00540080, 0x00182005})
PAGES = 0x00182001
BY_PLACE = frozenset({"CT", "MG", "MR", "NM", "OPT", "PT"})
"""Modalities whose frames are slices of a body unless the file says that they are moments."""
FILMED = frozenset({"ES", "IVUS", "RF", "US", "XA", "XC"})
"""Modalities whose frames are moments where the file says nothing of them."""
SIDES_UNKNOWN = "does not say how it lies in the patient, so its sides are a guess: left may be right"
TRANSDUCER = "lies in the frame of its ultrasound transducer, so its sides are a guess: left may be right"
CONTRADICTS = (
    "says MONOCHROME2 and Presentation LUT Shape INVERSE, which contradict each other; it is read as MONOCHROME2"
)
NO_SLOPE = "a rescale slope of 0 was taken for 1"
AS_VIEWS = "its frames are views (detectors, energy windows or pages), not moments of one view"
RAW = (
    "holds raw values for processing (Presentation Intent Type), not the picture that is shown: contrast, and which "
    "end is dark, are not those of other radiographs"
)
RADIOGRAPHS = ("CR", "DX", "RG")
MIRRORED = "its rows run to the patient's right (Patient Orientation), so it is stored mirrored to the usual view"
UPSIDE_DOWN = "its columns run to the patient's head (Patient Orientation), so it is stored upside down"
MAGNIFIED = 1.2
"""Times that a view is enlarged on the detector from which on it is said; contact views are enlarged by a tenth."""
LOCALISER = "LOCALIZER"
"""Third word of the Image Type of a CT's scout view: the standard does not say what its values are (C.8.2.1)."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One frame of one DICOM file.

    Attributes:
        frame: where it is.
        rows, columns: its size.
        samples: 1 grey, 3 colour (palettes count as colour).
        orientation: direction cosines of rows and columns in LPS, six numbers, or None.
        position: LPS millimetres of the first pixel, or None.
        spacing: (row, column) millimetres, or None.
        thickness: millimetres, or None; where there is none the distance from slice to slice.
        scaled: whether the file says how stored values become values (rescale or Modality LUT).
        units: a rescale type of :data:`UNITS`, of PET one of :data:`PET_UNITS`, "other", :data:`LOCALISER`, or empty.
        moment: whether it is one of several moments of one view.
        reference: the frame of reference that positions are given in, or empty; never shown.
        acquisition: number of the acquisition it is of, or None.
        apart: millimetres to the next slice as the file says, or None.
    """

    frame: headers.Frame
    rows: int
    columns: int
    samples: int = 1
    orientation: tuple[float, ...] | None = None
    position: tuple[float, ...] | None = None
    spacing: tuple[float, float] | None = None
    thickness: float | None = None
    scaled: bool = True
    units: str = ""
    moment: bool = False
    reference: str = field(default="", repr=False)
    acquisition: int | None = None
    apart: float | None = None

    @property
    def normal(self) -> NDArray[np.float64] | None:
        """What its rows and columns are at right angles to, in LPS, or None."""
        if self.orientation is None:
            return None
        return np.asarray(np.cross(self.orientation[:3], self.orientation[3:]), dtype=np.float64)

    @property
    def plane(self) -> geometry.Plane | None:
        """The plane it lies nearest to, or None."""
        if self.normal is None:
            return None
        axis = int(np.argmax(np.abs(self.normal)))
        return next(plane for plane, across in geometry.ACROSS.items() if across == axis)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frame lies: direction cosines and position in LPS, each or None."""

    orientation: tuple[float, ...] | None
    position: tuple[float, ...] | None


def read(
    tags: Any, file: Path, where: str, *, packed: bool, bare: bool, begin: Begin | None = None
) -> tuple[list[Slice], list[str]]:
    """One slice a frame, and what is to be said of the file.

    ``packed`` is whether the file is packed as a whole, ``begin`` where its values begin that lie there as they are,
    and the stamp of the file.

    Raises:
        DataError: for a mosaic, projections, frames of which nobody says whether they are places or moments, and bits
            that do not end where the standard says.
        ValueError, TypeError, AttributeError: for a damaged header.
    """
    _refuse_mosaic(tags, where)
    _refuse_shifted(tags, where)
    _refuse_coloured(tags, where)
    uid, rows, columns = str(tags.get("SOPInstanceUID", "")), int(tags.Rows), int(tags.Columns)
    photometric = tags.get("PhotometricInterpretation")
    samples = 3 if photometric == "PALETTE COLOR" else int(tags.get("SamplesPerPixel", 1))
    groups = tags.get("PerFrameFunctionalGroupsSequence")
    shared = next(iter(tags.get("SharedFunctionalGroupsSequence") or ()), None)
    number = count(tags)
    if groups is not None and len(groups) != number:
        raise ValueError
    levels = [[groups[index] if groups is not None else None, shared] for index in range(number)]
    places, notes = _places(tags, levels, where)
    moment = number > 1 and _moments(tags)
    if number > 1 and not moment and AS_VIEWS not in notes and places[0].position is None:
        notes.append(AS_VIEWS)
    table = bool(tags.get("ModalityLUTSequence")) and str(tags.get("Modality")) not in ANGIOGRAPHY
    inverted, padding = photometric == "MONOCHROME1", _padding(tags)
    if photometric == "MONOCHROME2" and tags.get("PresentationLUTShape") == "INVERSE":
        notes.append(CONTRADICTS)
    if tags.get("PresentationIntentType") == "FOR PROCESSING":
        notes.append(RAW)
    notes += _of_pictures(tags) if places[0].position is None else []
    found, together = [], packed or has_split_bytes(tags)
    for index, place in enumerate(places):
        slope, intercept, scaled = _rescale(tags, levels[index], notes)
        plain = None if begin is None else _plain(tags, begin, index)
        frame = headers.Frame(file, index, uid, slope, intercept, together, bare, inverted, table, padding, plain)
        measures = (tags, levels[index])
        found.append(
            Slice(
                frame,
                rows,
                columns,
                samples,
                place.orientation,
                place.position,
                _spacing(*measures),
                _thickness(*measures),
                scaled or table,
                _units(*measures),
                moment,
                str(tags.get("FrameOfReferenceUID") or ""),
                whole(_get(tags, levels[index], "FrameContentSequence", "FrameAcquisitionNumber", "AcquisitionNumber")),
                _apart(*measures),
            )
        )
    return found, notes


def has_split_bytes(tags: Any) -> bool:
    """Whether frames of single bits begin inside of a byte (PS3.5, 8.1.1): pydicom cuts them wrongly one by one."""
    return whole(tags.get("BitsAllocated")) == 1 and int(tags.Rows) * int(tags.Columns) % 8 != 0


def bytes_of_grey(tags: Any) -> int | None:
    """Bytes of all grey values of a file where each takes one or two; None for others, and where an element is missing.

    What is missing is told where pixels are decoded.
    """
    if any(tags.get(name) is None for name in NEEDED):
        return None
    bits, photometric = whole(tags.get("BitsAllocated")), tags.get("PhotometricInterpretation")
    if bits not in (8, 16) or photometric not in (GREY, "MONOCHROME1") or int(tags.SamplesPerPixel) != 1:
        return None
    return count(tags) * int(tags.Rows) * int(tags.Columns) * bits // 8


def _plain(tags: Any, begin: Begin, index: int) -> headers.Plain:
    """Where the values of a frame lie; see :func:`bytes_of_grey`."""
    (first, stamp), bits = begin, int(tags.BitsAllocated)
    kind = f"<{'i' if tags.PixelRepresentation == 1 else 'u'}{bits // 8}"
    offset = first + index * int(tags.Rows) * int(tags.Columns) * bits // 8
    return headers.Plain(offset, kind, bits - int(tags.BitsStored), stamp)


def _of_pictures(tags: Any) -> list[str]:
    """What is to be said of how a picture without a place is stored: its sides, its size, the shape of its pixels."""
    notes = []
    said = tags.get("PatientOrientation") or ()
    sides = [str(word).strip().upper()[:1] for word in said] if len(said) == 2 and not isinstance(said, str) else []
    if sides and tags.get("Modality") in RADIOGRAPHS:
        notes += [MIRRORED] * (sides[0] == "R") + [UPSIDE_DOWN] * (sides[1] == "H")
    shape = numbers(tags.get("PixelAspectRatio"), 2)
    if shape is not None and shape[0] != shape[1] and _spacing(tags, ()) is None:
        notes.append(f"its pixels are not square ({shape[0]:g} high to {shape[1]:g} wide, Pixel Aspect Ratio)")
    enlarged = numbers(tags.get("EstimatedRadiographicMagnificationFactor"), 1)
    if enlarged is not None and enlarged[0] >= MAGNIFIED and tags.get("PixelSpacing") is None:
        notes.append(f"sizes are those on the detector, {enlarged[0]:g} times those in the patient (magnified view)")
    return notes


def count(tags: Any) -> int:
    """How many frames a file says to have; one where it says nothing.

    Raises:
        ValueError: for less than none.
    """
    number = whole(tags.get("NumberOfFrames")) or 1
    if number < 0:
        raise ValueError
    return number


def _refuse_shifted(tags: Any, where: str) -> None:
    """Refuse values that do not end with the lowest bit (PS3.5, 8.1.1): decoders give them back multiplied.

    Raises:
        DataError: with both numbers.
    """
    high, stored = whole(tags.get("HighBit")), whole(tags.get("BitsStored"))
    if high is not None and stored is not None and high != stored - 1:
        raise defect.COMPRESSED.error(
            f"{where}: {stored} bits a value of which the highest is bit {high} instead of {stored - 1}; export it "
            "again"
        )


def _refuse_coloured(tags: Any, where: str) -> None:
    """Refuse grey values of which some are places in a palette of colours (PS3.3, C.7.6.19): Doppler, fused maps.

    Raises:
        DataError: with the remedy.
    """
    coloured = tags.get("PixelPresentation") in ("COLOR", "MIXED") and tags.get("SamplesPerPixel", 1) == 1
    if coloured and "RedPaletteColorLookupTableDescriptor" in tags and tags.get("PhotometricInterpretation") == GREY:
        raise defect.CHANNELS.error(
            f"{where}: grey values of which some stand for colours (supplemental palette); export it in colour (RGB), "
            "or without its colours"
        )


def _refuse_mosaic(tags: Any, where: str) -> None:
    """Refuse many slices as tiles of one picture: their common place is that of none of them.

    Raises:
        DataError: with the remedy.
    """
    words = tags.get("ImageType") or ()
    said = [str(word).strip().upper() for word in ([words] if isinstance(words, str) else words)]
    tiled = "MOSAIC" in said and tags.get("Modality") == "MR"
    for creator, (block, number) in TILES.items():
        owner, tiles = tags.get(block), tags.get(number)
        if owner is not None and tiles is not None and str(owner.value).strip() == creator:
            tiled |= (whole(tiles.value) or 0) > 1
    if tiled:
        raise defect.FRAMES_UNPLACED.error(
            f"{where}: a mosaic, many slices as tiles of one picture; unfold it into a volume (dcm2niix does) and "
            "bring that as NIfTI"
        )


def _places(tags: Any, levels: Sequence[Sequence[Any]], where: str) -> tuple[list[Place], list[str]]:
    """Where every frame lies, and notes on it."""
    if tags.get("Modality") == "NM" and levels[0] == [None, None] and (len(levels) > 1 or _reconstructed(tags)):
        return _nuclear(tags, len(levels), where)
    found, notes = [], []
    for level in levels:
        orientation = numbers(_get(tags, level, "PlaneOrientationSequence", "ImageOrientationPatient"), 6)
        position = numbers(_get(tags, level, "PlanePositionSequence", "ImagePositionPatient"), 3)
        if position is None:
            in_volume = numbers(_get(tags, level, "PlanePositionVolumeSequence", "ImagePositionVolume"), 3)
            if in_volume is not None:
                position, notes = in_volume, [TRANSDUCER]
                orientation = numbers(_get(tags, level, "PlaneOrientationVolumeSequence", "ImageOrientationVolume"), 6)
        found.append(Place(orientation, position))
    lacking = [one for one in found if one.position is None or one.orientation is None]
    if len(found) > 1 and (levels[0] == [None, None] or len(lacking) == len(found)):
        _refuse_unknown(tags, where)
    elif lacking and len(lacking) < len(found):
        raise defect.FRAMES_UNPLACED.error(
            f"{where}: {len(lacking)} of {len(found)} frames do not say where they lie in the patient, the others do; "
            "export it again"
        )
    return found, notes


def _pointer(tags: Any) -> frozenset[int]:
    """Which elements change from frame to frame, as the file says."""
    said = tags.get("FrameIncrementPointer")
    if said is None or said == "":
        return frozenset()
    return frozenset({int(said)} if isinstance(said, int) else {int(one) for one in said})


def _moments(tags: Any) -> bool:
    """Whether frames without a place of their own are moments of one view."""
    pointer = _pointer(tags)
    return bool(pointer & MOMENTS) or (not pointer and str(tags.get("Modality")) in FILMED)


def _refuse_unknown(tags: Any, where: str) -> None:
    """Refuse frames of one file that are not moments but do not say where they lie.

    Raises:
        DataError: with the remedy.
    """
    pointer = _pointer(tags)
    slices, silent = pointer & SLICES, not pointer & (MOMENTS | VIEWS | {PAGES})
    if slices or (silent and str(tags.get("Modality")) in BY_PLACE):
        raise defect.FRAMES_UNPLACED.error(
            f"{where}: several frames that do not say where they lie in the patient, nor that they are moments of one "
            "view; export it as enhanced multi-frame, one file a slice, or NIfTI"
        )


def _kind_of(tags: Any) -> str:
    """The third word of a file's Image Type: of nuclear medicine "STATIC", "RECON TOMO", ..., of CT "LOCALIZER"."""
    said = tags.get("ImageType") or ""
    words = [] if isinstance(said, str) else list(said)
    return str(words[2]).strip().upper() if len(words) > 2 else ""


def _reconstructed(tags: Any) -> bool:
    return _kind_of(tags).startswith("RECON")


def _nuclear(tags: Any, number: int, where: str) -> tuple[list[Place], list[str]]:
    """Frames of a nuclear medicine file: slices of a reconstruction, moments, or views.

    The place is that of the first frame in the Detector Information Sequence; slices are stacked along the normal by
    Spacing Between Slices, whose sign says to which side (PS3.3, C.8.4.11 and C.8.4.15).

    Raises:
        DataError: for projections, and slices of which nobody says how far apart they are.
    """
    pointer = _pointer(tags)
    if ANGLES in pointer or (_kind_of(tags).endswith("TOMO") and not _reconstructed(tags)):
        raise defect.FRAMES_UNPLACED.error(
            f"{where}: projections of a tomography; reconstruct slices from them and bring those"
        )
    slices = tags.get("SliceVector")
    if 0x00540080 not in pointer and slices is None and not _reconstructed(tags):
        return [Place(None, None)] * number, [] if pointer & MOMENTS else [AS_VIEWS]
    order = np.arange(number) if slices is None else np.asarray(slices, dtype=np.int64).reshape(-1) - 1
    if len(order) != number:
        raise ValueError
    said = (numbers(tags.get(name), 1) for name in ("SpacingBetweenSlices", "SliceThickness"))
    step = next((one[0] for one in said if one is not None), 0.0)
    if step == 0.0:
        raise defect.FRAMES_UNPLACED.error(
            f"{where}: slices that do not say how far apart they are; export it again, or as NIfTI"
        )
    detector = next(iter(tags.get("DetectorInformationSequence") or ()), None)
    stated = [detector, tags]
    orientation = _first(stated, "ImageOrientationPatient", 6)
    position = _first(stated, "ImagePositionPatient", 3)
    notes = [SIDES_UNKNOWN] if orientation is None or position is None else []
    turned, start = orientation or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), np.asarray(position or (0.0, 0.0, 0.0))
    normal = np.cross(turned[:3], turned[3:])
    places = [tuple(float(one) for one in start + at * step * normal) for at in order]
    return [Place(turned, place) for place in places], notes


def _first(levels: Sequence[Any], name: str, length: int) -> tuple[float, ...] | None:
    found = (numbers(level.get(name), length) for level in levels if level is not None)
    return next((one for one in found if one is not None), None)


def _get(tags: Any, levels: Sequence[Any], group: str, name: str, outside: str = "") -> Any:
    """An element from a frame's functional groups, the shared ones, or the file (``outside``: its name there)."""
    for level in levels:
        for item in (level.get(group) or ()) if level is not None else ():
            if item.get(name) is not None:
                return item.get(name)
    return tags.get(outside or name)


def _rescale(tags: Any, levels: Sequence[Any], notes: list[str]) -> tuple[float, float, bool]:
    """Slope, intercept, and whether the file has both: one without the other says nothing of the values' unit."""
    slope = numbers(_get(tags, levels, "PixelValueTransformationSequence", "RescaleSlope"), 1)
    intercept = numbers(_get(tags, levels, "PixelValueTransformationSequence", "RescaleIntercept"), 1)
    if slope == (0.0,):
        slope = (1.0,)
        notes.append(NO_SLOPE)
    said = slope is not None and intercept is not None
    return (slope or (1.0,))[0], (intercept or (0.0,))[0], said


def _units(tags: Any, levels: Sequence[Any]) -> str:
    """The rescale type, or of PET the unit, as far as the standard knows it."""
    stated = str(tags.get("Units") or "").strip().upper()
    if tags.get("Modality") == "PT" and stated:
        return stated if stated in PET_UNITS else "other"
    said = str(_get(tags, levels, "PixelValueTransformationSequence", "RescaleType") or "").strip().upper()
    if not said:
        table = next(iter(tags.get("ModalityLUTSequence") or ()), None)
        said = "" if table is None else str(table.get("ModalityLUTType") or "").strip().upper()
    if not said and tags.get("Modality") == "CT" and _kind_of(tags) == LOCALISER:
        return LOCALISER
    return said if said in UNITS or not said else "other"


def _padding(tags: Any) -> tuple[float, float] | None:
    """Lowest and highest stored value that is padding (PS3.3, C.7.5.1.1.2), or None.

    Some writers give it in the other sign than the pixels have: it is taken modulo the bits that are stored.
    """
    for kind in ("Float", "DoubleFloat"):
        limits = [numbers(tags.get(f"{kind}PixelPadding{end}"), 1) for end in ("Value", "RangeLimit")]
        if limits[0] is not None:
            both = [limit[0] for limit in limits if limit is not None]
            return min(both), max(both)
    given = [whole(tags.get(name)) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    ends = [_stored(tags, one) for one in given if one is not None]
    return (min(ends), max(ends)) if given[0] is not None else None


def _stored(tags: Any, value: int) -> int:
    allocated = int(tags.get("BitsAllocated", 16))
    bits = int(tags.get("BitsStored", allocated))
    signed = tags.get("PixelRepresentation", 0) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if low <= value <= high:
        return value
    cut = int(value & (2**bits - 1))
    return cut - int(2**bits) if signed and cut > high else cut


def _spacing(tags: Any, levels: Sequence[Any]) -> tuple[float, float] | None:
    """Of the patient, else of the detector (not corrected for magnification), else of the one ultrasound region."""
    found = numbers(_get(tags, levels, "PixelMeasuresSequence", "PixelSpacing"), 2)
    found = found or numbers(tags.get("ImagerPixelSpacing"), 2)
    regions = list(tags.get("SequenceOfUltrasoundRegions") or ())
    if found is None and len(regions) == 1:
        units = (regions[0].get("PhysicalUnitsXDirection"), regions[0].get("PhysicalUnitsYDirection"))
        steps = (regions[0].get("PhysicalDeltaY"), regions[0].get("PhysicalDeltaX"))
        if units == (CENTIMETRES, CENTIMETRES) and None not in steps:
            found = numbers([10.0 * abs(float(step)) for step in steps], 2)
    return (found[0], found[1]) if found is not None and min(found) > 0 else None


def _thickness(tags: Any, levels: Sequence[Any]) -> float | None:
    for name in ("SliceThickness", "SpacingBetweenSlices"):
        found = numbers(_get(tags, levels, "PixelMeasuresSequence", name), 1)
        if found is not None and found[0] != 0.0:
            return abs(found[0])
    return None


def _apart(tags: Any, levels: Sequence[Any]) -> float | None:
    found = numbers(_get(tags, levels, "PixelMeasuresSequence", "SpacingBetweenSlices"), 1)
    return abs(found[0]) if found is not None and found[0] else None


def numbers(value: Any, length: int) -> tuple[float, ...] | None:
    """``length`` finite numbers, or None where the element is empty or has another count."""
    if value is None or value == "":
        return None
    values = [value] if isinstance(value, int | float | str) else list(value)
    found = tuple(float(one) for one in values)
    return found if len(found) == length and bool(np.isfinite(found).all()) else None


def whole(value: Any) -> int | None:
    """A whole number, or None."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
