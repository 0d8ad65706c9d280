"""Box prompts from a file: they land where training's boxes lie, and one embedding serves all classes and boxes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import fedvfm
from fedvfm import errors
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.data import prompts as simulated
from fedvfm.data import sample as samples
from fedvfm.data import transforms
from fedvfm.data.volumes import slices, volumes
from fedvfm.inference import boxes, inputs
from fedvfm.tasks import segmentation

Saver = Callable[..., Path]
CLASSES = ("rest", "cell", "wall")
TASK = {"kind": "segmentation", "prompt": "box"}


@pytest.fixture(scope="session")
def adapter(saved: Saver, sam_folders: dict[str, Path]) -> Path:
    return saved(TASK, backbone=sam_folders["sam"], input_size=[64, 64])


def write(path: Path, given: Any, coordinates: str = "pixels") -> Path:
    path.write_text(json.dumps({"coordinates": coordinates, "boxes": given}))
    return path


def picture(path: Path, rows: int = 50, columns: int = 70) -> np.ndarray:
    y, x = np.mgrid[:rows, :columns]
    values = (np.sin(y / 4) * 90 + x + 90).astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(values).save(path)
    return values


def volume(path: Path, affine: np.ndarray, shape: tuple[int, int, int] = (12, 10, 6)) -> None:
    path.parent.mkdir(exist_ok=True)
    voxels = np.random.default_rng(0).integers(0, 255, shape).astype(np.int16)
    nibabel.Nifti1Image(voxels, affine).to_filename(path)


def test_each_box_is_drawn_as_in_training(adapter: Path, tmp_path: Path) -> None:
    """Against the model told as in training, on a resized picture; of several boxes a pixel keeps the highest logit."""
    values = picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "b.png", 64, 64)
    given = {
        "a": {"wall": [[10, 5, 40, 30], [50, 20, 69, 49]], "cell": [[0, 0, 20.5, 12]]},
        "b": {"cell": [[5, 5, 30, 30]]},
    }
    whole = fedvfm.load_adapter(adapter)
    made = fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=write(tmp_path / "b.json", given))
    assert made["inputs"][0]["prompts"] == {"from": "file", "boxes": {"cell": 1, "wall": 2}}
    assert made["prompts"]["coordinates"] == "pixels"
    assert made["notes"][boxes.NOTE] == ["a", "b"]

    contract = whole.recipe.data
    shown = samples.Pixels(values[None].astype(np.float32) / 255, None)
    ready = transforms.prepare(shown, contract, 3).image
    pixels = torch.from_numpy(transforms.normalise(ready[None], contract))
    drawn = []
    for wall in given["a"]["wall"]:
        told = []
        for box in (given["a"]["cell"][0], wall):
            x, y = (np.clip((np.array(box[at::2]) + 0.5) * 64 / side - 0.5, 0, 63) for at, side in ((0, 70), (1, 50)))
            corners = torch.tensor([[x[0], y[0], x[1], y[1]]], dtype=torch.float32)
            told.append(backbones.Prompts(boxes=corners, present=torch.tensor([True])))
        with torch.no_grad():
            drawn.append(whole.features(pixels, None, told).masks)
    expected = segmentation.classes_at(backbones.resize(torch.maximum(*drawn), (64, 64))[0], (50, 70))
    found = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert (found == expected).all()


def test_the_first_block_runs_once_an_image(adapter: Path, tmp_path: Path) -> None:
    """However many classes and boxes there are, in batches too."""
    for name in "abc":
        picture(tmp_path / "in" / f"{name}.png", 64, 64)
    given = {name: {"cell": [[at, 5, 30, 30] for at in range(5)], "wall": [[1, 1, 9, 9]]} for name in "abc"}
    model, seen, decoded = fedvfm.load_adapter(adapter), list[int](), list[int]()
    stock: Any = model.backbone.model
    stock.vision_encoder.layers[0].register_forward_hook(lambda _, taken, __: seen.append(len(taken[0])))
    stock.mask_decoder.transformer.register_forward_hook(lambda *_: decoded.append(1))
    from fedvfm.inference import predict as predicting

    items = inputs.find(tmp_path / "in")
    read = boxes.read(write(tmp_path / "b.json", given), tmp_path / "in", items, CLASSES)
    predictor = predicting.Predictor(model, tmp_path / "out", prompts=read)
    for item in items:
        predictor.item(item)
    assert seen == [1, 1, 1]
    assert len(decoded) == 3 * 5 * 2


def test_a_class_without_box_is_not_there(adapter: Path, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "b.png")
    path = write(tmp_path / "b.json", {"a": {"cell": [[0, 0, 69, 49]]}})
    with pytest.raises(errors.DataError, match=r"b: --boxes has none for it"):
        fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=path)
    mask = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert 2 not in mask
    assert not (tmp_path / "out" / "b.png").exists()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"a": {"cell": [[60, 0, 71, 9]]}}, r"reaches beyond the image; columns are 0 to 69, rows 0 to 49"),
        ({"a": {"Cell": [[0, 0, 9, 9]]}}, r"'Cell' is no class of cell, wall"),
        ({"z": {"cell": [[0, 0, 9, 9]]}}, r"'z' is no input, as 'a' is"),
        ({"a": {}}, r"'a' has no box at all"),
        ({"a": {"cell": []}}, r"class 'cell' has an empty list"),
        ({"a": {"cell": [[9, 0, 3, 9]]}}, r"ends before it begins"),
        ({"a": {"cell": [[0, 0, 0, 9, 9, 9]]}}, r"has 6 numbers, pixels take 4"),
        ({"a/z000": {"cell": [[0, 0, 9, 9]]}}, r"'a/z000' is no input"),
        ({}, r"boxes"),
        ({"a": {"cell": [[0, 0, float("nan"), 9]]}}, r"boxes"),
        ({"a": {"cell": [[0, 0, True, 9]]}}, r"boxes"),
    ],
)
def test_wrong_boxes_are_refused(adapter: Path, tmp_path: Path, given: Any, match: str) -> None:
    picture(tmp_path / "in" / "a.png")
    with pytest.raises((errors.BoxesError, errors.ConfigError, errors.DataError), match=match):
        fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=write(tmp_path / "b.json", given))
    assert not (tmp_path / "out" / "a.png").exists()


def test_a_key_that_stands_twice_and_no_json(adapter: Path, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    for text, match in (
        ('{"coordinates": "pixels", "boxes": {"a": {"cell": [[0,0,1,1]], "cell": [[0,0,9,9]]}}}', "stands twice"),
        ("{", "cannot be read as JSON"),
        ('{"boxes": {"a": {"cell": [[0,0,1,1]]}}}', "coordinates"),
    ):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(errors.FedvfmError, match=match):
            fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=tmp_path / "b.json")


def test_boxes_and_adapters_that_do_not_belong_together(
    adapter: Path, saved: Saver, sam_folders: dict[str, Path], tmp_path: Path
) -> None:
    picture(tmp_path / "in" / "a.png")
    path = write(tmp_path / "b.json", {"a": {"cell": [[0, 0, 9, 9]]}})
    promptless = saved(backbone=sam_folders["sam"], input_size=[64, 64])
    with pytest.raises(errors.ConfigError, match=r"--boxes: .*\n.*takes no boxes \(recipe.task.prompt = 'none'"):
        fedvfm.predict(promptless, tmp_path / "in", tmp_path / "out", boxes=path)
    with pytest.raises(errors.ConfigError, match=r"Give boxes: --boxes FILE"):
        fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out")


AFFINES = {
    "RAS": np.diag([0.8, 1.1, 3.0, 1.0]),
    "LPS": np.diag([-0.8, -1.1, 3.0, 1.0]),
    "SAR": np.array([[0, 0, 1.2, 4], [0, 0.7, 0, -9], [2.0, 0, 0, 30], [0, 0, 0, 1.0]]),
}
OBLIQUE = np.array([[0.8, 0.2, 0.1, -4], [-0.2, 1.0, 0.3, 9], [0.0, -0.3, 2.8, 2], [0, 0, 0, 1.0]])


def cut(path: Path, given: Any, coordinates: str, view: slices.View) -> tuple[dict[int, Any], Any]:
    (item,) = inputs.find(path)
    read = boxes.read(write(path.parent / "b.json", given, coordinates), path, [item], CLASSES)
    header = volumes.read_header(path)
    return read.of_slices(item, header, view), header


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("coordinates", ["mm-ras", "mm-lps"])
@pytest.mark.parametrize("stored", AFFINES)
def test_millimetres_give_the_boxes_of_training(tmp_path: Path, stored: str, coordinates: str, plane: Any) -> None:
    """A block of voxels, as a cuboid of its corners: the boxes are those that its mask would be trained with."""
    path = tmp_path / "scan.nii"
    volume(path, AFFINES[stored])
    block = np.array([[2, 3, 1], [6, 8, 4]])
    corners = block @ AFFINES[stored][:3, :3].T + AFFINES[stored][:3, 3]
    corners = corners * ((1, 1, 1) if coordinates == "mm-ras" else (-1, -1, 1))
    box = [*np.minimum(*corners), *np.maximum(*corners)]
    found, header = cut(path, {"scan": {"wall": [box]}}, coordinates, slices.View(plane))
    stored_mask = np.zeros(header.stored.shape, np.int64)
    stored_mask[2:7, 3:9, 1:5] = 2
    mask = header.stored.turn().apply(stored_mask)
    settings = schema.TaskConfig(kind="segmentation", prompt="box", prompt_jitter=0.0)
    expected = {}
    for at in range(header.count(plane)):
        shown = volumes.geometry.shown(mask, header.axis(plane), at)
        drawn = simulated.draw(shown, 3, settings, np.random.default_rng(0))
        if drawn.present[1]:
            expected[at] = drawn.boxes[1]  # type: ignore[index]
    assert list(found) == list(expected)
    for at, (cell, wall) in found.items():
        assert len(cell) == 0
        np.testing.assert_allclose(wall, expected[at][None], atol=1e-4)


def test_a_tilted_volume_is_cut_where_the_cuboid_is(tmp_path: Path) -> None:
    """Against points of the cuboid, slice by slice."""
    path = tmp_path / "scan.nii"
    volume(path, OBLIQUE, (30, 26, 8))
    middle = (OBLIQUE @ (14, 12, 3.5, 1))[:3]
    low, high = np.subtract(middle, (3, 4, 5)), np.add(middle, (4, 3, 5))
    found, header = cut(path, {"scan": {"cell": [[*low, *high]]}}, "mm-ras", slices.View())
    grid, axis = header.grid, header.axis("axial")
    axes = [np.linspace(a, b, 61) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    index = (np.c_[points, np.ones(len(points))] @ np.linalg.inv(grid.affine).T)[:, :3]
    for at in range(grid.shape[axis]):
        near = index[np.abs(index[:, axis] - at) < 0.02]
        assert (at in found) == (len(near) > 0)
        if at in found:
            x, y = grid.shape[0] - 1 - near[:, 0], grid.shape[1] - 1 - near[:, 1]
            np.testing.assert_allclose(found[at][0][0], [x.min(), y.min(), x.max(), y.max()], atol=0.25)


@pytest.mark.parametrize(
    ("given", "coordinates", "match"),
    [
        ({"scan": {"cell": [[0, 0, 0, 50, 5, 9]]}}, "mm-ras", r"beyond the volume .*holds x 0.0 to 8.8, y 0.0 to 9.9"),
        ({"scan": {"cell": [[0, 0, 1, 5, 5, 2]]}}, "mm-ras", r"lies between two slices"),
        ({"scan": {"cell": [[0, 0, 5, 5]]}}, "pixels", r"a volume of 6 slices; give pixels of single ones"),
        ({"scan/z006": {"cell": [[0, 0, 5, 5]]}}, "pixels", r"slice 'z006' is not there; they are z000 to z005"),
        ({"scan/z001": {"cell": [[0, 0, 5, 5, 5, 5]]}}, "mm-ras", r"'scan/z001' is no input"),
    ],
)
def test_wrong_boxes_of_volumes(adapter: Path, tmp_path: Path, given: Any, coordinates: str, match: str) -> None:
    volume(tmp_path / "in" / "scan.nii", AFFINES["RAS"])
    path = write(tmp_path / "b.json", given, coordinates)
    with pytest.raises(errors.BoxesError if "input" in match else errors.DataError, match=match):
        fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=path)


def test_slices_without_a_box_are_not_computed(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume(tmp_path / "in" / "scan.nii", AFFINES["RAS"])
    read, real = list[int](), volumes.read_shown
    monkeypatch.setattr(volumes, "read_shown", lambda file, at, *rest: (read.append(at), real(file, at, *rest))[1])
    path = write(tmp_path / "b.json", {"scan/z001": {"cell": [[0, 0, 5, 5]]}, "scan/z004": {"wall": [[3, 3, 5, 5]]}})
    made = fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=path, form="png")
    assert read == [1, 4]
    assert made["inputs"][0]["prompts"]["boxes"] == {"cell": 1, "wall": 1}
    masks = [np.asarray(Image.open(tmp_path / "out" / "scan" / f"z{at:03d}.png")) for at in range(6)]
    assert [at for at, mask in enumerate(masks) if mask.any()] in ([], [1], [4], [1, 4])
    assert all(2 not in mask for at, mask in enumerate(masks) if at != 4)


def test_millimetres_of_a_picture_are_refused(adapter: Path, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    path = write(tmp_path / "b.json", {"a": {"cell": [[0, 0, 0, 5, 5, 5]]}}, "mm-lps")
    with pytest.raises(errors.DataError, match="a picture has no place in a patient"):
        fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=path)


def test_a_window_is_told_what_it_shows() -> None:
    from fedvfm.model import sliding_window

    window = sliding_window.Window(0, np.zeros((3, 20, 30), np.float32), (10, 40))
    own = np.array([[0, 0, 45, 12], [80, 0, 90, 40], [50, 15, 52, 18], [0, 0, 39, 100]], float)
    (seen,) = sliding_window.shown(window, (own,))
    assert seen.tolist() == [[0, 0, 5, 2], [10, 5, 12, 8]]


def test_a_segmentation_object_says_that_somebody_helped(adapter: Path, tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom", reason="DICOM-SEG needs the extra dicom-seg")
    from tests.data import dicom_writer as writer

    voxels = np.random.default_rng(0).normal(100, 10, (22, 18, 4)).astype(np.int16)
    affine = np.diag([0.8, 1.2, 3.0, 1.0])
    writer.series(tmp_path / "in" / "study", voxels, affine)
    ends = np.array([[4, 3, 1, 1], [9, 11, 2, 1]]) @ affine.T
    path = write(tmp_path / "b.json", {"series-001": {"cell": [[*ends[0, :3], *ends[1, :3]]]}}, "mm-lps")
    made = fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=path)
    (segment, *_) = pydicom.dcmread(tmp_path / "out" / "series-001.dcm").SegmentSequence
    assert segment.SegmentAlgorithmType == "SEMIAUTOMATIC"
    (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
    assert f"boxes from a file, sha256 {made['prompts']['sha256']}" in algorithm.AlgorithmParameters
    by_folder = write(tmp_path / "c.json", json.loads(path.read_text())["boxes"], "mm-lps")
    by_folder.write_text(by_folder.read_text().replace("series-001", "study"))
    again = fedvfm.predict(adapter, tmp_path / "in", tmp_path / "again", boxes=by_folder)
    assert again["inputs"][0]["classes"] == made["inputs"][0]["classes"]
    assert set(itertools.chain(*made["notes"].values())) == {"series-001"}
