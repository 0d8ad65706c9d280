"""DICOM-SEG out: coded classes, of which images it can be made, and pictures of numbers that a viewer shows."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fedvfm
from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import colours, formats
from fedvfm.data.sources import folder
from fedvfm.data.volumes import dicom_seg, volumes
from fedvfm.inference import class_codes, results, segmentation_object
from tests.data import dicom_writer as writer
from tests.data import test_places as places

Saver = Callable[..., Path]

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom", reason="DICOM-SEG needs the extra dicom-seg")

CR = "1.2.840.10008.5.1.4.1.1.1"
NAMES = ["rest", "liver", "left kidney", "my own"]


def still(path: Path, modality: str = "CR", sop: str = CR, frames: int = 0, **more: Any) -> Path:
    """An image, or a film of so many frames, without a place in the patient."""
    shape = (frames, 12, 9) if frames else (12, 9)
    one = writer.pixels(writer.blank(modality, sop), np.arange(np.prod(shape), dtype=np.uint16).reshape(shape))
    if frames:
        one.FrameTime, one.FrameIncrementPointer = 30, 0x00181063
    del one.FrameOfReferenceUID
    one.save_as(path, enforce_file_format=True)
    return path


def written(path: Path, source: Path, names: list[str] = NAMES, **codes: str) -> tuple[Any, np.ndarray, Any]:
    """The object written of a drawn mask, the mask in canonical axes, and the header of its source."""
    header = volumes.read_header(source)
    labels = np.zeros(header.stored.shape, np.uint8)
    labels[1:3, 0:2], labels[0, 0] = 1, 2
    labels[2, 2, -1] = 3
    segmentation_object.write(path, labels, header, names, "f" * 64, codes)
    return highdicom.seg.segread(path), header.stored.turn().apply(labels), header


def coded(seg: Any) -> list[tuple[str, ...]]:
    """Category, type and modifier of each segment by value."""
    found = []
    for item in seg.SegmentSequence:
        kind = item.SegmentedPropertyTypeCodeSequence[0]
        modifiers = kind.get("SegmentedPropertyTypeModifierCodeSequence") or ()
        category = item.SegmentedPropertyCategoryCodeSequence[0].CodeValue
        found.append((category, kind.CodeValue, *(one.CodeValue for one in modifiers)))
    return found


@pytest.mark.files(
    "written",
    "classes of a predicted DICOM-SEG",
    "C.8.20.2; PS3.16 CID 7191, 7192, 7194",
    "common organs, also with a side, by SNOMED CT; other names by a private code of their own",
)
def test_organs_are_coded_and_other_names_have_a_code_of_their_own(tmp_path: Path) -> None:
    writer.series(tmp_path / "study", places.voxels(), places.LPS)
    seg, _, _ = written(tmp_path / "a.dcm", tmp_path / "study")
    anatomy = "123037004"
    assert coded(seg)[:2] == [(anatomy, "10200004"), (anatomy, "64033007", "7771000")]
    assert [one.SegmentLabel for one in seg.SegmentSequence] == NAMES[1:]
    assert seg.SeriesDescription == "fedvfm (research only): liver, left kidney, my own"
    own = seg.SegmentSequence[2].SegmentedPropertyTypeCodeSequence[0]
    assert (own.CodingSchemeDesignator, own.CodeMeaning) == (class_codes.SCHEME, "my own")
    other, _, _ = written(tmp_path / "b.dcm", tmp_path / "study", ["rest", "liver", "x", "another"])
    assert other.SegmentSequence[2].SegmentedPropertyTypeCodeSequence[0].CodeValue != own.CodeValue


@pytest.mark.files("written", "`recipe.data.class_codes`", "C.8.20.2", "stands above the name; a modifier after `+`")
def test_codes_of_the_recipe_stand_above_names(tmp_path: Path) -> None:
    writer.series(tmp_path / "study", places.voxels(), places.LPS)
    codes = {"my own": "SCT:39607008+SCT:24028007", "liver": "NCIt:C12392"}
    seg, _, _ = written(tmp_path / "a.dcm", tmp_path / "study", **codes)
    assert coded(seg) == [
        ("309825002", "C12392"),
        ("123037004", "64033007", "7771000"),
        ("123037004", "39607008", "24028007"),
    ]
    meanings = [one.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for one in seg.SegmentSequence]
    assert meanings == ["liver", "Kidney", "Lung"]


@pytest.mark.files("written", "predicted DICOM-SEG as masks again", "C.8.20", "read by code and name")
def test_what_is_written_is_read_back_by_its_codes(tmp_path: Path) -> None:
    writer.series(tmp_path / "studies" / "a", places.voxels(), places.LPS)
    _, mask, _ = written(tmp_path / "studies" / "a" / "seg.dcm", tmp_path / "studies" / "a")
    for names in (["rest", "my own", "liver", "left kidney"], ["rest", "my own", "Liver", "kidney left"]):
        values = {"source": "folder", "path": str(tmp_path), "options": {"class_names": names}}
        source = folder.Folder(schema.SourceConfig.model_validate(values))
        found = sum(np.bincount(source.read(one).mask.ravel(), minlength=4) for one in source.samples())
        expected = np.bincount(mask.ravel(), minlength=4)
        np.testing.assert_array_equal(found, expected[[0, 3, 1, 2]])


@pytest.mark.files(
    "written",
    "DICOM-SEG of CR, DX, US stills, SC and reconstructed NM",
    "C.8.20, C.8.4.15",
    "written, placed by the source's own frames",
)
@pytest.mark.parametrize("kind", ["CR", "US", "SC", "NM"])
def test_objects_of_stills_and_of_nuclear_medicine(tmp_path: Path, kind: str) -> None:
    if kind == "NM":
        places.nuclear(tmp_path / "a.dcm", SliceVector=[5, 4, 3, 2, 1], SpacingBetweenSlices=-4.0)
    else:
        still(tmp_path / "a.dcm", kind)
    seg, mask, header = written(tmp_path / "seg.dcm", tmp_path / "a.dcm")
    assert dicom_seg.check(tmp_path / "seg.dcm", header) == ()
    np.testing.assert_array_equal(dicom_seg.read(tmp_path / "seg.dcm", header), mask)
    if kind == "NM":
        found = sorted(float(one.PlanePositionSequence[0].ImagePositionPatient[2]) for one in _groups(seg, 1))
        assert found == [14.0, 18.0, 22.0, 26.0, 30.0]


def _groups(seg: Any, number: int) -> list[Any]:
    return [
        one
        for one in seg.PerFrameFunctionalGroupsSequence
        if one.SegmentIdentificationSequence[0].ReferencedSegmentNumber == number
    ]


@pytest.mark.files("written", "DICOM-SEG of images without a place", "C.8.20", "written without one, and noted")
def test_an_object_without_a_place_is_noted(saved: Saver, tmp_path: Path) -> None:
    made = fedvfm.predict(saved(), still(tmp_path / "a.dcm"), tmp_path / "out")
    assert segmentation_object.NO_PLANE in made["notes"]
    assert made["inputs"][0]["form"] == "dicom-seg"
    places.nuclear(tmp_path / "b.dcm")
    assert not fedvfm.predict(saved(), tmp_path / "b.dcm", tmp_path / "nm")["notes"]


@pytest.mark.files(
    "written",
    "DICOM-SEG of films (US, XA) and views",
    "C.7.6.16",
    "refused by name; without `--as` pictures are written",
)
@pytest.mark.parametrize("modality", ["US", "XA"])
def test_films_are_refused_by_name_and_become_pictures(saved: Saver, tmp_path: Path, modality: str) -> None:
    film = still(tmp_path / "a.dcm", modality, frames=3)
    with pytest.raises(errors.DataError, match=f"{modality}: 3 frames that do not say where they lie"):
        written(tmp_path / "seg.dcm", film)
    made = fedvfm.predict(saved(), film, tmp_path / "out")
    (row,) = made["inputs"]
    assert row["form"] == "png"
    assert row["files"] == [f"series-001/f00{number}.png" for number in range(3)]
    with pytest.raises(errors.DataError, match="--as png"):
        fedvfm.predict(saved(), film, tmp_path / "seg", form="dicom-seg")
    assert (tmp_path / "seg" / "summary.json").is_file()


@pytest.mark.parametrize(
    "codes",
    [
        ["SCT:1", "", "", ""],
        ["", "SCT:1"],
        ["", "10200004", "", ""],
        ["", "99MINE:1", "", ""],
        ["", "SCT:1", "SCT:1", ""],
        ["", "SCT:1+", "", ""],
    ],
)
def test_codes_that_say_nothing_are_refused(codes: list[str]) -> None:
    with pytest.raises(ValueError, match="class_codes"):
        schema.DataContract(class_names=tuple(NAMES), class_codes=tuple(codes))


def test_a_recipe_without_codes_keeps_its_bytes_and_hash() -> None:
    values = {"backbone": {"name": "dino"}, "data": {"class_names": NAMES}}
    plain = schema.Recipe.model_validate(values)
    assert "class_codes" not in plain.model_dump_json()
    stated = schema.Recipe.model_validate(
        {**values, "data": {"class_names": NAMES, "class_codes": ["", "SCT:10200004", "", ""]}}
    )
    assert stated.hash != plain.hash
    assert schema.Recipe.model_validate_json(stated.model_dump_json()) == stated


@pytest.mark.files(
    "written",
    "masks as PNG",
    "PNG 11.2.2",
    "class numbers with a palette that a viewer shows; the same palette in every file",
)
@pytest.mark.parametrize("classes", [2, 3, 256])
def test_numbers_are_shown_in_colours_and_come_back(tmp_path: Path, classes: int) -> None:
    shown = np.reshape(colours.palette(classes), (-1, 3))
    assert len(np.unique(shown, axis=0)) == classes
    assert not any(len(set(colour)) == 1 for colour in shown[1:])
    mask = (np.arange(16 * 16).reshape(16, 16) % classes).astype(np.uint8)
    content = results._png(mask, classes)
    (tmp_path / "a.png").write_bytes(content)
    np.testing.assert_array_equal(formats.read_mask(tmp_path / "a.png"), mask)
    with Image.open(io.BytesIO(content)) as picture:
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB"))[0, 1], shown[1])
