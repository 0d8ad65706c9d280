"""Prediction of several images at a time, and by onnxruntime: what one at a time by torch gives."""

from __future__ import annotations

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
from fedvfm.data import formats
from fedvfm.inference import export
from fedvfm.model import sliding_window

Saver = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three sizes, one of them damaged, and a volume of five slices."""
    folder, rng = tmp_path_factory.mktemp("in"), np.random.default_rng(5)
    for number, size in enumerate([(40, 52), (40, 52), (70, 30), (28, 28), (90, 90), (40, 52)]):
        grey = np.kron(rng.random((size[0] // 2, size[1] // 2)), np.ones((2, 2))) * 255
        Image.fromarray(grey.astype(np.uint8)).save(folder / f"p{number}.png")
    (folder / "p2b.png").write_bytes(b"no picture")
    stack = rng.random((30, 34, 5)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(stack, np.diag([1.0, 1.0, 3.0, 1.0])), folder / "v.nii.gz")
    return folder


def masks(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {path.stem: np.asarray(Image.open(path)) for path in folder.glob("*.png")}
    return found | {path.name: np.asarray(nibabel.load(path).dataobj) for path in folder.glob("*.nii.gz")}


def predicted(adapter: Path, source: Path, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    with pytest.raises(errors.DataError, match="p2b"):
        fedvfm.predict(adapter, source, out, overlays=True, **options)
    return json.loads((out / "summary.json").read_text()), masks(out)


@pytest.mark.parametrize("fit", ["resize", "native"])
@pytest.mark.parametrize("batch", [2, 4, 64])
def test_masks_of_a_batch_are_those_of_one_at_a_time(
    saved: Saver, source: Path, tmp_path: Path, fit: str, batch: int
) -> None:
    """Logits differ in their last digits, so a pixel on a border may change; few do."""
    adapter = saved(fit=fit)
    alone, expected = predicted(adapter, source, tmp_path / "alone")
    together, found = predicted(adapter, source, tmp_path / "together", batch=batch)
    assert {row["id"]: row["files"] for row in alone["inputs"]} == {
        row["id"]: row["files"] for row in together["inputs"]
    }
    assert alone["failed"] == together["failed"]
    assert set(found) == set(expected)
    assert len(found) == 7
    for name, mask in expected.items():
        assert mask.shape == found[name].shape
        assert (mask == found[name]).mean() >= 0.999
    assert len({len(np.unique(mask)) for mask in expected.values()}) >= 1


def test_one_at_a_time_is_what_a_cpu_does(saved: Saver, source: Path, tmp_path: Path) -> None:
    _, expected = predicted(saved(), source, tmp_path / "default")
    _, found = predicted(saved(), source, tmp_path / "one", batch=1)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_classes_of_a_batch(saved: Saver, source: Path, tmp_path: Path) -> None:
    rows = []
    for batch in (1, 4):
        made, _ = predicted(saved("classification"), source, tmp_path / str(batch), batch=batch)
        rows.append({row["id"]: row["probabilities"] for row in made["inputs"]})
    assert len(rows[0]) == 6 + 1 + 5
    assert rows[0].keys() == rows[1].keys()
    for name, chances in rows[0].items():
        assert chances == pytest.approx(rows[1][name], abs=2e-6)


def test_a_batch_is_computed_together(
    saved: Saver, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    alone = sliding_window.alone

    def counted(model: Any) -> sliding_window.Run:
        run = alone(model)

        def compute(parts: Any) -> torch.Tensor:
            sizes.append(len(parts))
            return run(parts)

        return compute

    monkeypatch.setattr(sliding_window, "alone", counted)
    predicted(saved(), source, tmp_path / "out", batch=4)
    assert sizes == [3, 3, 4, 1]  # p0 p1 p2 (p2b is damaged), p3 p4 p5, and the volume's five slices


@pytest.mark.parametrize("fault", [ZeroDivisionError(), MemoryError()])
def test_one_file_that_breaks_the_reader_ends_no_other(
    saved: Saver, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    original = formats.read_shown

    def read(path: Path) -> Any:
        if path.name == "p1.png":
            raise fault
        return original(path)

    monkeypatch.setattr(formats, "read_shown", read)
    made, found = predicted(saved(), source, tmp_path / "out", batch=4)
    assert set(made["failed"]) == {"p1", "p2b"}
    assert set(found) >= {"p0", "p2", "p3", "p4", "p5"}


@pytest.mark.parametrize("batch", [-1, 5000])
def test_a_batch_that_cannot_be(saved: Saver, source: Path, tmp_path: Path, batch: int) -> None:
    with pytest.raises(errors.ConfigError, match="--batch"):
        fedvfm.predict(saved(), source, tmp_path / "out", batch=batch)


# -- onnxruntime -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graphs(saved: Saver, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="graphs need the extra onnx")
    folder = tmp_path_factory.mktemp("graphs")
    for form in ("onnx", "onnx-int8"):
        made = fedvfm.export_adapter(saved(), folder / form, form)
        assert made["checked_with"] == "onnxruntime"
    assert 0 < made["difference"] < 0.25
    assert 0.5 < made["int8"] <= 1.0
    return {form: folder / form for form in ("onnx", "onnx-int8")}


def test_a_graph_predicts_what_the_adapter_does(
    saved: Saver, graphs: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    _, expected = predicted(saved(), source, tmp_path / "torch")
    for form, batch, share in (("onnx", 1, 0.999), ("onnx", 3, 0.999), ("onnx-int8", 1, 0.9)):
        made, found = predicted(saved(), source, tmp_path / f"{form}-{batch}", graph=graphs[form], batch=batch)
        assert made["computed_by"].startswith("onnxruntime ")
        assert made["precision"] == ("int8" if form == "onnx-int8" else "float32")
        same = np.concatenate([(mask == found[name]).ravel() for name, mask in expected.items()])
        assert same.mean() >= share


def test_weights_in_8_bits_are_smaller_and_say_so(graphs: dict[str, Path]) -> None:
    import onnx

    kinds = {
        form: [one.data_type for one in onnx.load(folder / "model.onnx").graph.initializer]
        for form, folder in graphs.items()
    }
    assert onnx.TensorProto.INT8 not in kinds["onnx"]
    assert onnx.TensorProto.INT8 in kinds["onnx-int8"]
    assert (graphs["onnx-int8"] / "model.onnx").stat().st_size < (graphs["onnx"] / "model.onnx").stat().st_size
    assert "weights in 8 bits" in (graphs["onnx-int8"] / "README.md").read_text()


def test_a_graph_of_another_adapter_is_refused(
    saved: Saver, graphs: dict[str, Path], source: Path, tmp_path: Path
) -> None:
    model = fedvfm.load_adapter(saved())
    with torch.no_grad():
        next(iter(model.head.parameters())).add_(0.1)
    other = export.save(model, tmp_path / "other", {})
    with pytest.raises(errors.CheckpointError, match="no export of this adapter: its adapter_fingerprint differ"):
        fedvfm.predict(other, source, tmp_path / "out", graph=graphs["onnx"])
    with pytest.raises(errors.CheckpointError, match=r"holds no model\.onnx"):
        fedvfm.predict(saved(), source, tmp_path / "out", graph=tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(errors.CheckpointError, match="cannot be opened by onnxruntime"):
        fedvfm.predict(saved(), source, tmp_path / "out", graph=tmp_path)
    with pytest.raises(errors.ConfigError, match="onnxruntime computes on the CPU"):
        fedvfm.predict(saved(), source, tmp_path / "out", graph=graphs["onnx"], device="cuda")


def test_an_image_of_another_size_than_the_graph_s(saved: Saver, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="graphs need the extra onnx")
    pytest.importorskip("onnxscript", reason="graphs need the extra onnx")
    adapter = saved(fit="native")
    fedvfm.export_adapter(adapter, tmp_path / "graph", "onnx")
    Image.fromarray(np.full((42, 42), 7, dtype=np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(errors.DataError, match="42 x 42 pixels, and the graph takes 28 x 28; leave --graph out"):
        fedvfm.predict(adapter, tmp_path / "a.png", tmp_path / "out", graph=tmp_path / "graph")
