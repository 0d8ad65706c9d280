"""DICOM in, DICOM-SEG or NIfTI out: by physical point, readable by others, and no identifier anywhere else."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

import fedvfm
from fedvfm import errors
from fedvfm.data import formats
from fedvfm.data.volumes import dicom_seg, dicom_series, volumes
from fedvfm.inference import inputs, segmentation_object
from tests.data import dicom_writer as writer

Saver = Callable[..., Path]

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom", reason="DICOM-SEG needs the extra dicom-seg")


def oblique(columns: float = 0.8, rows: float = 1.1, step: float = 3.0) -> np.ndarray:
    """Voxel index to LPS millimetres, turned about two axes."""
    a, b = 0.3, -0.2
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([columns, rows, step])
    affine[:3, 3] = [-40.0, 25.0, 12.0]
    return affine


def phantom() -> np.ndarray:
    """(columns, rows, slices): noise with an asymmetric block."""
    voxels = np.random.default_rng(0).normal(100, 10, (22, 18, 4)).astype(np.int16)
    voxels[3:9, 4:16, 1:] += 400
    return voxels


def lps_points(affine: np.ndarray, index: np.ndarray) -> np.ndarray:
    """LPS millimetres of voxel indices."""
    return np.asarray(index @ affine[:3, :3].T + affine[:3, 3])


def rounded(points: np.ndarray) -> set[tuple[float, ...]]:
    return {tuple(one) for one in np.round(points, 2) + 0.0}


def points_of_nifti(path: Path, number: int) -> set[tuple[float, ...]]:
    image = nibabel.load(path)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    return rounded(lps_points(affine, np.argwhere(np.asanyarray(image.dataobj) == number)))


def points_of_seg(path: Path, number: int) -> set[tuple[float, ...]]:
    """Where a segment's pixels lie, read with pydicom alone from the object's own positions."""
    seg = pydicom.dcmread(path)
    frames = np.atleast_3d(seg.pixel_array) if seg.pixel_array.ndim == 3 else seg.pixel_array[None]
    shared = seg.SharedFunctionalGroupsSequence[0]
    found = set()
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        if group.SegmentIdentificationSequence[0].ReferencedSegmentNumber != number:
            continue
        direction = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
        spacing = [float(one) for one in shared.PixelMeasuresSequence[0].PixelSpacing]
        first = np.array(group.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        rows, columns = np.nonzero(frame)
        places = first + np.outer(columns * spacing[1], direction[:3]) + np.outer(rows * spacing[0], direction[3:])
        found |= rounded(places)
    return found


@pytest.mark.parametrize("stored", ["series", "backwards", "enhanced"])
def test_seg_and_nifti_lie_on_the_same_points(saved: Saver, tmp_path: Path, stored: str) -> None:
    source = tmp_path / "study"
    if stored == "enhanced":
        writer.enhanced(source / "a.dcm", phantom(), oblique(), order=[2, 0, 3, 1])
    else:
        writer.series(source, phantom(), oblique(), backwards=stored == "backwards")
    made = fedvfm.predict(saved(), source, tmp_path / "seg")
    fedvfm.predict(saved(), source, tmp_path / "nifti", form="nifti")
    (row,) = made["inputs"]
    assert row["files"] == ["series-001.dcm"]
    assert row["form"] == "dicom-seg"
    for number, name in enumerate(["cell", "wall"], 1):
        there = points_of_seg(tmp_path / "seg" / "series-001.dcm", number)
        assert there == points_of_nifti(tmp_path / "nifti" / "series-001.nii.gz", number)
        assert len(there) == row["classes"][name]["voxels"]
        assert row["classes"][name]["mm3"] == pytest.approx(len(there) * 0.8 * 1.1 * 3.0, rel=1e-4)
    assert sum(count["voxels"] for count in row["classes"].values()) == phantom().size
    # All of them are pixels of the source.
    everywhere = rounded(lps_points(oblique(), np.argwhere(phantom() > -1)))
    assert points_of_seg(tmp_path / "seg" / "series-001.dcm", 1) <= everywhere


def test_highdicom_reads_it_back_with_its_sources(saved: Saver, tmp_path: Path) -> None:
    sources = writer.series(tmp_path / "study", phantom(), oblique())
    fedvfm.predict(saved(), tmp_path / "study", tmp_path / "out")
    fedvfm.predict(saved(), tmp_path / "study", tmp_path / "nifti", form="nifti")
    seg = highdicom.seg.segread(tmp_path / "out" / "series-001.dcm")
    assert [seg.get_segment_description(number).segment_label for number in seg.segment_numbers] == ["cell", "wall"]
    assert seg.StudyInstanceUID == sources[0].StudyInstanceUID
    assert seg.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    assert seg.SeriesInstanceUID != sources[0].SeriesInstanceUID
    uids = [one.SOPInstanceUID for one in sources]
    planes = seg.get_pixels_by_source_instance(
        uids, combine_segments=True, ignore_spatial_locations=False, assert_missing_frames_are_empty=True
    )
    stored = np.asanyarray(nibabel.load(tmp_path / "nifti" / "series-001.nii.gz").dataobj)
    np.testing.assert_array_equal(planes, stored.transpose(2, 1, 0))


def test_no_identifier_leaves_the_object(
    saved: Saver,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    folder = tmp_path / "in" / f"{writer.PLANTED}^NAME"
    writer.series(folder, phantom(), oblique(), OtherPatientIDs="PLANTED-OTHER", PatientComments="PLANTED comment")
    writer.series(tmp_path / "in" / "gap" / f"{writer.PLANTED}-2", phantom(), oblique(), skip=(1,))
    with pytest.raises(errors.DataError) as caught:
        fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out", overlays=True)
    shown = capfd.readouterr()
    said = shown.out + shown.err + caplog.text + str(caught.value)
    said += (tmp_path / "out" / "summary.json").read_text()
    said += " ".join(str(path.relative_to(tmp_path)) for path in (tmp_path / "out").rglob("*"))
    assert writer.PLANTED not in said
    seg = pydicom.dcmread(tmp_path / "out" / "series-001.dcm")
    held = {element.keyword for element in seg.iterall() if writer.PLANTED in str(element.value)}
    assert held <= set(segmentation_object.REQUIRED)
    assert "PatientID" in held
    assert seg.PatientID == f"{writer.PLANTED}-ID"
    with (tmp_path / "out" / "sources.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], Path(row["path"])) for row in rows] == [
        ("series-001", folder),
        ("series-002", tmp_path / "in" / "gap" / f"{writer.PLANTED}-2"),
    ]
    assert (tmp_path / "out" / "sources.csv").stat().st_mode & 0o077 == 0


def test_the_right_series_is_told_to_be_incomplete(saved: Saver, tmp_path: Path) -> None:
    writer.series(tmp_path / "in" / "a", phantom(), oblique())
    writer.series(tmp_path / "in" / "b", phantom(), oblique(), skip=(2,))
    with pytest.raises(errors.DataError, match="  - series-002: slices missing"):
        fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out")
    made = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["id"] for row in made["inputs"]] == ["series-001"]


def test_mixed_series_of_one_folder_are_refused_with_the_list(saved: Saver, tmp_path: Path) -> None:
    writer.series(tmp_path / "in", phantom(), oblique(), number=3)
    made = writer.series(tmp_path / "other", phantom()[..., :2], oblique(), number=4)
    for at, one in enumerate(made):
        one.save_as(tmp_path / "in" / f"more-{at}.dcm", enforce_file_format=True)
    with pytest.raises(errors.DataError, match=r"2 series[\s\S]*series 3: CT, 4 images[\s\S]*series 4: CT, 2 images"):
        fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out")


def test_one_of_several_series_is_predicted_where_it_is_asked_for(saved: Saver, tmp_path: Path) -> None:
    """Of a CD with everything in one folder, and of a study with a folder a series; nothing is sorted by hand."""
    cd = tmp_path / "cd" / writer.PLANTED
    for number, (count, modality) in enumerate([(4, "CT"), (2, "CT"), (4, "MR")], 3):
        for place in (cd, tmp_path / "study" / f"{writer.PLANTED}-{number}"):
            for at, one in enumerate(
                writer.series(place, phantom()[..., :count], oblique(), number=number, modality=modality)
            ):
                (place / f"{at:03d}-{writer.PLANTED}-1.2.3.{at}.dcm").unlink()
                one.save_as(place / f"{number}-{at}.dcm", enforce_file_format=True)
    alone = fedvfm.predict(saved(), tmp_path / "study" / f"{writer.PLANTED}-3", tmp_path / "alone", form="nifti")
    for at, (given, words) in enumerate([("cd", "3"), ("cd", "CT most"), ("study", "CT 4-images")]):
        made = fedvfm.predict(saved(), tmp_path / given, tmp_path / f"out-{at}", form="nifti", series=words)
        (row,) = made["inputs"]
        assert row["classes"] == alone["inputs"][0]["classes"]
        found, expected = (nibabel.load(tmp_path / name / row["files"][0]) for name in (f"out-{at}", "alone"))
        np.testing.assert_array_equal(np.asanyarray(found.dataobj), np.asanyarray(expected.dataobj))
        assert len(made["skipped"]) == (2 if given == "study" else 0)
        assert all("from slice to slice" in line for line in made["skipped"].values())
        assert writer.PLANTED not in json.dumps(made["skipped"])
    # The segmentation refers to the images of the chosen series alone.
    fedvfm.predict(saved(), cd, tmp_path / "seg", series="MR")
    seg = highdicom.seg.segread(tmp_path / "seg" / "series-001.dcm")
    named = {str(one.ReferencedSOPInstanceUID) for one in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert named <= {str(pydicom.dcmread(file).SOPInstanceUID) for file in cd.glob("5-*.dcm")}


def test_a_series_that_is_not_there(saved: Saver, tmp_path: Path) -> None:
    writer.series(tmp_path / "in" / "a", phantom(), oblique(), number=3)
    writer.series(tmp_path / "in" / "b", phantom(), oblique(), number=4)
    with pytest.raises(errors.DataError, match=r"no series fits 'PT'[\s\S]*series 3: CT[\s\S]*series 4: CT"):
        fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out", series="PT")
    with pytest.raises(errors.ConfigError, match="'head' says nothing of a series"):
        fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out", series="head")
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(errors.ConfigError, match="there is no DICOM among the inputs"):
        fedvfm.predict(saved(), tmp_path / "a.png", tmp_path / "out", series="CT")
    assert not (tmp_path / "out").exists()


def test_a_table_for_display_is_noted(saved: Saver, tmp_path: Path) -> None:
    """Also where the recipe sets a window: that is in stored units, and the table of the file is not applied."""
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 16], [3, 2, 1, 0]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    values = np.sort(np.random.default_rng(0).integers(0, 3000, (30, 44)).astype(np.uint16), axis=0)
    writer.radiograph(tmp_path / "in" / "a.dcm", values, VOILUTSequence=[table])
    made = fedvfm.predict(saved(window=[1500.0, 3000.0]), tmp_path / "in", tmp_path / "out", form="png")
    assert made["notes"] == {dicom_series.CURVED: ["series-001"]}


def test_the_wrong_modality_is_told_without_the_path(saved: Saver, tmp_path: Path) -> None:
    folder = tmp_path / writer.PLANTED
    writer.series(folder, phantom(), oblique(), modality="MR")
    with pytest.raises(
        errors.DataError, match=r"  - series-001: modality MR, but recipe\.data\.modality is 'CT'"
    ) as caught:
        fedvfm.predict(saved(modality="CT"), folder, tmp_path / "out")
    assert writer.PLANTED not in str(caught.value)


def test_our_own_reader_of_masks_reads_it(saved: Saver, tmp_path: Path) -> None:
    """What is predicted can be corrected and trained on."""
    writer.series(tmp_path / "study", phantom(), oblique(), backwards=True)
    fedvfm.predict(saved(), tmp_path / "study", tmp_path / "seg")
    fedvfm.predict(saved(), tmp_path / "study", tmp_path / "nifti", form="nifti")
    header = volumes.read_header(tmp_path / "study")
    found = dicom_seg.read(tmp_path / "seg" / "series-001.dcm", header)
    np.testing.assert_array_equal(found, volumes.read_volume(tmp_path / "nifti" / "series-001.nii.gz").voxels)


def test_radiographs_of_one_folder_are_inputs_each(saved: Saver, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(2):
        values = np.sort(rng.integers(0, 3000, (30, 44)).astype(np.uint16), axis=number)
        writer.radiograph(tmp_path / "in" / f"{number}.dcm", values, FrameOfReferenceUID="1.2.3")
    made = fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out")
    assert [row["id"] for row in made["inputs"]] == ["series-001", "series-002"]
    fedvfm.predict(saved(), tmp_path / "in", tmp_path / "png", form="png")
    for row in made["inputs"]:
        seg = highdicom.seg.segread(tmp_path / "out" / row["files"][0])
        mask = formats.read_mask(tmp_path / "png" / f"{row['id']}.png")
        assert mask.shape == (30, 44)
        planes = np.atleast_3d(seg.pixel_array).reshape(-1, 30, 44)
        groups = seg.PerFrameFunctionalGroupsSequence
        numbers = [one.SegmentIdentificationSequence[0].ReferencedSegmentNumber for one in groups]
        assert numbers
        for number, plane in zip(numbers, planes, strict=True):
            np.testing.assert_array_equal(plane, mask == number)
        assert row["classes"]["cell"]["mm2"] == pytest.approx(row["classes"]["cell"]["voxels"] * 0.2 * 0.1)


def test_a_radiograph_without_frame_of_reference_or_patient(saved: Saver, tmp_path: Path) -> None:
    values = np.sort(np.random.default_rng(0).integers(0, 3000, (30, 44)).astype(np.uint16), axis=0)
    one = writer.radiograph(tmp_path / "a.dcm", values)
    for keyword in ("FrameOfReferenceUID", *segmentation_object.REQUIRED):
        if keyword in one:
            del one[keyword]
    one.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    fedvfm.predict(saved(), tmp_path / "a.dcm", tmp_path / "out")
    seg = highdicom.seg.segread(tmp_path / "out" / "series-001.dcm")
    assert seg.PatientID in ("", None)
    assert (seg.Rows, seg.Columns) == (30, 44)


def test_an_empty_mask_is_a_readable_object(tmp_path: Path) -> None:
    writer.series(tmp_path / "study", phantom(), oblique())
    header = volumes.read_header(tmp_path / "study")
    empty = np.zeros(header.stored.shape, dtype=np.uint8)
    segmentation_object.write(tmp_path / "a.dcm", empty, header, ["rest", "cell"], "f" * 64)
    assert not highdicom.seg.segread(tmp_path / "a.dcm").pixel_array.any()


def test_no_highdicom_is_one_clear_error(saved: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer.series(tmp_path / "study", phantom(), oblique())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.MissingExtra, match=r"fedvfm\[dicom-seg\].*--as\s+nifti"):
        fedvfm.predict(saved(), tmp_path / "study", tmp_path / "out")


def test_what_is_found_where(tmp_path: Path) -> None:
    writer.series(tmp_path / "in" / "patient" / "ct", phantom()[..., :2], oblique())
    writer.series(tmp_path / "in" / "patient" / "mr", phantom()[..., :2], oblique(), modality="MR")
    (tmp_path / "in" / "patient" / "ct" / "README").write_text("no image")
    (tmp_path / "in" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    found = inputs.find(tmp_path / "in")
    assert [(item.name, item.path.name) for item in found] == [("series-001", "ct"), ("series-002", "mr")]
    table = tmp_path / "table.csv"
    table.write_text("id,image\nother, None\npatient,\n")
    assert [item.name for item in inputs.imageless(tmp_path / "in", found, table)] == ["other"]
    table.write_text("id,image\npatient,none\n")
    with pytest.raises(errors.DataError, match="id 'patient' has image = none, and there is an image of that name"):
        inputs.imageless(tmp_path / "in", found, table)
    without_ending = next((tmp_path / "in" / "patient" / "ct").glob("*.dcm"))
    renamed = without_ending.rename(tmp_path / "in" / "IM0001")
    assert inputs.find(renamed)[0].kind == "dicom"


def test_pictures_and_volumes_beside_a_study_are_predicted_too(saved: Saver, tmp_path: Path) -> None:
    """They were passed over in silence: a folder with one DICOM file hid all that lay in and below it."""
    study = tmp_path / "in" / "case"
    writer.series(study / "ct", phantom(), oblique())
    nibabel.save(nibabel.Nifti1Image(phantom(), np.eye(4)), study / "ct" / "before.nii.gz")
    (study / "ct" / "deep").mkdir()
    for place in (study / "ct", study / "ct" / "deep"):
        Image.fromarray(np.arange(900, dtype=np.uint8).reshape(30, 30) % 200).save(place / "view.png")
    made = fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out")
    assert [row["id"] for row in made["inputs"]] == [
        "case/ct/before",
        "case/ct/view",
        "case/ct/deep/view",
        "series-001",
    ]


def test_an_output_below_the_input_by_another_way(saved: Saver, tmp_path: Path) -> None:
    writer.series(tmp_path / "in", phantom(), oblique())
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(errors.OutputInUse, match="lies inside the input"):
        fedvfm.predict(saved(), tmp_path / "in", tmp_path / "link" / "out")


def test_what_does_not_fit_into_memory_stops_no_other_input(
    saved: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        writer.series(tmp_path / "in" / name, phantom(), oblique())
    place = volumes.place_back
    asked: list[int] = []

    def full(*given: Any) -> Any:
        asked.append(1)
        if len(asked) == 1:
            raise MemoryError
        return place(*given)

    monkeypatch.setattr(volumes, "place_back", full)
    with pytest.raises(errors.DataError, match="series-001: does not fit into the memory of this machine"):
        fedvfm.predict(saved(), tmp_path / "in", tmp_path / "out", form="nifti")
    assert (tmp_path / "out" / "series-002.nii.gz").is_file()
