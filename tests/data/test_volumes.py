"""NIfTI and NRRD: what is read, what goes back, what is refused, and how little is read for one slice."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest

from fedvfm import errors
from fedvfm.data.volumes import nifti as nifti_reader
from fedvfm.data.volumes import slices, volumes

AFFINE = np.array([[-0.7, 0, 0, 20.0], [0, -0.8, 0, 30.0], [0, 0, 2.5, -40.0], [0, 0, 0, 1.0]])


def voxels(kind: type = np.int16) -> np.ndarray:
    return (np.arange(4 * 5 * 6).reshape(4, 5, 6) * 3 - 100).astype(kind)


def nifti(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(errors.DataError) as caught:
        volumes.read_volume(path)
    return str(caught.value)


@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.float32, np.float64, np.int32])
def test_values_keep_their_units_and_kind(tmp_path: Path, kind: type) -> None:
    values = np.abs(voxels()).astype(kind)
    volume = volumes.read_volume(nifti(tmp_path / "a.nii.gz", values))
    assert volume.voxels.dtype == (np.float32 if np.dtype(kind).kind == "f" else np.dtype(kind))
    np.testing.assert_array_equal(volume.header.stored.turn().undo(volume.voxels), values)
    assert volumes.value_range(tmp_path / "a.nii.gz") == (float(values.min()), float(values.max()))
    assert not volume.voxels.flags.writeable


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_scaled_integers_are_unfolded(tmp_path: Path, ending: str) -> None:
    image = nibabel.Nifti1Image(voxels(), AFFINE)
    image.header.set_slope_inter(0.5, 10.0)
    path = tmp_path / f"a{ending}"
    nibabel.save(image, path)
    expected = np.asarray(nibabel.load(path).dataobj)
    volume = volumes.read_volume(path)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_allclose(volume.header.stored.turn().undo(volume.voxels), expected, rtol=1e-6)
    np.testing.assert_allclose(volumes.read_slice(path, 2), volumes.slice_of(volume, 2), rtol=1e-6)


def test_two_dimensional_nifti_is_one_slice(tmp_path: Path) -> None:
    flat = nifti(tmp_path / "flat.nii", np.arange(20, dtype=np.float32).reshape(4, 5), np.eye(4))
    header = volumes.read_header(flat)
    assert header.stored.shape == (4, 5, 1)
    assert volumes.read_slice(flat, 0).shape == (5, 4)
    assert slices.part_of(header, "x", 0, slices.View()) is None


def test_one_slice_of_an_uncompressed_file_does_not_read_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nifti(tmp_path / "a.nii", voxels())
    monkeypatch.setattr(volumes, "_volume", lambda *_: pytest.fail("read whole"))
    for plane, shape in (("axial", (5, 4)), ("coronal", (6, 4)), ("sagittal", (6, 5))):
        assert volumes.read_slice(path, 1, plane).shape == shape
    monkeypatch.setattr(volumes, "BYTES_IN_MEMORY", 1)  # what is larger is not read whole for its range
    assert volumes.value_range(path) == (-100.0, 257.0)


def test_few_volumes_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [nifti(tmp_path / f"{number}.nii.gz", voxels() + number) for number in range(6)]
    for path in paths:
        volumes.read_volume(path)
    assert len(volumes._volumes) <= volumes.VOLUMES_IN_MEMORY
    assert volumes.read_volume(paths[-1]) is volumes.read_volume(paths[-1])
    monkeypatch.setattr(volumes, "BYTES_IN_MEMORY", 1)
    volumes.read_volume(paths[0])
    assert len(volumes._volumes) == 1  # one is kept however large it is


def test_a_changed_volume_is_read_again(tmp_path: Path) -> None:
    path = nifti(tmp_path / "v.nii", np.zeros((4, 4, 2), dtype=np.uint8))
    assert volumes.read_volume(path).voxels.max() == 0
    nifti(path, np.ones((4, 4, 3), dtype=np.uint8))
    assert volumes.read_volume(path).voxels.max() == 1
    assert volumes.value_range(path) == (1.0, 1.0)


def test_what_is_no_volume(tmp_path: Path) -> None:
    assert "one volume of two or three axes" in refused(
        nifti(tmp_path / "time.nii", np.zeros((4, 4, 4, 2), np.float32))
    )
    bad = np.zeros((4, 4, 4), dtype=np.float32)
    bad[0, 0, 0] = np.inf
    assert "no finite numbers" in refused(nifti(tmp_path / "inf.nii", bad))
    with pytest.raises(errors.DataError, match="no finite numbers"):
        volumes.read_slice(tmp_path / "inf.nii", 0)
    assert "no finite numbers" in refused(nifti(tmp_path / "big.nii", np.full((4, 4, 4), 1e300)))
    assert "1 x 1 pixels, at least 2 x 2" in refused(nifti(tmp_path / "one.nii", np.zeros((1, 1, 4), np.uint8)))
    colour = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "colour voxels" in refused(nifti(tmp_path / "colour.nii", colour))
    assert "no such file" in refused(tmp_path / "none.nii")
    (tmp_path / "text.nii").write_text("no volume")
    assert "unreadable NIfTI" in refused(tmp_path / "text.nii")
    (tmp_path / "a.mgz").write_text("no volume")
    assert "no volume; these are read: .nii" in refused(tmp_path / "a.mgz")
    noise = np.random.default_rng(0).standard_normal((16, 16, 16)).astype(np.float32)
    for ending in (".nii.gz", ".nii"):
        whole = nifti(tmp_path / f"whole{ending}", noise).read_bytes()
        cut = tmp_path / f"cut{ending}"
        cut.write_bytes(whole[: len(whole) // 2])
        assert f"cut{ending}: damaged or cut short" in refused(cut)
    with pytest.raises(errors.DataError, match="slice 9 asked, it has 0 to 5"):
        volumes.read_slice(nifti(tmp_path / "good.nii", voxels()), 9)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_claims_more_voxels_than_the_file_can_hold(tmp_path: Path, ending: str) -> None:
    """Told from the header: reading would take the memory of all that is claimed."""
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    header.set_data_dtype(np.int16)
    content = header.binaryblock + bytes(5000)
    path = tmp_path / f"huge{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    with pytest.raises(errors.DataError, match=r"cut short \(\d+ bytes for 54000000000000 bytes of voxels\)"):
        volumes.read_header(path)


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_an_nrrd_that_claims_more_voxels_than_the_file_can_hold(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "v.nrrd"
    about = {"space": "left-posterior-superior", "space directions": np.eye(3), "space origin": [0.0] * 3}
    nrrd.write(str(path), voxels(), {**about, "encoding": encoding})
    content = path.read_bytes()
    assert b"sizes: 4 5 6" in content
    path.write_bytes(content.replace(b"sizes: 4 5 6", b"sizes: 30000 30000 30000"))
    with pytest.raises(errors.DataError, match=r"cut short \(\d+ bytes for 27000000000000 voxels\)"):
        volumes.read_header(path)


def test_complex_voxels_are_refused(tmp_path: Path) -> None:
    assert "complex voxels" in refused(nifti(tmp_path / "k.nii.gz", voxels().astype(np.complex64)))


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1000.0), ("meter", 0.001), ("mm", 1.0), ("unknown", 1.0)])
@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 1)])
def test_units_of_length_are_heeded_both_ways(tmp_path: Path, unit: str, factor: float, codes: tuple[int, int]) -> None:
    """Spacings are millimetres, and the mask has the input's own units and numbers."""
    affine = np.diag([factor, factor, factor, 1.0]) @ AFFINE
    image = nibabel.Nifti1Image(voxels(), affine)
    image.set_sform(affine if codes[0] else None, code=codes[0])
    image.set_qform(affine, code=codes[1])
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "in.nii")
    header = volumes.read_header(tmp_path / "in.nii")
    assert header.spacing("axial") == pytest.approx((0.8, 0.7))
    assert header.step("axial") == pytest.approx(2.5)
    np.testing.assert_allclose(header.stored.affine, AFFINE, rtol=1e-5, atol=1e-5)
    volumes.write_nifti(tmp_path / "out.nii", np.ones(voxels().shape, np.uint8), header)
    back = nibabel.load(tmp_path / "out.nii")
    np.testing.assert_allclose(back.affine, affine, rtol=1e-5)
    np.testing.assert_allclose(back.header.get_zooms(), image.header.get_zooms(), rtol=1e-5)
    assert back.header.get_xyzt_units()[0] == ("mm" if unit == "unknown" else unit)


def test_a_volume_without_any_affine_is_noted(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(), AFFINE)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / "bare.nii")
    assert "its sides are a guess" in volumes.read_header(tmp_path / "bare.nii").notes[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_affine_of_no_numbers_says_nothing(tmp_path: Path, value: float) -> None:
    content = bytearray(nibabel.Nifti1Image(voxels(), AFFINE).to_bytes())
    content[280:284] = np.array(value, "<f4").tobytes()  # the first number of sform
    (tmp_path / "a.nii").write_bytes(content)
    assert "does not say how the axes lie" in refused(tmp_path / "a.nii")


def test_affines_that_disagree(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(np.diag([0.7, 0.8, 2.5, 1.0]), 1)
    nibabel.save(image, tmp_path / "turned.nii")
    text = refused(tmp_path / "turned.nii")
    assert "two affines disagree: the axes run to LPS by sform, to RAS by qform" in text
    shifted = AFFINE.copy()
    shifted[:3, 3] += 5
    image.set_qform(shifted, 1)
    nibabel.save(image, tmp_path / "shifted.nii")
    header = volumes.read_header(tmp_path / "shifted.nii")
    np.testing.assert_allclose(header.stored.affine, AFFINE, atol=1e-6)
    assert "sform is taken" in header.notes[0]
    image.set_qform(AFFINE, 1)
    nibabel.save(image, tmp_path / "same.nii")
    assert volumes.read_header(tmp_path / "same.nii").notes == ()


@pytest.mark.parametrize(
    ("space", "signs"),
    [("left-posterior-superior", (-1, -1, 1)), ("RAS", (1, 1, 1)), ("left-anterior-superior", (-1, 1, 1))],
)
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_nrrd(tmp_path: Path, space: str, signs: tuple[int, ...], encoding: str) -> None:
    directions = np.array([[0, 0.9, 0.1], [0.8, 0, 0], [0, -0.2, 2.5]])
    fields = {"space": space, "space directions": directions, "space origin": [1.0, 2.0, 3.0], "encoding": encoding}
    nrrd.write(str(tmp_path / "a.nrrd"), voxels(), fields)
    volume = volumes.read_volume(tmp_path / "a.nrrd")
    for index in ((0, 0, 0), (3, 1, 5), (2, 4, 0)):
        (at,) = np.argwhere(volume.voxels == voxels()[index])
        expected = (np.array([1.0, 2.0, 3.0]) + np.array(index) @ directions) * signs
        np.testing.assert_allclose(volume.grid.world(at), expected, atol=1e-6)
    labels = volumes.place_back(
        {k: (volumes.read_slice(tmp_path / "a.nrrd", k) == voxels()[3, 1, 5]).astype(np.uint8) for k in range(6)},
        volume.header,
    )
    volumes.write_nifti(tmp_path / "out.nii.gz", labels, volume.header)
    result = nibabel.load(tmp_path / "out.nii.gz")
    (at,) = np.argwhere(np.asarray(result.dataobj) == 1)
    expected = (np.array([1.0, 2.0, 3.0]) + np.array([3, 1, 5]) @ directions) * signs
    np.testing.assert_allclose(nibabel.affines.apply_affine(result.affine, at), expected, atol=1e-5)


def test_nrrd_that_cannot_be_used(tmp_path: Path) -> None:
    nrrd.write(str(tmp_path / "bare.nrrd"), voxels())
    assert "does not say how the axes lie" in refused(tmp_path / "bare.nrrd")
    fields = {"space": "scanner-xyz", "space directions": np.eye(3)}
    nrrd.write(str(tmp_path / "xyz.nrrd"), voxels(), fields)
    assert "does not say how the axes lie" in refused(tmp_path / "xyz.nrrd")
    nrrd.write(str(tmp_path / "four.nrrd"), np.zeros((2, 3, 4, 5), np.uint8))
    assert "axes (2, 3, 4, 5); one volume of three axes" in refused(tmp_path / "four.nrrd")
    good = {"space": "RAS", "space directions": np.eye(3)}
    nrrd.write(str(tmp_path / "good.nrrd"), np.random.default_rng(0).integers(0, 99, (16, 16, 16)), good)
    whole = (tmp_path / "good.nrrd").read_bytes()
    (tmp_path / "cut.nrrd").write_bytes(whole[: len(whole) // 2])
    assert "unreadable NRRD" in refused(tmp_path / "cut.nrrd")
    (tmp_path / "text.nrrd").write_text("no volume")
    assert "unreadable NRRD" in refused(tmp_path / "text.nrrd")
    secret = tmp_path / "secret.txt"
    secret.write_bytes(bytes(27))
    (tmp_path / "elsewhere.nrrd").write_text(
        f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 3 3 3\nspace: RAS\nencoding: raw\n"
        f"space directions: (1,0,0) (0,1,0) (0,0,1)\ndata file: {secret}\n"
    )
    assert "its voxels are in another file" in refused(tmp_path / "elsewhere.nrrd")


def test_masks_that_cannot_be_put_back(tmp_path: Path) -> None:
    header = volumes.read_header(nifti(tmp_path / "a.nii", voxels()))
    with pytest.raises(errors.DataError, match="no slice to put back"):
        volumes.place_back({}, header)
    with pytest.raises(errors.DataError, match=r"a slice of \(4, 5\) pixels where the input has \(5, 4\)"):
        volumes.place_back({0: np.zeros((4, 5), np.uint8)}, header)
    with pytest.raises(errors.DataError, match="slice 6 asked"):
        volumes.place_back({6: np.zeros((5, 4), np.uint8)}, header)
    with pytest.raises(errors.DataError, match=r"labels .* for an input of"):
        volumes.write_nifti(tmp_path / "out.nii", np.zeros((5, 4, 6), np.uint8), header)
    with pytest.raises(errors.DataError, match=r"ends in \.nii or \.nii\.gz"):
        volumes.write_nifti(tmp_path / "out.png", np.zeros((4, 5, 6), np.uint8), header)


def test_written_labels_say_nothing_of_the_input(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(voxels(), AFFINE)
    image.header["descrip"] = b"PLANTED name"
    nibabel.save(image, tmp_path / "a.nii")
    header = volumes.read_header(tmp_path / "a.nii")
    volumes.write_nifti(tmp_path / "out.nii", np.full((4, 5, 6), 300, np.int64), header)
    assert b"PLANTED" not in (tmp_path / "out.nii").read_bytes()
    back = nibabel.load(tmp_path / "out.nii")
    assert back.get_data_dtype() == np.int16
    assert np.asarray(back.dataobj).max() == 300


def test_the_view_of_a_recipe(tmp_path: Path) -> None:
    path = nifti(tmp_path / "ct.nii.gz", voxels())
    plain = slices.read([path], 2)
    raw = volumes.read_slice(path, 2).astype(float)
    np.testing.assert_allclose(plain.image[0], (raw + 100) / 357, atol=1e-6)
    assert plain.units == (-100.0, 257.0)
    assert plain.orientation == "LPS"
    assert plain.spacing == pytest.approx((0.8, 0.7))
    window = slices.read([path], 2, slices.View(limits=(0.0, 50.0)))
    np.testing.assert_allclose(window.image[0], np.clip(raw / 50, 0, 1), atol=1e-6)
    stack = slices.read([path], 4, slices.View("coronal", 3))
    assert stack.image.shape == (3, 6, 4)
    np.testing.assert_array_equal(stack.image[1], stack.image[2])  # the last has no further neighbour
    header = volumes.read_header(path)
    assert slices.names(header, slices.View("coronal"))[-1] == "y004"
    part = slices.part_of(header, "case", 3, slices.View("sagittal"))
    assert part is not None
    assert (part.volume, part.index, part.of, part.step) == ("case", 3, 4, pytest.approx(0.7))
    with pytest.raises(errors.DataError, match="has channels of its own"):
        slices.read([path, path], 0, slices.View(stack=3))


def test_acquired_is_the_coarse_axis(tmp_path: Path) -> None:
    """A sagittal knee: thick slices across x, whatever the order in which its axes are stored."""
    sagittal = np.array([[0, 0, 4.0, 0], [0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, 1.0]])
    header = volumes.read_header(nifti(tmp_path / "knee.nii", voxels(), sagittal))
    assert slices.plane_of(header, slices.View("acquired")) == "sagittal"
    assert header.count("acquired") == 6
    assert header.step("acquired") == pytest.approx(4.0)
    fine = volumes.read_header(nifti(tmp_path / "fine.nii", voxels(), np.diag([0.9, 0.9, 0.6, 1.0])))
    assert slices.plane_of(fine, slices.View("acquired")) == "axial"


@pytest.mark.files("places", "NIfTI whose pixdim is 0", "NIfTI-1, pixdim", "1 mm, noted; no volume in ml")
@pytest.mark.parametrize("slices_there", [1, 3])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_voxel_size_of_0_is_noted(tmp_path: Path, ending: str, slices_there: int) -> None:
    image = nibabel.Nifti1Image(np.ones((4, 5, slices_there), np.int16), None)
    content = bytearray(image.to_bytes())
    content[88:92] = bytes(4)
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    header = volumes.read_header(path)
    assert nifti_reader.NO_SPACING in header.notes
    assert (header.thick, header.stored.sized) == (False, slices_there == 1)
    assert nifti_reader.NO_SPACING not in volumes.read_header(nifti(tmp_path / "b.nii", voxels(), np.eye(4))).notes


@pytest.mark.parametrize("kind", ["<i2", ">i2", "<f4", ">u4", "<f8", "|u1"])
@pytest.mark.parametrize("scaled", [False, True])
def test_voxels_that_need_no_decoder_are_those_of_the_library(tmp_path: Path, kind: str, scaled: bool) -> None:
    header = nibabel.Nifti1Header(endianness=">" if kind.startswith(">") else "<")
    header.set_data_dtype(np.dtype(kind))
    image = nibabel.Nifti1Image(np.abs(voxels()).astype(kind), AFFINE, header)
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"voxels begin later"))
    nibabel.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = np.array([0.5 if scaled else 1.0, 0.0], kind[0].replace("|", "<") + "f4").tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    found = volumes.read_volume(tmp_path / "a.nii")
    expected = nibabel.load(tmp_path / "a.nii").get_fdata(dtype=np.float32)
    np.testing.assert_array_equal(found.header.stored.turn().undo(found.voxels), expected)
    (tmp_path / "b.nii").write_bytes(content[:-1])
    assert "cut short" in refused(tmp_path / "b.nii")
