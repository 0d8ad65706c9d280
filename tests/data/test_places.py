"""Where a frame lies in DICOM: nuclear medicine, ultrasound volumes, mosaics, rounding, links, preambles."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pydicom.data
import pytest
from pydicom import uid

from fedvfm import errors
from fedvfm.data import formats
from fedvfm.data.volumes import dicom, dicom_series, geometry, volumes
from fedvfm.inference import results
from tests.data import dicom_writer as writer

NM, ENHANCED_US = "1.2.840.10008.5.1.4.1.1.20", "1.2.840.10008.5.1.4.1.1.6.2"
LPS = np.diag([0.5, 0.75, 2.5, 1.0])
SLICES, ANGLES, DETECTORS, TIMES, PAGES = 0x00540080, 0x00540090, 0x00540020, 0x00540100, 0x00182001


def voxels(number: int = 6) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 1000, (8, 7, number)).astype(np.int16)


def refused(path: Path, code: str) -> str:
    with pytest.raises(errors.DataError) as caught:
        volumes.read_volume(path)
    assert caught.value.code == code
    return str(caught.value)


def nuclear(path: Path, number: int = 5, kind: str = "RECON TOMO", pointer: Any = SLICES, **more: Any) -> np.ndarray:
    values = np.arange(number * 12, dtype=np.uint16).reshape(number, 3, 4)
    one = writer.pixels(writer.blank("NM", NM), values)
    one.ImageType, one.PixelSpacing, one.SliceThickness = ["ORIGINAL", "PRIMARY", kind, "EMISSION"], [3.0, 2.0], 5.0
    detector = pydicom.Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [-10.0, -20.0, 30.0], [1, 0, 0, 0, 1, 0]
    one.DetectorInformationSequence, one.FrameIncrementPointer, one.SpacingBetweenSlices = [detector], pointer, 4.0
    for name, value in more.items():
        setattr(one, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    one.save_as(path, enforce_file_format=True)
    return values


# --- nuclear medicine: PS3.3, C.8.4.8 to C.8.4.15 ---------------------------------------------------------------------


@pytest.mark.files(
    "places",
    "nuclear medicine, reconstructed",
    "C.8.4.11, C.8.4.15",
    "slices along the normal by Spacing Between Slices and its sign",
)
@pytest.mark.parametrize("step", [4.0, -4.0])
@pytest.mark.parametrize("order", [None, [5, 4, 3, 2, 1], [2, 1, 3, 5, 4]])
def test_reconstructed_slices_lie_along_the_normal(tmp_path: Path, step: float, order: list[int] | None) -> None:
    more = {"SliceVector": order} if order else {}
    values = nuclear(tmp_path / "a.dcm", SpacingBetweenSlices=step, **more)
    volume = volumes.read_volume(tmp_path / "a.dcm")
    assert volume.header.stored.placed
    assert not volume.header.moments
    assert volume.header.stored.spacing == (2.0, 3.0, 4.0)
    for frame, place in enumerate(order or range(1, 6)):
        world = geometry.from_lps(np.eye(4)) @ [-10.0, -20.0, 30.0 + step * (place - 1), 1.0]
        at = np.rint(np.linalg.inv(volume.grid.affine) @ world).astype(int)
        assert volume.voxels[tuple(at[:3])] == values[frame, 0, 0]


def test_a_reconstruction_without_a_place_is_noted(tmp_path: Path) -> None:
    nuclear(tmp_path / "a.dcm", DetectorInformationSequence=[])
    header = volumes.read_header(tmp_path / "a.dcm")
    assert header.stored.spacing[2] == 4.0
    assert any("sides are a guess" in note for note in header.notes)


@pytest.mark.files("places", "projections", "C.8.4.9", "refused")
def test_projections_and_slices_without_distance_are_refused(tmp_path: Path) -> None:
    nuclear(tmp_path / "tomo.dcm", kind="TOMO", pointer=[DETECTORS, ANGLES])
    assert "projections" in refused(tmp_path / "tomo.dcm", "frames-unplaced")
    nuclear(tmp_path / "far.dcm", SpacingBetweenSlices=None, SliceThickness=None)
    assert "how far apart" in refused(tmp_path / "far.dcm", "frames-unplaced")


def test_gated_slices_are_several_volumes(tmp_path: Path) -> None:
    nuclear(tmp_path / "a.dcm", 4, "RECON GATED TOMO", [0x00540070, SLICES], SliceVector=[1, 2, 1, 2])
    refused(tmp_path / "a.dcm", "slices-missing")


@pytest.mark.files("places", "frames of one file", "C.7.6.6", "a film only if they are moments")
@pytest.mark.parametrize(
    ("kind", "pointer", "moments"),
    [("DYNAMIC", TIMES, True), ("STATIC", DETECTORS, False), ("WHOLE BODY", [0x00540010, DETECTORS], False)],
)
def test_only_moments_are_a_film(tmp_path: Path, kind: str, pointer: Any, moments: bool) -> None:
    nuclear(tmp_path / "a.dcm", 3, kind, pointer)
    header = volumes.read_header(tmp_path / "a.dcm")
    assert header.moments == moments
    assert not header.stored.placed
    assert any("views" in note for note in header.notes) == (not moments)


@pytest.mark.files(
    "places", "frames that say nothing, of US, IVUS, XA, RF, endoscopy; of others", "C.7.6.6", "a film; pictures, noted"
)
@pytest.mark.parametrize(("modality", "moments"), [("US", True), ("XA", True), ("SC", False), ("DX", False)])
def test_frames_that_say_nothing_are_a_film_only_where_films_are_made(
    tmp_path: Path, modality: str, moments: bool
) -> None:
    writer.pixels(writer.blank(modality), np.zeros((4, 6, 6), np.uint8)).save_as(
        tmp_path / "a.dcm", enforce_file_format=True
    )
    header = volumes.read_header(tmp_path / "a.dcm")
    assert header.moments == moments
    assert any("views" in note for note in header.notes) == (not moments)


@pytest.mark.files("places", "enhanced frames of which some have no place", "C.7.6.16.2.3", "refused")
def test_frames_of_which_some_have_no_place_are_refused(tmp_path: Path) -> None:
    one = writer.enhanced(tmp_path / "a.dcm", voxels(), LPS)
    del one.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence
    one.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert "1 of 6 frames" in refused(tmp_path / "a.dcm", "frames-unplaced")
    for group in one.PerFrameFunctionalGroupsSequence:
        if "PlanePositionSequence" in group:
            del group.PlanePositionSequence
    one.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    refused(tmp_path / "b.dcm", "frames-unplaced")


@pytest.mark.files("places", "two frames of reference in one series", "C.7.4.1", "refused")
def test_positions_in_two_frames_of_reference_do_not_compare(tmp_path: Path) -> None:
    made = writer.series(tmp_path / "a", voxels(), LPS)
    one = made[3]
    one.FrameOfReferenceUID = uid.generate_uid()
    one.save_as(tmp_path / "a" / f"003-{writer.PLANTED}-1.2.3.3.dcm", enforce_file_format=True)
    assert "frames of reference" in refused(tmp_path / "a", "series-mixed")


@pytest.mark.files("places", "frames of CT, MR or PET that say neither place nor moment", "C.7.6.6", "refused")
@pytest.mark.parametrize("modality", ["CT", "MR", "PT", "OPT", "MG"])
def test_frames_that_say_neither_place_nor_moment_are_refused(tmp_path: Path, modality: str) -> None:
    values = np.zeros((4, 6, 6), np.uint16)
    one = writer.pixels(writer.blank(modality), values)
    one.PixelSpacing, one.ImagePositionPatient, one.ImageOrientationPatient = [1, 1], [0, 0, 0], [1, 0, 0, 0, 1, 0]
    one.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    refused(tmp_path / "a.dcm", "frames-unplaced")
    one.FrameIncrementPointer = 0x00181063
    one.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    assert volumes.read_header(tmp_path / "b.dcm").moments


# --- enhanced ultrasound volumes: PS3.3, C.8.24 -----------------------------------------------------------------------


@pytest.mark.files("places", "enhanced ultrasound volumes", "C.8.24", "a volume in its transducer's frame, noted")
def test_an_ultrasound_volume_lies_in_its_transducers_frame(tmp_path: Path) -> None:
    values = np.arange(4 * 30, dtype=np.uint8).reshape(4, 5, 6)
    one = writer.pixels(writer.blank("US", ENHANCED_US), values)
    shared, turned, measures = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    turned.ImageOrientationVolume = [1.0, 0, 0, 0, 1.0, 0]
    measures.PixelSpacing = [0.5, 0.25]
    shared.PlaneOrientationVolumeSequence, shared.PixelMeasuresSequence = [turned], [measures]
    one.SharedFunctionalGroupsSequence, groups = [shared], []
    for number in range(4):
        group, place = pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionVolume = [0.0, 0.0, 0.8 * number]
        group.PlanePositionVolumeSequence = [place]
        groups.append(group)
    one.PerFrameFunctionalGroupsSequence = groups
    one.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    header = volumes.read_header(tmp_path / "a.dcm")
    np.testing.assert_allclose(header.stored.spacing, (0.25, 0.5, 0.8))
    assert not header.moments
    assert header.step("acquired") == pytest.approx(0.8)
    assert any("transducer" in note for note in header.notes)


# --- mosaics ----------------------------------------------------------------------------------------------------------


@pytest.mark.files("places", "mosaics (Siemens, United Imaging)", "their private blocks", "refused")
@pytest.mark.parametrize("how", ["ImageType", "capitals", "Siemens", "United Imaging"])
def test_mosaics_are_refused(tmp_path: Path, how: str) -> None:
    writer.series(tmp_path / "mr", voxels(1), LPS, modality="MR")
    (file,) = (tmp_path / "mr").iterdir()
    one = pydicom.dcmread(file)
    if how in ("ImageType", "capitals"):
        word = "MOSAIC" if how == "ImageType" else "Mosaic"
        one.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", word]
    elif how == "Siemens":
        one.add_new(0x00190010, "LO", "SIEMENS MR HEADER")
        one.add_new(0x0019100A, "US", 36)
    else:
        one.add_new(0x00650010, "LO", "Image Private Header")
        one.add_new(0x00651050, "DS", "36")
    one.save_as(file)
    assert "mosaic" in refused(tmp_path / "mr", "frames-unplaced")


# --- thickness, size of a pixel, rounding -----------------------------------------------------------------------------


@pytest.mark.files("places", "one slice without thickness", "C.7.6.2", "its area, no volume in ml, noted")
@pytest.mark.parametrize(
    ("said", "thick"),
    [
        ({"SliceThickness": 5.0}, 5.0),
        ({"SliceThickness": None, "SpacingBetweenSlices": -6.0}, 6.0),
        ({"SliceThickness": 0}, None),
    ],
)
def test_volumes_in_ml_need_a_thickness(tmp_path: Path, said: dict[str, Any], thick: float | None) -> None:
    writer.series(tmp_path / "mr", voxels(1), LPS, modality="MR", **said)
    header = volumes.read_header(tmp_path / "mr")
    row = results.counts(np.ones(header.stored.shape, np.uint8), ["background", "lesion"], header)["lesion"]
    if thick is None:
        assert row == {"voxels": 56, "mm2": 21.0}
        assert any("how thick" in note for note in header.notes)
    else:
        assert row["mm3"] == pytest.approx(56 * 0.5 * 0.75 * thick)


@pytest.mark.files("places", "a series without Pixel Spacing", "C.7.6.2", "refused by that name")
def test_a_series_without_pixel_spacing_is_told_so(tmp_path: Path) -> None:
    made = writer.series(tmp_path / "ct", voxels(), LPS)
    for file, one in zip(sorted((tmp_path / "ct").iterdir()), made, strict=True):
        del one.PixelSpacing
        one.save_as(file)
    assert "Pixel Spacing is missing" in refused(tmp_path / "ct", "pixel-size")


def rounded(folder: Path, step: float, decimals: int = 1, skip: tuple[int, ...] = (), number: int = 9) -> Path:
    affine = np.diag([1.0, 1.0, step, 1.0])
    writer.series(folder, voxels(number), affine, skip=skip)
    for file in folder.iterdir():
        one = pydicom.dcmread(file)
        one.ImagePositionPatient = [round(float(part), decimals) for part in one.ImagePositionPatient]
        one.save_as(file)
    return folder


@pytest.mark.files(
    "places", "positions rounded to one decimal", "C.7.6.2", "read where a regular grid is within 0.05 mm, noted"
)
@pytest.mark.parametrize("step", [0.625, 0.75, 1.25, 0.45, 0.33])
def test_positions_rounded_by_a_writer_are_read(tmp_path: Path, step: float) -> None:
    header = volumes.read_header(rounded(tmp_path / "ct", step))
    assert header.stored.spacing[2] == pytest.approx(step, rel=0.02)


@pytest.mark.parametrize("step", [0.625, 0.2, 0.33, 0.1])
@pytest.mark.parametrize("lost", [1, 4, 7])
def test_a_missing_slice_is_no_rounding(tmp_path: Path, step: float, lost: int) -> None:
    refused(rounded(tmp_path / "ct", step, 2, skip=(lost,)), "slices-missing")


def test_of_three_slices_one_missing_is_no_rounding(tmp_path: Path) -> None:
    refused(rounded(tmp_path / "ct", 0.15, 2, skip=(2,), number=4), "slices-missing")


# --- nothing vanishes: preambles, links, copies -----------------------------------------------------------------------


@pytest.mark.files("nothing", "files without preamble", "PS3.10, 7.1", "read")
@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("ending", ["", ".dcm", ".ima"])
def test_files_without_preamble_are_read(tmp_path: Path, implicit: bool, ending: str) -> None:
    writer.series(tmp_path / "ct", voxels(), LPS)
    plain = volumes.read_volume(tmp_path / "ct").voxels.copy()
    for number, file in enumerate(sorted((tmp_path / "ct").iterdir())):
        whole = pydicom.dcmread(file)
        file.unlink()
        if number > 3:
            bare = pydicom.Dataset()
            bare.update({element.tag: element for element in whole})
            bare.save_as(
                file.with_name(f"{number}{ending}"), implicit_vr=implicit, little_endian=True, enforce_file_format=False
            )
        else:
            whole.save_as(file)
    header = volumes.read_header(tmp_path / "ct")
    assert header.notes == ()
    np.testing.assert_array_equal(volumes.read_volume(tmp_path / "ct").voxels, plain)


def test_bare_data_sets_of_both_byte_orders_are_known_and_texts_are_not(tmp_path: Path) -> None:
    examples = Path(str(pydicom.data.__file__)).parent / "test_files"
    for name in ("ExplVR_BigEndNoMeta.dcm", "ExplVR_LitEndNoMeta.dcm"):
        assert dicom.is_bare((examples / name).read_bytes()[:4096])
    for text in (b"", b"%PDF-1.7", b"II*\0", bytes(4096), b"\x08\0", b"patient,site\n" * 50, b"\x89PNG\r\n"):
        assert not dicom.is_bare(text)


def test_links_in_a_study_are_refused_by_what_they_are(tmp_path: Path) -> None:
    writer.series(tmp_path / "ct", voxels(), LPS)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "ct", other)
    (tmp_path / "ct" / "more").symlink_to(other)
    assert "a link to a folder" in refused(tmp_path / "ct", "link")
    (tmp_path / "ct" / "more").unlink()
    (tmp_path / "ct" / "9").symlink_to("../../.git/annex/objects/x")
    assert "leads nowhere" in refused(tmp_path / "ct", "link")


@pytest.mark.files("nothing", "exact copies of an instance", "PS3.5, 9", "left out and counted")
def test_an_exact_copy_of_an_instance_is_left_out_and_counted(tmp_path: Path) -> None:
    writer.series(tmp_path / "ct", voxels(), LPS)
    first = sorted((tmp_path / "ct").iterdir())[0]
    shutil.copy(first, tmp_path / "ct" / "again")
    header = volumes.read_header(tmp_path / "ct")
    assert header.stored.shape[2] == 6
    assert header.notes == ("1 file(s) left out: an exact copy of another file of the study",)
    one = pydicom.dcmread(first)
    one.PixelData = bytes(len(one.PixelData))
    one.save_as(tmp_path / "ct" / "another")
    refused(tmp_path / "ct", "slices-missing")


@pytest.mark.files("nothing", "documents in a study", "", "left out, counted by their kind")
def test_documents_are_left_out_by_their_kind(tmp_path: Path) -> None:
    writer.series(tmp_path / "ct", voxels(), LPS)
    report = writer.blank("SR", uid.BasicTextSRStorage)
    report.save_as(tmp_path / "ct" / "report", enforce_file_format=True)
    header = volumes.read_header(tmp_path / "ct")
    assert header.notes == ("1 file(s) left out: SR objects are not read",)
    assert [reason for _, reason in header.left] == ["SR objects are not read"]


# --- several things in one series -------------------------------------------------------------------------------------


def acquisitions(folder: Path, modality: str, apart: float) -> Path:
    """Two acquisitions of six slices in one series, the second one so many millimetres further."""
    series = uid.generate_uid()
    for number in (1, 2):
        affine = LPS.copy()
        affine[2, 3] = apart * (number - 1)
        more = {"SeriesInstanceUID": series, "AcquisitionNumber": number}
        writer.series(folder / str(number), voxels(), affine, modality=modality, **more)
    return folder


@pytest.mark.files(
    "places",
    "acquisitions of one series whose slices alternate (before and after contrast agent)",
    "C.7.6.16.2.2, C.8.2.1",
    "CT is refused, others are noted; stations one after the other are one volume",
)
def test_slices_of_two_acquisitions_between_each_other(tmp_path: Path) -> None:
    refused(acquisitions(tmp_path / "ct", "CT", 1.25), "series-mixed")
    notes = volumes.read_header(acquisitions(tmp_path / "mr", "MR", 1.25)).notes
    assert dicom_series.ALTERNATING in notes
    stations = volumes.read_header(acquisitions(tmp_path / "stations", "CT", 15.0))
    assert (stations.stored.shape[2], stations.notes) == (12, ())
    writer.series(tmp_path / "one", voxels(), LPS, AcquisitionNumber=1)
    without = sorted((tmp_path / "one").iterdir())[2]
    changed = pydicom.dcmread(without)
    del changed.AcquisitionNumber
    changed.save_as(without)
    assert volumes.read_header(tmp_path / "one").notes == (), (
        "a slice that does not say its acquisition is no other one"
    )


@pytest.mark.files("places", "slices farther apart than their files say", "C.7.6.2, C.8.3.1", "noted")
@pytest.mark.parametrize(
    ("apart", "thickness", "noted"), [(2.5, 2.5, True), (5.0, 2.5, False), (None, 2.5, False), (1.0, 4.0, False)]
)
def test_every_second_slice_missing_is_noted(
    tmp_path: Path, apart: float | None, thickness: float, noted: bool
) -> None:
    """Some writers give the gap between slices: 1 mm and 4 mm thick are 5 mm apart."""
    more = {"SpacingBetweenSlices": apart, "SliceThickness": thickness}
    writer.series(tmp_path / "a", voxels(), LPS, skip=(1, 3, 5), **more)
    assert any("may be missing" in note for note in volumes.read_header(tmp_path / "a").notes) == noted


@pytest.mark.files("places", "a copy of the screen, or a report, in a series", "C.7.6.2", "refused by its own reason")
def test_an_image_without_a_place_among_others_is_named_as_that(tmp_path: Path) -> None:
    series = writer.series(tmp_path / "a", voxels(), LPS)[0].SeriesInstanceUID
    one = writer.pixels(writer.blank("CT", writer.CT, series), np.zeros((20, 30, 3), np.uint8), "RGB")
    one.save_as(tmp_path / "a" / "z.dcm", enforce_file_format=True)
    assert "1 of 7 images" in refused(tmp_path / "a", "series-mixed")


@pytest.mark.files(
    "places", "enhanced frames at one place (phases, echoes, directions)", "C.7.6.16", "pictures, no volume; noted"
)
def test_frames_at_one_place_are_no_volume(tmp_path: Path) -> None:
    one = writer.enhanced(tmp_path / "a.dcm", voxels(), LPS)
    for group in one.PerFrameFunctionalGroupsSequence:
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 0]
    one.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    header = volumes.read_header(tmp_path / "a.dcm")
    assert not header.stored.placed
    assert dicom_series.ONE_PLACE in header.notes


@pytest.mark.files(
    "places", "digits of Pixel Spacing that differ inside a series", "C.7.6.2", "read; other sizes refused"
)
@pytest.mark.parametrize(("spacing", "right"), [("0.7500001", True), ("0.77", False)])
def test_digits_of_pixel_spacing_make_no_other_series(tmp_path: Path, spacing: str, right: bool) -> None:
    one = writer.series(tmp_path / "a", voxels(), LPS)[-1]
    one.PixelSpacing = [spacing, "0.5"]
    one.save_as(sorted((tmp_path / "a").iterdir())[-1])
    if right:
        assert volumes.read_header(tmp_path / "a").stored.shape == (8, 7, 6)
    else:
        refused(tmp_path / "a", "series-mixed")


@pytest.mark.files("nothing", "archives in a study", "", "left out by that name")
def test_a_packed_slice_is_named_as_that(tmp_path: Path) -> None:
    writer.series(tmp_path / "a", voxels(), LPS)
    last = sorted((tmp_path / "a").iterdir())[-1]
    last.with_suffix(".dcm.gz").write_bytes(gzip.compress(last.read_bytes()))
    last.unlink()
    assert volumes.read_header(tmp_path / "a").notes == ("1 file(s) left out: packed with gzip; unpack it",)


@pytest.mark.files("nothing", "pointers of Git LFS and git-annex in place of files", "", "refused by that name")
@pytest.mark.parametrize("begin", [b"version https://git-lfs.github.com/spec/v1\n", b"/annex/objects/SHA256E-s9--"])
def test_pointers_in_place_of_files_are_named_as_that(tmp_path: Path, begin: bytes) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "IM1").write_bytes(begin + b"0" * 200)
    for name in ("a.nii.gz", "a.nii", "a.png", "a.nrrd", "a.mha", "a.dcm"):
        path = tmp_path / name
        path.write_bytes(begin + b"0" * 200)
        with pytest.raises(errors.DataError) as caught:
            formats.read_image(path) if name.endswith("png") else volumes.read_header(path)
        assert "pointer in place of the file" in str(caught.value)
    refused(tmp_path / "study", "link")
