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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.data.volumes import dicom
from fedvfm.data.volumes import header as headers
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
SCHEME = "99FEDVFM"
"""Class names are the recipe's own, so their codes are private; the category is the standard's most neutral one."""


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


def write(
    path: Path, labels: NDArray[np.uint8], header: headers.Header, class_names: Sequence[str], fingerprint: str
) -> None:
    """Write labels as one binary DICOM-SEG object with a segment for every foreground class.

    Args:
        path: the file.
        labels: class numbers in stored axes (column, row, slice), as :func:`fedvfm.data.volumes.volumes.place_back`
            gives them.
        header: of the DICOM input.
        class_names: of the recipe, background first.
        fingerprint: of the adapter.

    Raises:
        DataError: if the source's headers do not allow it; the message quotes none of them.
        MissingExtra: without highdicom.
        StorageError: if the disk refuses.
    """
    require_installed()
    try:
        # Log lines of highdicom name what is copied.
        with dicom.quietly(), logs.limited(logging.CRITICAL + 1, "highdicom"):
            sources, planes = _sources(labels, header)
            made = _object(sources, planes, class_names, fingerprint)
            content = io.BytesIO()
            made.save_as(content)
    except dicom.BROKEN as error:
        # The words of the error may quote the header.
        raise errors.DataError(
            f"a DICOM-SEG object cannot be made of these source images ({type(error).__name__}); write NIfTI: --as "
            "nifti"
        ) from None
    storage.write_bytes(path, content.getvalue())


def _sources(labels: NDArray[np.uint8], header: headers.Header) -> tuple[list[Any], NDArray[np.uint8]]:
    """Source headers, and the masks frame by frame in their order: (frames, rows, columns).

    Raises:
        DataError: if the frames come from several multi-frame files.
    """
    files = list(dict.fromkeys(one.file for one in header.frames))
    planes = labels.transpose(2, 1, 0)
    if len(files) == len(header.frames):
        return [_read(file) for file in files], np.ascontiguousarray(planes)
    if len(files) > 1:
        raise errors.DataError(
            f"the series has {len(header.frames)} frames in {len(files)} files; DICOM-SEG refers to single images or "
            "to one multi-frame file. Write NIfTI: --as nifti"
        )
    source = _read(files[0])
    whole = np.zeros((int(source.NumberOfFrames), *planes.shape[1:]), dtype=np.uint8)
    for frame, plane in zip(header.frames, planes, strict=True):
        whole[frame.number] = plane
    return [source], whole


def _read(file: Path) -> Any:
    """The few elements of a source image that its segmentation needs; unknown ones of patient and study are empty."""
    import pydicom

    found = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*REQUIRED, *IMAGE])
    for name in REQUIRED:
        if name not in found:
            setattr(found, name, "")
    return found


def _object(sources: list[Any], planes: NDArray[np.uint8], class_names: Sequence[str], fingerprint: str) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    version = importlib.metadata.version("fedvfm")
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="fedvfm",
        family=codes.DCM.ArtificialIntelligence,
        version=version,
        parameters={"adapter": fingerprint},
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
            segmented_property_type=highdicom.sr.CodedConcept(f"CLASS{number}", SCHEME, name[:64]),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(class_names[1:], 1)
    ]
    return highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=planes,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER,
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
