"""Files that are easily taken for what they are not: one code for two structures, lost frames, unlike tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.sr.codedict import codes

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import structures
from fedvfm.data.sources import folder
from fedvfm.data.volumes import dicom_rtstruct, dicom_seg, volumes
from fedvfm.inference import class_codes
from tests.data import dicom_writer as writer

LPS = np.diag([0.8, 0.8, 2.0, 1.0])
VOXELS = np.arange(8 * 9 * 4, dtype=np.int16).reshape(8, 9, 4)
EDEMA = codes.SCT.Edema


def source(path: Path, **options: object) -> folder.Folder:
    return folder.Folder(
        schema.SourceConfig.model_validate({"source": "folder", "path": str(path), "options": options})
    )


def drawn() -> np.ndarray:
    """Number 1 has four voxels, number 2 six."""
    mask = np.zeros((8, 9, 4), np.uint8)
    mask[1:3, 1:3, 1], mask[5:7, 4:7, 1] = 1, 2
    return mask


def segmented(root: Path, name: str, *described: tuple[Any, str]) -> Path:
    images = writer.series(root / "studies" / name, VOXELS, LPS)
    file = root / "studies" / name / "seg.dcm"
    writer.segmentation(file, images, drawn(), described=list(described))
    return file


def counts(of: folder.Folder) -> list[int]:
    masks = [of.read(sample).mask for sample in of.samples()]
    total = np.zeros(max(int(mask.max()) for mask in masks) + 1, int)
    for mask in masks:
        total[: int(mask.max()) + 1] += np.bincount(mask.ravel())
    return total[1:].tolist()


@pytest.mark.files(
    "structures",
    "one code for structures of several names in one file",
    "C.8.20.2",
    "a class each, by code and name; names that differ by a number at the end are one",
)
def test_one_code_with_several_names_is_several_classes(tmp_path: Path) -> None:
    segmented(tmp_path, "a", (EDEMA, "rim"), (EDEMA, "core"))
    of = source(tmp_path)
    assert len(of.info.class_names) == 3
    assert sorted(counts(of)) == [4, 6]


def test_numbered_parts_of_one_structure_are_one_class_and_it_is_said(tmp_path: Path) -> None:
    segmented(tmp_path, "a", (EDEMA, "spot 1"), (EDEMA, "spot 2"))
    (tmp_path / "b").mkdir()
    segmented(tmp_path, "c", (EDEMA, "spot 1"), (codes.SCT.Liver, "liver"))
    of = source(tmp_path)
    assert len(of.info.class_names) == 3
    assert sorted(counts(of)) == [6, 14]
    assert any(structures.TWO_STRUCTURES in of.notes_of(sample) for sample in of.samples())


def test_numbers_that_change_under_one_code_are_refused(tmp_path: Path) -> None:
    segmented(tmp_path, "a", (EDEMA, "dead core"), (EDEMA, "rim"))
    segmented(tmp_path, "b", (EDEMA, "bright"), (EDEMA, "core"))
    with pytest.raises(errors.DataError, match="number 1 is another structure"):
        source(tmp_path, class_names=["background", "inner", "outer"]).samples()


@pytest.mark.files("structures", "several modifiers of a type", "C.8.20.2", "all of them tell structures apart")
def test_every_modifier_counts(tmp_path: Path) -> None:
    file = segmented(tmp_path, "a", (codes.SCT.Lung, "Segment 1"), (codes.SCT.Lung, "Segment 2"))
    tags = pydicom.dcmread(file)
    for item, side in zip(tags.SegmentSequence, (codes.SCT.Superior, codes.SCT.Inferior), strict=True):
        kind = item.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_coded(codes.SCT.Left), _coded(side)]
    tags.save_as(file)
    of = source(tmp_path)
    assert len(of.info.class_names) == 3
    assert sorted(counts(of)) == [4, 6]


def _coded(code: Any) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


@pytest.mark.files("places", "SEG with fewer frame descriptions than frames", "C.7.6.16", "refused")
def test_no_frame_of_a_segmentation_is_lost(tmp_path: Path) -> None:
    file = segmented(tmp_path, "a", (EDEMA, "rim"), (codes.SCT.Liver, "liver"))
    tags = pydicom.dcmread(file)
    del tags.PerFrameFunctionalGroupsSequence[-1]
    tags.save_as(file)
    header = volumes.read_header(tmp_path / "studies" / "a")
    with pytest.raises(errors.DataError) as caught:
        dicom_seg.read(file, header)
    assert caught.value.code == "unreadable"


@pytest.mark.files("structures", "open contours beside closed ones in a region", "C.8.8.6", "left out, noted")
def test_open_contours_beside_closed_ones_are_noted(tmp_path: Path) -> None:
    images = writer.series(tmp_path / "studies" / "a", VOXELS, LPS)
    rings = [(at, np.array([[1, 1, at * 2], [5, 1, at * 2], [5, 5, at * 2], [1, 5, at * 2]], float)) for at in range(4)]
    file = tmp_path / "studies" / "a" / "rs.dcm"
    writer.structure_set(file, images, [("liver", rings)])
    tags = pydicom.dcmread(file)
    for at in (2, 3):
        tags.ROIContourSequence[0].ContourSequence[at].ContourGeometricType = "OPEN_PLANAR"
    tags.save_as(file)
    of = source(tmp_path, class_names=["background", "liver"])
    assert dicom_rtstruct.OPEN in [note for sample in of.samples() for note in of.notes_of(sample)]


def labelled(root: Path, **tables: str) -> Path:
    (root / "images").mkdir(parents=True)
    for name in "ab":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)).save(
            root / "images" / f"{name}.png"
        )
    for name, text in tables.items():
        (root / f"{name}.csv").write_text(text)
    return root


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"labels": "id,label\na,yes\nb,no\na,no\n"}, "stands in 2 rows"),
        ({"labels": "id,label\na,yes\nb,no\nzz,no\n"}, "id 'zz' has no image"),
        ({"labels": "id,label\na,yes\nb,Yes\n"}, "differ in capitals"),
        ({"labels": "id,label\na,yes\nb,no\n", "index": "id,label\na,yes\nb,yes\n"}, "unlike labels"),
    ],
)
def test_a_table_of_labels_is_of_one_mind(tmp_path: Path, tables: dict[str, str], says: str) -> None:
    with pytest.raises(errors.DataError, match=says):
        source(labelled(tmp_path, **tables)).samples()


def test_padding_of_doubles_is_padding(tmp_path: Path) -> None:
    values = np.linspace(5.0, 8.0, 64).reshape(8, 8)
    values[0, 0] = -9999.0
    tags = writer.blank("OT", "1.2.840.10008.5.1.4.1.1.30")
    tags.Rows, tags.Columns, tags.SamplesPerPixel, tags.PhotometricInterpretation = 8, 8, 1, "MONOCHROME2"
    tags.BitsAllocated, tags.DoubleFloatPixelData = 64, values.tobytes()
    tags.DoubleFloatPixelPaddingValue = -9999.0
    tags.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert volumes.value_range(tmp_path / "a.dcm") == (pytest.approx(values[0, 1]), 8.0)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("sub-01_T1w", "sub-01_ce-gad_dseg"),
        ("sub-01_echo-1_T1w", "sub-01_echo-2_dseg"),
        ("sub-01_T1w", "sub-01_rec-b_dseg"),
    ],
)
def test_the_mask_of_another_bids_image_is_not_taken(tmp_path: Path, image: str, mask: str) -> None:
    (tmp_path / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.10.0"}))
    for place, name, kind in (("sub-01/anat", image, np.float32), ("derivatives/x/sub-01/anat", mask, np.uint8)):
        (tmp_path / place).mkdir(parents=True)
        array = np.zeros((6, 7, 5), kind)
        array[2:4, 2:4, 2] = 1
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / place / f"{name}.nii.gz")
    with pytest.raises(errors.DataError) as caught:
        source(tmp_path).samples()
    assert "mask-missing" in str([fault.code for fault in caught.value.faults] + [caught.value.code])


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_mask_with_a_transparent_number_is_refused(tmp_path: Path, mode: str) -> None:
    root, mask = labelled(tmp_path), np.zeros((16, 16), np.uint8)
    mask[4:8, 4:8] = 1
    (root / "masks").mkdir()
    for name in "ab":
        picture = Image.fromarray(mask)
        if mode == "P":
            picture = picture.convert("P")
            picture.putpalette([0, 0, 0, 255, 0, 0])
            picture.putdata(mask.ravel().tolist())
        picture.save(root / "masks" / f"{name}.png", transparency=bytes([255, 0]) if mode == "P" else 1)
    of = source(root)
    with pytest.raises(errors.DataError) as caught:
        of.read(of.samples()[0])
    assert caught.value.code == "mask-colour"


def test_hidden_folders_of_a_study_are_not_read(tmp_path: Path) -> None:
    study = tmp_path / "studies" / "a"
    writer.series(study, VOXELS, LPS)
    tags = pydicom.dcmread(sorted(study.glob("*.dcm"))[0])
    tags.SOPInstanceUID, tags.ImagePositionPatient = "1.2.3.4", [0, 0, 8]
    (study / ".Trash").mkdir()
    tags.save_as(study / ".Trash" / "x.dcm")
    assert volumes.read_header(study).stored.shape[2] == 4


@pytest.mark.parametrize("name", ["ventricle", "left ventricle", "atrium", "cortex", "tail"])
def test_a_part_that_several_organs_have_gets_no_code_of_one(name: str) -> None:
    assert class_codes.of(name, {}).kind[1] == class_codes.SCHEME
    assert class_codes.of("liver", {}).kind == ("10200004", "SCT", "Liver")
    assert not structures.codes_of(name)
