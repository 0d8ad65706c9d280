"""ConvNeXt of DINOv3: equal to the stock model; LoRA on its two linear layers a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fedvfm.backbones import convnext, table
from fedvfm.config import schema
from fedvfm.model import adapted_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random ConvNeXt of four stages; every number is random, its scales of branches too."""
    place = tmp_path_factory.mktemp("convnext") / "tiny"
    shape = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 2, 2, 1]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**shape))
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.data.add_(1.0)
    model.save_pretrained(place)
    return place


def load(name: Path | str, *, with_weights: bool = True, **options: Any) -> convnext.ConvNext:
    chosen = schema.BackboneConfig(name=str(name), options=options)
    made = table.loader(chosen)(chosen, with_weights=with_weights)
    assert isinstance(made, convnext.ConvNext)
    return made


def pixels(height: int, width: int | None = None) -> Tensor:
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", [(64, 64), (96, 160)], ids=str)
def test_grid_and_vector_are_the_stock_models(folder: Path, size: tuple[int, int]) -> None:
    ours, stock = load(folder), transformers.DINOv3ConvNextModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found, expected = ours.features(pixels(*size), (ours.depth,)), stock(pixels(*size))
    assert expected.last_hidden_state.abs().mean() > 1e-3
    torch.testing.assert_close(found.pooled, expected.pooler_output, rtol=1e-5, atol=1e-5)
    tokens = found.grids[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected.last_hidden_state[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 6])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_and_suffix_are_the_whole(folder: Path, stop: int, checkpointing: bool) -> None:
    ours = load(folder, gradient_checkpointing=checkpointing)
    taps = ours.taps(2)
    assert taps == (3, 6)
    whole = ours.features(pixels(64), taps)
    parts = ours.features(pixels(64), taps, ours.prefix(pixels(64), stop, taps))
    assert [tuple(grid.shape) for grid in whole.grids] == [(2, 64, 4, 4)] * 2
    assert all(torch.equal(left, right) for left, right in zip(whole.grids, parts.grids, strict=True))


def test_bfloat16_stays_near(folder: Path) -> None:
    """Scales of branches are float32, what they are multiplied with is not."""
    ours = load(folder)
    with torch.no_grad():
        exact = ours.features(pixels(128), ours.taps(2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = ours.features(pixels(128), ours.taps(2))
    for left, right in zip((exact.pooled, *exact.grids), (rough.pooled, *rough.grids), strict=True):
        assert torch.linalg.vector_norm(left - right.float()) < 0.1 * torch.linalg.vector_norm(left)


def test_names_of_the_wire(folder: Path) -> None:
    ours = load(folder)
    names = {ours.wire_name(name) for name, _ in ours.model.named_parameters()}
    assert len(names) == sum(1 for _ in ours.model.parameters())
    assert {"embed.0.weight", "block.00.fc1.weight", "block.05.gamma", "block.03.merge.1.bias"} <= names
    assert {"block.02.conv.weight", "block.05.norm1.bias", "final_norm.weight"} <= names


def recipe(folder: Path, kind: str, **adapter: Any) -> schema.Recipe:
    values = {
        "backbone": {"name": str(folder)},
        "adapter": {"kind": kind, "rank": 2, **adapter},
        "task": {"kind": "segmentation"},
        "data": {"class_names": ["rest", "cell"], "input_size": [64, 64]},
    }
    return schema.parse(schema.Recipe, values, "recipe")


@pytest.mark.parametrize("kind", ["lora", "norm", "full"])
def test_adapters_train_and_go_round(folder: Path, kind: str) -> None:
    chosen = recipe(folder, kind, targets=["fc1", "fc2"])
    model = adapted_model.AdaptedModel(chosen)
    assert adapted_model.AdaptedModel(chosen, with_weights=False).manifest == model.manifest
    start = model.initial()
    model.write(start)
    optimiser = torch.optim.AdamW([each for group in model.trainable().values() for each in group], lr=0.05)
    for _ in range(2):
        optimiser.zero_grad()
        loss = model.task.loss(model(pixels(64)), torch.ones(2, 64, 64, dtype=torch.int64))
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    moved = model.read()
    assert all((moved[name] != start[name]).any() for name in start)
    other = adapted_model.AdaptedModel(chosen)
    other.write(moved)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(pixels(64)), model.eval()(pixels(64)), rtol=1e-3, atol=1e-3)


def test_attention_that_is_not_there_is_a_fault(folder: Path) -> None:
    _, faults = adapted_model.examine(recipe(folder, "lora", targets=["q", "v"]))
    assert any("'q'" in fault for fault in faults)
