"""Promptable models through prediction and every export, without prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import fedvfm
from fedvfm.inference import delivery

Saver = Callable[..., Path]

SIZES = {"sam": 64, "sam_hq": 64, "sam2": 64, "sam3": 56}
CLASSES = {"sam": "SamModel", "sam_hq": "SamHQModel", "sam2": "Sam2Model", "sam3": "Sam3TrackerModel"}


def adapter_of(saved: Saver, sam_folders: dict[str, Path], family: str) -> Path:
    return saved(backbone=sam_folders[family], input_size=[SIZES[family]] * 2)


def logits(model: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(image)
    return found


@pytest.mark.parametrize("family", SIZES)
def test_hf_and_monai(saved: Saver, sam_folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    adapter = adapter_of(saved, sam_folders, family)
    made = fedvfm.export_adapter(adapter, tmp_path / "hf")
    assert made["class"] == CLASSES[family]
    model = fedvfm.load_adapter(adapter)
    stock = getattr(transformers, CLASSES[family]).from_pretrained(tmp_path / "hf").eval()
    image = torch.rand(1, 3, SIZES[family], SIZES[family], generator=torch.Generator().manual_seed(2))
    expected = logits(delivery.Deliverable(model), image)
    torch.testing.assert_close(
        logits(delivery.Deliverable(delivery.on(model, stock)), image), expected, rtol=1e-4, atol=1e-4
    )
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "`head.safetensors` is empty" in card
    assert ("itself gives other masks" in card) == (family == "sam_hq")
    assert "pixels alone" not in card
    bundle = fedvfm.export_adapter(adapter, tmp_path / "bundle", "monai")
    assert bundle["difference"] == 0.0


def test_the_card_says_where_the_stock_class_takes_no_such_input(
    saved: Saver, sam_folders: dict[str, Path], tmp_path: Path
) -> None:
    fedvfm.export_adapter(saved(backbone=sam_folders["sam"], input_size=[32, 48]), tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "`SamModel` itself takes 64 x 64 pixels alone; this adapter was trained at 32 x 48." in card


def test_predict(saved: Saver, sam_folders: dict[str, Path], tmp_path: Path) -> None:
    rows, columns = np.mgrid[:50, :70]
    Image.fromarray((np.sin(rows / 4) * 90 + columns + 90).astype(np.uint8)).save(tmp_path / "a.png")
    made = fedvfm.predict(adapter_of(saved, sam_folders, "sam"), tmp_path / "a.png", tmp_path / "out")
    assert made["inputs"][0]["size"] == [50, 70]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sam", "sam3"])
def test_onnx(saved: Saver, sam_folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    """One graph for any number of images: run with one and with three, against torch."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the graph is run with onnxruntime")
    pytest.importorskip("onnxscript", reason="ONNX needs the extra onnx")
    adapter = adapter_of(saved, sam_folders, family)
    made = fedvfm.export_adapter(adapter, tmp_path / "onnx", "onnx")
    assert made["batch"] == "free"
    plain = delivery.Deliverable(fedvfm.load_adapter(adapter))
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    image = torch.rand(3, 3, SIZES[family], SIZES[family], generator=torch.Generator().manual_seed(2))
    for given in (image[:1], image):
        found = torch.from_numpy(session.run(None, {"image": given.numpy()})[0])
        assert delivery.difference(found, logits(plain, given)) <= 1e-4
    assert "(B, 3," in (tmp_path / "onnx" / "README.md").read_text()
