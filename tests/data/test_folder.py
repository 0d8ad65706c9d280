"""The hospital's own folder: three layouts, tables of patients, and faults that are all named at once."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import folder


def picture(path: Path, values: np.ndarray | int = 100, size: tuple[int, int] = (6, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = values if isinstance(values, np.ndarray) else np.full(size, values, dtype=np.uint8)
    Image.fromarray(array).save(path)
    return path


def volume(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([0.5, 0.7, 3.0, 1.0]) if affine is None else affine), path)
    return path


def mask(rows: int = 6, columns: int = 8, value: int = 1) -> np.ndarray:
    values = np.zeros((rows, columns), dtype=np.uint8)
    values[: rows // 2] = value
    return values


def make(path: Path, **options: object) -> folder.Folder:
    values = {"source": "folder", "path": str(path), "options": options}
    return folder.Folder(schema.SourceConfig.model_validate(values))


def message(path: Path, **options: object) -> str:
    with pytest.raises(errors.FedvfmError) as caught:
        make(path, **options)
    return str(caught.value)


def pairs(path: Path, names: str = "abc", value: int = 1) -> Path:
    for number, name in enumerate(names):
        picture(path / "images" / f"{name}.jpg", 60 + number)
        picture(path / "masks" / f"{name}.png", mask(value=value))
    return path


# --- images/ and masks/ -------------------------------------------------------------------------------------------


def test_pairs(tmp_path: Path) -> None:
    source = make(pairs(tmp_path))
    assert source.info.task == "segmentation"
    assert source.info.class_names == ("background", "foreground")
    assert [one.id for one in source.samples()] == ["image-0001", "image-0002", "image-0003"]
    pixels = source.read(source.samples()[1])
    assert pixels.image.shape == (1, 6, 8)
    assert pixels.image.mean() == pytest.approx(61 / 255, abs=0.01)
    np.testing.assert_array_equal(pixels.mask, mask())
    assert source.path_of(source.samples()[1]) == tmp_path / "images" / "b.jpg"


@pytest.mark.files("structures", "masks of 0 and 255, two classes", "", "255 is the second class")
def test_black_and_white_masks_of_two_classes(tmp_path: Path) -> None:
    source = make(pairs(tmp_path, value=255))
    np.testing.assert_array_equal(source.read(source.samples()[0]).mask, mask())
    mapped = make(tmp_path, mask_values=[0, 255])
    np.testing.assert_array_equal(mapped.read(mapped.samples()[0]).mask, mask())
    three = make(tmp_path, class_names=["background", "cyst", "tumour"])
    with pytest.raises(errors.DataError, match=r"masks/a\.png: value 255 in 24 pixels is no class; .*mask_values"):
        three.read(three.samples()[0])
    three = make(tmp_path, class_names=["background", "cyst", "tumour"], mask_values=[0, 128, 255])
    np.testing.assert_array_equal(three.read(three.samples()[0]).mask, mask(value=2))
    both = mask(value=255)
    both[5, 5] = 1
    picture(tmp_path / "masks" / "a.png", both)
    mixed = make(tmp_path)
    with pytest.raises(errors.DataError, match="value 255"):
        mixed.read(mixed.samples()[0])


def test_every_structural_fault_is_named_at_once(tmp_path: Path) -> None:
    pairs(tmp_path, "abcdef")
    (tmp_path / "masks" / "a.png").unlink()
    (tmp_path / "images" / "b.jpg").unlink()
    picture(tmp_path / "masks" / "c.png", mask(5, 8))
    (tmp_path / "images" / "d.jpg").write_text("no picture")
    picture(tmp_path / "images" / "e.png")
    (tmp_path / "images" / "scan.npy").write_bytes(b"NUMPY")
    (tmp_path / "images" / "deeper").mkdir()
    (tmp_path / "images" / ".hidden").touch()
    (tmp_path / "images" / "Thumbs.db").touch()
    picture(tmp_path / "images" / "f.jpg", size=(1, 1))
    text = message(tmp_path)
    for expected in (
        "8 faults",
        "images/a.jpg: no mask masks/a.*",
        "masks/b.png: no image images/b.*",
        "masks/c.png is 5 x 8 pixels, images/c.jpg is 6 x 8",
        "images/d.jpg: unreadable picture",
        "images/e.png: same name as e.jpg",
        "images/scan.npy: ending '.npy' is not read",
        "images/deeper: a folder inside",
        "images/f.jpg: 1 x 1 pixels",
    ):
        assert expected in text
    assert "Thumbs" not in text
    assert "hidden" not in text


def test_very_many_faults_are_counted(tmp_path: Path) -> None:
    for number in range(30):
        picture(tmp_path / "images" / f"{number:02d}.png")
    (tmp_path / "masks").mkdir()
    text = message(tmp_path)
    assert "30 faults" in text
    assert text.endswith("and 10 more")


def test_damage_inside_a_picture_is_found_when_it_is_read(tmp_path: Path) -> None:
    pairs(tmp_path)
    noise = np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8)
    picture(tmp_path / "images" / "a.jpg", noise)
    whole = picture(tmp_path / "masks" / "a.png", noise).read_bytes()
    (tmp_path / "masks" / "a.png").write_bytes(whole[: len(whole) // 2])
    source = make(tmp_path)
    with pytest.raises(errors.DataError, match=r"masks/a\.png: damaged or cut short"):
        source.read(source.samples()[0])


def test_folders_without_a_layout(tmp_path: Path) -> None:
    assert "no such folder" in message(tmp_path / "none")
    assert "no known layout; expected images/ and masks/" in message(tmp_path)
    (tmp_path / "images").mkdir()
    assert "masks/: no such folder" in message(tmp_path)
    (tmp_path / "masks").mkdir()
    assert "no images; these are read: .png" in message(tmp_path)


def test_options_are_all_checked_at_once() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        folder.Folder(
            schema.SourceConfig(
                source="folder",
                options={
                    "layuot": "pairs",
                    "layout": "dicom",
                    "ids": 3,
                    "class_names": ["a"],
                    "mask_values": [0, 0],
                    "channels": [0, 1],
                },
            )
        )
    paths = [fault.split(":")[0].split(" =")[0] for fault in caught.value.faults]
    names = ("layuot", "layout", "ids", "class_names", "mask_values", "channels")
    assert paths == ["data.path", *(f"data.options.{name}" for name in names)]
    assert "nearest: 'layout'" in str(caught.value)


# --- tables of patients ------------------------------------------------------------------------------------------


def test_patients_sites_and_splits(tmp_path: Path) -> None:
    pairs(tmp_path)
    (tmp_path / "patients.csv").write_text(
        "id,patient,split,site\na,MRN-77,train,north\nb, MRN-77 ,train,north\nc,MRN-12,test,south\n",
        encoding="utf-8-sig",
    )
    one, two, three = make(tmp_path).samples()
    assert one.patient == two.patient != three.patient
    assert [(sample.split, sample.site) for sample in (one, three)] == [("train", "north"), ("test", "south")]
    shown = "".join(f"{sample.id}{sample.patient}" for sample in (one, two, three))
    assert "MRN" not in shown
    named = make(tmp_path, ids="names").samples()
    assert (named[0].id, named[0].patient) == ("a", "MRN-77")


def test_a_table_that_does_not_fit(tmp_path: Path) -> None:
    pairs(tmp_path)
    table = tmp_path / "patients.csv"
    table.write_text("id,patient,split\na,MRN-1,train\na,MRN-1,train\nb,MRN-1,test\nz,,validation\n")
    text = message(tmp_path)
    for expected in (
        "id 'a' stands in 2 rows",
        "id 'z' has no image",
        "no row for image 'c'",
        "id 'z' has no patient",
        "id 'z' has split 'validation'",
        "a patient with images in test and train (id 'a' is one)",
    ):
        assert expected in text
    assert "MRN" not in text
    table.write_text("name,patient\na,1\n")
    assert "column id is missing; it has name, patient" in message(tmp_path)
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        table.write_text(f"id{mark}patient\na{mark}1\n")
        assert f"is separated by {name}; save it with commas" in message(tmp_path)
    table.write_bytes(b"id,patient\n\xff\xfe,1\n")
    assert "cannot be read as a comma-separated UTF-8 table" in message(tmp_path)
    table.write_text('id,patient,note\na,1,"not closed\nb,1,x\nc,2,y\n')
    assert "look for a quotation mark that is not closed" in message(tmp_path)


# --- one folder a class ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("patients.csv", "id,Patient\na,1\nb,1\nc,2\n", "column 'Patient' is not read as 'patient'"),
        ("patients.csv", "id,patient_id\na,1\nb,1\nc,2\n", "column 'patient_id' is not read as 'patient'"),
        ("patients.csv", "id,site,Split\na,n,train\nb,n,test\nc,n,val\n", "column 'Split' is not read as 'split'"),
        ("patients.csv", "id,patient\na,P1\nb,p1\nc,p2\n", "written in 2 ways, in other capitals or with and without"),
        ("patients.csv", "id,patient\na,1\nb,1.0\nc,2\n", "written in 2 ways, in other capitals or with and without"),
        ("patients.csv", "id,patient\na,1\nb,NaN\nc,nan\n", "id 'b' has no patient"),
        ("Patients.csv", "id,patient\na,1\nb,1\nc,2\n", "save it as patients.csv"),
        ("images/patients.csv", "id,patient\na,1\nb,1\nc,2\n", "its rows belong into patients.csv of the data folder"),
        ("patients.tsv", "id\tpatient\na\t1\n", "save it as patients.csv"),
        ("labels.csv", "id,patient\na,1\nb,1\nc,2\n", "has a column patient, but patients.csv is read"),
        ("table.csv", "id,age,patient\na,50,1\nb,50,1\n", "has a column patient, but patients.csv is read"),
    ],
)
def test_what_is_said_of_patients_is_read_or_refused(tmp_path: Path, name: str, text: str, expected: str) -> None:
    """Passed over, images of one patient would be trained on and tested."""
    pairs(tmp_path)
    (tmp_path / name).write_text(text)
    assert expected in message(tmp_path)


def test_a_table_of_something_else_beside_masks_is_nobodys(tmp_path: Path) -> None:
    pairs(tmp_path)
    (tmp_path / "labels.csv").write_text("value,name\n1,liver\n")
    (tmp_path / "table.csv").write_text("id,age\na,50\nz,60\n")
    (tmp_path / "patients.csv").write_text("id,patient\na,007\nb,7\nc,07\n")
    assert len({one.patient for one in make(tmp_path).samples()}) == 3


def test_classes(tmp_path: Path) -> None:
    for name in ("tumour", "normal"):
        for number in range(2):
            picture(tmp_path / name / f"{number}.png", np.full((6, 8, 3), 50, dtype=np.uint8))
    source = make(tmp_path)
    assert source.info.task == "classification"
    assert source.info.class_names == ("normal", "tumour")
    assert [one.label for one in source.samples()] == [0, 0, 1, 1]
    assert source.read(source.samples()[0]).image.shape == (3, 6, 8)
    assert source.read(source.samples()[0]).mask is None
    # A hospital that has seen no case of a class must still number the classes as the others do.
    wider = make(tmp_path, class_names=["tumour", "inflammation", "normal"])
    assert [one.label for one in wider.samples()] == [2, 2, 0, 0]
    assert "tumour/: no class of data.options.class_names (normal, tumor); nearest: 'tumor'" in message(
        tmp_path, class_names=["normal", "tumor"]
    )
    assert "mask_values: only for layout pairs, studies, bids, this is 'classes'" in message(
        tmp_path, mask_values=[0, 1]
    )


def test_classes_that_cannot_be_told_apart(tmp_path: Path) -> None:
    picture(tmp_path / "normal" / "a.png")
    assert "1 class folder(s) (normal); two are needed" in message(tmp_path)
    (tmp_path / "tumour").mkdir()
    assert "tumour/: no images" in message(tmp_path)


# --- nnU-Net -----------------------------------------------------------------------------------------------------


def nnunet(path: Path, ending: str = ".png", channels: int = 1, **changes: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    settings = {
        "channel_names": {str(number): f"channel {number}" for number in range(channels)},
        "labels": {"background": 0, "tumour": 2, "kidney": 1},
        "numTraining": 2,
        "file_ending": ending,
        **changes,
    }
    (path / "dataset.json").write_text(json.dumps(settings))
    return path


def test_nnunet_pictures(tmp_path: Path) -> None:
    nnunet(tmp_path)
    for name in ("case_01", "case_02"):
        picture(tmp_path / "imagesTr" / f"{name}_0000.png", 90)
        picture(tmp_path / "labelsTr" / f"{name}.png", mask(value=2))
    source = make(tmp_path, ids="names")
    assert source.info.class_names == ("background", "kidney", "tumour")
    assert [one.id for one in source.samples()] == ["case_01", "case_02"]
    np.testing.assert_array_equal(source.read(source.samples()[0]).mask, mask(value=2))
    picture(tmp_path / "labelsTr" / "case_02.png", mask(value=7))
    with pytest.raises(errors.DataError, match=r"labelsTr/case_02\.png: value 7 in 24 .* add it to dataset\.json"):
        source.read(source.samples()[1])


def test_nnunet_colour_pictures_in_one_file(tmp_path: Path) -> None:
    nnunet(tmp_path, channels=3, numTraining=1)
    picture(tmp_path / "imagesTr" / "a_0000.png", np.full((6, 8, 3), 50, dtype=np.uint8))
    picture(tmp_path / "labelsTr" / "a.png", mask())
    source = make(tmp_path)
    assert source.read(source.samples()[0]).image.shape == (3, 6, 8)


def test_nnunet_volumes_become_axial_slices(tmp_path: Path) -> None:
    nnunet(tmp_path, ".nii.gz", channels=2)
    values = np.random.default_rng(0).integers(-1000, 1000, (8, 6, 3), dtype=np.int16)
    labels = (values > 500).astype(np.uint8)
    for name in ("left", "right"):
        for channel in range(2):
            volume(tmp_path / "imagesTr" / f"{name}_{channel:04d}.nii.gz", values // (channel + 1))
        volume(tmp_path / "labelsTr" / f"{name}.nii.gz", labels)
    source = make(tmp_path, channels=[1])
    assert [one.id for one in source.samples()][:4] == [f"image-0001-z00{z}" for z in range(3)] + ["image-0002-z000"]
    # Neighbouring slices are near duplicates: a volume is one patient even without a table.
    assert len({one.patient for one in source.samples()}) == 2
    pixels = source.read(source.samples()[1])
    assert pixels.image.shape == (1, 6, 8)
    assert pixels.spacing == pytest.approx((0.7, 0.5))
    half = (values // 2).astype(float)
    expected = (half - half.min()) / (half.max() - half.min())
    np.testing.assert_allclose(pixels.image[0], expected[::-1, ::-1, 1].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pixels.mask, labels[::-1, ::-1, 1].T)
    with pytest.raises(errors.DataError, match=r"2 channels; choose one or three with data\.options\.channels"):
        make(tmp_path).read(source.samples()[0])
    with pytest.raises(errors.DataError, match=r"channels = \[5\], but there are 2"):
        make(tmp_path, channels=[5]).read(source.samples()[0])
    (site,) = virtual_hospitals.make_hospitals(source, schema.PartitionConfig(kind="iid", sites=1), 0)
    assert {one.patient for one in site.train}.isdisjoint(one.patient for one in site.test)


def test_nnunet_structural_faults_at_once(tmp_path: Path) -> None:
    nnunet(tmp_path, ".nii.gz", numTraining=9)
    cube = np.zeros((4, 4, 4), dtype=np.uint8)
    for name in ("a_0000", "b_0000", "c_0001", "noname", "e_0000", "f_0000"):
        volume(tmp_path / "imagesTr" / f"{name}.nii.gz", cube)
    for name, values in (("b", cube[:3]), ("c", cube), ("d", cube)):
        volume(tmp_path / "labelsTr" / f"{name}.nii.gz", values)
    volume(tmp_path / "labelsTr" / "e.nii.gz", cube, np.diag([9.0, 0.7, 3.0, 1.0]))
    picture(tmp_path / "labelsTr" / "f.png", mask(4, 4))
    text = message(tmp_path)
    for expected in (
        "imagesTr/a_0000.nii.gz: no mask labelsTr/a.*",
        "labelsTr/d.nii.gz: no image imagesTr/d_0000.*",
        "imagesTr/c: channels 0001, but dataset.json names 1",
        "imagesTr/noname.nii.gz: no channel number; call it noname_0000.nii.gz",
        "numTraining is 9, but imagesTr/ has 5 cases",
        "labelsTr/b.nii.gz (voxels (3, 4, 4)) and imagesTr/b_0000.nii.gz (voxels (4, 4, 4)) differ",
        "labelsTr/e.nii.gz (voxels (4, 4, 4)) and imagesTr/e_0000.nii.gz",
        "pictures and volumes mixed",
    ):
        assert expected in text, text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, "label 'whole' = [1, 2] is no whole number (regions"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "label 'ignore' is not supported"),
        ({"labels": {"background": 0, "a": 2}}, "label numbers [0, 2]; 0 (background), 1, 2, ... without gaps"),
        ({"labels": ["background", "a"]}, "'labels' is missing or no table"),
    ],
)
def test_nnunet_labels_that_cannot_be_learned(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    nnunet(tmp_path, **changes)
    assert expected in message(tmp_path)


def test_nnunet_settings_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "imagesTr").mkdir()
    assert "dataset.json: cannot be read" in message(tmp_path)
    (tmp_path / "dataset.json").write_text("{not json")
    assert "dataset.json: cannot be read" in message(tmp_path)
    (tmp_path / "dataset.json").write_text('{"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}}')
    assert "this looks like version 1" in message(tmp_path)
    nnunet(tmp_path)
    assert "data.options.class_names = ['a', 'b'], but dataset.json has" in message(tmp_path, class_names=["a", "b"])
