"""DICOM headers: which images a folder holds, by series, and only what geometry and grey values need of them.

Nothing that names a person is read: files are opened with a list of tags, and what is not on it is skipped. Because
every text in a DICOM file may name a patient, messages hold numbers, codes from closed lists and the folder's own path,
never text of a header, never an exception's words and never the names of files inside a study (these often are UIDs or
patients' names): a file is called by its place in the order of names.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import geometry
from fedvfm.data import header as headers

ENDINGS = (".dcm", ".dicom")
MODALITIES = frozenset(
    "CR CT DX ES GM IO IVUS MG MR NM OCT OP OPT OT PT PX RF RG SC SM TG US XA XC".split()  # noqa: SIM905 (28 lines)
)
"""Codes of DICOM (0008,0060) that images have; others are shown as "other"."""
WITHOUT_PIXELS = frozenset(
    {"AU", "DOC", "ECG", "KO", "PLAN", "PR", "REG", "RTDOSE", "RTIMAGE", "RTPLAN", "RTRECORD", "RTSTRUCT", "SR"}
)
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
DEFLATED = "1.2.840.10008.1.2.1.99"
DEFLATE_RATIO = 1032
FRAME_BYTES = 8
"""Every compressed frame has a tag and a length before it."""
CENTIMETRES = 3
TAGS = (
    "BitsAllocated",
    "BitsStored",
    "Columns",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImagerPixelSpacing",
    "Modality",
    "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "PixelRepresentation",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "SOPClassUID",
    "SOPInstanceUID",
    "SamplesPerPixel",
    "SequenceOfUltrasoundRegions",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SharedFunctionalGroupsSequence",
    "SliceThickness",
    "VOILUTSequence",
)
BROKEN = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    IndexError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    struct.error,
)
"""What pydicom and its decoders raise on a file that is not as it should be. Their words may quote the file."""


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
        thickness: millimetres, or None.
    """

    frame: headers.Frame
    rows: int
    columns: int
    samples: int = 1
    orientation: tuple[float, ...] | None = None
    position: tuple[float, ...] | None = None
    spacing: tuple[float, float] | None = None
    thickness: float | None = None

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


@dataclass(slots=True)
class Series:
    """Images of one series as found, not yet in order.

    Attributes:
        number: the series number, or None.
        modality: a code of :data:`MODALITIES`, or "other".
        slices: its frames.
        inverted: whether small values are bright (MONOCHROME1).
        films: whether several frames of it come from one file.
        curved: whether a file of it carries a table for display (VOI LUT), which is not applied.
    """

    number: int | None
    modality: str
    slices: list[Slice] = field(default_factory=list)
    inverted: bool = False
    films: bool = False
    curved: bool = False

    def __str__(self) -> str:
        sizes = sorted({(one.rows, one.columns) for one in self.slices})
        shown = ", ".join(f"{rows} x {columns}" for rows, columns in sizes[:3])
        name = "without number" if self.number is None else str(self.number)
        return f"series {name}: {self.modality}, {len(self.slices)} images of {shown}"

    @property
    def described(self) -> str:
        """All that tells it apart without its texts; :mod:`fedvfm.data.wanted` chooses by these words."""
        step = None if self.step is None else f"{self.step:g} mm from slice to slice"
        return ", ".join(part for part in (str(self), self.plane, step) if part)

    @property
    def plane(self) -> geometry.Plane | None:
        """The plane its slices lie nearest to, or None where they do not say or disagree."""
        planes = {one.plane for one in self.slices}
        return planes.pop() if len(planes) == 1 else None

    @property
    def step(self) -> float | None:
        """The usual distance from slice to slice in millimetres, to a hundredth; None where it is not known."""
        normal = None if self.plane is None else self.slices[0].normal
        if normal is None or len(self.slices) < 2:
            return None
        along = np.sort([np.dot(one.position, normal) for one in self.slices if one.position is not None])
        gaps = np.diff(along)
        return round(float(np.median(gaps)), 2) if len(gaps) else None


@dataclass(slots=True)
class Study:
    """What a folder (or one file) holds: series of images in the order of their numbers, and segmentation files."""

    series: list[Series] = field(default_factory=list)
    segmentations: list[Path] = field(default_factory=list)
    unread: int = 0


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep pydicom's warnings and log lines, which may quote a header, from every output."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def is_dicom(path: Path) -> bool:
    """Whether the file says that it is DICOM, whatever its name."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def files_in(path: Path) -> list[Path]:
    """The files of a study folder, deeper ones too, in the order of their names; the file itself where it is one."""
    if path.is_file():
        return [path]
    found = [Path(folder) / name for folder, _, names in os.walk(path) for name in names if not name.startswith(".")]
    return sorted(one for one in found if one.name.upper() != "DICOMDIR")


def find(path: Path) -> Study:
    """Read the headers of all DICOM files of a folder, or of one file.

    Raises:
        DataError: if it is missing, or a file is damaged.
    """
    if not path.exists():
        raise errors.DataError(f"{path}: no such file or folder; check the path, or remove its row or partner")
    study, found = Study(), dict[tuple[str, str], Series]()
    files = files_in(path)
    for number, file in enumerate(files, 1):
        where = f"{path}: file {number} of {len(files)} (in the order of names)" if path.is_dir() else str(path)
        if not os.access(file, os.R_OK):
            # It may be a slice: without it the volume would be shorter than it is.
            raise errors.DataError(f"{where}: cannot be read; give this user the right to, or remove it")
        if not is_dicom(file) and not (file.name.lower().endswith(ENDINGS) or path.is_file()):
            study.unread += 1
            continue
        _add(study, found, file, where)
    study.series = sorted(found.values(), key=lambda one: (one.number is None, one.number or 0, one.modality))
    return study


def read_tags(file: Path, where: str, tags: Sequence[str] = TAGS) -> Any:
    """The named elements of a DICOM file, pixels left out.

    Raises:
        DataError: if it is no DICOM file or damaged.
    """
    import pydicom  # only users of DICOM pay for it

    try:
        with quietly():
            found = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(tags))
            for element in found:
                _ = element.value  # values are decoded on first use; better here
            return found
    except (*BROKEN, pydicom.errors.InvalidDicomError) as error:
        kind = type(error).__name__
        raise errors.DataError(
            f"{where}: damaged, cut short or no DICOM ({kind}); export it again or remove it"
        ) from None


def syntax(tags: Any) -> Any:
    """The transfer syntax UID of a file where the standard knows it, else None."""
    found = tags.file_meta.get("TransferSyntaxUID") if hasattr(tags, "file_meta") else None
    try:
        return found if found is not None and found.is_transfer_syntax and not found.is_private else None
    except ValueError:  # no UID of the standard
        return None


def _add(study: Study, found: dict[tuple[str, str], Series], file: Path, where: str) -> None:
    tags = read_tags(file, where)
    with quietly():
        try:
            modality = str(tags.get("Modality") or "")
            if modality == "SEG":
                study.segmentations.append(file)
                return
            if modality in WITHOUT_PIXELS or tags.get("Rows") is None:
                if _claims_an_image(tags):
                    raise ValueError
                study.unread += 1
                return
            if str(tags.get("SOPClassUID", "")) == WHOLE_SLIDE:
                raise errors.DataError(f"{where}: a whole-slide image; cut it into tiles and save them as PNG")
            _check_length(tags, file, where)
            slices = _slices(tags, file)
            key = (str(tags.get("SeriesInstanceUID", "")), modality)
            number = _whole(tags.get("SeriesNumber"))
            photometric = str(tags.get("PhotometricInterpretation", ""))
            curved = _curved(tags)
        except BROKEN as error:
            kind = type(error).__name__
            raise errors.DataError(f"{where}: damaged header ({kind}); export it again or remove it") from None
    one = found.setdefault(key, Series(number, modality if modality in MODALITIES else "other"))
    one.slices += slices
    one.films |= len(slices) > 1
    one.inverted |= photometric == "MONOCHROME1"
    one.curved |= curved


def _curved(tags: Any) -> bool:
    """Whether the file, or its frames, carry a table that a viewer would show the values through."""
    shared = next(iter(tags.get("SharedFunctionalGroupsSequence") or ()), None)
    levels = [tags, shared, *(tags.get("PerFrameFunctionalGroupsSequence") or ())]
    frames = [item for level in levels if level is not None for item in level.get("FrameVOILUTSequence") or ()]
    return any(one.get("VOILUTSequence") for one in (tags, *frames))


def _claims_an_image(tags: Any) -> bool:
    """Whether the first lines of a file say that it is an image, so that one without rows is cut short."""
    meta = getattr(tags, "file_meta", {})
    said = meta.get("MediaStorageSOPClassUID") or tags.get("SOPClassUID")
    return said is not None and "Image Storage" in said.name and str(tags.get("Modality")) not in WITHOUT_PIXELS


def _check_length(tags: Any, file: Path, where: str) -> None:
    """Refuse a file that is shorter than its own pixels; of compressed ones the least that frames take is known.

    Raises:
        DataError: with both sizes.
    """
    packing, frames, have = syntax(tags), _frames(tags), file.stat().st_size
    if packing is not None and packing.is_deflated:
        have *= DEFLATE_RATIO
    if packing is None or packing.is_compressed:
        if have < frames * FRAME_BYTES:
            raise errors.DataError(
                f"{where}: cut short ({have} bytes for {frames} frames); export or copy it again, or remove it"
            )
        return
    samples = 2 if tags.get("PhotometricInterpretation") == "YBR_FULL_422" else tags.get("SamplesPerPixel", 1)
    need = frames * tags.Rows * tags.Columns * samples * tags.get("BitsAllocated", 8) // 8
    if have < need:
        raise errors.DataError(
            f"{where}: cut short ({have} bytes for {need} bytes of pixels); export or copy it again, or remove it"
        )


def _slices(tags: Any, file: Path) -> list[Slice]:
    """One slice a frame."""
    uid, rows, columns = str(tags.get("SOPInstanceUID", "")), int(tags.Rows), int(tags.Columns)
    samples = 3 if tags.get("PhotometricInterpretation") == "PALETTE COLOR" else int(tags.get("SamplesPerPixel", 1))
    groups = tags.get("PerFrameFunctionalGroupsSequence")
    shared = next(iter(tags.get("SharedFunctionalGroupsSequence") or ()), None)
    number = _frames(tags)
    if groups is not None and len(groups) != number:
        raise ValueError
    deflated, made = syntax(tags) == DEFLATED, []
    for index in range(number):
        levels = [groups[index], shared] if groups is not None else [None, shared]
        slope, intercept = _rescale(tags, levels)
        made.append(
            Slice(
                headers.Frame(file, index, uid, slope, intercept, deflated),
                rows,
                columns,
                samples,
                numbers(_get(tags, levels, "PlaneOrientationSequence", "ImageOrientationPatient"), 6),
                numbers(_get(tags, levels, "PlanePositionSequence", "ImagePositionPatient"), 3),
                _spacing(tags, levels),
                (numbers(_get(tags, levels, "PixelMeasuresSequence", "SliceThickness"), 1) or (None,))[0],
            )
        )
    return made


def _get(tags: Any, levels: Sequence[Any], group: str, name: str) -> Any:
    """An element from a frame's functional groups, the shared ones, or the file's own level."""
    for level in levels:
        for item in (level.get(group) or ()) if level is not None else ():
            if item.get(name) is not None:
                return item.get(name)
    return tags.get(name)


def _rescale(tags: Any, levels: Sequence[Any]) -> tuple[float, float]:
    slope = numbers(_get(tags, levels, "PixelValueTransformationSequence", "RescaleSlope"), 1)
    intercept = numbers(_get(tags, levels, "PixelValueTransformationSequence", "RescaleIntercept"), 1)
    return (slope[0] if slope and slope[0] else 1.0), (intercept[0] if intercept else 0.0)


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


def numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """``count`` finite numbers, or None where the element is empty or has another count."""
    if value is None or value == "":
        return None
    values = [value] if isinstance(value, int | float | str) else list(value)
    found = tuple(float(one) for one in values)
    return found if len(found) == count and bool(np.isfinite(found).all()) else None


def _frames(tags: Any) -> int:
    """How many frames a file says to have; one where it says nothing.

    Raises:
        ValueError: for less than none.
    """
    number = _whole(tags.get("NumberOfFrames")) or 1
    if number < 0:
        raise ValueError
    return number


def _whole(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
