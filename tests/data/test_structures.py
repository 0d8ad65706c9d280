"""Which number means which structure: by code and name in DICOM-SEG, 3D Slicer's NRRD, dcmqi and BIDS, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pydicom
import pytest
from pydicom.sr.coding import Code

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import labels, structures
from fedvfm.data.sources import folder
from tests.data import dicom_writer as writer

LIVER, KIDNEY = Code("10200004", "SCT", "Liver"), Code("64033007", "SCT", "Kidney")
OLD_LIVER, TISSUE = Code("T-62000", "SRT", "Liver"), Code("85756007", "SCT", "Tissue")
SHAPE = (8, 7, 4)
LPS = np.diag([1.0, 1.0, 2.0, 1.0])


def drawn(number: int, where: str) -> np.ndarray:
    """The liver has 12 voxels, the kidney 20."""
    made = np.zeros(SHAPE, np.uint8)
    made[(slice(0, 2), slice(0, 3), slice(1, 3)) if where == "liver" else (slice(4, 6), slice(1, 6), slice(1, 3))] = (
        number
    )
    return made


def study(root: Path, name: str, *objects: dict[int, tuple[Any, str, str]]) -> Path:
    """A CT and a segmentation for each object: {segment: (coded type, label, what is drawn)}."""
    images = writer.series(root / "studies" / name, np.zeros(SHAPE, np.int16), LPS)
    for at, held in enumerate(objects):
        mask = sum((drawn(number, where) for number, (_, _, where) in held.items()), np.zeros(SHAPE, np.uint8))
        said = [(held[number][0], held[number][1]) for number in sorted(held)]
        writer.segmentation(root / "studies" / name / f"seg-{at}.dcm", images, mask, described=said)
    return root


def make(path: Path, **options: object) -> folder.Folder:
    return folder.Folder(
        schema.SourceConfig.model_validate({"source": "folder", "path": str(path), "options": options})
    )


def voxels(source: Any) -> dict[str, list[int]]:
    """Voxels of each class by case."""
    found: dict[str, np.ndarray] = {}
    for one in source.samples():
        counts = np.bincount(source.read(one).mask.ravel(), minlength=len(source.info.class_names))
        found[one.unit] = found.get(one.unit, 0) + counts
    return {name: list(map(int, counts[1:])) for name, counts in found.items()}


def refused(path: Path, **options: object) -> str:
    with pytest.raises(errors.DataError) as caught:
        make(path, **options)
    return str(caught.value)


def recipe(*names: str) -> schema.Recipe:
    values = {"backbone": {"name": "dino"}, "task": {"kind": "segmentation"}, "data": {"class_names": list(names)}}
    return schema.Recipe.model_validate(values)


NAMES = ["background", "liver", "kidney"]

# --- DICOM-SEG: PS3.3, C.8.20.2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("liver", [(LIVER, "Segment_1"), (OLD_LIVER, "a"), (TISSUE, "LIVER"), (TISSUE, "liver ")])
def test_numbers_that_change_from_study_to_study(tmp_path: Path, liver: tuple[Any, str]) -> None:
    study(tmp_path, "a", {1: (*liver, "liver"), 2: (KIDNEY, "x", "kidney")})
    study(tmp_path, "b", {1: (KIDNEY, "y", "kidney"), 2: (*liver, "liver")})
    study(tmp_path, "c", {1: (KIDNEY, "y", "kidney")}, {1: (*liver, "liver")})
    assert voxels(make(tmp_path, class_names=NAMES)) == {f"image-000{at}": [12, 20] for at in (1, 2, 3)}
    assert voxels(make(tmp_path, class_names=["rest", "SCT:64033007", "Liver"])) == {
        f"image-000{at}": [20, 12] for at in (1, 2, 3)
    }


def test_a_structure_that_is_no_class_is_refused_and_can_be_mapped(tmp_path: Path) -> None:
    study(tmp_path, "a", {1: (LIVER, "PLANTED", "liver")}, {1: (KIDNEY, "PLANTED", "kidney")})
    text = refused(tmp_path, class_names=["background", "liver"])
    assert "number 1 (SCT:64033007), stands for no class" in text
    assert "PLANTED" not in text
    contract = recipe("background", "liver").data
    source = make(tmp_path).under(contract)
    assert source.info.class_names == ("background", "liver", "SCT:64033007")
    assert labels.faults(recipe("background", "liver"), source.info)
    for key in ("SCT:64033007", "64033007", "kidney"):
        mapped = labels.mapped(source, {key: "background"}, ("background", "liver"))
        assert not labels.faults(recipe("background", "liver"), mapped.info)
        assert voxels(mapped) == {"image-0001": [12]}


def test_the_recipes_names_alone_tell_structures_apart(tmp_path: Path) -> None:
    study(tmp_path, "a", {1: (LIVER, "a", "liver"), 2: (KIDNEY, "b", "kidney")})
    study(tmp_path, "b", {1: (KIDNEY, "b", "kidney"), 2: (LIVER, "a", "liver")})
    wanted = recipe("background", "Kidney", "LIVER")
    source = make_tolerant(tmp_path).under(wanted.data)
    assert not labels.faults(wanted, source.info)
    assert voxels(source) == {"image-0001": [20, 12], "image-0002": [20, 12]}


def make_tolerant(path: Path) -> folder.Folder:
    return folder.Folder.tolerant(schema.SourceConfig(source="folder", path=str(path)), [])


def test_another_organ_than_the_recipes_is_refused(tmp_path: Path) -> None:
    study(tmp_path, "a", {1: (KIDNEY, "b", "kidney")})
    wanted = recipe("background", "liver")
    source = make(tmp_path).under(wanted.data)
    (fault,) = labels.faults(wanted, source.info)
    assert "SCT:64033007" in fault
    assert "[labels]" in fault
    assert not labels.faults(recipe("background", "foreground"), make(tmp_path).info)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({1: (LIVER, "a", "liver")}, {1: (KIDNEY, "b", "kidney")}),  # one number, two structures
        ({1: (TISSUE, "left", "liver")}, {1: (TISSUE, "right", "kidney")}),  # told apart by their names alone
        ({1: (LIVER, "a", "liver")}, {1: (LIVER, "a", "liver"), 2: (KIDNEY, "b", "kidney")}),
    ],
)
def test_numbers_count_only_where_each_is_one_structure(tmp_path: Path, one: Any, two: Any) -> None:
    study(tmp_path, "a", one)
    study(tmp_path, "b", two)
    if len(two) == 1:
        assert "number 1 is another structure from file to file" in refused(
            tmp_path, class_names=["rest", "organ", "x"]
        )
    else:
        assert voxels(make(tmp_path, class_names=["rest", "organ", "x"])) == {
            "image-0001": [12, 0],
            "image-0002": [12, 20],
        }


def test_one_structure_under_two_numbers_and_mask_values_that_contradict(tmp_path: Path) -> None:
    study(tmp_path, "a", {1: (LIVER, "a", "liver")})
    images = writer.series(tmp_path / "studies" / "b", np.zeros(SHAPE, np.int16), LPS)
    path = writer.segmentation(
        tmp_path / "studies" / "b" / "seg.dcm", images, drawn(1, "liver"), described=[(LIVER, "a")]
    )
    one = pydicom.dcmread(path)
    one.SegmentSequence[0].SegmentNumber = 2
    for group in (*one.SharedFunctionalGroupsSequence, *one.PerFrameFunctionalGroupsSequence):
        for item in group.get("SegmentIdentificationSequence", ()):
            item.ReferencedSegmentNumber = 2
    one.save_as(path)
    assert "has the numbers 1, 2" in refused(tmp_path, class_names=["rest", "organ", "x"])
    assert voxels(make(tmp_path, class_names=["rest", "liver"])) == {"image-0001": [12], "image-0002": [12]}
    text = refused(tmp_path, class_names=["rest", "liver", "x"], mask_values=[0, 2, 1])
    assert "mask_values give that class the number 2" in text


def test_code_and_name_of_two_classes_are_refused(tmp_path: Path) -> None:
    study(tmp_path, "a", {1: (LIVER, "kidney", "liver")})
    assert "of several classes (liver and kidney)" in refused(tmp_path, class_names=NAMES)


def test_two_versions_of_one_structure_are_noted(tmp_path: Path) -> None:
    study(tmp_path, "a", {1: (LIVER, "v", "liver")}, {1: (LIVER, "v", "liver")})
    source = make(tmp_path, class_names=["rest", "liver"])
    assert structures.TWO_OBJECTS in source.notes_of(source.samples()[0])


def test_padding_of_a_label_map_is_background(tmp_path: Path) -> None:
    images = writer.series(tmp_path / "studies" / "a", np.zeros(SHAPE, np.int16), LPS)
    path = tmp_path / "studies" / "a" / "seg.dcm"
    writer.segmentation(path, images, drawn(1, "liver"), "LABELMAP", [(LIVER, "a")])
    one = pydicom.dcmread(path)
    one.PixelData = np.where(one.pixel_array == 0, 255, one.pixel_array).astype(np.uint8).tobytes()
    one.PixelPaddingValue = 255
    one.save_as(path)
    assert voxels(make(tmp_path, class_names=["rest", "liver"])) == {"image-0001": [12]}
    del one.PixelPaddingValue
    other = tmp_path / "other" / "studies"
    other.parent.mkdir()
    (tmp_path / "studies").rename(other)
    one.save_as(other / "a" / "seg.dcm")
    source = make(tmp_path / "other", class_names=["rest", "liver"])
    with pytest.raises(errors.DataError, match="255 is described by no segment"):
        voxels(source)


# --- 3D Slicer's NRRD -------------------------------------------------------------------------------------------------


def slicer(
    path: Path, held: dict[int, tuple[str, str]], mask: np.ndarray, origin: Any = (0, 0, 0), **more: Any
) -> None:
    fields: dict[str, Any] = {
        "space": "left-posterior-superior",
        "space directions": np.diag([1.0, 1.0, 2.0]),
        "space origin": np.asarray(origin, float),
        **more,
    }
    for at, (number, (code, name)) in enumerate(held.items()):
        fields[f"Segment{at}_LabelValue"], fields[f"Segment{at}_Name"] = str(number), name
        terms = f"Segmentation category and type~SCT^1^x~SCT^{code}^meant~^^~Anatomic codes~^^~^^|"
        fields[f"Segment{at}_Tags"] = f"TerminologyEntry:{terms}Segmentation.Status:completed|"
    path.parent.mkdir(parents=True, exist_ok=True)
    nrrd.write(str(path), mask, fields)


def pairs(root: Path, name: str, held: dict[int, tuple[str, str]], mask: np.ndarray, ending: str = ".seg.nrrd") -> None:
    slicer(root / "images" / f"{name}.nrrd", {}, np.zeros(SHAPE, np.int16))
    slicer(root / "masks" / f"{name}{ending}", held, mask)


@pytest.mark.parametrize("ending", [".nrrd", ".seg.nrrd", ".SEG.NRRD"])
def test_slicers_segments_go_by_name_or_code(tmp_path: Path, ending: str) -> None:
    both = drawn(1, "liver") + drawn(2, "kidney")
    pairs(tmp_path, "a", {1: ("85756007", "Liver"), 2: ("64033007", "Segment_2")}, both, ending)
    swapped = np.array([0, 2, 1], np.uint8)[both]
    pairs(tmp_path, "b", {2: ("85756007", "liver"), 1: ("64033007", "Segment_1")}, swapped, ending)
    assert voxels(make(tmp_path, class_names=NAMES)) == {"image-0001": [12, 20], "image-0002": [12, 20]}


def test_a_value_without_a_segment_is_refused(tmp_path: Path) -> None:
    pairs(tmp_path, "a", {1: ("10200004", "x")}, drawn(1, "liver") + drawn(2, "kidney"))
    with pytest.raises(errors.DataError, match=r"value 2 in .* is no class: the file describes no structure"):
        voxels(make(tmp_path, class_names=NAMES))


def test_a_cropped_segmentation_is_placed(tmp_path: Path) -> None:
    whole = drawn(1, "liver") + drawn(2, "kidney")
    pairs(tmp_path, "a", {1: ("10200004", "x"), 2: ("64033007", "y")}, whole)
    expected = voxels(make(tmp_path, class_names=NAMES))
    masks = [make(tmp_path, class_names=NAMES).read(one).mask for one in make(tmp_path, class_names=NAMES).samples()]
    other = tmp_path / "other"
    slicer(other / "images" / "a.nrrd", {}, np.zeros(SHAPE, np.int16))
    held = {1: ("10200004", "x"), 2: ("64033007", "y")}
    slicer(other / "masks" / "a.seg.nrrd", held, np.ascontiguousarray(whole[:, :, 1:3]), (0, 0, 2.0))
    source = make(other, class_names=NAMES)
    assert voxels(source) == expected
    for one, mask in zip(source.samples(), masks, strict=True):
        np.testing.assert_array_equal(source.read(one).mask, mask)
    slicer(other / "masks" / "a.seg.nrrd", held, np.ascontiguousarray(whole[:, :, 1:3]), (0, 0, 2.7))
    assert "differ in size, spacing or place" in refused(other, class_names=NAMES)


@pytest.mark.parametrize(
    ("unit", "factor"), [("mm", 1.0), ("cm", 10.0), ("m", 1000.0), ("um", 0.001), ("Centimeters", 10)]
)
def test_space_units_are_heeded(tmp_path: Path, unit: str, factor: float) -> None:
    from fedvfm.data.volumes import volumes

    slicer(tmp_path / "a.nrrd", {}, np.zeros(SHAPE, np.int16), (1, 2, 3), **{"space units": [unit] * 3})
    grid = volumes.read_header(tmp_path / "a.nrrd").stored
    np.testing.assert_allclose(grid.spacing, np.multiply([1, 1, 2], factor))
    np.testing.assert_allclose(grid.affine[:3, 3], np.multiply([-1, -2, 3], factor))


def test_other_space_units_are_refused(tmp_path: Path) -> None:
    from fedvfm.data.volumes import volumes

    slicer(tmp_path / "a.nrrd", {}, np.zeros(SHAPE, np.int16), **{"space units": ["inch"] * 3})
    with pytest.raises(errors.DataError, match="space units inch"):
        volumes.read_header(tmp_path / "a.nrrd")


# --- dcmqi, BIDS ------------------------------------------------------------------------------------------------------


def nifti(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, LPS), path)


def test_dcmqis_meta_information(tmp_path: Path) -> None:
    for name, order in (("a", (1, 2)), ("b", (2, 1))):
        nifti(tmp_path / "images" / f"{name}.nii.gz", np.zeros(SHAPE, np.int16))
        nifti(tmp_path / "masks" / f"{name}.nii.gz", drawn(order[0], "liver") + drawn(order[1], "kidney"))
        segments = [
            {
                "labelID": number,
                "SegmentLabel": "x",
                "SegmentedPropertyTypeCodeSequence": {
                    "CodeValue": code.value,
                    "CodingSchemeDesignator": "SCT",
                    "CodeMeaning": code.meaning,
                },
            }
            for number, code in zip(order, (LIVER, KIDNEY), strict=True)
        ]
        (tmp_path / "masks" / f"{name}.json").write_text(json.dumps({"segmentAttributes": [segments]}))
    assert voxels(make(tmp_path, class_names=NAMES)) == {"image-0001": [12, 20], "image-0002": [12, 20]}


@pytest.mark.parametrize("where", ["beside", "above"])
def test_bids_tables(tmp_path: Path, where: str) -> None:
    (tmp_path / "dataset_description.json").write_text("{}")
    derived = tmp_path / "derivatives" / "manual"
    for name in ("01", "02"):
        nifti(tmp_path / f"sub-{name}" / "anat" / f"sub-{name}_T1w.nii.gz", np.zeros(SHAPE, np.int16))
        mask = derived / f"sub-{name}" / "anat" / f"sub-{name}_dseg.nii.gz"
        nifti(mask, drawn(2, "liver") + drawn(1, "kidney"))
        table = mask.with_name(f"sub-{name}_dseg.tsv") if where == "beside" else derived / "dseg.tsv"
        table.write_text("index\tname\n0\tBackground\n1\tKidney\n2\tLiver\n")
    assert voxels(make(tmp_path, class_names=NAMES)) == {"image-0001": [12, 20], "image-0002": [12, 20]}


# --- dataset.json and recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "right"),
    [
        (["background", "edema", "other", "enhancing"], ["background", "necrosis", "edema", "enhancing"], False),
        (["background", "edema", "non-enhancing"], ["background", "Edema", "Non_Enhancing"], True),
        (["background", "edema", "core"], ["background", "Core", "Edema"], False),
        (["background", "liver"], ["background", "spleen"], False),
        (["rest", "liver"], ["background", "Liver"], True),
        (["background", "liver"], ["background", "foreground"], True),
    ],
)
def test_data_that_names_its_classes_is_held_to_the_recipe(theirs: list[str], ours: list[str], right: bool) -> None:
    from fedvfm.data import sample

    info = sample.SourceInfo("folder", "segmentation", tuple(theirs), "none", named=True)
    assert (not labels.faults(recipe(*ours), info)) == right


def test_pydicoms_dictionary_knows_common_organs() -> None:
    """An internal of pydicom: a new release may move it."""
    for name, code in (("liver", "10200004"), ("Spleen", "78961009"), ("kidney", "64033007"), ("prostate", "41216001")):
        assert f"SCT:{code}" in structures.codes_of(name)
    assert structures.code_of("SRT", "T-62000") == structures.code_of("sct", "10200004") == "SCT:10200004"
    assert structures.code_of("99PRIVATE", "Mueller").startswith("other scheme:")
