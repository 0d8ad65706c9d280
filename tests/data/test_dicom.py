"""DICOM as hospitals have it: pydicom's example files, series that are wrong in every way, grey values, polarity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest

from fedvfm import errors
from fedvfm.data.volumes import dicom, dicom_series, slices, volumes
from tests.data import dicom_writer as writer

EXAMPLES = Path(str(pydicom.data.__file__)).parent / "test_files"
LPS = np.diag([0.5, 0.75, 2.5, 1.0])


def voxels() -> np.ndarray:
    return np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)


def refused(path: Path, code: str) -> str:
    with pytest.raises(errors.DataError) as caught:
        volumes.read_volume(path)
    assert caught.value.code == code
    return str(caught.value)


# --- pydicom's examples: transfer syntaxes, colour, modalities --------------------------------------------------------

MR = ["_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_jpeg_ls_lossless", "_padded"]


@pytest.mark.parametrize("packed", MR)
def test_lossless_packings_give_the_same_slice(packed: str) -> None:
    plain = volumes.read_volume(EXAMPLES / "MR_small.dcm")
    other = volumes.read_volume(EXAMPLES / f"MR_small{packed}.dcm")
    np.testing.assert_array_equal(other.voxels, plain.voxels)
    np.testing.assert_allclose(other.grid.affine, plain.grid.affine)
    assert plain.header.modality == "MR"
    assert plain.voxels.dtype == np.int16


def test_ct_is_in_hounsfield_units() -> None:
    data = pydicom.dcmread(EXAMPLES / "CT_small.dcm")
    expected = data.pixel_array.astype(int) + int(data.RescaleIntercept)
    np.testing.assert_array_equal(volumes.read_slice(EXAMPLES / "CT_small.dcm", 0), np.maximum(expected, -1024))
    assert volumes.value_range(EXAMPLES / "CT_small.dcm") == (expected.min(), expected.max())
    assert volumes.read_slice(EXAMPLES / "693_J2KI.dcm", 0).min() == -1024  # JPEG 2000, padded with -2000


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_jpeg_gdcm.dcm",  # JPEG lossless, process 14
        "SC_rgb_rle.dcm",
        "SC_rgb_dcmtk_+eb+cy+n1.dcm",  # YBR_FULL
        "SC_rgb_dcmtk_+eb+cy+np.dcm",  # YBR_FULL_422
        "SC_rgb_jpeg_lossy_gdcm.dcm",
        "SC_rgb_gdcm_KY.dcm",  # JPEG 2000
        "SC_ybr_full_422_uncompressed.dcm",
    ],
)
def test_colour_is_rgb_however_it_is_stored(name: str) -> None:
    """All show the same bars: red at the top."""
    shown = volumes.read_slice(EXAMPLES / name, 0)
    assert shown.shape == (100, 100, 3)
    assert shown.dtype == np.uint8
    red, green, blue = shown[5, 50].astype(int)
    assert red > 240
    assert max(green, blue) < 10
    pixels = slices.read([EXAMPLES / name], 0)
    assert pixels.image.shape == (3, 100, 100)
    assert pixels.image[0, 5, 50] > 0.94
    assert pixels.units is None


def test_16_bit_colour_and_palettes() -> None:
    wide = slices.read([EXAMPLES / "SC_rgb_rle_16bit.dcm"], 0).image
    narrow = slices.read([EXAMPLES / "SC_rgb_rle.dcm"], 0).image
    np.testing.assert_allclose(wide, narrow, atol=0.01)
    palette = slices.read([EXAMPLES / "examples_palette.dcm"], 0).image
    assert palette.shape == (3, 350, 800)
    assert palette.max() > 0.9


def test_deflated_file() -> None:
    path = EXAMPLES / "image_dfl.dcm"
    np.testing.assert_array_equal(volumes.read_slice(path, 0), pydicom.dcmread(path).pixel_array)


def test_ultrasound_film_is_moments_not_places() -> None:
    header = volumes.read_header(EXAMPLES / "examples_ybr_color.dcm")
    assert header.moments
    assert header.count("axial") == 30
    assert header.step("axial") is None
    assert header.spacing("axial") is not None  # of its one region, centimetres in the file
    assert slices.part_of(header, "film", 0, slices.View()) is None
    first, last = (volumes.read_slice(EXAMPLES / "examples_ybr_color.dcm", at) for at in (0, 29))
    assert first.shape == (240, 320, 3)
    assert not np.array_equal(first, last)


def test_real_series_in_order_and_mixed_ones_listed() -> None:
    folder = EXAMPLES / "dicomdirtests" / "98892001"
    header = volumes.read_header(folder / "CT5N")
    assert header.stored.shape == (16, 16, 5)
    assert header.step("axial") == pytest.approx(2.5)
    text = refused(folder, "series-mixed")
    assert "2 series, one is read" in text
    assert "series 4: CT, 2 images of 16 x 16" in text
    assert "series 5: CT, 5 images of 16 x 16" in text


def test_monochrome1_is_turned_bright_where_the_body_is(tmp_path: Path) -> None:
    values = np.array([[0, 10, 20], [30, 40, 4095]], dtype=np.uint16)
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        writer.radiograph(tmp_path / f"{photometric}.dcm", values, photometric, BitsStored=12, HighBit=11)
    inverted = volumes.read_slice(tmp_path / "MONOCHROME1.dcm", 0)
    np.testing.assert_array_equal(inverted, 4095 - values)
    np.testing.assert_array_equal(volumes.read_slice(tmp_path / "MONOCHROME2.dcm", 0), values)
    assert volumes.read_header(tmp_path / "MONOCHROME1.dcm").inverted
    writer.series(tmp_path / "pet", voxels(), LPS, modality="PT", PhotometricInterpretation="MONOCHROME1")
    assert volumes.value_range(tmp_path / "pet") == (0.0, 119.0)  # a measurement stays one


# --- rescale, windows, 16 bits ----------------------------------------------------------------------------------------


def test_rescale_slope_and_intercept(tmp_path: Path) -> None:
    writer.series(tmp_path / "whole", voxels(), LPS, modality="MR", slope=1.0, intercept=-50.0)
    assert volumes.value_range(tmp_path / "whole") == (-50.0, 69.0)
    assert volumes.read_volume(tmp_path / "whole").voxels.dtype == np.int16
    writer.series(tmp_path / "half", voxels(), LPS, modality="MR", slope=0.5, intercept=1.0)
    assert volumes.value_range(tmp_path / "half") == (1.0, 60.5)
    assert volumes.read_volume(tmp_path / "half").voxels.dtype == np.float32


def test_16_unsigned_bits_do_not_wrap(tmp_path: Path) -> None:
    values = np.array([[[0], [65535]], [[40000], [1]]], dtype=np.uint16)
    writer.series(tmp_path / "s", values, LPS, modality="MR")
    assert volumes.value_range(tmp_path / "s") == (0.0, 65535.0)


def test_slices_of_different_slope_join(tmp_path: Path) -> None:
    """PET scales every slice by itself."""
    made = writer.series(tmp_path / "pet", np.full((3, 2, 2), 10, dtype=np.int16), LPS, modality="PT")
    made[1].RescaleSlope = 0.25
    made[1].save_as(next((tmp_path / "pet").glob("001-*")), enforce_file_format=True)
    volume = volumes.read_volume(tmp_path / "pet")
    assert sorted(np.unique(volume.voxels).tolist()) == [2.5, 10.0]


def test_window_of_the_recipe(tmp_path: Path) -> None:
    writer.series(tmp_path / "ct", voxels() * 10, LPS, intercept=-600.0)
    raw = volumes.read_slice(tmp_path / "ct", 1).astype(float)
    lung = slices.read([tmp_path / "ct"], 1, slices.View(limits=(-1350.0, 150.0)))
    np.testing.assert_allclose(lung.image[0], np.clip((raw + 1350) / 1500, 0, 1), atol=1e-6)
    assert lung.units == (-1350.0, 150.0)


def test_one_slice_reads_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedvfm.data.volumes import dicom_pixels

    writer.series(tmp_path / "ct", voxels(), LPS)
    read = []
    original = dicom_pixels.read_frame
    monkeypatch.setattr(dicom_pixels, "read_frame", lambda *found: (read.append(found[1]), original(*found))[1])
    volumes.read_slice(tmp_path / "ct", 2)
    assert read == [2]
    slices.read([tmp_path / "ct"], 2, slices.View(stack=3, limits=(0.0, 1.0)))
    assert read == [2, 1, 2, 3]


# --- what is wrong ----------------------------------------------------------------------------------------------------


def test_missing_slices_are_refused_with_their_positions(tmp_path: Path) -> None:
    writer.series(tmp_path / "ct", np.zeros((4, 4, 9), np.int16), LPS, skip=(3, 6, 7))
    text = refused(tmp_path / "ct", "slices-missing")
    assert "5.0 to 10.0, 12.5 to 20.0 mm, where 2.5 mm" in text
    assert "series 1: CT, 6 images of 4 x 4" in text


def test_several_images_at_one_place(tmp_path: Path) -> None:
    affine = LPS.copy()
    affine[2, 2] = 0.0
    affine[2, 3] = 7.0
    made = writer.series(tmp_path / "ct", np.zeros((4, 4, 3), np.int16), LPS)
    made[2].ImagePositionPatient = made[1].ImagePositionPatient
    made[2].save_as(next((tmp_path / "ct").glob("002-*")), enforce_file_format=True)
    assert "3 images at 2 places" in refused(tmp_path / "ct", "slices-missing")


def test_a_localiser_among_the_slices(tmp_path: Path) -> None:
    made = writer.series(tmp_path / "ct", np.zeros((4, 4, 3), np.int16), LPS)
    made[0].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    made[0].save_as(next((tmp_path / "ct").glob("000-*")), enforce_file_format=True)
    assert "directions" in refused(tmp_path / "ct", "series-mixed")


def test_slices_of_different_size_or_off_the_line(tmp_path: Path) -> None:
    made = writer.series(tmp_path / "size", np.zeros((4, 4, 3), np.int16), LPS)
    made[0].PixelSpacing = [3, 3]
    made[0].save_as(next((tmp_path / "size").glob("000-*")), enforce_file_format=True)
    assert "size or spacing" in refused(tmp_path / "size", "series-mixed")
    made = writer.series(tmp_path / "line", np.zeros((4, 4, 3), np.int16), LPS)
    made[1].ImagePositionPatient = [9, 0, 2.5]
    made[1].save_as(next((tmp_path / "line").glob("001-*")), enforce_file_format=True)
    assert "line" in refused(tmp_path / "line", "slices-missing")


def test_two_radiographs_are_no_volume(tmp_path: Path) -> None:
    for number in range(2):
        writer.radiograph(tmp_path / "study" / f"{number}.dcm", np.zeros((4, 4), np.uint16), SeriesInstanceUID="1.2.3")
    assert "2 images" in refused(tmp_path / "study", "no-geometry")


def test_truncated_files(tmp_path: Path) -> None:
    writer.series(tmp_path / "ct", np.zeros((64, 64, 3), np.int16), LPS)
    cut = sorted((tmp_path / "ct").iterdir())[1]
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-4000])
    assert "file 2 of 3 (in the order of names): cut short (" in refused(tmp_path / "ct", "unreadable")
    cut.write_bytes(whole[:400])
    assert "file 2 of 3 (in the order of names): " in refused(tmp_path / "ct", "unreadable")
    refused(EXAMPLES / "MR_truncated.dcm", "unreadable")
    packed = (EXAMPLES / "MR_small_jp2klossless.dcm").read_bytes()
    (tmp_path / "packed.dcm").write_bytes(packed[: len(packed) - 3000])
    assert "packed.dcm: " in refused(tmp_path / "packed.dcm", "compressed")


@pytest.mark.parametrize("packed", [False, True])
def test_a_number_of_frames_that_cannot_be(tmp_path: Path, packed: bool) -> None:
    """A damaged or hostile number must neither fill the memory nor end in a traceback."""
    one = writer.pixels(writer.blank("US", writer.US), np.zeros((10, 10), np.uint8))
    if packed:
        one.compress(pydicom.uid.RLELossless)
    for number, expected in ((-5, "damaged header"), (2_000_000_000, "cut short (")):
        one.NumberOfFrames = number
        one.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
        assert expected in refused(tmp_path / f"{number}.dcm", "unreadable")


def test_a_file_of_a_study_that_cannot_be_opened_is_not_skipped(tmp_path: Path) -> None:
    """Without its last slice a series would still look whole."""
    writer.series(tmp_path / "ct", voxels(), LPS)
    (tmp_path / "ct" / "IM0009").symlink_to(tmp_path / "gone")
    text = refused(tmp_path / "ct", "link")
    assert "file 5 of 5 (in the order of names): " in text
    assert "IM0009" not in text


@pytest.mark.parametrize("packing", ["HTJ2KLossless", "HTJ2KLosslessRPCL", "HTJ2K"])
def test_packings_without_a_decoder(tmp_path: Path, packing: str) -> None:
    one = writer.radiograph(tmp_path / "a.dcm", np.zeros((4, 4), np.uint16))
    one.file_meta.TransferSyntaxUID = getattr(pydicom.uid, packing)
    one.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(60)])
    one["PixelData"].VR = "OB"
    one.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    text = refused(tmp_path / "a.dcm", "compressed")
    assert "packed as 'High-Throughput JPEG 2000" in text


def table_for_display(text: str) -> pydicom.Dataset:
    """A VOI LUT that turns dark and bright round; its explanation may name a patient."""
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTExplanation = [4, 0, 16], text
    table.LUTData = [3, 2, 1, 0]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    return table


@pytest.mark.parametrize("where", ["file", "frame"])
def test_a_table_for_display_is_told_and_not_applied(tmp_path: Path, where: str) -> None:
    """The window of a recipe is in the file's units: what a viewer's table makes of them must not come in between."""
    table = table_for_display(f"{writer.PLANTED} look")
    if where == "file":
        values = np.arange(16, dtype=np.uint16).reshape(4, 4)
        writer.radiograph(tmp_path / "one.dcm", values, VOILUTSequence=[table])
    else:
        one = writer.enhanced(tmp_path / "one.dcm", voxels(), LPS)
        item = pydicom.Dataset()
        item.VOILUTSequence = [table]
        one.PerFrameFunctionalGroupsSequence[0].FrameVOILUTSequence = [item]
        one.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    header = volumes.read_header(tmp_path / "one.dcm")
    assert header.notes == (dicom_series.CURVED,)
    assert writer.PLANTED not in repr(header)
    shown = volumes.read_slice(tmp_path / "one.dcm", 0)
    expected = np.arange(16).reshape(4, 4) if where == "file" else voxels()[:, :, 0].T - 100
    np.testing.assert_array_equal(shown, expected)
    writer.radiograph(tmp_path / "plain.dcm", np.zeros((4, 4), np.uint16))
    assert volumes.read_header(tmp_path / "plain.dcm").notes == ()


def test_what_is_no_image(tmp_path: Path) -> None:
    refused(EXAMPLES / "rtplan.dcm", "image-missing")
    refused(EXAMPLES / "test-SR.dcm", "image-missing")
    assert "1 segmentation(s)" in refused(EXAMPLES / "liver_1frame.dcm", "image-missing")
    refused(EXAMPLES / "no_meta.dcm", "unreadable")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "image-missing")
    refused(tmp_path / "none.dcm", "not-found")
    writer.radiograph(tmp_path / "point.dcm", np.zeros((1, 1), np.uint16))
    assert "1 x 1" in refused(tmp_path / "point.dcm", "too-small")
    one = writer.radiograph(tmp_path / "slide.dcm", np.zeros((4, 4), np.uint16))
    one.SOPClassUID = dicom.WHOLE_SLIDE
    one.save_as(tmp_path / "slide.dcm", enforce_file_format=True)
    refused(tmp_path / "slide.dcm", "whole-slide")


def test_other_files_in_the_folder_are_counted_not_read(tmp_path: Path) -> None:
    writer.series(tmp_path / "ct" / "deeper", voxels(), LPS)
    (tmp_path / "ct" / "report.pdf").write_bytes(b"%PDF")
    (tmp_path / "ct" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    for path in (tmp_path / "ct" / "deeper").iterdir():
        path.rename(path.with_suffix(""))  # as many PACS export: without an ending
    header = volumes.read_header(tmp_path / "ct")
    assert header.stored.shape == (6, 5, 4)
    assert header.notes == ("1 file(s) left out: no DICOM",)
    assert [(file.name, reason) for file, reason in header.left] == [("report.pdf", "no DICOM")]


def test_enhanced_file_of_several_phases_is_refused(tmp_path: Path) -> None:
    writer.enhanced(tmp_path / "one.dcm", voxels(), LPS, order=[0, 1, 2, 3, 0, 1, 2, 3])
    assert "8 images at 4 places" in refused(tmp_path / "one.dcm", "slices-missing")
