"""Real DICOM files for tests: series, enhanced multi-frame, radiographs; every one carries planted patient text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import dataset, uid

PLANTED = "PLANTED"
"""Stands in every text that may name a patient; must never be seen again."""
CT, DX, US, ENHANCED_MR = (
    uid.CTImageStorage,
    uid.DigitalXRayImageStorageForPresentation,
    uid.UltrasoundMultiFrameImageStorage,
    uid.EnhancedMRImageStorage,
)


def blank(modality: str = "CT", sop: str = CT, series: str | None = None, number: int = 1) -> pydicom.Dataset:
    """A data set with everything but geometry and pixels."""
    one = pydicom.Dataset()
    one.file_meta = dataset.FileMetaDataset()
    one.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = sop
    one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID = uid.generate_uid()
    one.PatientName, one.PatientID = f"{PLANTED}^NAME", f"{PLANTED}-ID"
    one.AccessionNumber, one.PatientBirthDate = f"{PLANTED}-ACC", "19700101"
    one.StudyDescription = one.SeriesDescription = f"{PLANTED} description"
    one.InstitutionName, one.ImageComments = f"{PLANTED} hospital", f"{PLANTED} comment"
    one.PatientSex, one.StudyDate, one.StudyTime, one.StudyID = "O", "20200101", "120000", f"{PLANTED}-S"
    one.ReferringPhysicianName, one.Manufacturer = f"{PLANTED}^DOCTOR", "none"
    one.StudyInstanceUID, one.SeriesInstanceUID = "1.2.826.0.1.7777777", series or uid.generate_uid()
    one.FrameOfReferenceUID = "1.2.826.0.1.6666666"
    one.Modality, one.SeriesNumber, one.InstanceNumber = modality, number, 1
    return one


def pixels(one: pydicom.Dataset, values: np.ndarray, photometric: str = "MONOCHROME2") -> pydicom.Dataset:
    """Put (rows, columns[, 3]) or (frames, rows, columns[, 3]) values into a data set."""
    colour = values.shape[-1] == 3 and photometric in ("RGB", "YBR_FULL")
    shape = values.shape[:-1] if colour else values.shape
    one.Rows, one.Columns = shape[-2:]
    if len(shape) == 3:
        one.NumberOfFrames = shape[0]
    one.SamplesPerPixel, one.PhotometricInterpretation = (3 if colour else 1), photometric
    if colour:
        one.PlanarConfiguration = 0
    one.BitsAllocated = one.BitsStored = 8 * values.dtype.itemsize
    one.HighBit, one.PixelRepresentation = one.BitsStored - 1, int(values.dtype.kind == "i")
    one.PixelData = values.tobytes()
    if len(one.PixelData) % 2:
        one.PixelData += b"\0"
    one["PixelData"].VR = "OW" if values.dtype.itemsize > 1 else "OB"
    return one


def series(
    folder: Path,
    voxels: np.ndarray,
    affine: np.ndarray,
    *,
    backwards: bool = False,
    modality: str = "CT",
    slope: float = 1.0,
    intercept: float = 0.0,
    skip: tuple[int, ...] = (),
    number: int = 1,
    **changes: Any,
) -> list[pydicom.Dataset]:
    """One file a slice.

    Args:
        folder: where to; its files get names that do not follow their order in space.
        voxels: (columns, rows, slices), values as stored.
        affine: voxel index to LPS millimetres.
        backwards: instance numbers and names run against the normal.
        modality: of every file.
        slope: rescale.
        intercept: rescale.
        skip: slices that are left out.
        number: of the series.
        changes: further elements.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    series_uid, made = uid.generate_uid(), []
    for k in range(voxels.shape[2]):
        if k in skip:
            continue
        one = pixels(blank(modality, CT, series_uid, number), np.ascontiguousarray(voxels[:, :, k].T))
        one.ImageOrientationPatient = [
            float(f"{v:.10g}") for v in [*affine[:3, 0] / sizes[0], *affine[:3, 1] / sizes[1]]
        ]
        one.ImagePositionPatient = [float(f"{v:.10g}") for v in affine[:3, 3] + k * affine[:3, 2]]
        one.PixelSpacing, one.SliceThickness = [float(sizes[1]), float(sizes[0])], float(sizes[2])
        one.RescaleSlope, one.RescaleIntercept = slope, intercept
        order = voxels.shape[2] - 1 - k if backwards else k
        one.InstanceNumber = order + 1
        for name, value in changes.items():
            setattr(one, name, value)
        one.save_as(folder / f"{order:03d}-{PLANTED}-1.2.3.{k}.dcm", enforce_file_format=True)
        made.append(one)
    return made


def enhanced(path: Path, voxels: np.ndarray, affine: np.ndarray, order: list[int] | None = None) -> pydicom.Dataset:
    """One multi-frame file; ``order`` is the order of its frames. Voxels and affine as in :func:`series`."""
    order = order or list(range(voxels.shape[2]))
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    one = pixels(blank("MR", ENHANCED_MR), np.stack([np.ascontiguousarray(voxels[:, :, k].T) for k in order]))
    shared, orientation, measures = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    orientation.ImageOrientationPatient = [*affine[:3, 0] / sizes[0], *affine[:3, 1] / sizes[1]]
    measures.PixelSpacing, measures.SliceThickness = [sizes[1], sizes[0]], sizes[2]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    one.SharedFunctionalGroupsSequence, groups = [shared], []
    for k in order:
        group, position, rescale = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient = list(affine[:3, 3] + k * affine[:3, 2])
        rescale.RescaleSlope, rescale.RescaleIntercept = 1, -100
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [position], [rescale]
        groups.append(group)
    one.PerFrameFunctionalGroupsSequence = groups
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path, enforce_file_format=True)
    return one


def radiograph(path: Path, values: np.ndarray, photometric: str = "MONOCHROME2", **changes: Any) -> pydicom.Dataset:
    """A projection: (rows, columns), no position in the patient."""
    one = pixels(blank("DX", DX), values, photometric)
    one.PatientOrientation, one.ImagerPixelSpacing = ["L", "F"], [0.2, 0.1]
    for name, value in changes.items():
        setattr(one, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path, enforce_file_format=True)
    return one


def segmentation(
    path: Path,
    images: list[pydicom.Dataset],
    drawn: np.ndarray,
    kind: str = "BINARY",
    described: Sequence[tuple[Any, str]] = (),
) -> Path:
    """A DICOM-SEG by highdicom; ``drawn`` (columns, rows, slices): segment numbers, or fractions of segment 1.

    ``described`` holds coded type and label of segments 1, 2, ...
    """
    import highdicom
    from pydicom.sr.codedict import codes

    count = max(len(described), int(drawn.max()) if drawn.dtype.kind != "f" else 1)
    said = [*described, *((codes.SCT.Liver, f"{PLANTED} {number}") for number in range(len(described) + 1, count + 1))]
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=said[number - 1][1],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=said[number - 1][0],
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number in range(1, count + 1)
    ]
    made = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=np.ascontiguousarray(drawn.transpose(2, 1, 0)),
        segmentation_type=kind,
        segment_descriptions=descriptions,
        series_instance_uid=highdicom.UID(),
        series_number=99,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="none",
        manufacturer_model_name="none",
        software_versions="1",
        device_serial_number="1",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path


def structure_set(
    path: Path,
    images: Sequence[pydicom.Dataset],
    regions: Sequence[tuple[str, Sequence[tuple[int | None, np.ndarray]]]],
    *,
    kind: str = "CLOSED_PLANAR",
    referenced: bool = True,
    **changes: Any,
) -> pydicom.Dataset:
    """An RT structure set.

    Args:
        path: where to.
        images: one a slice, which contours refer to.
        regions: name of each region, with its contours: number of the image, or None to name none, and (points, 3) in
            LPS millimetres.
        kind: Contour Geometric Type of all contours.
        referenced: whether contours and the set as a whole name the images.
        changes: further elements.
    """
    whole = blank("RTSTRUCT", uid.RTStructureSetStorage, number=77)
    del whole.FrameOfReferenceUID
    frame, study, source = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    frame.FrameOfReferenceUID = images[0].FrameOfReferenceUID
    source.SeriesInstanceUID = images[0].SeriesInstanceUID
    source.ContourImageSequence = [reference(one) for one in images]
    study.RTReferencedSeriesSequence = [source]
    frame.RTReferencedStudySequence = [study] if referenced else []
    whole.ReferencedFrameOfReferenceSequence = [frame]
    whole.StructureSetROISequence, whole.ROIContourSequence, whole.RTROIObservationsSequence = [], [], []
    for number, (name, drawn) in enumerate(regions, 11):
        listed, held, observed = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        listed.ROINumber = held.ReferencedROINumber = observed.ReferencedROINumber = number
        listed.ROIName, listed.ReferencedFrameOfReferenceUID = name, images[0].FrameOfReferenceUID
        observed.ROIInterpreter = f"{PLANTED}^DOCTOR"
        held.ContourSequence = []
        for at, points in drawn:
            contour = pydicom.Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            contour.ContourData = [f"{value:.6g}" for value in np.asarray(points, float).ravel()]
            if referenced and at is not None:
                contour.ContourImageSequence = [reference(images[at])]
            held.ContourSequence.append(contour)
        whole.StructureSetROISequence.append(listed)
        whole.ROIContourSequence.append(held)
        whole.RTROIObservationsSequence.append(observed)
    for name, value in changes.items():
        setattr(whole, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save_as(path, enforce_file_format=True)
    return whole


def reference(image: pydicom.Dataset) -> pydicom.Dataset:
    """A file as others name it."""
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    return item
