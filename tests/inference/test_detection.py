"""Boxes of an adapter that detects: on the pixels of pictures and volumes, as ONNX, and where they are refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import fedvfm
from fedvfm import errors
from fedvfm.data import formats
from fedvfm.data import sample as samples
from fedvfm.inference import delivery, distillation, export, forms, graph, live
from fedvfm.model import memory
from fedvfm.tasks import detection
from tests.inference.conftest import moved
from tests.inference.test_predict import evaluated, picture

TASK: dict[str, Any] = {"kind": "detection", "options": {"threshold": 0.05, "most": 5}}


@pytest.fixture(scope="module")
def adapter(tiny_dino: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is sure of something everywhere, so that every image has boxes."""
    model = moved(tiny_dino, TASK)
    with torch.no_grad():
        model.parameter("head.heat.bias").fill_(-0.5)
    return export.save(model, tmp_path_factory.mktemp("boxes") / "adapter", {})


def test_boxes_of_pictures_are_those_that_are_scored(adapter: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    names = [picture(source / f"{at}.png", seed=at).stem for at in range(2)]
    summary = fedvfm.predict(adapter, source, tmp_path / "out", overlays=True)
    task = fedvfm.load_adapter(adapter).task
    assert isinstance(task, detection.Detection)
    lines = list(csv.DictReader((tmp_path / "out" / "boxes.csv").read_text().splitlines()))
    for name, row in zip(names, summary["inputs"], strict=True):
        logits = evaluated(adapter, samples.Pixels(formats.read_image(source / f"{name}.png")))
        expected = task.delivered(logits, (40, 52))
        written = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert [box["box"] for box in written["boxes"]] == np.round(expected.edges, 2).tolist()
        assert written["images"] == [{"image": name, "size": [40, 52]}]
        assert row["boxes"] == written["boxes"]
        assert len(expected) == 5 == sum(own["boxes"] for own in row["classes"].values())
        own = [line for line in lines if line["id"] == name]
        assert [float(line["right"]) for line in own] == np.round(expected.edges[:, 2], 2).tolist()
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.png") as shown:
            assert shown.size == (52, 40)


def test_boxes_of_a_volume_say_their_slice_and_voxels(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    voxels = np.random.default_rng(0).integers(0, 255, (30, 28, 3)).astype(np.int16)
    (tmp_path / "in").mkdir()
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / "in" / "scan.nii.gz")  # type: ignore[attr-defined]
    summary = fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out")
    (row,) = summary["inputs"]
    written = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert [image["slice"] for image in written["images"]] == [0, 1, 2]
    assert {box["slice"] for box in row["boxes"]} == {0, 1, 2}
    assert row["form"] == "json"
    assert row["size"] == [30, 28, 3]
    for box in row["boxes"]:  # shown, rows run from front to back and columns from right to left
        (left, top, right, bottom), at = box["box"], box["slice"]
        assert box["voxels"] == pytest.approx([30 - right, 28 - bottom, at, 30 - left, 28 - top, at + 1])
    lines = list(csv.DictReader((tmp_path / "out" / "boxes.csv").read_text().splitlines()))
    assert [float(line["i_begin"]) for line in lines] == [box["voxels"][0] for box in row["boxes"]]
    live.show(summary, as_json=False)
    assert "boxes of cell" in capsys.readouterr().out


def test_an_input_called_as_the_summary_is_told_so(adapter: Path, tmp_path: Path) -> None:
    """Its boxes would lie where the summary is written last."""
    for name in ("a", "Summary"):
        picture(tmp_path / "in" / f"{name}.png")
    with pytest.raises(errors.DataError, match="which tells of all inputs; rename it"):
        fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["id"] for row in summary["inputs"]] == ["a"]
    assert list(summary["failed"]) == ["Summary"]


def test_forms_of_masks_are_refused(adapter: Path, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.png")
    with pytest.raises(errors.ConfigError, match="answers with boxes, which are written as JSON"):
        fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", form="png")
    for form in ("monai", "hf", "peft", "onnx-int8"):
        with pytest.raises(errors.ConfigError, match="answers with boxes"):
            forms.export_adapter(adapter, tmp_path / form, form=form)
    with pytest.raises(errors.ConfigError, match="answers with boxes"):
        distillation._require_teacher(fedvfm.load_adapter(adapter))
    fault = str(graph._inexpressible(fedvfm.load_adapter(adapter), ValueError()))
    assert ("fedvfm predict" in fault, "monai" in fault) == (True, False), fault


@pytest.mark.slow
def test_a_graph_gives_the_same_boxes(adapter: Path, tmp_path: Path) -> None:
    made = forms.export_adapter(adapter, tmp_path / "onnx", form="onnx")
    assert made["difference"] <= delivery.TOLERANCE
    card = (tmp_path / "onnx" / "README.md").read_text()
    assert "first 2 heat maps of the classes" in card
    assert "(B, 6, 28, 28)" in card
    picture(tmp_path / "in" / "a.png")
    torchs, graphs = (
        [
            box["box"]
            for box in fedvfm.predict(adapter, tmp_path / "in", tmp_path / name, graph=path)["inputs"][0]["boxes"]
        ]
        for name, path in (("torch", None), ("graph", tmp_path / "onnx"))
    )
    assert np.array(torchs) == pytest.approx(np.array(graphs), abs=0.02)


def test_memory_of_a_step_is_counted_and_not_estimated(adapter: Path) -> None:
    model = fedvfm.load_adapter(adapter)
    counted = memory.activations(model)
    maps = 4 * model.recipe.optimiser.batch_size * 6 * 28 * 28
    assert counted > maps
    assert counted != 4 * model.backbone.activations((28, 28)) * model.recipe.optimiser.batch_size
