"""Folders as hospitals have them: other names, one a hospital, tables, links that lead nowhere, what is left out."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.config import privacy, schema
from fedvfm.data.sources import folder
from fedvfm.data.volumes import volumes
from tests.data import dicom_writer as writer

RNG = np.random.default_rng(0)


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def pair(root: Path, images: str, masks: str, name: str) -> None:
    save(root / images / f"{name}.png", RNG.integers(0, 255, (16, 16)))
    save(root / masks / f"{name}.png", RNG.integers(0, 2, (16, 16)))


def nii(path: Path, values: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 4), np.uint8) if values is None else values, np.eye(4)), path)
    return path


def make(path: Path, **options: object) -> folder.Folder:
    return folder.Folder(
        schema.SourceConfig.model_validate({"source": "folder", "path": str(path), "options": options})
    )


def refused(path: Path, **options: object) -> errors.DataError:
    with pytest.raises(errors.DataError) as caught:
        make(path, **options)
    return caught.value


@pytest.mark.parametrize(
    ("images", "masks"),
    [("images", "labels"), ("img", "label"), ("Images", "Masks"), ("imgs", "annotations"), ("image", "gt")],
)
def test_folders_of_images_and_masks_by_other_names(tmp_path: Path, images: str, masks: str) -> None:
    for name in "ab":
        pair(tmp_path, images, masks, name)
    source = make(tmp_path)
    assert source.info.task == "segmentation"
    assert len(source.samples()) == 2
    save(tmp_path / images / "c.png", np.zeros((16, 16)))
    assert f"{images}/c.png: no mask {masks}/c.*" in str(refused(tmp_path))


def test_a_folder_for_each_hospital(tmp_path: Path) -> None:
    for site, masks in (("north", "masks"), ("south", "labels")):
        for name in "ab":
            pair(tmp_path / site, "images", masks, name)
    source = make(tmp_path)
    assert [one.site for one in source.samples()] == ["north", "north", "south", "south"]
    assert len({one.id for one in source.samples()}) == 4
    save(tmp_path / "east" / "a.png", np.zeros((16, 16)))
    assert [(fault.code, fault[:5]) for fault in refused(tmp_path).faults] == [("ending", "east/")]


@pytest.mark.parametrize("names", [("scans", "masken"), ("x", "y"), ("raw_images", "seg_labels")])
def test_images_and_masks_are_no_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in "ab":
        pair(tmp_path, *names, name)
    assert refused(tmp_path).code == "options"
    assert make(tmp_path, layout="classes").info.class_names == tuple(sorted(names))


def test_splits_and_lists_of_other_names_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "Test"):
        save(tmp_path / "a" / split / f"{split}.png", np.zeros((16, 16)))
    assert "splits" in refused(tmp_path / "a").fault()
    save(tmp_path / "b" / "x" / "1.png", np.zeros((16, 16)))
    (tmp_path / "b" / "list.json").write_text(json.dumps({"training": []}))
    assert "has to be called dataset.json" in str(refused(tmp_path / "b"))


def test_classes_may_hold_files_of_the_same_names(tmp_path: Path) -> None:
    for kind in ("ill", "well"):
        for name in "ab":
            save(tmp_path / kind / f"{name}.png", RNG.integers(0, 255, (16, 16)))
    assert make(tmp_path).info.class_names == ("ill", "well")


def test_images_and_a_table_with_labels(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "images" / f"{name}.png", np.zeros((16, 16)))
    (tmp_path / "index.csv").write_text("id,label,patient,site\na,ill,p1,north\nb,well,p1,north\nc,ill,p2,south\n")
    source = make(tmp_path)
    assert source.info.task == "classification"
    assert source.info.class_names == ("ill", "well")
    assert [one.label for one in source.samples()] == [0, 1, 0]
    assert [one.site for one in source.samples()] == ["north", "north", "south"]
    (tmp_path / "index.csv").unlink()
    for name in ("index.csv", "labels.csv"):
        (tmp_path / name).write_text("id,label\na,ill\nb,well\n")
        error = refused(tmp_path)
        assert (len(error.faults), error.code) == (1, "table")
        assert "no row for image 'c'" in str(error)
        (tmp_path / name).unlink()


def test_a_missing_folder_is_one_fault(tmp_path: Path) -> None:
    for name in range(30):
        save(tmp_path / "images" / f"{name}.png", np.zeros((16, 16)))
    assert len(refused(tmp_path).faults) == 1
    from fedvfm.data.sources import nuclei

    (tmp_path / "index.csv").write_text("id,site\n" + "".join(f"{name},a\n" for name in range(30)))
    with pytest.raises(errors.DataError) as caught:
        nuclei.Nuclei(schema.SourceConfig(source="nuclei", path=str(tmp_path)))
    assert caught.value.faults == ("labels/: no such folder",)


def test_nnunets_first_version_is_called_so(tmp_path: Path) -> None:
    for name in ("a_1", "a_2"):
        nii(tmp_path / "imagesTr" / f"{name}_0000.nii.gz")
        nii(tmp_path / "labelsTr" / f"{name}.nii.gz")
    entries = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in ("a_1", "a_2")]
    settings = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(settings))
    (fault,) = refused(tmp_path).faults
    assert "version 1" in fault
    assert fault.code == "dataset-json"


# --- nothing vanishes -------------------------------------------------------------------------------------------------


def bids(root: Path, *subjects: str) -> Path:
    (root / "dataset_description.json").parent.mkdir(parents=True, exist_ok=True)
    (root / "dataset_description.json").write_text("{}")
    for sub in subjects:
        nii(root / f"sub-{sub}" / "anat" / f"sub-{sub}_T1w.nii.gz")
        nii(root / "derivatives" / "manual" / f"sub-{sub}" / "anat" / f"sub-{sub}_dseg.nii.gz")
    return root


@pytest.mark.parametrize("which", ["image", "mask"])
def test_a_file_that_git_annex_has_not_got(tmp_path: Path, which: str) -> None:
    root = bids(tmp_path, "01", "02")
    lost = root / "sub-02" / "anat" / "sub-02_T1w.nii.gz"
    if which == "mask":
        lost = root / "derivatives" / "manual" / "sub-02" / "anat" / "sub-02_dseg.nii.gz"
    lost.unlink()
    lost.symlink_to("../../.git/annex/objects/x.nii.gz")
    fault = refused(root).faults[0]
    assert "leads nowhere" in fault
    assert fault.code == "link"


@pytest.mark.files("nothing", "links that lead nowhere, or to a folder", "", "refused by that name")
@pytest.mark.parametrize("layout", ["pairs", "classes", "studies"])
def test_links_that_lead_nowhere_are_faults(tmp_path: Path, layout: str) -> None:
    where = {"pairs": "images/c.png", "classes": "third", "studies": "studies/c"}[layout]
    if layout == "pairs":
        pair(tmp_path, "images", "masks", "a")
    elif layout == "classes":
        save(tmp_path / "one" / "a.png", np.zeros((16, 16)))
        save(tmp_path / "two" / "b.png", np.zeros((16, 16)))
    else:
        (tmp_path / "studies").mkdir()
    (tmp_path / where).symlink_to(tmp_path / "gone")
    assert "leads nowhere" in str(refused(tmp_path))


@pytest.mark.files("nothing", "subjects without image, masks that are nobody's", "BIDS 1.10", "the finding `left-out`")
def test_subjects_and_masks_that_are_not_taken_are_told(tmp_path: Path) -> None:
    root = bids(tmp_path, "01", "02")
    nii(root / "sub-03" / "anat" / "sub-03_FLAIR.nii.gz")
    nii(root / "derivatives" / "manual" / "sub-04" / "anat" / "sub-04_dseg.nii.gz")
    source = make(root, suffix="T1w")
    assert source.left == (
        "sub-03: no image of suffix T1w",
        "derivatives/manual/sub-04/anat/sub-04_dseg.nii.gz: a mask that is taken for no image",
    )


@pytest.mark.files(
    "places", "BIDS masks of another space, side or resolution", "BIDS 1.10, derivatives", "no mask of this image"
)
@pytest.mark.parametrize("entity", ["space-MNI152NLin2009cAsym", "hemi-L", "res-2", "den-32k"])
def test_a_mask_of_another_space_is_no_images_mask(tmp_path: Path, entity: str) -> None:
    root = bids(tmp_path, "01")
    own = root / "derivatives" / "manual" / "sub-01" / "anat" / "sub-01_dseg.nii.gz"
    other = own.with_name(f"sub-01_{entity}_dseg.nii.gz")
    nii(other)
    assert len(make(root).samples()) == 4
    own.unlink()
    assert "no mask in derivatives/ (1 of another space, side or resolution)" in str(refused(root))
    other.rename(other.with_name("sub-01_space-T1w_dseg.nii.gz"))
    assert len(make(root).samples()) == 4


@pytest.mark.files("nothing", "images that no list names", "MONAI datalist", "the finding `left-out`")
def test_images_that_no_list_names_are_told(tmp_path: Path) -> None:
    entries = []
    for name in "abc":
        nii(tmp_path / "imagesTr" / f"{name}.nii.gz")
        nii(tmp_path / "labelsTr" / f"{name}.nii.gz")
        entries.append({"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"})
    settings = {"labels": {"0": "background", "1": "liver"}, "training": entries[:2]}
    (tmp_path / "dataset.json").write_text(json.dumps(settings))
    assert make(tmp_path).left == ("imagesTr/c.nii.gz: not listed in dataset.json",)


# --- [data] unreadable = "skip" ---------------------------------------------------------------------------------------


def skipping(path: Path) -> folder.Folder:
    return folder.Folder(schema.SourceConfig(source="folder", path=str(path), unreadable="skip"))


@pytest.mark.files(
    "nothing", "files that cannot be read", "", 'stop; with `[data] unreadable = "skip"` left out and counted'
)
def test_unreadable_cases_are_skipped_by_choice_and_counted(tmp_path: Path) -> None:
    for name in "abcd":
        nii(tmp_path / "images" / f"{name}.nii.gz")
        nii(tmp_path / "masks" / f"{name}.nii.gz")
    (tmp_path / "images" / "b.nii.gz").write_bytes(b"no volume")
    whole = (tmp_path / "masks" / "c.nii.gz").read_bytes()
    (tmp_path / "masks" / "c.nii.gz").write_bytes(whole[:-20])
    assert refused(tmp_path).code == "unreadable"
    source = skipping(tmp_path)
    assert len({one.unit for one in source.samples()}) == 2
    assert all(source.read(one).mask is not None for one in source.samples())
    assert [text.split(":")[0] for text in source.left] == ["b", "c"]
    assert "2 case(s) skipped as unreadable" in source.info.note
    nii(tmp_path / "masks" / "d.nii.gz", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(errors.DataError, match="voxels"):
        skipping(tmp_path)


def test_rows_of_skipped_images_and_rows_of_nothing_are_counted_apart(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, name in enumerate(("007", "7", "07", "8")):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "8.png").write_bytes(b"no picture")
    (tmp_path / "labels.csv").write_text("id,label,patient\n007,a,01\n7,b,1\n07,a,001\n8,b,2\n")
    (tmp_path / "table.csv").write_text("id,age\n007,1\n7,2\n8,3\n9,4\n0007,5\n")
    source = skipping(tmp_path)
    assert [source.row(one)["age"] for one in source.samples()] == ["1", "", "2"]  # 007, 07, 7
    assert len({one.patient for one in source.samples()}) == 3
    assert source.unused_rows == 2
    assert source.info.note.endswith(
        "; 1 case(s) skipped as unreadable, and 1 row(s) of the tables with them; 2 row(s) of the tables of nothing "
        "that is here"
    )


@pytest.mark.parametrize("where", ["site", "recipe"])
def test_nothing_is_skipped_under_privacy(where: str) -> None:
    from fedvfm.client import site_file

    data = schema.SourceConfig(source="folder", path="x", unreadable="skip")
    site = schema.SiteConfig(name="north", data=data)
    recipe = schema.Recipe.model_validate(
        {"backbone": {"name": "dino"}, "task": {"kind": "segmentation"}, "data": {"class_names": ["a", "b"]}}
    )
    site_file.require_no_skipping(site, recipe)
    budget = privacy.Budget.model_construct()
    settings = recipe.privacy.model_copy(update={"mechanism": "site-level"})
    site = site.model_copy(update={"privacy": budget}) if where == "site" else site
    recipe = recipe.model_copy(update={"privacy": settings}) if where == "recipe" else recipe
    with pytest.raises(errors.ConfigError, match="repair or remove the files"):
        site_file.require_no_skipping(site, recipe)
    site_file.require_no_skipping(
        site.model_copy(update={"data": schema.SourceConfig(source="folder", path="x")}), recipe
    )


@pytest.mark.files("nothing", "images beside the folders that are read", "", "the finding `left-out`")
@pytest.mark.parametrize("layout", ["pairs", "hospitals", "nnunet", "studies", "table"])
def test_images_beside_the_folders_that_are_read_are_told(tmp_path: Path, layout: str) -> None:
    if layout == "nnunet":
        labels = {"background": 0, "lesion": 1}
        settings = {"channel_names": {"0": "x"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
        tmp_path.joinpath("dataset.json").write_text(json.dumps(settings))
        for path in ("imagesTr/a_0000", "labelsTr/a", "imagesTs/b_0000"):
            nii(tmp_path / f"{path}.nii.gz")
    elif layout == "studies":
        writer.series(tmp_path / "studies" / "a", np.zeros((8, 7, 4), np.int16), np.eye(4))
        nii(tmp_path / "masks" / "a.nii.gz")
    else:
        pair(tmp_path / ("north" if layout == "hospitals" else ""), "images", "masks", "a")
    if layout == "table":
        (tmp_path / "masks" / "a.png").unlink()
        (tmp_path / "masks").rmdir()
        pair(tmp_path, "images", "images", "b")
        tmp_path.joinpath("index.csv").write_text("id,label\na,x\nb,y\n")
    where = {"hospitals": tmp_path / "north", "studies": tmp_path / "studies"}.get(layout, tmp_path)
    save(where / "forgotten.png", np.zeros((16, 16)))
    if layout != "studies":
        save(where / "more images" / "c.png", np.zeros((16, 16)))
    faults: list[str] = []
    source = folder.Folder.tolerant(schema.SourceConfig(source="folder", path=str(tmp_path)), faults)
    begin = {"hospitals": "north/", "studies": "studies/"}.get(layout, "")
    told = [one for one in source.left if "not read" in one or "that are read" in one]
    assert [one.split(":")[0] for one in told] == [
        f"{begin}forgotten.png",
        *([f"{begin}more images/"] if layout != "studies" else []),
    ]


@pytest.mark.files("nothing", "empty files in a study", "", "left out and counted by that name")
def test_an_empty_file_is_left_out_by_that_name(tmp_path: Path) -> None:
    writer.series(tmp_path / "a", np.zeros((8, 7, 4), np.int16), np.eye(4))
    (tmp_path / "a" / "IM0009").write_bytes(b"")
    assert any("empty" in note for note in volumes.read_header(tmp_path / "a").notes)


@pytest.mark.files("nothing", "archives beside what is read", "", "the finding `left-out`")
def test_archives_beside_the_studies_are_told(tmp_path: Path) -> None:
    for name in "ab":
        pair(tmp_path, "images", "masks", name)
    with zipfile.ZipFile(tmp_path / "more", "w") as archive:
        archive.writestr("c.png", b"")
    assert make(tmp_path).left == ("more: an archive (ZIP); unpack it",)


@pytest.mark.files("structures", "nnU-Net's `dataset`, which lists files", "nnU-Net, dataset_format.md", "refused")
@pytest.mark.files("structures", "a list of masks as the label of one case", "MONAI datalist", "refused by that name")
def test_lists_that_are_not_read_are_refused(tmp_path: Path) -> None:
    for name in "ab":
        nii(tmp_path / "imagesTr" / f"{name}_0000.nii.gz")
        nii(tmp_path / "labelsTr" / f"{name}.nii.gz")
    names = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
    listed = {"a": {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}}
    (tmp_path / "dataset.json").write_text(json.dumps({**names, "numTraining": 2, "dataset": listed}))
    assert "'dataset' lists" in str(refused(tmp_path))
    masks = ["labelsTr/a.nii.gz", "labelsTr/b.nii.gz"]
    training = [{"image": "imagesTr/a_0000.nii.gz", "label": masks}]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "rest", "1": "x"}, "training": training}))
    assert "a list of 2 labels" in str(refused(tmp_path))


@pytest.mark.files("nothing", "surfaces and matrices beside images (CIFTI-2, GIFTI)", "BIDS 1.10", "no images")
def test_surfaces_beside_images_are_no_other_suffix(tmp_path: Path) -> None:
    (tmp_path / "dataset_description.json").write_text("{}")
    nii(tmp_path / "sub-1" / "anat" / "sub-1_T1w.nii.gz")
    nii(tmp_path / "sub-1" / "func" / "sub-1_den-91k_bold.dtseries.nii")
    nii(tmp_path / "derivatives" / "x" / "sub-1" / "sub-1_dseg.nii.gz")
    assert len(make(tmp_path).samples()) == 4
    nii(tmp_path / "sub-2" / "anat" / "sub-2_acq-0.8mm_T1w.nii.gz")
    nii(tmp_path / "derivatives" / "x" / "sub-2" / "sub-2_acq-0.8mm_dseg.nii.gz")
    assert len(make(tmp_path).samples()) == 8, "a dot in a name is no other kind of file"


@pytest.mark.files("structures", "masks of floats beside a number (0.9999999)", "", "that number, to 0.0001")
def test_floats_beside_a_class_number_are_that_class(tmp_path: Path) -> None:
    drawn = np.zeros((8, 8, 4), np.float32)
    drawn[2:4] = 0.9999999
    nii(tmp_path / "images" / "a.nii")
    nii(tmp_path / "masks" / "a.nii", drawn)
    source = make(tmp_path)
    assert sum(int(source.read(one).mask.sum()) for one in source.samples()) == 64
    nii(tmp_path / "masks" / "a.nii", drawn * 0.99)
    source = make(tmp_path)
    with pytest.raises(errors.DataError, match="no whole numbers"):
        source.read(source.samples()[0])


@pytest.mark.files(
    "structures", "labels of a table that differ in 1 and 1.0, capitals or signs nobody sees", "", "refused"
)
@pytest.mark.files("structures", "NaN, N/A as a label", "", "no class; refused unless the row is taken out")
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (("0", "1", "0.0"), "'0' and '0.0'"),
        (("well", "ill", "Ill"), "'Ill' and 'ill'"),
        (("well", "ill", "ill\0"), r"'ill' and 'ill\x00'"),
        (("well", "ill", "NaN"), "label 'NaN' stands for no class"),
    ],
)
def test_labels_that_look_alike_are_no_classes_of_their_own(tmp_path: Path, labels: tuple[str, ...], said: str) -> None:
    for at in range(len(labels)):
        save(tmp_path / "images" / f"{at}.png", RNG.integers(0, 255, (4, 4)))
    rows = [f"{at},{label}" for at, label in enumerate(labels)]
    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *rows]))
    assert said in str(refused(tmp_path))


@pytest.mark.files(
    "structures", "one name twice in dataset.json", "RFC 8259, 4", "refused: of the two numbers the last would count"
)
def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    for part in ("imagesTr/a_0000", "labelsTr/a"):
        nii(tmp_path / f"{part}.nii.gz")
    labels = '{"background": 0, "liver": 1, "liver": 2, "kidney": 1}'
    (tmp_path / "dataset.json").write_text(
        f'{{"channel_names": {{"0": "CT"}}, "labels": {labels}, "numTraining": 1, "file_ending": ".nii.gz"}}'
    )
    assert "'liver' stands twice in one object" in str(refused(tmp_path))
