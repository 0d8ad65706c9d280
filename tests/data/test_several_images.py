"""Several radiographs or clips of one study: each is a case, all are of one patient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.sources import folder
from tests.data import dicom_writer as writer

CR = "1.2.840.10008.5.1.4.1.1.1"
RNG = np.random.default_rng(0)


def views(study: Path, *sizes: tuple[int, ...], modality: str = "CR", **more: Any) -> list[pydicom.Dataset]:
    """Images of one series without a place in the patient, of these (frames,) rows and columns."""
    study.mkdir(parents=True, exist_ok=True)
    series, made = pydicom.uid.generate_uid(), []
    for number, size in enumerate(sizes):
        values = RNG.integers(1, 200, size).astype(np.uint8)
        one = writer.pixels(writer.blank(modality, CR, series), values)
        one.InstanceNumber = number + 1
        if len(size) == 3:
            one.FrameTime, one.FrameIncrementPointer = 30, 0x00181063
        for name, value in more.items():
            setattr(one, name, value)
        one.save_as(study / f"{number}-{writer.PLANTED}.dcm", enforce_file_format=True)
        made.append(one)
    return made


def make(path: Path, **options: object) -> folder.Folder:
    return folder.Folder(
        schema.SourceConfig.model_validate({"source": "folder", "path": str(path), "options": options})
    )


def labelled(root: Path, names: str = "ab") -> Path:
    root.joinpath("labels.csv").write_text("id,label\n" + "".join(f"{name},{name}\n" for name in names))
    return root


@pytest.mark.files(
    "places",
    "several radiographs of one study (frontal, lateral)",
    "C.7.6.2",
    "a case each, `STUDY/1`, `STUDY/2`, of one patient and split",
)
def test_views_of_one_series_are_items_of_one_patient(tmp_path: Path) -> None:
    made = views(tmp_path / "studies" / "a", (12, 9), (10, 14))
    views(tmp_path / "studies" / "b", (12, 9))
    source = make(labelled(tmp_path), ids="names")
    samples = source.samples()
    assert [(one.id, one.label, one.patient) for one in samples] == [
        ("a/1", 0, "a"),
        ("a/2", 0, "a"),
        ("b-f000", 1, "b"),
    ]
    for one, written in zip(samples, made, strict=False):
        full = np.ptp(written.pixel_array)
        np.testing.assert_allclose(
            source.read(one).image[0], (written.pixel_array - written.pixel_array.min()) / full, atol=1e-6
        )
    assert source.stable(samples[0])[1] == source.stable(samples[1])[1] == "a"
    numbered = make(tmp_path).samples()
    assert numbered[0].patient == numbered[1].patient is not None
    assert writer.PLANTED not in repr([source.notes_of(one) for one in samples])


def test_each_view_of_its_own_series_and_patients_by_hash(tmp_path: Path) -> None:
    for name in "ab":
        views(tmp_path / "studies" / name, (12, 9), SeriesNumber=1)
        (next((tmp_path / "studies" / name).iterdir())).rename(tmp_path / "studies" / name / "first.dcm")
        views(tmp_path / "studies" / name, (10, 14), SeriesNumber=2)
    source = make(labelled(tmp_path))
    assert len(source.samples()) == 4
    assert all(folder.SAME_PATIENT in source.notes_of(one) for one in source.samples())
    hashed = make(tmp_path, patients="hash").samples()
    assert len({one.patient for one in hashed}) == 1
    tmp_path.joinpath("labels.csv").write_text("id,label,patient,split\na,a,p,train\nb,b,q,test\n")
    found = [(one.split, one.patient) for one in make(tmp_path, ids="names").samples()]
    assert found == [("train", "p"), ("train", "p"), ("test", "q"), ("test", "q")]


@pytest.mark.files("places", "several clips of one ultrasound study", "C.7.6.5", "a case each")
def test_clips_of_one_series_are_cases_of_their_own(tmp_path: Path) -> None:
    views(tmp_path / "studies" / "a", (3, 12, 9), (2, 10, 14), modality="US")
    views(tmp_path / "studies" / "b", (12, 9), modality="US")
    source = make(labelled(tmp_path), ids="names")
    assert [one.id for one in source.samples()] == [
        "a/1-f000",
        "a/1-f001",
        "a/1-f002",
        "a/2-f000",
        "a/2-f001",
        "b-f000",
    ]
    assert {one.patient for one in source.samples()} == {"a", "b"}


@pytest.mark.files(
    "places", "DICOM-SEG of one of several radiographs", "C.8.20", "goes to the image it names; one without is a fault"
)
def test_masks_go_to_the_view_that_they_name(tmp_path: Path) -> None:
    study = tmp_path / "studies" / "a"
    made = views(study, (12, 9), (10, 14))
    for number, one in enumerate(made, 1):
        one.FrameOfReferenceUID = pydicom.uid.generate_uid()
        one.PatientOrientation = ["L", "F"]
        one.ImagerPixelSpacing = [1, 1]
        mask = np.zeros((one.Columns, one.Rows, 1), np.uint8)
        mask[:number, :number] = 1
        writer.segmentation(study / f"seg-{number}.dcm", [one], mask)
    source = make(tmp_path, ids="names")
    assert {one.id: int(source.read(one).mask.sum()) for one in source.samples()} == {"a/1": 1, "a/2": 4}
    (study / "seg-2.dcm").unlink()
    with pytest.raises(errors.DataError) as caught:
        make(tmp_path)
    assert caught.value.code == "mask-missing"
    assert "a: image 2" in str(caught.value)
    assert writer.PLANTED not in str(caught.value)


def test_no_name_of_a_file_inside_a_study_is_told(tmp_path: Path) -> None:
    made = views(tmp_path / "studies" / "a", (12, 9), (10, 14))
    views(tmp_path / "studies" / "b", (12, 9))
    one = made[1]
    one.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    one.PixelData = pydicom.encaps.encapsulate([b"no picture, but long enough for one frame"])
    one["PixelData"].is_undefined_length = True
    one.save_as(tmp_path / "studies" / "a" / f"1-{writer.PLANTED}.dcm", enforce_file_format=True)
    source = make(labelled(tmp_path))
    with pytest.raises(errors.DataError) as caught:
        source.read(source.samples()[1])
    assert "a: image 2" in str(caught.value)
    assert writer.PLANTED not in str(caught.value)
    contract = schema.DataContract(class_names=("a", "b"), modality="CT")
    with pytest.raises(errors.DataError) as caught:
        source.under(contract)
    assert writer.PLANTED not in str(caught.value)


@pytest.mark.files(
    "places", "radiographs and clips of several modalities in one study", "", "refused until `series` says which"
)
def test_images_of_several_modalities_stay_refused(tmp_path: Path) -> None:
    views(tmp_path / "studies" / "a", (12, 9))
    (tmp_path / "studies" / "a" / f"0-{writer.PLANTED}.dcm").rename(tmp_path / "studies" / "a" / "other.dcm")
    views(tmp_path / "studies" / "a", (12, 9), (12, 9), modality="US")
    views(tmp_path / "studies" / "b", (12, 9), modality="US")
    with pytest.raises(errors.DataError) as caught:
        make(labelled(tmp_path))
    assert caught.value.code == "series-mixed"
    assert len(make(tmp_path, series="US").samples()) == 3


@pytest.mark.files(
    "places", "CT, MR or PET slices that lost their places", "PS3.3 C.7.6.2", "refused, no cases of their own"
)
def test_slices_without_a_place_are_no_cases_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        voxels = np.zeros((4, 4, 3), np.int16)
        for one in writer.series(tmp_path / "studies" / name, voxels, np.diag([1.0, 1.0, 2.0, 1.0])):
            del one.ImagePositionPatient
            path = next((tmp_path / "studies" / name).glob(f"{one.InstanceNumber - 1:03d}*"))
            one.save_as(path, enforce_file_format=True)
    (tmp_path / "labels.csv").write_text("id,label\na,well\nb,ill\n")
    with pytest.raises(errors.DataError, match="do not say where they lie"):
        folder.Folder(schema.SourceConfig.model_validate({"source": "folder", "path": str(tmp_path)}))
