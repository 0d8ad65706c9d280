"""Right is right: an asymmetric phantom stored in every way files allow, checked by physical point in and out.

The phantom's values say where a voxel is: each is unique, so that a voxel found in a file, in a slice or in a written
mask is compared with the world coordinates it must have. Files are written by pydicom and nibabel from affines made
here, and what is written is read back by nibabel alone.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedvfm.data.volumes import geometry, volumes
from tests.data import dicom_writer as writer

SHAPE = (4, 5, 6)
UPRIGHT = np.array([[2.0, 0, 0, -11.0], [0, 3.0, 0, 7.0], [0, 0, 5.0, -31.0], [0, 0, 0, 1.0]])
"""Right, anterior, superior; three different spacings and no symmetry."""
LANDMARKS = ((0, 0, 0), (3, 0, 0), (0, 4, 0), (0, 0, 5), (2, 1, 4), (3, 4, 5))
CODES = ["".join(code) for axes in itertools.permutations(("RL", "AP", "SI")) for code in itertools.product(*axes)]
TILT = np.array([[0.936, -0.275, 0.218], [0.289, 0.956, -0.037], [-0.198, 0.098, 0.975]])


def phantom() -> np.ndarray:
    return np.arange(1, 1 + np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


def oblique() -> np.ndarray:
    """A rotation of about 20 degrees around no axis in particular, before the upright affine."""
    rotation, _ = np.linalg.qr(TILT)
    rotation *= np.sign(np.diagonal(rotation))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation @ np.diag([2.0, 3.0, 5.0]), (-11.0, 7.0, -31.0)
    return affine


def stored(code: str, upright: np.ndarray = UPRIGHT) -> tuple[np.ndarray, np.ndarray]:
    """The phantom with its axes running to ``code``, and its affine to RAS; by nibabel."""
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(code)
    )
    image = nibabel.Nifti1Image(phantom(), upright).as_reoriented(turn)
    return np.asarray(image.dataobj), image.affine


def place_of(value: int, upright: np.ndarray = UPRIGHT) -> np.ndarray:
    """World coordinates that the voxel of this value must have, by hand."""
    index = np.argwhere(phantom() == value)[0]
    return upright[:3, :3] @ index + upright[:3, 3]


def check_reading(path: Path, upright: np.ndarray = UPRIGHT) -> volumes.Volume:
    """Every landmark is found at its physical point, in the volume and in the slices of every plane."""
    volume = volumes.read_volume(path)
    for at in LANDMARKS:
        value = int(phantom()[at])
        found = np.argwhere(volume.voxels == value)
        assert len(found) == 1
        np.testing.assert_allclose(volume.grid.world(found[0]), place_of(value, upright), atol=1e-3)
        np.testing.assert_array_equal(found[0], at)  # upright: canonical axes are those of the phantom
    return volume


def check_writing(path: Path, out: Path, plane: geometry.Plane, upright: np.ndarray = UPRIGHT) -> None:
    """Landmarks marked on slices as shown come out of the written mask at their physical points."""
    header = volumes.read_header(path)
    wanted = [int(phantom()[at]) for at in LANDMARKS]
    marked = {}
    for index in range(header.count(plane)):
        shown = volumes.read_slice(path, index, plane)
        marked[index] = np.where(np.isin(shown, wanted), shown, 0).astype(np.int16)
        check_boxes(path, shown, wanted, header.axis(plane), index)
    volumes.write_nifti(out, volumes.place_back(marked, header, plane), header)
    result = nibabel.load(out)
    labels = np.asarray(result.dataobj)
    assert np.count_nonzero(labels) == len(wanted)
    for value in wanted:
        (index,) = np.argwhere(labels == value)
        for affine in (result.get_sform(), result.get_qform()):
            np.testing.assert_allclose(nibabel.affines.apply_affine(affine, index), place_of(value, upright), atol=2e-3)


def check_boxes(path: Path, shown: np.ndarray, wanted: list[int], axis: int, index: int) -> None:
    """The box of a landmark on a slice as shown is that of its voxel in the axes of the file."""
    volume = volumes.read_volume(path)
    as_stored = volume.header.stored.turn().undo(volume.voxels)
    places = np.argwhere(np.isin(shown, wanted))
    edges = np.concatenate([places[:, ::-1], places[:, ::-1] + 1], axis=1).astype(float)
    for (row, column), box in zip(places, geometry.box_back(edges, volume.header.stored, axis, index), strict=True):
        np.testing.assert_array_equal(box[3:], box[:3] + 1)
        assert as_stored[tuple(box[:3].astype(int))] == shown[row, column]


@pytest.mark.parametrize("code", CODES)
def test_nifti_in_all_48_axis_codes(tmp_path: Path, code: str) -> None:
    values, affine = stored(code)
    path = tmp_path / "in.nii"
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    assert "".join(nibabel.aff2axcodes(affine)) == code == volumes.read_header(path).stored.codes
    check_reading(path)
    for plane in geometry.PLANES:
        check_writing(path, tmp_path / f"{plane}.nii.gz", plane)
    back = nibabel.load(tmp_path / "axial.nii.gz")
    assert back.shape == values.shape
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)  # the input's own axes, not turned ones


def test_48_codes() -> None:
    assert len(set(CODES)) == 48


@pytest.mark.parametrize("code", CODES)
def test_dicom_in_all_48_axis_codes(tmp_path: Path, code: str) -> None:
    """Columns, rows and the order of the files run to ``code``; 24 of the 48 list their slices against the normal."""
    values, affine = stored(code)
    lps = geometry.from_lps(affine)
    against = np.linalg.det(lps[:3, :3]) < 0
    if against:  # DICOM cannot say it otherwise: the first file in the order of names is the last along the normal
        lps = lps.copy()
        lps[:3, 3] += lps[:3, 2] * (values.shape[2] - 1)
        lps[:3, 2] *= -1
        values = values[:, :, ::-1]
    writer.series(tmp_path / "study", values, lps, backwards=bool(against))
    header = volumes.read_header(tmp_path / "study")
    first, last = (header.frames[at].file.name for at in (0, -1))
    assert (first > last) == against
    check_reading(tmp_path / "study")
    for plane in geometry.PLANES:
        check_writing(tmp_path / "study", tmp_path / f"{plane}.nii.gz", plane)


@pytest.mark.parametrize("backwards", [False, True])
def test_oblique(tmp_path: Path, backwards: bool) -> None:
    for code in ("RAS", "LPS", "PIR"):
        values, affine = stored(code, oblique())
        nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / f"{code}.nii.gz")
        check_reading(tmp_path / f"{code}.nii.gz", oblique())
        check_writing(tmp_path / f"{code}.nii.gz", tmp_path / f"{code}-out.nii", "coronal", oblique())
        if np.linalg.det(affine[:3, :3]) > 0:
            writer.series(tmp_path / code, values, geometry.from_lps(affine), backwards=backwards)
            check_reading(tmp_path / code, oblique())
            check_writing(tmp_path / code, tmp_path / f"{code}-dicom.nii.gz", "acquired", oblique())


def test_enhanced_multi_frame_in_any_order_of_frames(tmp_path: Path) -> None:
    values, affine = stored("LPS")
    writer.enhanced(tmp_path / "one.dcm", values + 100, geometry.from_lps(affine), order=[3, 0, 5, 1, 4, 2])
    check_reading(tmp_path / "one.dcm")  # its frames say: minus 100
    check_writing(tmp_path / "one.dcm", tmp_path / "out.nii.gz", "axial")


def test_tilted_gantry_keeps_its_shear(tmp_path: Path) -> None:
    """The affine is not at right angles; only the sform can hold it."""
    values, affine = stored("LPS")
    sheared = affine.copy()
    sheared[1, 2] += 1.5
    writer.series(tmp_path / "ct", values, geometry.from_lps(sheared))
    header = volumes.read_header(tmp_path / "ct")
    np.testing.assert_allclose(header.stored.affine, sheared, atol=1e-6)
    assert "askew" in header.notes[0]
    volumes.write_nifti(tmp_path / "out.nii", np.ones(values.shape, dtype=np.uint8), header)
    back = nibabel.load(tmp_path / "out.nii")
    np.testing.assert_allclose(back.affine, sheared, atol=1e-5)
    assert int(back.header["qform_code"]) == 0


@pytest.mark.parametrize("code", ["RAS", "LPS", "ASL", "IPR"])
def test_slices_are_shown_as_a_radiologist_sees_them(tmp_path: Path, code: str) -> None:
    """By name of the side, not by formula: one bright voxel near the patient's right, front and top."""
    values, affine = stored(code)
    bright = int(phantom()[3, 4, 5])  # the most right, anterior and superior voxel
    path = tmp_path / "in.nii"
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    volume = volumes.read_volume(path)
    axial = volumes.slice_of(volume, 5, "axial")
    assert axial.shape == (5, 4)
    assert axial[0, 0] == bright  # front is up, the patient's right is at the left
    coronal = volumes.slice_of(volume, 4, "coronal")
    assert coronal.shape == (6, 4)
    assert coronal[0, 0] == bright  # the head is up, the patient's right is at the left
    sagittal = volumes.slice_of(volume, 3, "sagittal")
    assert sagittal.shape == (6, 5)
    assert sagittal[0, 0] == bright  # the head is up, the nose points left
    assert volume.header.spacing("axial") == pytest.approx((3.0, 2.0))
    assert volume.header.spacing("coronal") == pytest.approx((5.0, 2.0))
    assert volume.header.spacing("sagittal") == pytest.approx((5.0, 3.0))
    assert [volume.header.step(plane) for plane in ("axial", "coronal", "sagittal")] == pytest.approx([5.0, 3.0, 2.0])


@pytest.mark.parametrize("letters", [["L", "F"], ["R", "F"], ["A", "F"], []])
def test_radiograph_is_never_turned(tmp_path: Path, letters: list[str]) -> None:
    """Rows stay rows. A point r rows down and c columns right is where its pixel spacing says, in and out."""
    values = np.arange(7 * 9, dtype=np.uint16).reshape(7, 9) * 10
    writer.radiograph(tmp_path / "chest.dcm", values, PatientOrientation=letters)
    header = volumes.read_header(tmp_path / "chest.dcm")
    assert not header.stored.placed
    shown = volumes.read_slice(tmp_path / "chest.dcm", 0)
    np.testing.assert_array_equal(shown, values)
    assert header.size("axial") == (7, 9)
    assert header.spacing("axial") == pytest.approx((0.2, 0.1))
    assert header.step("axial") is None
    mask = np.zeros((7, 9), dtype=np.uint8)
    mask[2, 6] = 1
    volumes.write_nifti(tmp_path / "out.nii.gz", volumes.place_back({0: mask}, header), header)
    result = nibabel.load(tmp_path / "out.nii.gz")
    (index,) = np.argwhere(np.asarray(result.dataobj) == 1)
    # Columns to the left of the patient, rows downwards: -x and -y in RAS, as a frontal picture is looked at.
    np.testing.assert_allclose(nibabel.affines.apply_affine(result.affine, index), [-6 * 0.1, -2 * 0.2, 0.0], atol=1e-6)


def test_turning_back_is_exact() -> None:
    values = np.random.default_rng(0).integers(0, 99, SHAPE)
    for code in CODES:
        _, affine = stored(code)
        shape = stored(code)[0].shape
        turn = geometry.Grid(shape, affine).turn()
        there = turn.apply(values.reshape(shape))
        assert there.shape == SHAPE
        np.testing.assert_array_equal(turn.undo(there), values.reshape(shape))


def test_stack_holds_the_neighbours(tmp_path: Path) -> None:
    values, affine = stored("PIR")
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "in.nii.gz")
    volume = volumes.read_volume(tmp_path / "in.nii.gz")
    stack = volumes.stack_of(volume, 2, "axial")
    assert stack.shape == (3, 5, 4)
    for channel, z in enumerate((1, 2, 3)):
        np.testing.assert_array_equal(stack[channel], volumes.slice_of(volume, z, "axial"))
    np.testing.assert_array_equal(volumes.stack_of(volume, 0)[0], volumes.slice_of(volume, 0))
    np.testing.assert_array_equal(volumes.stack_of(volume, 5)[2], volumes.slice_of(volume, 5))
