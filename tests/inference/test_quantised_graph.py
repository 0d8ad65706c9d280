"""Static 8 bits: measured on images, compared with the float graph, refused where it answers otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fedvfm
from fedvfm import errors
from fedvfm.inference import agreement, calibration, quantised_graph
from tests.inference.conftest import Saver

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="graphs need the extra onnx")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 smooth pictures, none like another."""
    folder = tmp_path_factory.mktemp("photographs")
    rows, columns = np.mgrid[:30, :40]
    for at in range(32):
        wave = np.sin(rows / (2 + at % 5)) * 90 + np.cos((columns + at) / (3 + at % 7)) * 30 + 128
        Image.fromarray(wave.astype(np.uint8)).save(folder / f"{at:02d}.png")
    return folder


@pytest.fixture(scope="module")
def written(saved: Saver, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("static") / "graph"
    return fedvfm.export_adapter(saved(), folder, "onnx", int8=True, calibrate=photographs)


def test_layers_in_8_bits_answer_like_the_adapter_and_say_how_near(
    saved: Saver, photographs: Path, written: dict[str, Any], tmp_path: Path
) -> None:
    import onnx

    folder = Path(written["folder"])
    measured = written["calibration"]
    assert (measured["method"], measured["images"], measured["compared_by"]) == ("min-max", 32, "dice")
    assert 0.9 <= written["int8"] < 1.0
    assert measured["bytes"]["int8"] == (folder / "model.onnx").stat().st_size < measured["bytes"]["float32"]
    assert min(measured["seconds"].values()) > 0
    assert measured["classes"]
    assert set(measured["classes"]) <= {"cell", "wall"}
    assert min(measured["classes"].values()) >= quantised_graph.LEAST_OF_A_CLASS
    graph = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(graph)
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert facts["fedvfm.weights"] == "int8"
    assert json.loads(facts["fedvfm.calibration"]) == {"method": "min-max", "images": 32, "windows": 32}
    scales = {weight.name: weight for weight in graph.graph.initializer}
    told = [node for node in graph.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in scales]
    assert any(len(onnx.numpy_helper.to_array(scales[node.input[1]]).shape) == 1 for node in told)  # one a column
    weights = [scales[node.input[0]] for node in told]
    largest = [np.abs(onnx.numpy_helper.to_array(one)).max() for one in weights if one.data_type == 3]
    assert largest
    assert max(largest) <= 64  # 7 bits: pairs of products fit 16 bits
    assert "photographs" not in graph.SerializeToString().decode("latin1")
    card = (folder / "README.md").read_text()
    assert f"Dice of its masks with those of the float graph {written['int8']:.4f}" in card
    made = fedvfm.predict(saved(), photographs, tmp_path / "out", graph=folder)
    assert made["precision"] == "int8"
    own = fedvfm.predict(saved(), photographs, tmp_path / "own")
    same = [
        (np.asarray(Image.open(tmp_path / "out" / f"{row['id']}.png")) == np.asarray(Image.open(path))).mean()
        for row in own["inputs"]
        for path in [tmp_path / "own" / f"{row['id']}.png"]
    ]
    assert np.mean(same) > 0.9


def test_a_class_that_is_lost_is_no_graph_for_the_mean_of_all(saved: Saver) -> None:
    """Twenty images where the large class is the same; the small one, in one of them, is gone."""
    model = fedvfm.load_adapter(saved())
    masks = torch.ones(20, 8, 8, dtype=torch.long)
    masks[0, :2, :2] = 2
    expected = [10.0 * torch.nn.functional.one_hot(mask, 3).permute(2, 0, 1) for mask in masks]
    masks[0] = 1
    given = [10.0 * torch.nn.functional.one_hot(mask, 3).permute(2, 0, 1) for mask in masks]
    measured = agreement.measure(model, given, expected, "--calibrate")
    name, same, classes = measured.name, measured.share, measured.classes
    assert (classes["wall"], same > quantised_graph.LEAST_AGREEMENT) == (0.0, True)
    with pytest.raises(errors.CheckpointError, match=r"'wall' 0\.000 on the images"):
        quantised_graph._require_near(quantised_graph.Compared(name, same, classes, 0.1, (1.0, 1.0)))


@pytest.mark.parametrize(("lost", "shown"), [(3, True), (2, False)])
def test_a_rare_class_of_a_classification_is_looked_at(saved: Saver, lost: int, shown: bool) -> None:
    """Of many images of one class a few are of another that the small graph no longer knows."""
    model = fedvfm.load_adapter(saved("classification"))
    names = model.recipe.data.class_names
    expected = [10.0 * torch.eye(len(names))[int(at < lost)] for at in range(60)]
    given = [10.0 * torch.eye(len(names))[0]] * 60
    measured = agreement.measure(model, given, expected, "--calibrate")
    assert measured.share > quantised_graph.LEAST_AGREEMENT
    assert (measured.classes[names[1]], measured.images[names[1]]) == (0.0, lost)
    compared = quantised_graph.Compared(
        measured.name, measured.share, measured.classes, 0.1, (1.0, 1.0), measured.images
    )
    if shown:
        with pytest.raises(errors.CheckpointError, match=rf"answers that are its own is '{names[1]}' 0\.000"):
            quantised_graph._require_near(compared)
    else:
        quantised_graph._require_near(compared)
        assert f"'{names[1]}' ({lost})" in quantised_graph._notes(model, compared)[0]


def test_classes_in_8_bits(saved: Saver, photographs: Path, tmp_path: Path) -> None:
    made = fedvfm.export_adapter(saved("classification"), tmp_path / "graph", "onnx", int8=True, calibrate=photographs)
    assert made["calibration"]["compared_by"] == "same_class"
    assert made["int8"] >= 0.9
    assert "of the classes are the same" in (tmp_path / "graph" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "hf", "int8": True}, r"--int8[\s\S]*is for --format onnx, not 'hf'"),
        ({"form": "onnx", "calibrate": "here"}, r"--calibrate[\s\S]*is for --format onnx --int8"),
        ({"form": "onnx", "int8": True}, "at least 32 images: give --calibrate FOLDER"),
    ],
)
def test_options_that_do_not_belong_together(
    saved: Saver, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        fedvfm.export_adapter(saved(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_too_few_images_and_an_adapter_that_finds_nothing(
    saved: Saver, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "few").mkdir()
    for path in sorted(photographs.iterdir())[:31]:
        (tmp_path / "few" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(errors.DataError, match="31 images and slices; ranges are measured on at least 32"):
        fedvfm.export_adapter(saved(), tmp_path / "out", "onnx", int8=True, calibrate=tmp_path / "few")
    model = fedvfm.load_adapter(saved())
    nothing = [torch.stack([torch.ones(4, 4), *[torch.zeros(4, 4)] * 2])]
    with pytest.raises(errors.DataError, match="finds none of its classes"):
        agreement.measure(model, nothing, nothing, "--calibrate")
    monkeypatch.setattr(calibration, "LEAST", 2)
    monkeypatch.setattr(quantised_graph, "LEAST_AGREEMENT", 1.1)
    with pytest.raises(errors.CheckpointError, match=r"float graph is 0\.\d+ on the images.*Nothing was written"):
        fedvfm.export_adapter(saved(), tmp_path / "out", "onnx", int8=True, calibrate=tmp_path / "few")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize(("groups", "kept"), [(4, ["depthwise", "expand"]), (1, [])])
def test_convolutions_of_mobile_blocks_stay_in_float32(groups: int, kept: list[str]) -> None:
    from onnx import TensorProto, helper

    shapes = {"stem": (4, 3, 3, 3), "expand": (4, 4, 1, 1), "depthwise": (4, 4 // groups, 3, 3)}
    names = ["image", *shapes]
    nodes = [
        helper.make_node(
            "Conv", [names[at], f"{name}.weight"], [name], name, group=groups if name == "depthwise" else 1
        )
        for at, name in enumerate(shapes)
    ]
    weights = [
        helper.make_tensor(f"{name}.weight", TensorProto.FLOAT, shape, np.zeros(shape, dtype=np.float32).ravel())
        for name, shape in shapes.items()
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("image", "depthwise")]
    model = helper.make_model(helper.make_graph(nodes, "blocks", ends[:1], ends[1:], weights))
    assert quantised_graph.kept_in_float(model) == kept
