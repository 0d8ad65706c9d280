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


@pytest.mark.files(
    "structures",
    "DICOM-SEG, numbers that change from study to study, several objects of a study",
    "C.8.20.2",
    "by coded type (SRT as SCT), else by label, capitals apart",
)
@pytest.mark.parametrize("liver", [(LIVER, "Segment_1"), (OLD_LIVER, "a"), (TISSUE, "LIVER"), (TISSUE, "liver ")])
def test_numbers_that_change_from_study_to_study(tmp_path: Path, liver: tuple[Any, str]) -> None:
    study(tmp_path, "a", {1: (*liver, "liver"), 2: (KIDNEY, "x", "kidney")})
    study(tmp_path, "b", {1: (KIDNEY, "y", "kidney"), 2: (*liver, "liver")})
    study(tmp_path, "c", {1: (KIDNEY, "y", "kidney")}, {1: (*liver, "liver")})
    assert voxels(make(tmp_path, class_names=NAMES)) == {f"image-000{at}": [12, 20] for at in (1, 2, 3)}
    assert voxels(make(tmp_path, class_names=["rest", "SCT:64033007", "Liver"])) == {
        f"image-000{at}": [20, 12] for at in (1, 2, 3)
    }


@pytest.mark.files(
    "structures", "a structure that is no class", "C.8.20.2", "refused by number and code; can be mapped in `[labels]`"
)
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


@pytest.mark.files("structures", "codes that the recipe states (`class_codes`)", "C.8.20.2", "the class of that code")
def test_the_recipes_codes_tell_structures_apart(tmp_path: Path) -> None:
    study(tmp_path, "a", {1: (LIVER, "x", "liver"), 2: (KIDNEY, "y", "kidney")})
    wanted = recipe("background", "beta", "alpha")
    stated = wanted.data.model_copy(update={"class_codes": ("", "SCT:64033007", "SCT:10200004")})
    assert labels.faults(wanted, make(tmp_path).under(wanted.data).info)
    source = make(tmp_path).under(stated)
    assert source.info.class_names == ("background", "beta", "alpha")
    assert voxels(source) == {"image-0001": [20, 12]}


def make_tolerant(path: Path) -> folder.Folder:
    return folder.Folder.tolerant(schema.SourceConfig(source="folder", path=str(path)), [])


@pytest.mark.files("structures", "another organ than the recipe's", "C.8.20.2", "refused")
def test_another_organ_than_the_recipes_is_refused(tmp_path: Path) -> None:
    study(tmp_path, "a", {1: (KIDNEY, "b", "kidney")})
    wanted = recipe("background", "liver")
    source = make(tmp_path).under(wanted.data)
    (fault,) = labels.faults(wanted, source.info)
    assert "SCT:64033007" in fault
    assert "[labels]" in fault
    assert not labels.faults(recipe("background", "foreground"), make(tmp_path).info)


@pytest.mark.files("structures", "numbers alone", "C.8.20.2", "taken only if each number is one structure in all files")
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


@pytest.mark.files("structures", "code of one class and label of another", "C.8.20.2", "refused")
def test_code_and_name_of_two_classes_are_refused(tmp_path: Path) -> None:
    study(tmp_path, "a", {1: (LIVER, "kidney", "liver")})
    assert "of several classes (liver and kidney)" in refused(tmp_path, class_names=NAMES)


@pytest.mark.files("structures", "two objects of one structure, apart or alike", "", "noted, taken together")
@pytest.mark.files("structures", "two versions of one structure", "", 'refused; `overlap = "last"` takes both together')
@pytest.mark.parametrize(("axis", "moved", "right"), [(1, 0, True), (1, 1, False), (0, 2, True)])
def test_two_versions_of_one_structure(tmp_path: Path, axis: int, moved: int, right: bool) -> None:
    images = writer.series(tmp_path / "studies" / "a", np.zeros(SHAPE, np.int16), LPS)
    first = drawn(1, "kidney")
    for at, mask in enumerate((first, np.roll(first, moved, axis))):
        writer.segmentation(tmp_path / "studies" / "a" / f"{at}.dcm", images, mask, described=[(KIDNEY, "v")])
    source = make(tmp_path, class_names=["rest", "kidney"])
    assert structures.TWO_OBJECTS in source.notes_of(source.samples()[0])
    both = {"image-0001": [np.count_nonzero(first | np.roll(first, moved, axis))]}
    assert voxels(make(tmp_path, class_names=["rest", "kidney"], overlap="last")) == both
    if not moved:
        writer.segmentation(tmp_path / "studies" / "a" / "2.dcm", images, first, described=[(KIDNEY, "v")])
        assert voxels(make(tmp_path, class_names=["rest", "kidney"])) == both, "a third copy is no version, either"
    if right:
        assert voxels(source) == both
    else:
        with pytest.raises(errors.DataError, match="two versions of one segmentation") as caught:
            voxels(source)
        assert caught.value.code == "mask-overlap"


@pytest.mark.files(
    "structures", "label map with Pixel Padding Value", "C.8.20", "background; other numbers must be described"
)
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


@pytest.mark.files(
    "structures",
    "sides that only the region's modifier tells",
    "C.8.20.2",
    "part of the code: `SCT:85756007@SCT:39607008+SCT:7771000`",
)
def test_sides_of_a_region_tell_segments_apart(tmp_path: Path) -> None:
    """dcmqi writes the side as modifier of the region: type and label are those of both lungs."""
    images = writer.series(tmp_path / "studies" / "a", np.zeros(SHAPE, np.int16), LPS)
    path = tmp_path / "studies" / "a" / "seg.dcm"
    mask = drawn(1, "liver") + drawn(2, "kidney")
    writer.segmentation(path, images, mask, described=[(TISSUE, "lesion"), (TISSUE, "lesion")])
    one = pydicom.dcmread(path)
    for item, side in zip(one.SegmentSequence, ("7771000", "24028007"), strict=True):
        region, modifier = pydicom.Dataset(), pydicom.Dataset()
        region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "39607008", "SCT", "Lung"
        modifier.CodeValue, modifier.CodingSchemeDesignator, modifier.CodeMeaning = side, "SCT", "side"
        region.AnatomicRegionModifierSequence, item.AnatomicRegionSequence = [modifier], [region]
    one.save_as(path)
    left, right = (f"SCT:85756007@SCT:39607008+SCT:{side}" for side in ("7771000", "24028007"))
    assert voxels(make(tmp_path, class_names=["rest", right, left])) == {"image-0001": [20, 12]}
    assert voxels(make(tmp_path, class_names=["rest", "lesion"])) == {"image-0001": [32]}
    source = make_tolerant(tmp_path).under(recipe("background", "lesion of the left lung").data)
    assert set(source.info.class_names) == {"background", left, right}


@pytest.mark.files(
    "structures",
    "names that differ by a sign or a vowel's mark",
    "",
    "two structures; capitals, blanks, hyphens and brackets are none",
)
@pytest.mark.parametrize("names", [("ER+", "ER-"), ("Tumor", "Tumor*"), ("कल", "कुल")])
def test_signs_and_marks_tell_names_apart(tmp_path: Path, names: tuple[str, str]) -> None:
    assert structures.plain(names[0]) != structures.plain(names[1])
    assert structures.plain("Left_Kidney (cortex)") == structures.plain("left  kidney-cortex")
    assert structures.plain("Hu\u0308fte") == structures.plain("H\u00fcfte")


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


@pytest.mark.files(
    "structures", "3D Slicer's NRRD", "3D Slicer, segmentation file formats", "by `SegmentN_Tags` and `SegmentN_Name`"
)
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


@pytest.mark.files(
    "structures",
    "segments of 3D Slicer before 4.11, without a number",
    "3D Slicer, segmentation file formats",
    "drawn as 1, known by code or name",
)
def test_a_segment_without_a_number_is_drawn_as_1(tmp_path: Path) -> None:
    """Slicer before 4.11 wrote no LabelValue: two such files say by their names that they hold two structures."""
    for name, code in (("a", "10200004"), ("b", "64033007")):
        pairs(tmp_path, name, {1: (code, "x")}, drawn(1, "liver"))
        path = tmp_path / "masks" / f"{name}.seg.nrrd"
        values, fields = nrrd.read(str(path))
        del fields["Segment0_LabelValue"]
        nrrd.write(str(path), values, fields)
    assert voxels(make(tmp_path, class_names=NAMES)) == {"image-0001": [12, 0], "image-0002": [0, 12]}
    assert make(tmp_path).info.class_names == ("background", "SCT:10200004", "SCT:64033007")


@pytest.mark.files("structures", "its regions and sides", "3D Slicer, terminologies", "part of the code")
def test_slicers_regions_tell_segments_apart(tmp_path: Path) -> None:
    pairs(tmp_path, "a", {1: ("85756007", "x"), 2: ("85756007", "x")}, drawn(1, "liver") + drawn(2, "kidney"))
    path = tmp_path / "masks" / "a.seg.nrrd"
    values, fields = nrrd.read(str(path))
    for at, side in enumerate(("7771000^Left", "24028007^Right")):
        fields[f"Segment{at}_Tags"] = fields[f"Segment{at}_Tags"].replace(
            "codes~^^~^^", f"codes~SCT^39607008^Lung~SCT^{side}"
        )
    nrrd.write(str(path), values, fields)
    right = "SCT:85756007@SCT:39607008+SCT:24028007"
    left = right.replace("24028007", "7771000")
    assert voxels(make(tmp_path, class_names=["rest", right, left])) == {"image-0001": [20, 12]}


@pytest.mark.files("structures", "one number for two structures in one file", "", "refused")
def test_one_number_for_two_structures_of_one_file_is_refused(tmp_path: Path) -> None:
    pairs(tmp_path, "a", {1: ("10200004", "x"), 2: ("64033007", "y")}, drawn(1, "liver"))
    path = tmp_path / "masks" / "a.seg.nrrd"
    values, fields = nrrd.read(str(path))
    fields["Segment1_LabelValue"] = "1"
    nrrd.write(str(path), values, fields)
    assert "number 1 stands for two structures" in refused(tmp_path, class_names=NAMES)
    assert "number 1 stands for two structures" in refused(tmp_path)


@pytest.mark.files(
    "structures", "its cropped segmentation", "3D Slicer", "placed by whole voxels, 0 around it; else refused"
)
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


@pytest.mark.files(
    "places", "NRRD space units", 'NRRD format, "space units"', "mm, cm, m and um are heeded, others refused"
)
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


@pytest.mark.files("structures", "dcmqi's JSON beside a mask", "dcmqi, meta information", "by coded type")
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


@pytest.mark.files(
    "structures",
    "dcmqi's lists of several files beside one mask",
    "dcmqi, meta information",
    "refused where a number is in two lists",
)
def test_dcmqis_lists_of_several_files_are_refused(tmp_path: Path) -> None:
    """itkimage2segimage takes a list for each file: beside one mask nobody can tell which list is its."""
    nifti(tmp_path / "images" / "a.nii.gz", np.zeros(SHAPE, np.int16))
    nifti(tmp_path / "masks" / "a.nii.gz", drawn(1, "liver"))
    lists = [[{"labelID": 1, "SegmentLabel": name}] for name in ("Liver", "Kidney")]
    (tmp_path / "masks" / "a-meta.json").write_text(json.dumps({"segmentAttributes": lists}))
    assert "number 1 stands for two structures" in refused(tmp_path, class_names=NAMES)


def bids(root: Path, name: str, ending: str, mask: np.ndarray) -> Path:
    (root / "dataset_description.json").write_text("{}")
    nifti(root / f"sub-{name}" / "anat" / f"sub-{name}_T1w.nii.gz", np.zeros(SHAPE, np.int16))
    path = root / "derivatives" / "manual" / f"sub-{name}" / "anat" / f"sub-{name}_{ending}.nii.gz"
    nifti(path, mask)
    return path


@pytest.mark.files("structures", "`label-NAME_mask` of BIDS", "BIDS 1.10, derivatives", "the structure's name")
def test_the_label_in_a_bids_name_is_the_structure(tmp_path: Path) -> None:
    bids(tmp_path, "01", "label-liver_mask", drawn(1, "liver"))
    bids(tmp_path, "02", "label-kidney_mask", drawn(1, "kidney"))
    assert voxels(make(tmp_path, class_names=NAMES)) == {"image-0001": [12, 0], "image-0002": [0, 20]}
    assert "another structure from file to file" in refused(tmp_path)


@pytest.mark.files("structures", "masks of several `desc-`, `atlas-` or `seg-`", "BIDS 1.10, derivatives", "refused")
def test_bids_masks_made_in_several_ways_are_refused(tmp_path: Path) -> None:
    bids(tmp_path, "01", "desc-brain_mask", drawn(1, "liver"))
    bids(tmp_path, "02", "desc-brain_mask", drawn(1, "liver"))
    assert voxels(make(tmp_path)) == {"image-0001": [12], "image-0002": [12]}
    bids(tmp_path, "03", "desc-lesion_mask", drawn(1, "kidney"))
    assert "desc-brain, desc-lesion" in refused(tmp_path)


@pytest.mark.files("structures", "tables that lack a row, or give a number twice", "BIDS 1.10, derivatives", "refused")
@pytest.mark.parametrize("rows", ["1\tliver\n1\tkidney\n", "1\tliver\n2\tn/a\n", "1.0\tliver\n", "1\n"])
def test_bids_tables_that_do_not_say_all_are_refused(tmp_path: Path, rows: str) -> None:
    mask = bids(tmp_path, "01", "dseg", drawn(1, "liver"))
    (mask.parent / "sub-01_dseg.tsv").write_text(f"index\tname\n{rows}")
    refused(tmp_path, class_names=NAMES)


@pytest.mark.files(
    "structures", "BIDS tables (`dseg.tsv`)", "BIDS 1.10, derivatives", "by name; beside the mask or inherited"
)
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


@pytest.mark.files(
    "structures",
    "rows of a BIDS table that no mask has (an atlas)",
    "BIDS 1.10",
    "no class; refused once a mask has one",
)
def test_rows_of_a_table_that_no_mask_has_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "dataset_description.json").write_text("{}")
    nifti(tmp_path / "sub-1" / "anat" / "sub-1_T1w.nii.gz", np.zeros(SHAPE, np.int16))
    mask = tmp_path / "derivatives" / "x" / "sub-1" / "anat" / "sub-1_dseg.nii.gz"
    nifti(mask, drawn(2, "liver") + drawn(7, "kidney"))
    mask.with_name("sub-1_dseg.tsv").write_text("index\tname\n2\tLiver\n7\tKidney\n9\tSpleen\n")
    assert voxels(make(tmp_path, class_names=NAMES)) == {"image-0001": [12, 20]}
    both = make(tmp_path).under(recipe(*NAMES).data)
    assert both.info.class_names == tuple(NAMES)
    assert voxels(both) == {"image-0001": [12, 20]}
    for source in (make(tmp_path, class_names=NAMES[:2]), make(tmp_path).under(recipe(*NAMES[:2]).data)):
        with pytest.raises(errors.DataError, match="its table names a structure") as caught:
            voxels(source)
        assert caught.value.values == (7,)
    mapped = labels.mapped(make(tmp_path).under(recipe(*NAMES[:2]).data), {"Kidney": "background"}, NAMES[:2])
    assert voxels(mapped) == {"image-0001": [12]}


# --- dataset.json and recipes -----------------------------------------------------------------------------------------


@pytest.mark.files(
    "structures",
    "names of `dataset.json` against the recipe's",
    "nnU-Net, MONAI",
    "a name under another number, or another name, is refused",
)
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


# --- label tables in headers: Connectome Workbench and TotalSegmentator (NIfTI), MITK (NRRD) ------------------------

TABLE = (
    '<?xml version="1.0" encoding="UTF-8"?><CaretExtension><VolumeInformation Index="0"><LabelTable>'
    '<Label Key="0" Red="0" Green="0" Blue="0" Alpha="0"><![CDATA[???]]></Label>{}'
    "</LabelTable><VolumeType><![CDATA[Label]]></VolumeType></VolumeInformation></CaretExtension>"
)


def nifti_mask(path: Path, where: dict[int, str], names: dict[int, str], code: int) -> None:
    """A mask of :func:`drawn`, and a table of names."""
    rows = [f'<Label Key="{number}" Red="1" Alpha="1"><![CDATA[{name}]]></Label>' for number, name in names.items()]
    image = nibabel.Nifti1Image(sum((drawn(*item) for item in where.items()), np.zeros(SHAPE, np.uint8)), np.eye(4))
    content = TABLE.format("".join(rows)).encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, content))
    nibabel.save(image, path)


def mitk_mask(path: Path, where: dict[int, str], names: dict[int, str], code: int) -> None:
    labels = [{"name": name, "value": number, "locked": True} for number, name in names.items()]
    header = {"space": "right-anterior-superior", "space directions": np.eye(3), "space origin": [0, 0, 0]}
    more = {"modality": "org.mitk.multilabel.segmentation", f"{MITK}.version": "1"}
    values = sum((drawn(*item) for item in where.items()), np.zeros(SHAPE, np.uint8))
    nrrd.write(str(path), values, header | more | {f"{MITK}.labelgroups": json.dumps([{"labels": labels}])})


MITK = "org.mitk.multilabel.segmentation"


@pytest.mark.files(
    "structures",
    "label table in a NIfTI header (TotalSegmentator, Connectome Workbench)",
    "GIFTI 1.0, LabelTable",
    "by name",
)
@pytest.mark.files("structures", "multi-label segmentations of MITK", "MITK, MultiLabelSegmentation", "by name")
@pytest.mark.parametrize(
    ("write", "ending", "code"), [(nifti_mask, ".nii.gz", 0), (nifti_mask, ".nii", 30), (mitk_mask, ".nrrd", 0)]
)
def test_names_in_a_header_say_which_number_is_which(tmp_path: Path, write: Any, ending: str, code: int) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for case, (liver, kidney) in {"a": (1, 2), "b": (2, 1)}.items():
        nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)), tmp_path / "images" / f"{case}.nii.gz")
        where, names = {liver: "liver", kidney: "kidney"}, {liver: "Liver", kidney: "kidney"}
        write(tmp_path / "masks" / f"{case}{ending}", where, names, code)
    source = make(tmp_path, class_names=NAMES)
    assert list(voxels(source).values()) == [[12, 20], [12, 20]]
    assert "another structure from file to file" in refused(
        tmp_path
    )  # nobody says which classes there are, and a number is two structures


@pytest.mark.files(
    "structures",
    "a mask whose header and the table beside it give one name to unlike numbers",
    "",
    "`mask-value`: nobody knows which is wrong",
)
def test_a_header_and_a_table_that_contradict_are_refused(tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)), tmp_path / "images" / "a.nii.gz")
    nifti_mask(tmp_path / "masks" / "a.nii.gz", {1: "liver", 2: "kidney"}, {1: "Liver", 2: "kidney"}, 0)
    table = tmp_path / "masks" / "a.json"
    for numbers, fits in (((1, 2), True), ((2, 1), False)):
        rows = [
            {"labelID": number, "SegmentLabel": name} for number, name in zip(numbers, ("liver", "kidney"), strict=True)
        ]
        table.write_text(json.dumps({"segmentAttributes": [rows]}))
        if fits:
            assert list(voxels(make(tmp_path, class_names=NAMES)).values()) == [[12, 20]]
        else:
            assert "number 1 in its header and number 2 in the table beside it" in refused(tmp_path, class_names=NAMES)


def test_labels_of_mitk_without_a_value_are_refused(tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)), tmp_path / "images" / "a.nii.gz")
    mitk_mask(tmp_path / "masks" / "a.nrrd", {1: "liver"}, {None: "liver"}, 0)  # type: ignore[dict-item]
    assert "labels of MITK without name or value" in refused(tmp_path)
