"""Boxes round what a DICOM-SEG or RT structure set draws: those of training, on the images it was drawn on alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedvfm
from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import prompts as simulated
from fedvfm.data.volumes import geometry, slices, volumes
from fedvfm.inference import drawn_boxes, inputs
from tests.inference.conftest import Saver

pytest.importorskip("highdicom", reason="DICOM-SEG needs the extra dicom-seg")
from pydicom.sr.codedict import codes

from tests.data import dicom_writer as writer

CONTRACT = schema.DataContract(class_names=("rest", "cell", "wall"), input_size=(64, 64))
TILTED = np.array([[0.8, 0, 0.2, -30], [0, 1.2, 0, 40], [-0.1, 0, 3.0, 7], [0, 0, 0, 1]])
NAMES = ((codes.SCT.Liver, "Cell"), (codes.SCT.Spleen, "wall"), (codes.SCT.Kidney, f"{writer.PLANTED} other"))


def study(folder: Path, affine: np.ndarray = TILTED) -> list[Any]:
    voxels = np.random.default_rng(0).normal(100, 10, (22, 18, 5)).astype(np.int16)
    return writer.series(folder, voxels, affine)


def labels() -> np.ndarray:
    drawn = np.zeros((22, 18, 5), np.uint8)
    drawn[3:9, 4:11, 1:4] = 1
    drawn[12:20, 2:15, 2:5] = 2
    drawn[0:2, 0:2, 0] = 3
    return drawn


def expected(mask: np.ndarray, header: Any, plane: Any) -> dict[int, Any]:
    """What training shows for the same masks."""
    settings = schema.TaskConfig(kind="segmentation", prompt="box", prompt_jitter=0.0)
    whole = header.stored.turn().apply(mask.astype(np.int64))
    boxes = {}
    for at in range(header.count(plane)):
        drawn = simulated.draw(geometry.shown(whole, header.axis(plane), at), 3, settings, np.random.default_rng(0))
        if drawn.present.any():
            every = zip(drawn.present, np.asarray(drawn.boxes), strict=True)
            boxes[at] = [box[None] if there else np.zeros((0, 4)) for there, box in every]
    return boxes


def contour(left: float, top: float, right: float, bottom: float, at: int) -> np.ndarray:
    """A rectangle through the edges of pixels, in millimetres."""
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)]) - 0.5
    corners[1:3, 0] += 1
    corners[2:, 1] += 1
    index = np.c_[corners, np.full(4, at), np.ones(4)]
    return np.asarray((index @ TILTED.T)[:, :3])


@pytest.mark.parametrize("plane", ["axial", "sagittal"])
@pytest.mark.parametrize("kind", ["dicom-seg", "rtstruct"])
def test_boxes_are_those_of_training(tmp_path: Path, kind: str, plane: Any) -> None:
    images, mask = study(tmp_path / "in"), labels()
    if kind == "dicom-seg":
        writer.segmentation(tmp_path / "drawn" / "a.dcm", images, mask, described=NAMES)
    else:
        mask[mask == 3] = 0
        rings = {"CELL": (3, 4, 8, 10, range(1, 4)), "wall": (12, 2, 19, 14, range(2, 5)), "other": (0, 0, 1, 1, [0])}
        regions = [(name, [(at, contour(*ring[:4], at)) for at in ring[4]]) for name, ring in rings.items()]
        writer.structure_set(tmp_path / "drawn" / "a.dcm", images, regions)
    mask[mask == 3] = 0
    (item,) = inputs.find(tmp_path / "in")
    header = volumes.read_header(item.path)
    for path in (tmp_path / "drawn", tmp_path / "drawn" / "a.dcm"):
        assert drawn_boxes.holds(path)
        read = drawn_boxes.read(path, [item], CONTRACT)
        found = read.of_slices(item, header, slices.View(plane))
        told = expected(mask, header, plane)
        assert list(found) == list(told)
        for at, boxes in found.items():
            for own, other in zip(boxes, told[at], strict=True):
                np.testing.assert_array_equal(own, other)
    assert read.source["kind"] == kind


def test_prediction_takes_the_object_of_each_study(saved: Saver, sam_folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = saved({"kind": "segmentation", "prompt": "box"}, backbone=sam_folders["sam"], input_size=[64, 64])
    for name, moved in (("a", 0), ("b", 2)):
        images = study(tmp_path / "in" / name)
        writer.segmentation(
            tmp_path / "drawn" / f"{name}.dcm", images, np.roll(labels(), moved, axis=1), described=NAMES
        )
    study(tmp_path / "in" / "c")
    with pytest.raises(errors.DataError, match="series-003: no object of --boxes was drawn on these images"):
        fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=tmp_path / "drawn", form="png")
    made = (tmp_path / "out" / "summary.json").read_text()
    assert '"kind": "dicom-seg"' in made
    assert made.count('"cell": 3') >= 2
    assert writer.PLANTED not in made


def test_a_structure_set_beside_a_segmentation_is_left_out_and_said(tmp_path: Path) -> None:
    images = study(tmp_path / "in")
    writer.segmentation(tmp_path / "drawn" / "a.dcm", images, labels(), described=NAMES)
    (item,) = inputs.find(tmp_path / "in")
    header = volumes.read_header(item.path)
    alone = drawn_boxes.read(tmp_path / "drawn", [item], CONTRACT)
    assert (alone.notes(header), alone.notes(None)) == ([], [])
    ring = [("CELL", [(at, contour(3, 4, 8, 10, at)) for at in range(1, 4)])]
    writer.structure_set(tmp_path / "drawn" / "b.dcm", images, ring)
    both = drawn_boxes.read(tmp_path / "drawn", [item], CONTRACT)
    assert both.notes(header) == [drawn_boxes.LEFT_OUT]
    first, second = (read.of_slices(item, header, slices.View()) for read in (alone, both))
    assert list(first) == list(second)


def refused(tmp_path: Path, path: Path, match: str) -> None:
    (item,) = inputs.find(tmp_path / "in")
    with pytest.raises(errors.BoxesError, match=match) as caught:
        drawn_boxes.read(path, [item], CONTRACT).of_slices(item, volumes.read_header(item.path), slices.View())
    assert writer.PLANTED not in str(caught.value)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    images = study(tmp_path / "in")
    drawn = tmp_path / "drawn"
    writer.segmentation(drawn / "named" / f"{writer.PLANTED}.dcm", images, labels(), described=NAMES[2:])
    refused(tmp_path, drawn / "named", "no structure has the name or code of a class \\(cell, wall\\)")
    others = study(tmp_path / "others")
    writer.segmentation(drawn / "others" / f"{writer.PLANTED}.dcm", others, labels(), described=NAMES)
    refused(tmp_path, drawn / "others", "series-001: no object of --boxes was drawn on these images")
    for name in "ab":
        writer.segmentation(drawn / "twice" / f"{name}.dcm", images, labels(), described=NAMES)
    refused(tmp_path, drawn / "twice", "class 'cell' is drawn by 2 objects of --boxes; keep one")
    (drawn / "none").mkdir()
    refused(tmp_path, drawn / "none", "holds no DICOM-SEG and no RT structure set")
    aside = [("cell", [(at, contour(3, 4, 8, 10, at + 0.5)) for at in (1, 2)])]
    writer.structure_set(drawn / "between" / f"{writer.PLANTED}.dcm", images, aside, referenced=False)
    refused(tmp_path, drawn / "between", "--boxes, structure set 1.*contours lie between the slices")
    read = drawn_boxes.read(drawn / "twice" / "a.dcm", inputs.find(tmp_path / "in"), CONTRACT)
    picture = inputs.Item("a", "picture", tmp_path)
    with pytest.raises(errors.BoxesError, match="a: a picture, and drawings of DICOM belong to DICOM images"):
        read.of_picture(picture, (4, 4))
