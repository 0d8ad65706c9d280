"""What a grey value means in DICOM: polarity, tables, padding and units, as the standard says or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import transforms
from fedvfm.data.volumes import dicom_frames, dicom_series, slices, volumes
from tests.data import dicom_writer as writer

RAMP = np.tile(np.arange(64, dtype=np.uint16) * 10, (64, 1))
LPS = np.diag([0.5, 0.75, 2.5, 1.0])
XA = "1.2.840.10008.5.1.4.1.1.12.1"
CONTRACT = schema.DataContract(class_names=("background", "lesion"), input_size=(64, 64))


def table(values: np.ndarray, bits: int = 16) -> pydicom.Dataset:
    made = pydicom.Dataset()
    made.add_new(0x00283002, "US", [len(values), 0, bits])
    made.add_new(0x00283006, "OW", values.astype(np.uint16).tobytes())
    made.ModalityLUTType = "US"
    return made


def voxels(number: int = 6) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 1000, (8, 7, number)).astype(np.int16)


def shown(path: Path) -> np.ndarray:
    return np.asarray(volumes.read_slice(path, 0), dtype=float)


# --- polarity and Modality LUT: PS3.3, C.7.6.3.1.2 and C.11.1 ---------------------------------------------------------


@pytest.mark.files("greys", "MONOCHROME1 with a Modality LUT", "C.7.6.3.1.2, C.11.1", "the table, then turned round")
@pytest.mark.parametrize("modality", ["CR", "DX", "MG", "PX"])
@pytest.mark.parametrize("bits", [12, 16])
def test_monochrome1_is_turned_after_its_table(tmp_path: Path, modality: str, bits: int) -> None:
    rising = table(np.arange(640), bits)
    path = tmp_path / "a.dcm"
    writer.radiograph(path, RAMP, "MONOCHROME1", ModalityLUTSequence=[rising], Modality=modality)
    np.testing.assert_array_equal(shown(path), 2.0**bits - 1 - RAMP)
    writer.radiograph(tmp_path / "b.dcm", RAMP, "MONOCHROME2", ModalityLUTSequence=[rising], Modality=modality)
    np.testing.assert_array_equal(shown(tmp_path / "b.dcm"), RAMP)


@pytest.mark.files("greys", "Modality LUT of XA and RF", "C.8.7.1.1.2", "not applied: it leads back to X-ray intensity")
@pytest.mark.parametrize("modality", ["XA", "RF"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_the_table_of_angiography_leads_back_to_intensity_and_is_not_applied(
    tmp_path: Path, modality: str, photometric: str
) -> None:
    falling = table(np.arange(640)[::-1])
    path = tmp_path / "a.dcm"
    more = {"ModalityLUTSequence": [falling], "Modality": modality, "PixelIntensityRelationship": "LOG"}
    writer.radiograph(path, RAMP, photometric, SOPClassUID=XA, **more)
    expected = 65535.0 - RAMP if photometric == "MONOCHROME1" else RAMP
    np.testing.assert_array_equal(shown(path), expected)


@pytest.mark.files("greys", "polarity that changes inside a series", "C.7.6.3.1.2", "each file by its own")
def test_polarity_is_that_of_each_file_of_a_series(tmp_path: Path) -> None:
    made = writer.series(tmp_path / "mr", voxels().astype(np.uint16), LPS, modality="MR")
    plain = volumes.read_volume(tmp_path / "mr").voxels.copy()
    files = sorted((tmp_path / "mr").iterdir())
    one = pydicom.dcmread(files[2])
    one.PhotometricInterpretation = "MONOCHROME1"
    one.PixelData = (65535 - one.pixel_array).astype(np.uint16).tobytes()
    one.save_as(files[2])
    assert len(made) == 6
    np.testing.assert_array_equal(volumes.read_volume(tmp_path / "mr").voxels, plain)


@pytest.mark.files("greys", "MONOCHROME2 with Presentation LUT Shape INVERSE", "C.8.11.3", "noted")
def test_a_contradiction_of_polarity_is_noted(tmp_path: Path) -> None:
    writer.radiograph(tmp_path / "a.dcm", RAMP, "MONOCHROME2", PresentationLUTShape="INVERSE")
    assert any("contradict" in note for note in volumes.read_header(tmp_path / "a.dcm").notes)


# --- padding: PS3.3, C.7.5.1.1.2 --------------------------------------------------------------------------------------

PADDED: dict[str, tuple[str, type, dict[str, Any], int]] = {
    "MR, far below": ("MONOCHROME2", np.int16, {"PixelPaddingValue": -32768}, -32768),
    "DX, far above": ("MONOCHROME2", np.uint16, {"PixelPaddingValue": 65535}, 65535),
    "MG, dark on bright": ("MONOCHROME1", np.uint16, {"PixelPaddingValue": 65535}, 65535),
    "a range": ("MONOCHROME2", np.uint16, {"PixelPaddingValue": 60000, "PixelPaddingRangeLimit": 65535}, 61234),
    "a range, upper end first": (
        "MONOCHROME2",
        np.int16,
        {"PixelPaddingValue": -900, "PixelPaddingRangeLimit": -999},
        -950,
    ),
    "a range of MONOCHROME1": (
        "MONOCHROME1",
        np.uint16,
        {"PixelPaddingValue": 65535, "PixelPaddingRangeLimit": 4096},
        5000,
    ),
}


@pytest.mark.files(
    "greys", "padding value, padding range, either end", "C.7.5.1.1.2", "dark; sets no range, no percentile, no median"
)
@pytest.mark.parametrize("name", PADDED)
def test_padding_sets_no_range_and_no_percentile(tmp_path: Path, name: str) -> None:
    photometric, kind, said, value = PADDED[name]
    pixels = RAMP.astype(kind)
    writer.radiograph(tmp_path / "whole.dcm", pixels[20:], photometric)
    padded = pixels.copy()
    padded[:20] = value
    path = tmp_path / "padded.dcm"
    writer.radiograph(path, padded, photometric, **said)
    assert volumes.value_range(path) == volumes.value_range(tmp_path / "whole.dcm")
    read, whole = slices.read([path], 0), slices.read([tmp_path / "whole.dcm"], 0)
    np.testing.assert_array_equal(read.image[0, 20:], whole.image[0])
    assert read.image[0, :20].max() == 0.0
    np.testing.assert_array_equal(np.flatnonzero(read.padded.all(axis=1)), np.arange(20))
    assert volumes.read_volume(path).voxels.min() == volumes.read_volume(tmp_path / "whole.dcm").voxels.min()
    for intensity in ("percentile", "polarity"):
        contract = CONTRACT.model_copy(update={"intensity": intensity, "fit": "native"})
        seen, alone = (transforms.prepare(one, contract, 2).image[0] for one in (read, whole))
        np.testing.assert_array_equal(seen[20:], alone)
        assert seen[:20].max() == 0.0


@pytest.mark.files("greys", "padding given in the other sign", "C.7.5.1.1.2", "the same bits")
def test_padding_given_in_the_other_sign_is_the_same_bits(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.int16)
    pixels[:9] = -2000
    one = writer.radiograph(tmp_path / "a.dcm", pixels)
    one.add_new(0x00280120, "US", 65536 - 2000)
    one.save_as(tmp_path / "a.dcm")
    assert volumes.value_range(tmp_path / "a.dcm") == (0.0, 630.0)


def test_padding_of_a_volume_is_left_out_in_every_plane(tmp_path: Path) -> None:
    values = voxels()
    values[:2], values[:, :, 5] = -32768, -32768
    writer.series(tmp_path / "mr", values, LPS, modality="MR", PixelPaddingValue=-32768)
    tissue = values[2:, :, :5]
    assert volumes.value_range(tmp_path / "mr") == (float(tissue.min()), float(tissue.max()))
    for plane in ("axial", "coronal", "sagittal"):
        found, padded = volumes.read_shown(tmp_path / "mr", 1, plane)
        if padded is not None:
            assert found[~padded].min() >= 0 if (~padded).any() else padded.all()
    assert volumes.read_volume(tmp_path / "mr").padded.sum() == values.size - tissue.size


def test_padding_of_a_ct_is_air(tmp_path: Path) -> None:
    values = voxels()
    values[0] = -2000
    writer.series(tmp_path / "ct", values, LPS, intercept=-1024, PixelPaddingValue=-2000)
    assert volumes.value_range(tmp_path / "ct") == (float(values[1:].min()) - 1024, float(values.max()) - 1024)
    assert volumes.read_volume(tmp_path / "ct").voxels.min() == -1024


# --- units: PS3.3, C.11.1.1.2 -----------------------------------------------------------------------------------------


@pytest.mark.files("greys", "rescale that some slices lack", "C.11.1", "refused")
@pytest.mark.parametrize("modality", ["CT", "MR", "PT"])
def test_a_slice_that_lost_its_rescale_is_refused(tmp_path: Path, modality: str) -> None:
    writer.series(tmp_path / "ct", voxels(), LPS, modality=modality, slope=2.0, intercept=-1024)
    last = sorted((tmp_path / "ct").iterdir())[-1]
    one = pydicom.dcmread(last)
    del one.RescaleSlope, one.RescaleIntercept
    one.save_as(last)
    with pytest.raises(errors.DataError, match="1 of 6 images") as caught:
        volumes.read_header(tmp_path / "ct")
    assert caught.value.code == "grey-units"


@pytest.mark.files("greys", "CT not in Hounsfield units", "C.11.1.1.2", "noted; refused under a recipe with a window")
@pytest.mark.parametrize("kind", ["MGML", "Z_EFF", "ED", "HU_MOD", "US", "Vendor's own"])
def test_a_ct_not_in_hounsfield_units_is_noted_and_not_cut_at_air(tmp_path: Path, kind: str) -> None:
    writer.series(tmp_path / "ct", voxels(), LPS, slope=1.0, intercept=-5000, RescaleType=kind)
    header = volumes.read_header(tmp_path / "ct")
    assert header.hounsfield is False
    assert any("not in Hounsfield units" in note for note in header.notes)
    assert not any("Vendor" in note for note in header.notes)
    assert volumes.read_volume(tmp_path / "ct").voxels.min() < -1024


@pytest.mark.parametrize("kind", ["HU", None])
def test_a_ct_in_hounsfield_units_has_no_note(tmp_path: Path, kind: str | None) -> None:
    writer.series(tmp_path / "ct", voxels(), LPS, intercept=-1024, **({"RescaleType": kind} if kind else {}))
    header = volumes.read_header(tmp_path / "ct")
    assert header.hounsfield is True
    assert header.notes == ()


def test_units_that_change_inside_a_series_are_refused(tmp_path: Path) -> None:
    writer.series(tmp_path / "ct", voxels(), LPS, intercept=-1024, RescaleType="HU")
    last = sorted((tmp_path / "ct").iterdir())[-1]
    one = pydicom.dcmread(last)
    one.RescaleType = "MGML"
    one.save_as(last)
    with pytest.raises(errors.DataError, match="units") as caught:
        volumes.read_header(tmp_path / "ct")
    assert caught.value.code == "grey-units"


# --- packings ---------------------------------------------------------------------------------------------------------


@pytest.mark.files("greys", "elements without VR in a file packed as JPEG", "PS3.5 A.4", "read")
def test_elements_without_vr_in_jpeg_are_read() -> None:
    path = Path(pydicom.data.get_testdata_file("SC_rgb_jpeg.dcm", download=False))
    expected = pydicom.dcmread(path).pixel_array
    volume = volumes.read_volume(path)
    stored = volume.header.stored.turn().undo(volume.voxels)
    np.testing.assert_array_equal(stored[:, :, 0].swapaxes(0, 1), expected)


@pytest.mark.files("greys", "JPEG Extended, 12 bits", "PS3.5 A.4.1", "read through GDCM")
def test_jpeg_of_12_bits_is_read() -> None:
    from pydicom.data import get_testdata_file

    for name, most in (("JPGExtended.dcm", 264), ("JPEG-lossy.dcm", 264)):
        found = volumes.read_volume(Path(str(get_testdata_file(name, download=False)))).voxels
        assert (found.min(), found.max()) == (0, most)


@pytest.mark.files(
    "greys", "PET in Bq/ml, counts or without a unit", "C.8.9.1.1.3", "noted; several units in one series are refused"
)
@pytest.mark.parametrize(
    ("unit", "note"),
    [("GML", ""), ("BQML", dicom_series.PET["BQML"]), ("CNTS", dicom_series.PET_OTHER), (None, dicom_series.PET[""])],
)
def test_units_of_pet_are_noted(tmp_path: Path, unit: str | None, note: str) -> None:
    changes = {} if unit is None else {"Units": unit}
    writer.series(tmp_path / "a", np.ones((5, 4, 2), np.int16), np.eye(4), modality="PT", **changes)
    notes = [text for text in volumes.read_header(tmp_path / "a").notes if "PET" in text]
    assert notes == ([note] if note else [])


def test_pet_slices_of_two_units_are_refused(tmp_path: Path) -> None:
    made = writer.series(tmp_path / "a", np.ones((5, 4, 2), np.int16), np.eye(4), modality="PT", Units="BQML")
    made[1].Units = "GML"
    made[1].save_as(sorted((tmp_path / "a").iterdir())[1], enforce_file_format=True)
    with pytest.raises(errors.DataError) as caught:
        volumes.read_header(tmp_path / "a")
    assert caught.value.code == "grey-units"


@pytest.mark.files("greys", "Float Pixel Padding Value", "C.7.6.24", "as padding of whole numbers")
def test_padding_of_floats_sets_no_range(tmp_path: Path) -> None:
    """Parametric maps: PS3.3, C.7.6.24 (Float Pixel Padding Value)."""
    values = RAMP[:, :8].astype(np.float32)
    values[values == 30] = -9999
    one = writer.blank("OT", "1.2.840.10008.5.1.4.1.1.30")
    one.Rows, one.Columns, one.SamplesPerPixel, one.PhotometricInterpretation = 64, 8, 1, "MONOCHROME2"
    one.BitsAllocated, one.FloatPixelData, one.FloatPixelPaddingValue = 32, values.tobytes(), -9999.0
    one.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert volumes.value_range(tmp_path / "a.dcm") == (0.0, 70.0)


@pytest.mark.files("greys", "slope without intercept", "C.11.1", "no Hounsfield units")
def test_a_slope_without_intercept_is_no_scale(tmp_path: Path) -> None:
    for one in writer.series(tmp_path / "a", voxels(), LPS):
        del one.RescaleIntercept
        one.save_as(tmp_path / "a" / f"{one.InstanceNumber}.dcm", enforce_file_format=True)
    for path in (tmp_path / "a").glob(f"*{writer.PLANTED}*"):
        path.unlink()
    assert volumes.read_header(tmp_path / "a").hounsfield is False


@pytest.mark.files("greys", "High Bit other than Bits Stored - 1", "PS3.5 8.1.1", "refused")
def test_bits_that_do_not_end_where_the_standard_says_are_refused(tmp_path: Path) -> None:
    writer.radiograph(tmp_path / "a.dcm", RAMP << 4, BitsStored=12, HighBit=15)
    with pytest.raises(errors.DataError) as caught:
        volumes.read_header(tmp_path / "a.dcm")
    assert caught.value.code == "compressed"
    writer.radiograph(tmp_path / "b.dcm", RAMP | 0x8000, BitsStored=12, HighBit=11)  # an overlay in unused bits
    np.testing.assert_array_equal(shown(tmp_path / "b.dcm"), RAMP)


@pytest.mark.files("greys", "scout views of a CT (Image Type LOCALIZER)", "C.8.2.1.1", "no Hounsfield units; noted")
def test_a_scout_view_is_not_in_hounsfield_units(tmp_path: Path) -> None:
    scout: dict[str, Any] = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    writer.series(tmp_path / "a", voxels(1), LPS, **scout)
    assert volumes.read_header(tmp_path / "a").hounsfield is False
    assert dicom_series.SCOUT in volumes.read_header(tmp_path / "a").notes
    writer.series(tmp_path / "b", voxels(1), LPS, RescaleType="HU", **scout)
    assert volumes.read_header(tmp_path / "b").hounsfield is True


@pytest.mark.files("greys", "radiographs FOR PROCESSING", "C.8.11.3", "raw values; noted")
def test_raw_values_of_a_detector_are_noted(tmp_path: Path) -> None:
    for intent, noted in (("FOR PROCESSING", True), ("FOR PRESENTATION", False)):
        writer.radiograph(tmp_path / "a.dcm", RAMP, PresentationIntentType=intent, SeriesDescription=intent)
        assert (dicom_frames.RAW in volumes.read_header(tmp_path / "a.dcm").notes) == noted


@pytest.mark.files("greys", "greys that stand for colours (supplemental palette)", "C.7.6.19", "refused")
def test_greys_that_stand_for_colours_are_refused(tmp_path: Path) -> None:
    palette = {f"{colour}PaletteColorLookupTableDescriptor": [128, 128, 8] for colour in ("Red", "Green", "Blue")}
    for presentation in ("MONOCHROME", "COLOR", "MIXED"):
        one = writer.pixels(writer.blank("US", writer.US), RAMP)
        one.PixelPresentation = presentation
        for name, value in palette.items():
            one.add_new(name, "US", value)
        one.save_as(tmp_path / f"{presentation}.dcm", enforce_file_format=True)
    assert volumes.read_header(tmp_path / "MONOCHROME.dcm").channels == 1
    for presentation in ("COLOR", "MIXED"):
        with pytest.raises(errors.DataError) as caught:
            volumes.read_header(tmp_path / f"{presentation}.dcm")
        assert caught.value.code == "channels"


@pytest.mark.files("greys", "colours of fewer bits than are stored", "C.7.6.3.1", "full is what their bits hold")
def test_colours_of_ten_bits_are_scaled_by_ten(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 1024, (6, 8, 3)).astype(np.uint16)
    one = writer.pixels(writer.blank("SC", writer.US), values, "RGB")
    one.BitsStored, one.HighBit = 10, 9
    one.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    shown = slices.read([tmp_path / "a.dcm"], 0).image
    np.testing.assert_allclose(np.moveaxis(shown, 0, -1), values / 1023, atol=1e-5)


@pytest.mark.files("greys", "frames of single bits that begin inside of a byte", "PS3.5 8.1.1", "read as they are")
def test_single_bits_are_those_of_their_own_frame(tmp_path: Path) -> None:
    values = (np.random.default_rng(0).random((3, 5, 7)) > 0.5).astype(np.uint8)
    one = writer.pixels(writer.blank("SC", "1.2.840.10008.5.1.4.1.1.7.1"), values)
    one.BitsAllocated, one.BitsStored, one.HighBit = 1, 1, 0
    one.PixelData = np.packbits(values.ravel(), bitorder="little").tobytes()
    one.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    found = [volumes.read_slice(tmp_path / "a.dcm", at, "acquired") for at in range(3)]
    np.testing.assert_array_equal(found, values)


@pytest.mark.files("places", "radiographs stored mirrored or upside down", "C.7.6.1.1.1", "as stored; noted")
@pytest.mark.files("places", "magnified views whose size is that on the detector", "C.8.7.2, 0018,1114", "noted")
@pytest.mark.files("places", "pixels that are not square, without a size", "C.7.6.3, 0028,0034", "noted")
@pytest.mark.parametrize(
    ("said", "notes"),
    [
        ({}, ()),
        ({"PatientOrientation": ["R", "F"]}, (dicom_frames.MIRRORED,)),
        ({"PatientOrientation": ["L", "H"]}, (dicom_frames.UPSIDE_DOWN,)),
        ({"PatientOrientation": ["P", "F"], "EstimatedRadiographicMagnificationFactor": 1.05}, ()),
        ({"EstimatedRadiographicMagnificationFactor": 1.8}, "1.8 times"),
        ({"ImagerPixelSpacing": None, "PixelAspectRatio": ["2", "1"]}, "2 high to 1 wide"),
    ],
)
def test_how_a_picture_is_stored_is_noted(tmp_path: Path, said: dict[str, Any], notes: Any) -> None:
    writer.radiograph(tmp_path / "a.dcm", RAMP, **said)
    found = volumes.read_header(tmp_path / "a.dcm").notes
    assert found == notes if isinstance(notes, tuple) else notes in found[0]
