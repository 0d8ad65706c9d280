"""The hospital's folder with volumes: DICOM studies, datalists, BIDS, and what a recipe asks of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import sample
from fedvfm.data.partition import virtual_hospitals
from fedvfm.data.sources import cases, folder, table
from fedvfm.data.volumes import dicom_seg, geometry, volumes
from tests.data import dicom_writer as writer

LPS = np.diag([0.5, 0.75, 2.5, 1.0])
RAS = geometry.from_lps(LPS)


def values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 99, (6, 5, 4)).astype(np.int16)


def labels() -> np.ndarray:
    made = np.zeros((6, 5, 4), dtype=np.uint8)
    made[0, 1, 2] = made[5, 4, 3] = 1
    return made


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = RAS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def make(path: Path, **options: object) -> folder.Folder:
    source = {"source": "folder", "path": str(path), "options": options}
    return folder.Folder(schema.SourceConfig.model_validate(source))


def message(path: Path, **options: object) -> str:
    with pytest.raises(errors.FedvfmError) as caught:
        make(path, **options)
    return caught.value.fault() if isinstance(caught.value, errors.DataError) else str(caught.value)


def contract(**changes: object) -> schema.DataContract:
    return schema.DataContract.model_validate({"class_names": ["background", "foreground"], **changes})


def check_truth(source: folder.Folder) -> None:
    """Every marked voxel is shown where the image has the value of that voxel."""
    found = {}
    for one in source.samples():
        pixels = source.read(one)
        assert pixels.mask is not None
        low, high = pixels.units or (0.0, 0.0)
        shown = np.rint(pixels.image[0] * (high - low) + low)
        found[one.id] = sorted(shown[pixels.mask == 1].tolist())
    expected = {2: [float(values()[0, 1, 2])], 3: [float(values()[5, 4, 3])]}
    assert found == {f"image-0001-z{z:03d}": expected.get(z, []) for z in range(4)}


# --- DICOM studies ----------------------------------------------------------------------------------------------------


def studies(path: Path, names: str = "ab", **options: Any) -> Path:
    for number, name in enumerate(names):
        writer.series(path / "studies" / name, values(number), LPS, modality="MR", **options)
    return path


def test_studies_with_labels(tmp_path: Path) -> None:
    studies(tmp_path, "abc")
    (tmp_path / "labels.csv").write_text("id,label,patient,split\na,well,p1,train\nb,ill,p2,test\nc,ill,p2,test\n")
    source = make(tmp_path)
    assert source.info.task == "classification"
    assert source.info.class_names == ("ill", "well")
    found = source.samples()
    assert [one.id for one in found][:5] == [f"image-0001-z{z:03d}" for z in range(4)] + ["image-0002-z000"]
    assert [one.label for one in found] == [1] * 4 + [0] * 8
    assert [one.patient for one in found[::4]] == ["patient-0001", "patient-0002", "patient-0002"]
    assert [one.split for one in found[::4]] == ["train", "test", "test"]
    part = found[5].part
    assert part is not None
    assert (part.volume, part.index, part.of, part.step) == ("image-0002", 1, 4, pytest.approx(2.5))
    assert found[5].unit == "image-0002"
    pixels = source.read(found[1])
    assert pixels.mask is None
    assert pixels.part == found[1].part
    assert pixels.spacing == pytest.approx((0.75, 0.5))
    np.testing.assert_allclose(pixels.image[0] * 98, values()[:, :, 1].T, atol=1e-3)
    assert source.path_of(found[0]) == tmp_path / "studies" / "a"


def test_studies_whose_labels_do_not_fit(tmp_path: Path) -> None:
    studies(tmp_path, "abcd")
    (tmp_path / "labels.csv").write_text("id,label\na,well\nb,il\nc,ill\nz,ill\n")
    text = message(tmp_path, class_names=["well", "ill"])
    assert "3 faults" in text
    assert "labels.csv: id 'b': label 'il' stands for no class" in text
    assert "labels.csv: no row for image 'd'" in text
    assert "labels.csv: id 'z' has no image" in text
    (tmp_path / "labels.csv").write_text("id,label\na,well\nb,well\nc,well\nd,well\n")
    assert "1 class(es)" in message(tmp_path)


@pytest.mark.parametrize("ending", ["nii.gz", "nrrd"])
def test_studies_with_masks_as_files(tmp_path: Path, ending: str) -> None:
    studies(tmp_path, "a")
    turned = nibabel.Nifti1Image(labels(), RAS).as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
    if ending == "nrrd":
        fields = {"space": "RAS", "space directions": turned.affine[:3, :3].T, "space origin": turned.affine[:3, 3]}
        (tmp_path / "masks").mkdir()
        nrrd.write(str(tmp_path / "masks" / "a.nrrd"), np.asarray(turned.dataobj), fields)
    else:
        nifti(tmp_path / "masks" / "a.nii.gz", np.asarray(turned.dataobj), turned.affine)
    check_truth(make(tmp_path))


def test_studies_with_segmentations_inside(tmp_path: Path) -> None:
    images = writer.series(tmp_path / "studies" / "a", values(), LPS)
    writer.segmentation(tmp_path / "studies" / "a" / "seg" / "one.dcm", images, labels())
    source = make(tmp_path)
    check_truth(source)
    # The same object beside the images, as a file and as a folder.
    (tmp_path / "other").mkdir()
    (tmp_path / "studies" / "a" / "seg").rename(tmp_path / "other" / "a")
    (tmp_path / "other").rename(tmp_path / "masks")
    check_truth(make(tmp_path))
    (tmp_path / "masks" / "a" / "one.dcm").rename(tmp_path / "masks" / "one.dcm")
    (tmp_path / "masks" / "a").rmdir()
    (tmp_path / "masks" / "one.dcm").rename(tmp_path / "masks" / "a.dcm")
    check_truth(make(tmp_path))


def test_segment_numbers_are_mask_values(tmp_path: Path) -> None:
    images = writer.series(tmp_path / "studies" / "a", values(), LPS)
    writer.segmentation(tmp_path / "studies" / "a" / "seg.dcm", images, labels() * 2)
    source = make(tmp_path)
    with pytest.raises(errors.DataError, match=r"studies/a: value 2 in 1 pixels") as caught:
        source.read(source.samples()[2])
    assert (caught.value.code, caught.value.values) == ("mask-value", (2,))
    source = make(tmp_path, mask_values=[0, 2])
    assert source.read(source.samples()[2]).mask.sum() == 1


def test_structural_faults_of_studies_at_once(tmp_path: Path) -> None:
    studies(tmp_path, "abcdefg")
    for name, array, affine in (
        ("a", labels(), RAS),
        ("b", labels()[:5], RAS),
        ("c", labels(), np.diag([1.0, 1.0, 1.0, 1.0]) @ RAS + np.eye(4)),
        ("d", labels(), RAS),
        ("x", labels(), RAS),
    ):
        nifti(tmp_path / "masks" / f"{name}.nii.gz", array, affine)
    sorted((tmp_path / "studies" / "d").iterdir())[1].unlink()
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(tmp_path / "masks" / "e.png")
    writer.series(tmp_path / "studies" / "f" / "more", values(), LPS, number=7)
    nifti(tmp_path / "masks" / "f.nii.gz", labels())
    writer.radiograph(tmp_path / "studies" / "loose.dcm", np.zeros((4, 4), np.uint16))
    text = message(tmp_path)
    for expected in (
        "8 faults",
        "studies/: 1 DICOM file(s) outside of a study's folder",
        "masks/b.nii.gz (voxels (5, 5, 4)) and studies/b (voxels (6, 5, 4)) differ in size, spacing or place",
        "masks/c.nii.gz (voxels (6, 5, 4)) and studies/c (voxels (6, 5, 4)) differ in size, spacing or place",
        "studies/d: slices missing or unevenly spaced: 0.0 to 5.0 mm",
        "studies/e, masks/e.png: pictures and volumes mixed",
        "studies/f: 2 series, one is read",
        "studies/g: no mask masks/g.*; add it",
        "masks/x.nii.gz: no image studies/x/; add it",
    ):
        assert expected in text, text
    assert str(tmp_path / "studies") not in text  # as seen from the folder


def test_studies_without_masks_or_labels(tmp_path: Path) -> None:
    studies(tmp_path, "a")
    assert "studies/a: no segmentation" in message(tmp_path)


# --- radiographs where pictures may stand -----------------------------------------------------------------------------


def test_radiographs_in_class_folders(tmp_path: Path) -> None:
    for name in ("normal", "pneumonia"):
        writer.radiograph(tmp_path / name / "1.dcm", np.arange(48, dtype=np.uint16).reshape(6, 8))
    source = make(tmp_path)
    assert [one.id for one in source.samples()] == ["image-0001", "image-0002"]
    assert source.samples()[0].part is None
    assert source.samples()[0].patient is None
    pixels = source.read(source.samples()[0])
    np.testing.assert_allclose(pixels.image[0] * 47, np.arange(48).reshape(6, 8), atol=1e-4)
    assert pixels.spacing == pytest.approx((0.2, 0.1))
    assert pixels.orientation is None


@pytest.mark.parametrize("kind", ["png", "nii.gz"])
def test_radiographs_with_masks(tmp_path: Path, kind: str) -> None:
    writer.radiograph(tmp_path / "images" / "a.dcm", np.arange(48, dtype=np.uint16).reshape(6, 8))
    (tmp_path / "masks").mkdir()
    mask = np.zeros((6, 8), dtype=np.uint8)
    mask[1, 6] = 1
    if kind == "png":
        Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    else:
        nifti(tmp_path / "masks" / "a.nii.gz", mask.T[:, :, None], np.diag([-0.1, -0.2, 1.0, 1.0]))
    source = make(tmp_path)
    pixels = source.read(source.samples()[0])
    np.testing.assert_array_equal(pixels.mask, mask)
    Image.fromarray(mask.T).save(tmp_path / "masks" / "a.png")
    if kind == "png":
        assert "masks/a.png is 8 x 6 pixels, images/a.dcm is 6 x 8" in message(tmp_path)


def test_a_mask_of_a_radiograph_with_long_pixels(tmp_path: Path) -> None:
    """Its rows are further apart than the millimetre that stands for its missing depth: it is no stack of rows."""
    writer.radiograph(
        tmp_path / "images" / "a.dcm", np.arange(48, dtype=np.uint16).reshape(6, 8), ImagerPixelSpacing=[3.0, 1.0]
    )
    mask = np.zeros((6, 8), dtype=np.uint8)
    mask[1, 6] = 1
    header = volumes.read_header(tmp_path / "images" / "a.dcm")
    (tmp_path / "masks").mkdir()
    volumes.write_nifti(tmp_path / "masks" / "a.nii.gz", volumes.place_back({0: mask}, header), header)
    source = make(tmp_path)
    np.testing.assert_array_equal(source.read(source.samples()[0]).mask, mask)


def test_a_mask_without_directions_is_not_turned_upside_down(tmp_path: Path) -> None:
    """Saved with the unit affine it says right and front where the radiograph's columns and rows run left and down."""
    writer.radiograph(tmp_path / "images" / "a.dcm", np.arange(36, dtype=np.uint16).reshape(6, 6))
    mask = np.zeros((6, 6), dtype=np.uint8)
    mask[1, 4] = 1
    nifti(tmp_path / "masks" / "a.nii.gz", mask.T[:, :, None], np.eye(4))
    text = message(tmp_path)
    assert "masks/a.nii.gz: its axes run to RAS, those of images/a.dcm as stored (columns, rows) to LPS" in text
    assert text.code == "mask-geometry"


def test_a_drawn_mask_on_a_turned_slice_is_refused(tmp_path: Path) -> None:
    """Prone: the file's rows are not those a radiologist is shown, and nobody can say on which the mask was drawn."""
    writer.series(tmp_path / "one", values()[:, :, :1], np.diag([-0.5, -0.75, 2.5, 1.0]))
    (tmp_path / "images").mkdir()
    next((tmp_path / "one").iterdir()).rename(tmp_path / "images" / "a.dcm")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(tmp_path / "masks" / "a.png")
    assert message(tmp_path).code == "mask-geometry"


# --- what the recipe asks ---------------------------------------------------------------------------------------------


def test_plane_stack_and_window(tmp_path: Path) -> None:
    writer.series(tmp_path / "studies" / "a", values(), LPS)
    nifti(tmp_path / "masks" / "a.nii.gz", labels())
    source = make(tmp_path).under(contract(plane="coronal", stack=3, window=[40.0, 40.0]))
    assert [one.id for one in source.samples()] == [f"image-0001-y{y:03d}" for y in range(5)]
    pixels = source.read(source.samples()[1])
    assert pixels.image.shape == (3, 4, 6)
    assert pixels.mask.shape == (4, 6)
    assert pixels.units == (20.0, 60.0)
    assert pixels.spacing == pytest.approx((2.5, 0.5))
    # LPS stored: y grows to the back, coronal slices are counted from back to front, rows run from head to feet.
    expected = values()[:, 3, ::-1].T
    np.testing.assert_allclose(pixels.image[1], np.clip((expected - 20.0) / 40, 0, 1), atol=1e-6)
    assert sum(int(source.read(one).mask.sum()) for one in source.samples()) == 2
    part = source.samples()[0].part
    assert part is not None
    assert part.step == pytest.approx(0.75)


def test_wrong_modality_is_named(tmp_path: Path) -> None:
    studies(tmp_path, "ab")
    writer.series(tmp_path / "studies" / "c", values(), LPS, modality="CT")
    (tmp_path / "labels.csv").write_text("id,label\na,well\nb,ill\nc,ill\n")
    source = make(tmp_path)
    with pytest.raises(
        errors.DataError, match=r"1 fault\n  - studies/c: modality CT, but recipe.data.modality is 'MR'"
    ):
        source.under(contract(modality="MR"))
    faults: list[str] = []
    settings = schema.SourceConfig(source="folder", path=str(tmp_path))
    usable = table.survey(settings, faults, contract(modality="MR"))
    assert len(faults) == 1
    assert {one.id[:10] for one in usable.samples()} == {"image-0001", "image-0002"}
    assert len(table.make(settings, contract(modality="any")).samples()) == 12


@pytest.mark.parametrize(
    ("text", "codes"),
    [
        ("CT", {"CT"}),
        ("ct", {"CT"}),
        ("T1 MR", {"MR"}),
        ("MRI", {"MR"}),
        ("DX", {"CR", "DX", "RG"}),
        ("chest X-ray", {"CR", "DX", "RG"}),
        ("PET and CT", {"PT", "CT"}),
        ("microscopy", set()),
        ("any", set()),
    ],
)
def test_modalities_of_a_recipe(text: str, codes: set[str]) -> None:
    assert cases.modalities(text) == codes


def test_pictures_where_the_recipe_needs_volumes(tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / part / "a.png")
    source = make(tmp_path)
    with pytest.raises(errors.DataError, match=r"images/a\.png: a picture, but recipe\.data\.stack needs neighbouring"):
        source.under(contract(stack=3))
    with pytest.raises(errors.DataError, match=r"recipe\.data\.window needs values in units"):
        source.under(contract(window="lung"))
    assert len(source.under(contract(plane="sagittal")).samples()) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"window": "lungs"}, "known windows: abdomen"),
        ({"window": [40.0, 0.0]}, "greater than 0"),
        ({"window": "lung", "intensity": "polarity"}, "exclude each other"),
        ({"stack": 3, "grey": True}, "exclude each other"),
        ({"stack": 2}, "should be 1 or 3"),
        ({"plane": "diagonal"}, "plane"),
    ],
)
def test_contracts_that_cannot_be(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        schema.parse(schema.DataContract, {"class_names": ["a", "b"], **changes}, "recipe")
    assert expected in str(caught.value)


def test_limits_of_windows() -> None:
    assert contract(window="lung").limits == (-1350.0, 150.0)
    assert contract(window=[40, 400]).limits == (-160.0, 240.0)
    assert contract().limits is None


# --- datalists --------------------------------------------------------------------------------------------------------


def datalist(path: Path, training: list[object], **changes: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    settings = {"labels": {"0": "background", "1": "foreground"}, "training": training, **changes}
    (path / "dataset.json").write_text(json.dumps(settings))
    return path


def test_decathlon(tmp_path: Path) -> None:
    for number in range(3):
        nifti(tmp_path / "imagesTr" / f"la_{number}.nii.gz", values())
        nifti(tmp_path / "labelsTr" / f"la_{number}.nii.gz", labels())
    entries = [
        {"image": f"./imagesTr/la_{at}.nii.gz", "label": f"./labelsTr/la_{at}.nii.gz", "fold": at, "patient": f"p{at}"}
        for at in range(2)
    ]
    last = {"image": "imagesTr/la_2.nii.gz", "label": "labelsTr/la_2.nii.gz", "patient": "p0"}
    datalist(tmp_path, entries, validation=[last], test=["./imagesTs/x.nii.gz"])
    source = make(tmp_path)
    assert source.info.task == "segmentation"
    assert source.info.class_names == ("background", "foreground")
    assert [one.split for one in source.samples()[::4]] == [None, None, "val"]
    assert [one.patient for one in source.samples()[::4]] == ["patient-0001", "patient-0002", "patient-0001"]
    pixels = source.read(source.samples()[2])
    assert pixels.mask.sum() == 1
    assert pixels.orientation == "LPS"
    # Folds are of the training list; what the list holds for validation stays that.
    assert [one.split for one in make(tmp_path, fold=1).samples()[::4]] == ["train", "test", "val"]
    datalist(tmp_path, entries, validation=[{**last, "fold": 1}])
    assert [one.split for one in make(tmp_path).samples()[::4]] == [None, None, "val"]
    assert "validation 1: is in the list 'validation' and has a 'fold'" in message(tmp_path, fold=1)
    datalist(tmp_path, [*entries, last])
    assert "training 3: no whole number as 'fold', but data.options.fold = 1" in message(tmp_path, fold=1)
    datalist(tmp_path, entries)
    assert [one.split for one in make(tmp_path, fold=1).samples()[::4]] == ["train", "test"]
    assert "no case of fold 7" in message(tmp_path, fold=7)


def test_datalist_for_classification(tmp_path: Path) -> None:
    for number in range(2):
        nifti(tmp_path / f"{number}.nii", values())
    datalist(tmp_path, [{"image": "0.nii", "label": 1}, {"image": "1.nii", "label": "background"}])
    source = make(tmp_path)
    assert source.info.task == "classification"
    assert [one.label for one in source.samples()[::4]] == [1, 0]


@pytest.mark.parametrize("digits", ["\u00b2", "2" * 5000], ids=["superscript", "long"])
def test_a_label_number_that_python_cannot_read_is_a_fault(tmp_path: Path, digits: str) -> None:
    nifti(tmp_path / "a.nii", values())
    datalist(tmp_path, [{"image": "a.nii", "label": 1}], labels={"0": "background", digits: "tumour"})
    assert "= 'tumour' is no whole number" in message(tmp_path)


def test_cases_of_a_datalist_that_begin_with_one_image_are_not_lost(tmp_path: Path) -> None:
    for name in "abcd":
        nifti(tmp_path / f"{name}.nii", values())
    datalist(tmp_path, [{"image": ["a.nii", f"{name}.nii"], "label": 1} for name in "bcd"])
    assert "training 3: an image that is listed twice" in message(tmp_path)


@pytest.mark.parametrize("key", ["patient_id", "Patient", "split"])
def test_a_datalist_s_word_on_patients_or_splits_is_not_passed_over(tmp_path: Path, key: str) -> None:
    nifti(tmp_path / "a.nii", values())
    datalist(tmp_path, [{"image": "a.nii", "label": 1, key: "p1"}])
    assert f"training 1: '{key}' is not read" in message(tmp_path)


def test_datalist_faults_at_once(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii", values())
    nifti(tmp_path / "mask.nii", labels())
    entries = [
        {"image": "a.nii", "label": "mask.nii"},
        {"image": "a.nii", "label": "mask.nii"},
        {"image": "/etc/passwd", "label": "mask.nii"},
        {"image": "../a.nii", "label": "mask.nii"},
        {"image": "b.nii", "label": "mask.nii"},
        {"image": "a.nii"},
        {"image": "a.nii", "label": 7},
        "a.nii",
    ]
    datalist(tmp_path, entries)
    text = message(tmp_path)
    for expected in (
        "dataset.json: training 2: an image that is listed twice",
        "training 3: a path that leaves the folder",
        "training 4: a path that leaves the folder",
        "training 5: b.nii: no such file",
        "training 6: needs 'image' and 'label'",
        "training 7: label 7 stands for no class; classes: background, foreground",
        "training 8: needs 'image' and 'label'",
    ):
        assert expected in text, text


@pytest.mark.parametrize("part", ["training", "test"])
def test_a_datalist_whose_part_is_no_list(tmp_path: Path, part: str) -> None:
    nifti(tmp_path / "a.nii", values())
    nifti(tmp_path / "mask.nii", labels())
    datalist(tmp_path, [{"image": "a.nii", "label": "mask.nii"}])
    settings = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps({**settings, part: 5}))
    if part == "training":
        assert "dataset.json: 'training' is no list" in message(tmp_path)
    else:  # of images that are not read
        assert len(make(tmp_path).samples()) == 4


# --- BIDS -------------------------------------------------------------------------------------------------------------


def bids(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "dataset_description.json").write_text("{}")
    for subject, session in (("01", "a"), ("01", "b"), ("02", "a")):
        base, name = f"sub-{subject}/ses-{session}/anat", f"sub-{subject}_ses-{session}"
        nifti(path / base / f"{name}_T1w.nii.gz", values())
        nifti(path / base / f"{name}_FLAIR.nii.gz", values())
        nifti(path / "derivatives" / "manual" / base / f"{name}_label-lesion_mask.nii.gz", labels())
    return path


def test_bids(tmp_path: Path) -> None:
    bids(tmp_path)
    assert "there are images of FLAIR, T1w; say which" in message(tmp_path)
    source = make(tmp_path, suffix="FLAIR")
    assert [one.patient for one in source.samples()[::4]] == ["patient-0001", "patient-0001", "patient-0002"]
    assert source.read(source.samples()[2]).mask.sum() == 1
    next((tmp_path / "derivatives").rglob("sub-02*mask.nii.gz")).unlink()
    assert "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz: no mask in" in message(tmp_path, suffix="T1w")


def test_one_bids_mask_is_not_given_to_two_images(tmp_path: Path) -> None:
    bids(tmp_path)
    first = next(tmp_path.rglob("sub-02_ses-a_T1w.nii.gz"))
    for run in (1, 2):
        nifti(first.with_name(f"sub-02_ses-a_run-{run}_T1w.nii.gz"), values(run))
    first.unlink()
    text = message(tmp_path, suffix="T1w")
    assert (
        "sub-02_ses-a_run-2_T1w.nii.gz: its mask in derivatives/ is that of sub-02/ses-a/anat/sub-02_ses-a_run-1"
        in text
    )
    assert text.code == "name-twice"
    mask = next((tmp_path / "derivatives").rglob("sub-02*mask.nii.gz"))
    for run in (1, 2):
        nifti(mask.with_name(f"sub-02_ses-a_run-{run}_label-lesion_mask.nii.gz"), labels())
    mask.unlink()
    assert len(make(tmp_path, suffix="T1w").samples()) == 16


# --- patients and splits ----------------------------------------------------------------------------------------------


def test_caps_keep_test_volumes_whole(tmp_path: Path) -> None:
    studies(tmp_path, "abcdef")
    (tmp_path / "labels.csv").write_text(
        "id,label\n" + "".join(f"{name},{'xy'[at % 2]}\n" for at, name in enumerate("abcdef"))
    )
    source = make(tmp_path)
    partition = schema.PartitionConfig(kind="iid", sites=1, train=6, test=6, val_share=0.0, test_share=0.5)
    (site,) = virtual_hospitals.make_hospitals(source, partition, 0)
    assert len(site.train) == 6
    assert len(site.test) == 4  # one whole volume; a second would be over the cap
    assert len({one.unit for one in site.test}) == 1


def test_a_segmentation_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = writer.series(tmp_path / "studies" / "a", values(), LPS)
    writer.segmentation(tmp_path / "studies" / "a" / "seg.dcm", images, labels())
    source = make(tmp_path)
    calls = []
    original = dicom_seg._stored
    monkeypatch.setattr(dicom_seg, "_stored", lambda *found: (calls.append(1), original(*found))[1])
    assert [int(source.read(one).mask.sum()) for one in source.samples()] == [0, 0, 1, 1]
    assert len(calls) == 1


class Pictures:
    """A source without volumes."""

    info = sample.SourceInfo("mine", "segmentation", ("background", "foreground"), "none")

    def __init__(self, source: schema.SourceConfig) -> None:
        self.source = source

    def samples(self) -> list[sample.Sample]:
        return []


def test_a_source_without_volumes_does_not_pass_over_what_the_recipe_asks() -> None:
    source = schema.SourceConfig(source="mine")
    made = Pictures(source)
    assert table.under(made, contract()) is made
    assert table.under(made, contract(plane="acquired")) is made
    assert table.under(made, None) is made
    for changes, words in ({"stack": 3}, "stack = 3 needs"), ({"plane": "coronal"}, "plane = 'coronal' needs"):
        with pytest.raises(errors.DataError, match=words) as caught:
            table.under(made, contract(**changes))
        assert caught.value.code == "volume-needed"
