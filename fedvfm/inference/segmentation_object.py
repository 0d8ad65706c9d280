"""DICOM-SEG: masks in the hospital's own format, on the very pixels of the source images.

Of the source's headers only what the standard requires of a segmentation in the same study is read: who the patient is
and which study it is (the PACS files it by them), and where the pixels lie. All else stays unread. These identifiers
are in that file alone, which lies where the images lie; they are never logged, nor part of a name, message or summary.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data import colours, structures
from fedvfm.data.decoding import decoder
from fedvfm.data.volumes import dicom, geometry
from fedvfm.data.volumes import header as headers
from fedvfm.inference import class_codes
from fedvfm.runtime import logs
from fedvfm.storage import storage

REQUIRED = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
)
"""Patient and study: present in every DICOM object, empty where unknown (type 2)."""
IMAGE = (
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "InstanceNumber",
    "Modality",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "DimensionOrganizationType",
)
SERIES_NUMBER = 900
NO_PLANE = (
    "its DICOM-SEG has no place in the patient, as the image has none: highdicom reads it, dcmqi, pydicom-seg and 3D "
    "Slicer do not; --as png is read by all"
)
LONGEST = 64
"""Characters of a text of one line (VR LO)."""


def require_installed() -> None:
    """Say how to get highdicom where it is missing.

    Raises:
        MissingExtra: if it is not installed.
    """
    if importlib.util.find_spec("highdicom") is None:
        raise errors.MissingExtra(
            "DICOM-SEG needs highdicom, not installed here. Run: pip install 'fedvfm[dicom-seg]', or write NIfTI: --as "
            "nifti"
        )


def holds(header: headers.Header) -> bool:
    """Whether a DICOM-SEG object can hold a mask of these images: frames without a place need an object each."""
    return header.stored.placed or len(header.frames) == 1


def write(
    path: Path,
    labels: NDArray[np.uint8],
    header: headers.Header,
    class_names: Sequence[str],
    fingerprint: str,
    codes: Mapping[str, str] = structures.EMPTY,
    prompts: str = "",
) -> None:
    """Write labels as one binary DICOM-SEG object with a segment for every foreground class.

    Args:
        path: the file.
        labels: class numbers in stored axes (column, row, slice), as :func:`fedvfm.data.volumes.volumes.place_back`
            gives them.
        header: of the DICOM input.
        class_names: of the recipe, background first.
        fingerprint: of the adapter.
        codes: class -> its code (``recipe.data.class_codes``); those of common organs are known.
        prompts: where prompts came from that somebody gave; empty where the model alone found all.

    Raises:
        DataError: if the source's headers do not allow it; the message quotes none of them.
        MissingExtra: without highdicom.
        StorageError: if the disk refuses.
    """
    require_installed()
    if not holds(header):
        raise errors.DataError(
            f"{header.modality or 'images'}: {len(header.frames)} frames that do not say where they lie in the "
            "patient, which a DICOM-SEG object cannot hold together; write pictures: --as png, or NIfTI: --as nifti"
        )
    kind = header.modality or "images"
    coded = tuple(codes.items())
    storage.write_bytes(path, _content(labels, header, class_names, fingerprint, coded, prompts, kind).tobytes())


@decoder.apart
def _content(
    labels: NDArray[Any],
    header: headers.Header,
    class_names: Sequence[str],
    fingerprint: str,
    codes: tuple[tuple[str, str], ...],
    prompts: str,
    where: str,
) -> NDArray[np.uint8]:
    """The object's file; see :func:`write`. The source's headers are read for it, so it is made where these are."""
    try:
        # Log lines of highdicom name what is copied.
        with dicom.quietly(), logs.limited(logging.CRITICAL + 1, "highdicom"):
            sources, planes = _sources(labels, header)
            content = io.BytesIO()
            _object(sources, planes, class_names, fingerprint, dict(codes), prompts).save_as(content)
            return np.frombuffer(content.getvalue(), np.uint8)
    except dicom.BROKEN as error:
        # The words of the error may quote the header.
        raise errors.DataError(
            f"{where}: a DICOM-SEG object cannot be made of these source images "
            f"({type(error).__name__}); write NIfTI: --as nifti"
        ) from None


def _sources(labels: NDArray[np.uint8], header: headers.Header) -> tuple[list[Any], NDArray[np.uint8]]:
    """Source headers, and the masks frame by frame in their order: (frames, rows, columns).

    Raises:
        DataError: if the frames come from several multi-frame files.
    """
    files = list(dict.fromkeys(frame.file for frame in header.frames))
    planes = labels.transpose(2, 1, 0)
    if len(files) == len(header.frames):
        return [_read(file) for file in files], np.ascontiguousarray(planes)
    if len(files) > 1:
        raise errors.DataError(
            f"the series has {len(header.frames)} frames in {len(files)} files; DICOM-SEG refers to single images or "
            "to one multi-frame file. Write NIfTI: --as nifti"
        )
    source = _with_places(_read(files[0]), header)
    whole = np.zeros((int(source.NumberOfFrames), *planes.shape[1:]), dtype=np.uint8)
    for frame, plane in zip(header.frames, planes, strict=True):
        whole[frame.number] = plane
    return [source], whole


def _with_places(source: Any, header: headers.Header) -> Any:
    """A multi-frame image whose frames say where they lie in functional groups; nuclear medicine says it by vectors."""
    import pydicom

    if source.get("PerFrameFunctionalGroupsSequence") or not header.stored.placed:
        return source
    lps = geometry.from_lps(header.stored.affine)
    column, row, _ = header.stored.spacing
    shared, turned, measures = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    turned.ImageOrientationPatient = [*(lps[:3, 0] / column), *(lps[:3, 1] / row)]
    measures.PixelSpacing, measures.SliceThickness = [row, column], header.stored.spacing[2]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [turned], [measures]
    groups = [pydicom.Dataset() for _ in range(int(source.NumberOfFrames))]
    for at, frame in enumerate(header.frames):
        place = pydicom.Dataset()
        place.ImagePositionPatient = [float(value) for value in (lps @ (0.0, 0.0, at, 1.0))[:3]]
        groups[frame.number].PlanePositionSequence = [place]
    source.SharedFunctionalGroupsSequence, source.PerFrameFunctionalGroupsSequence = [shared], groups
    return source


def _read(file: Path) -> Any:
    """The few elements of a source image that its segmentation needs; unknown ones of patient and study are empty."""
    import pydicom

    wanted = [*REQUIRED, *IMAGE]
    source = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted, force=dicom.begins_bare(file))
    for name in REQUIRED:
        if name not in source:
            setattr(source, name, "")
    return source


def _object(
    sources: list[Any],
    planes: NDArray[np.uint8],
    class_names: Sequence[str],
    fingerprint: str,
    codes: Mapping[str, str],
    prompts: str,
) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes as known

    version = importlib.metadata.version("fedvfm")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="fedvfm",
        family=known.DCM.ArtificialIntelligence,
        version=version,
        parameters={"adapter": fingerprint, **({"prompts": prompts} if prompts else {})},
    )
    kinds = highdicom.seg.SegmentAlgorithmTypeValues
    kind = kinds.SEMIAUTOMATIC if prompts else kinds.AUTOMATIC
    segments = [
        _segment(number, class_codes.of(name, codes), name, algorithm, kind)
        for number, name in enumerate(class_names[1:], 1)
    ]
    segmentation = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=planes,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER,
        series_description=f"fedvfm (research only): {', '.join(class_names[1:])}"[:LONGEST],
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="fedvfm",
        manufacturer_model_name="fedvfm",
        software_versions=version,
        device_serial_number=fingerprint[:16],
        content_label="FEDVFM_SEG",
        content_description="For research only",
        omit_empty_frames=bool(planes.any()),
    )
    segmentation.ContentCreatorName = ""  # nobody, but the standard wants it present (type 2)
    return segmentation


def _segment(number: int, coded: class_codes.Coded, name: str, algorithm: Any, algorithm_type: Any) -> Any:
    """What a segment is: category, type and modifier as codes, and the class's name as label."""
    import highdicom

    category, kind, modifier = (code and highdicom.sr.CodedConcept(*code) for code in coded)
    description = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:LONGEST],
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=algorithm_type,
        algorithm_identification=algorithm,
        display_color=highdicom.color.CIELabColor.from_rgb(*colours.palette(number + 1)[-3:]),
    )
    if modifier is not None:
        description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return description
