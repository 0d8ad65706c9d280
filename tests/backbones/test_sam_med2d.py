"""SAM-Med2D: its checkpoint's names, and an encoder that computes what its authors describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor
from torch.nn import functional

import fedvfm
from fedvfm import errors
from fedvfm.backbones import convert, sam_med2d, table
from fedvfm.config import schema
from fedvfm.inference import export
from fedvfm.model import adapted_model
from tests.backbones.test_weights_import import original_name

WIDTH, INNER, DEPTH = 32, 8, 4


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))


def published(folder: Path, *, blocks: int = DEPTH) -> dict[str, Tensor]:
    """A small SAM under its authors' names, with the adapter layers of SAM-Med2D in its first blocks."""
    stock = transformers.SamModel.from_pretrained(folder)
    arrays = {str(original_name(name)): value.clone() for name, value in stock.state_dict().items()}
    arrays.pop("None", None)
    draw = torch.Generator().manual_seed(2)
    shapes: dict[str, tuple[int, ...]] = {
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "channel.0.weight": (INNER, WIDTH),
        "channel.2.weight": (WIDTH, INNER),
        "spatial.0.weight": (WIDTH, WIDTH, 3, 3),
        "spatial.2.weight": (WIDTH, WIDTH, 4, 4),
    }
    for block in range(blocks):
        for name, shape in shapes.items():
            arrays[f"image_encoder.blocks.{block}.Adapter.{name}"] = torch.randn(shape, generator=draw) * 0.2
    return arrays | {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}


@pytest.fixture
def arrays(sam_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    monkeypatch.setattr(convert.sam_original, "HEADS", 2)
    return published(sam_folders["sam"])


@pytest.fixture
def imported(arrays: dict[str, Tensor], tmp_path: Path) -> str:
    file = tmp_path / "sam-med2d_b.pth"
    torch.save({"model": arrays, "optimizer": {"state": {}, "param_groups": []}}, file)
    convert.bring(file, "med2d")
    return "med2d"


def load(name: str) -> sam_med2d.SamMed2d:
    chosen = schema.BackboneConfig(name=name)
    made = table.loader(chosen)(chosen)
    assert isinstance(made, sam_med2d.SamMed2d)
    return made


def beside(own: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """The adapter layer, from the paper's figure: channels weighted, down and up again, added, normalised."""
    grid = hidden.permute(0, 3, 1, 2)
    inner = functional.relu(grid.mean((2, 3)) @ own["channel.0.weight"].T)
    weighted = grid * torch.sigmoid(inner @ own["channel.2.weight"].T)[:, :, None, None]
    down = functional.relu(functional.conv2d(weighted, own["spatial.0.weight"], stride=2, padding=1))
    up = functional.relu(functional.conv_transpose2d(down, own["spatial.2.weight"], stride=2, padding=1))
    added = (grid + up).permute(0, 2, 3, 1)
    return functional.layer_norm(added, added.shape[-1:], own["norm.weight"], own["norm.bias"], 1e-5)


def normalised(layer: Any, hidden: Tensor) -> Tensor:
    """What enters a stock block's feed-forward branch, and so the layer beside it."""
    seen: list[Tensor] = []
    handle = layer.layer_norm2.register_forward_hook(lambda _, __, out: seen.append(out))
    layer(hidden)
    handle.remove()
    return seen[0]


def test_the_encoder_computes_what_its_authors_describe(
    arrays: dict[str, Tensor], imported: str, sam_folders: dict[str, Path]
) -> None:
    """Against the stock SAM walked block by block, with the layer written down a second time beside the MLP."""
    stock = transformers.SamModel.from_pretrained(sam_folders["sam"]).eval().vision_encoder
    ours = load(imported)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden = stock.patch_embed(image) + stock.pos_embed
        for block, layer in enumerate(stock.layers):
            begins = f"image_encoder.blocks.{block}.Adapter."
            own = {name.removeprefix(begins): value for name, value in arrays.items() if name.startswith(begins)}
            seen = normalised(layer, hidden)
            hidden = layer(hidden) + beside(own, seen)
        found = ours.features(image, (DEPTH,)).grids[-1]
    assert hidden.abs().mean() > 1e-2
    torch.testing.assert_close(found, hidden.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


def test_nothing_of_the_checkpoint_is_passed_over(imported: str) -> None:
    ours = load(imported)
    folder = Path(fedvfm.backbones.weights.own_folder(imported))
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    loaded = ours.model.state_dict()
    assert set(stored) <= set(loaded)
    assert all(torch.equal(value, loaded[name]) for name, value in stored.items())
    assert json.loads((folder / "config.json").read_text())["adapter_width"] == INNER
    names = {ours.wire_name(name) for name, _ in ours.model.named_parameters()}
    assert "block.03.mlp.adapter.spatial.0.weight" in names


def test_prefix_is_the_whole_and_sides_are_even_patches(imported: str) -> None:
    ours = load(imported)
    image = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = ours.features(image, (DEPTH,))
        parts = ours.features(image, (DEPTH,), ours.prefix(image, 2, (DEPTH,)))
    assert torch.equal(whole.grids[0], parts.grids[0])
    assert "multiples of 32, two patches" in ours.check_size((48, 64))[0]
    assert ours.check_size((64, 64)) == []


def recipe(name: str, kind: str) -> schema.Recipe:
    values = {
        "backbone": {"name": name},
        "adapter": {"kind": kind, "rank": 2},
        "task": {"kind": "segmentation"},
        "data": {"class_names": ["rest", "cell"], "input_size": [64, 64]},
    }
    return schema.parse(schema.Recipe, values, "recipe")


@pytest.mark.parametrize("kind", ["lora", "medical-sam-adapter"])
def test_its_own_adapter_layers_stay_frozen(imported: str, kind: str) -> None:
    model = adapted_model.AdaptedModel(recipe(imported, kind))
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model.write(model.initial())
    model.train()
    model.task.loss(model(image), torch.zeros(2, 64, 64, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
    trained = {name for name, value in model.backbone.model.named_parameters() if value.requires_grad}
    assert trained
    assert not any(".adapter." in name and "lora" not in name for name in trained if ".mlp.adapter." in name)


def test_it_has_no_stock_form_and_says_so(imported: str, tmp_path: Path) -> None:
    model = adapted_model.AdaptedModel(recipe(imported, "lora"))
    model.write(model.initial())
    folder = export.save(model.eval(), tmp_path / "adapter", {})
    assert "no place for the adapter layers of SAM-Med2D" in (folder / "README.md").read_text()
    with pytest.raises(errors.ConfigError, match="is no model of transformers; use monai or onnx"):
        fedvfm.export_adapter(folder, tmp_path / "hf", "hf")


def test_adapter_layers_in_some_blocks_alone_are_refused(
    sam_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert.sam_original, "HEADS", 2)
    file = tmp_path / "some.pth"
    torch.save(published(sam_folders["sam"], blocks=2), file)
    with pytest.raises(errors.WeightsError, match="lack 12 arrays"):
        convert.bring(file, "some")


def test_layers_of_other_authors_are_refused(arrays: dict[str, Any], tmp_path: Path) -> None:
    """transformers passes over arrays that it has no place for; the model would compute something else."""
    plain = {name: value for name, value in arrays.items() if ".Adapter." not in name}
    file = tmp_path / "medical-sam-adapter.pth"
    torch.save(plain | {"image_encoder.blocks.0.MLP_Adapter.D_fc1.weight": torch.zeros(8, WIDTH)}, file)
    with pytest.raises(errors.WeightsError, match=r"1 arrays .* no place for .*MLP_Adapter\.D_fc1\.weight"):
        convert.bring(file, "other")


def test_the_tables_shape_is_vit_b_at_256_pixels() -> None:
    chosen = schema.BackboneConfig(name="sam-med2d")
    made = table.loader(chosen)(chosen, with_weights=False)
    adapters = 12 * (2 * 768 * 192 + 768 * 768 * (9 + 16) + 2 * 768)
    chosen = schema.BackboneConfig(name="sam-vit-base")
    plain = table.loader(chosen)(chosen, with_weights=False)
    smaller = 768 * (64**2 - 16**2) + 4 * 2 * 64 * (127 - 31)  # tables of positions, absolute and relative
    assert made.parameters_total() == plain.parameters_total() + adapters - smaller
