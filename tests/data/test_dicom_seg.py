"""DICOM-SEG: segments written by highdicom land on the same voxels, by reference and by position, however stored."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom import encaps, filebase, filewriter, uid

from fedvfm import errors
from fedvfm.data.volumes import dicom_seg, geometry, volumes
from tests.data import dicom_writer as writer

SHAPE = (5, 7, 6)  # columns, rows, slices; odd sizes: packed bits do not end with a byte
LETTERS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
RIGHT_HANDED = [
    code
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for code in itertools.product(*axes)
    if np.linalg.det(np.array([LETTERS[letter] for letter in code])) > 0
]


def lps(code: tuple[str, ...] = ("L", "P", "S")) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array([LETTERS[letter] for letter in code]).T * (0.6, 0.9, 2.0)
    affine[:3, 3] = (11.0, -7.0, 5.0)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def labels() -> np.ndarray:
    """Two segments without symmetry, in the order of the frames."""
    made = np.zeros(SHAPE, dtype=np.uint8)
    made[0:2, 1:4, 0:3] = 1
    made[4, 6, 5] = made[3, 0, 4] = 2
    return made


def study(folder: Path, affine: np.ndarray | None = None, **options: Any) -> list[Any]:
    found: list[Any] = writer.series(folder, np.zeros(SHAPE, np.int16), lps() if affine is None else affine, **options)
    return found


def places(mask: np.ndarray, grid: geometry.Grid, value: int) -> set[tuple[float, ...]]:
    return {tuple(np.round(grid.world(index), 3)) for index in np.argwhere(mask == value)}


@pytest.mark.parametrize("code", RIGHT_HANDED)
@pytest.mark.parametrize("backwards", [False, True])
def test_segments_lie_at_their_physical_points(tmp_path: Path, code: tuple[str, ...], backwards: bool) -> None:
    images = study(tmp_path / "study", lps(code), backwards=backwards)
    writer.segmentation(tmp_path / "seg.dcm", images, labels())
    header = volumes.read_header(tmp_path / "study")
    dicom_seg.check(tmp_path / "seg.dcm", header)
    found = dicom_seg.read(tmp_path / "seg.dcm", header)
    expected = geometry.Grid(SHAPE, geometry.from_lps(lps(code)))
    for value in (1, 2):
        assert places(found, header.grid, value) == places(labels(), expected, value)
    assert np.count_nonzero(found) == np.count_nonzero(labels())


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
def test_kinds_of_segmentations(tmp_path: Path, kind: str) -> None:
    images = study(tmp_path / "study")
    drawn = labels() if kind != "FRACTIONAL" else (labels() == 1).astype(np.float32) * 0.7
    writer.segmentation(tmp_path / "seg.dcm", images, drawn, kind)
    header = volumes.read_header(tmp_path / "study")
    found = header.stored.turn().undo(dicom_seg.read(tmp_path / "seg.dcm", header))
    np.testing.assert_array_equal(found, labels() if kind != "FRACTIONAL" else labels() == 1)


def test_fractions_below_one_half_do_not_count(tmp_path: Path) -> None:
    images = study(tmp_path / "study")
    writer.segmentation(tmp_path / "seg.dcm", images, (labels() == 1).astype(np.float32) * 0.3, "FRACTIONAL")
    assert not dicom_seg.read(tmp_path / "seg.dcm", volumes.read_header(tmp_path / "study")).any()


def test_by_position_where_frames_name_no_image(tmp_path: Path) -> None:
    images = study(tmp_path / "study")
    seg = pydicom.dcmread(writer.segmentation(tmp_path / "seg.dcm", images, labels()))
    for group in seg.PerFrameFunctionalGroupsSequence:
        del group.DerivationImageSequence
    seg.save_as(tmp_path / "bare.dcm", enforce_file_format=True)
    header = volumes.read_header(tmp_path / "study")
    found = header.stored.turn().undo(dicom_seg.read(tmp_path / "bare.dcm", header))
    np.testing.assert_array_equal(found, labels())


def test_on_frames_of_an_enhanced_file(tmp_path: Path) -> None:
    """Frames stored in another order than they lie; the segmentation names frame numbers."""
    order = [3, 0, 5, 1, 4, 2]
    writer.enhanced(tmp_path / "one.dcm", np.zeros(SHAPE, np.int16), lps(), order=order)
    image = pydicom.dcmread(tmp_path / "one.dcm")
    image.DimensionOrganizationType = "3D"
    writer.segmentation(tmp_path / "seg.dcm", [image], labels()[:, :, order])
    header = volumes.read_header(tmp_path / "one.dcm")
    found = header.stored.turn().undo(dicom_seg.read(tmp_path / "seg.dcm", header))
    np.testing.assert_array_equal(found, labels())


def test_several_objects_of_one_study(tmp_path: Path) -> None:
    images = study(tmp_path / "study")
    writer.segmentation(tmp_path / "study" / "one.dcm", images, np.where(labels() == 1, 1, 0).astype(np.uint8))
    writer.segmentation(tmp_path / "study" / "two.dcm", images, np.where(labels() == 2, 2, 0).astype(np.uint8))
    header = volumes.read_header(tmp_path / "study")
    found = header.stored.turn().undo(dicom_seg.read(tmp_path / "study", header))
    np.testing.assert_array_equal(found, labels())


# --- what is wrong ----------------------------------------------------------------------------------------------------


def refused(seg: Path, header: Any) -> errors.Fault:
    with pytest.raises(errors.DataError) as caught:
        dicom_seg.check(seg, header)
    assert "PLANTED" not in str(caught.value)
    return caught.value.fault()


def test_segmentations_of_other_images(tmp_path: Path) -> None:
    images = study(tmp_path / "study")
    header = volumes.read_header(tmp_path / "study")
    seg = writer.segmentation(tmp_path / "seg.dcm", images, labels())
    moved = lps()
    moved[2, 3] += 400
    study(tmp_path / "moved", moved)
    assert refused(seg, volumes.read_header(tmp_path / "moved")).code == "mask-geometry"
    study(tmp_path / "turned", lps(("R", "A", "S")))
    assert refused(seg, volumes.read_header(tmp_path / "turned")).code == "mask-geometry"
    coarse = lps()
    coarse[:, 0] *= 2
    study(tmp_path / "coarse", coarse)
    assert refused(seg, volumes.read_header(tmp_path / "coarse")).code == "mask-geometry"
    writer.series(tmp_path / "large", np.zeros((9, 9, 6), np.int16), lps())
    fault = refused(seg, volumes.read_header(tmp_path / "large"))
    assert fault.code == "mask-geometry"
    assert "7 x 5 pixels, the images have 9 x 9" in fault
    assert refused(tmp_path / "study", header).code == "mask-missing"


def test_a_reference_that_contradicts_its_position(tmp_path: Path) -> None:
    images = study(tmp_path / "study")
    seg = pydicom.dcmread(writer.segmentation(tmp_path / "seg.dcm", images, labels()))
    seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient = [11, 7, 9]
    seg.save_as(tmp_path / "wrong.dcm", enforce_file_format=True)
    header = volumes.read_header(tmp_path / "study")
    assert refused(tmp_path / "wrong.dcm", header).code == "mask-geometry"


def test_overlapping_segments_and_damage(tmp_path: Path) -> None:
    images = study(tmp_path / "study")
    header = volumes.read_header(tmp_path / "study")
    writer.segmentation(tmp_path / "both" / "one.dcm", images, np.where(labels() == 1, 1, 0).astype(np.uint8))
    writer.segmentation(tmp_path / "both" / "two.dcm", images, np.where(labels() == 1, 2, 0).astype(np.uint8))
    with pytest.raises(errors.DataError, match="18 voxels") as caught:
        dicom_seg.read(tmp_path / "both", header)
    assert caught.value.code == "mask-overlap"
    whole = writer.segmentation(tmp_path / "seg.dcm", images, labels()).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:1500])
    with pytest.raises(errors.DataError) as caught:
        dicom_seg.read(tmp_path / "cut.dcm", header)
    assert caught.value.code == "unreadable"


@pytest.mark.files(
    "places",
    "DICOM-SEG that names an instance without frames",
    "table 10-3",
    "all its frames are meant; placed by position",
)
def test_an_instance_without_frame_numbers_is_meant_with_all_of_them(tmp_path: Path) -> None:
    source = writer.enhanced(tmp_path / "mr.dcm", np.zeros(SHAPE, np.uint16), lps())
    path = writer.segmentation(tmp_path / "seg.dcm", [source], labels())
    header = volumes.read_header(tmp_path / "mr.dcm")
    expected = np.array(dicom_seg.read(path, header))
    one = pydicom.dcmread(path)
    for group in one.PerFrameFunctionalGroupsSequence:
        for derived in group.DerivationImageSequence:
            for item in derived.SourceImageSequence:
                del item.ReferencedFrameNumber
    one.save_as(tmp_path / "other.dcm")
    np.testing.assert_array_equal(dicom_seg.read(tmp_path / "other.dcm", header), expected)
    assert expected.any()


@pytest.mark.files(
    "places", "DICOM-SEG made on other images", "C.7.4.1", "by position, noted; refused in another frame of reference"
)
def test_a_segmentation_of_other_images_lies_in_their_frame_of_reference(tmp_path: Path) -> None:
    others = study(tmp_path / "others")
    study(tmp_path / "a")
    writer.segmentation(tmp_path / "seg.dcm", others, labels())
    header = volumes.read_header(tmp_path / "a")
    assert dicom_seg.check(tmp_path / "seg.dcm", header) == (dicom_seg.OTHER_IMAGES,)
    study(tmp_path / "b", FrameOfReferenceUID="1.2.826.0.1.5555555")
    with pytest.raises(errors.DataError) as caught:
        dicom_seg.check(tmp_path / "seg.dcm", volumes.read_header(tmp_path / "b"))
    assert caught.value.code == "mask-geometry"


@pytest.mark.files("places", "DICOM-SEG by position, of thinner or thicker slices", "C.7.6.16.2.1", "refused")
@pytest.mark.parametrize(
    ("factor", "named", "said"),
    [(0.5, True, True), (0.5, False, False), (0.2, False, False), (2, True, True), (2, False, False)],
)
@pytest.mark.parametrize("lesions", ["large", "small"])
def test_a_segmentation_of_thinner_or_thicker_slices_is_refused(
    tmp_path: Path, factor: float, named: bool, said: bool, lesions: str
) -> None:
    """Each of its positions fits a slice, but slices between them would be background, or several would be one."""
    affine = lps()
    affine[:3, 2] *= factor
    others = writer.series(tmp_path / "others", np.zeros((5, 7, 12), np.int16), affine, FrameOfReferenceUID="1.2.3")
    writer.series(tmp_path / "study", np.zeros((5, 7, 12), np.int16), lps(), FrameOfReferenceUID="1.2.3")
    drawn = np.zeros((5, 7, 12), np.uint8)
    drawn[1:4, 1:4, 1 : 2 if lesions == "small" and said else 4] = 1
    seg = pydicom.dcmread(writer.segmentation(tmp_path / "seg.dcm", others, drawn))
    if not named:
        for group in seg.PerFrameFunctionalGroupsSequence:
            del group.DerivationImageSequence
    if not said:
        del seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
    seg.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    fault = refused(tmp_path / "seg.dcm", volumes.read_header(tmp_path / "study"))
    assert fault.code == "mask-geometry"
    assert factor < 1 or "farther apart than the 2 mm of these" in fault


def test_in_another_frame_of_reference_every_frame_has_to_name_its_image(tmp_path: Path) -> None:
    images = study(tmp_path / "study")
    header = volumes.read_header(tmp_path / "study")
    seg = pydicom.dcmread(writer.segmentation(tmp_path / "seg.dcm", images, labels()))
    seg.FrameOfReferenceUID = "1.2.826.0.1.5555555"
    seg.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    assert dicom_seg.check(tmp_path / "seg.dcm", header) == ()
    del seg.PerFrameFunctionalGroupsSequence[-1].DerivationImageSequence
    seg.save_as(tmp_path / "seg.dcm", enforce_file_format=True)
    assert "in another frame of reference" in refused(tmp_path / "seg.dcm", header)


def test_of_masks_beside_a_study_those_of_the_chosen_series_count(tmp_path: Path) -> None:
    common = {"FrameOfReferenceUID": "1.2.3"}
    first = study(tmp_path / "study" / "a", number=1, **common)
    study(tmp_path / "study" / "b", number=2, **common)
    third = study(tmp_path / "study" / "c", number=3, **common)
    for images, value in ((first, 1), (third, 2)):
        writer.segmentation(
            tmp_path / "masks" / f"{value}.dcm", images, np.where(labels() == value, value, 0).astype("u1")
        )
    for words, present, notes in (
        ("1", {1}, (dicom_seg.OTHER_SERIES,)),
        ("3", {2}, (dicom_seg.OTHER_SERIES,)),
        ("2", {1, 2}, (dicom_seg.OTHER_IMAGES,)),
    ):
        header = volumes.read_header(tmp_path / "study", words)
        assert dicom_seg.check(tmp_path / "masks", header) == notes
        assert set(np.unique(dicom_seg.read(tmp_path / "masks", header))) == {0, *present}


@pytest.mark.files("structures", "DICOM-SEG packed as a whole (deflated)", "PS3.5 A.5", "read")
@pytest.mark.files("structures", "DICOM-SEG without preamble", "PS3.10, 7.1", "read")
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize("how", ["deflated", "bare"])
def test_segmentations_packed_as_a_whole_or_without_preamble(tmp_path: Path, kind: str, how: str) -> None:
    path = tmp_path / "study" / "seg.dcm"
    writer.segmentation(path, study(tmp_path / "study"), labels(), kind)
    header = volumes.read_header(tmp_path / "study")
    expected = np.array(dicom_seg.read(path, header))
    one = pydicom.dcmread(path)
    if how == "deflated":
        one.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
        one.save_as(path, enforce_file_format=True)
    else:
        content = filebase.DicomBytesIO()
        content.is_little_endian, content.is_implicit_VR = True, False
        filewriter.write_dataset(content, one)
        path.write_bytes(content.getvalue())
    np.testing.assert_array_equal(dicom_seg.read(path, volumes.read_header(tmp_path / "study")), expected)
    assert expected.any()


@pytest.mark.files("structures", "DICOM-SEG packed as HTJ2K", "PS3.5 A.4", "refused by that name")
def test_a_packing_without_a_decoder_is_no_damage(tmp_path: Path) -> None:
    path = writer.segmentation(tmp_path / "seg.dcm", study(tmp_path / "study"), labels(), "LABELMAP")
    one = pydicom.dcmread(path)
    one.file_meta.TransferSyntaxUID = uid.HTJ2KLossless
    one.PixelData = encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(40)] * int(one.NumberOfFrames))
    one["PixelData"].is_undefined_length, one["PixelData"].VR = True, "OB"
    one.save_as(path, enforce_file_format=True)
    with pytest.raises(errors.DataError, match="High-Throughput") as caught:
        dicom_seg.read(path, volumes.read_header(tmp_path / "study"))
    assert caught.value.code == "compressed"
