"""Bottlenecks between neighbouring slices: by hand, at the start as the model without them, for the middle slice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedvfm
from fedvfm.adapters import bottleneck
from fedvfm.config import schema
from fedvfm.data import transforms
from fedvfm.inference import export
from fedvfm.model import adapted_model, memory
from fedvfm.state import state

FAMILIES = ("sam", "sam_hq", "sam2", "sam3", "tinyvit")


def recipe(folder: Path, depth: Any = True, stack: int = 3, **more: Any) -> schema.Recipe:
    side = 56 if folder.name == "sam3" else 64
    adapter = {"kind": "medical-sam-adapter", "options": {"depth": depth}, **more.pop("adapter", {})}
    data = {"class_names": ["rest", "front", "back"], "input_size": [side, side], "stack": stack}
    values = {"backbone": {"name": str(folder)}, "adapter": adapter, "data": data, "seed": 3, **more}
    return schema.parse(schema.Recipe, values, "recipe")


def slices(folder: Path, count: int = 2) -> torch.Tensor:
    """Stacks as a contract without normalisation of its own shows them. Shapes: (count, 3, H, W)."""
    side = 56 if folder.name == "sam3" else 64
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(7))


def normalised(chosen: schema.Recipe, stacks: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(transforms.normalise(stacks.numpy(), chosen.data))


def moved(chosen: schema.Recipe) -> adapted_model.AdaptedModel:
    model, rng = adapted_model.AdaptedModel(chosen), np.random.default_rng(0)
    start = model.initial()
    model.write(
        state.AdapterState({name: a + rng.normal(0, 0.2, a.shape).astype(np.float32) for name, a in start.items()})
    )
    return model.eval()


def test_a_bottleneck_between_slices_by_hand() -> None:
    torch.manual_seed(1)
    module = bottleneck.DepthBottleneck(4, 2, 0.5, nn.functional.gelu, 0.0, 3)
    entering = torch.randn(6, 5, 4)
    assert not module(entering).any(), "zero at the start"
    nn.init.normal_(module.up.weight)
    nn.init.normal_(module.up.bias)
    # The same as torch's own convolution over depth: a kernel of (slice below, the slice, slice above).
    narrow = nn.functional.gelu(module.down(entering)).reshape(2, 3, 5, 2).permute(0, 3, 1, 2)[..., None]
    kernel = module.up.weight.reshape(4, 3, 2).permute(0, 2, 1)[..., None, None]
    wide = nn.functional.conv3d(narrow, kernel, module.up.bias, padding=(1, 0, 0))[..., 0]
    expected = 0.5 * wide.permute(0, 2, 3, 1).reshape(6, 5, 4)
    torch.testing.assert_close(module(entering), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_model_of_the_middle_slice_and_learns_from_its_neighbours(
    sam_folders: dict[str, Path], family: str
) -> None:
    folder = sam_folders[family]
    chosen, stacks = recipe(folder, adapter={"layers": [1, 2]}), slices(folder)
    assert adapted_model.examine(chosen)[1] == []
    model = adapted_model.AdaptedModel(chosen).eval()
    model.write(model.initial())
    single = adapted_model.AdaptedModel(recipe(folder, depth=False, stack=1, adapter={"layers": [1, 2]})).eval()
    single.write(single.initial())
    pixels, middle = normalised(chosen, stacks), normalised(chosen, stacks[:, 1:2].expand(-1, 3, -1, -1))
    with torch.no_grad():
        assert_near(model(pixels), single(middle))
    model.train()
    model = moved(chosen)
    assert (model.backbone.slices, model.backbone.joined, model.frozen_blocks) == (3, 3, 1)
    # Of all that trains a gradient, and of both neighbours.
    seen = pixels.clone().requires_grad_()
    model(seen)[0].square().mean().backward()
    assert seen.grad is not None
    assert (seen.grad[0].abs().sum(dim=(1, 2)) > 0).all(), "each slice of the sample"
    assert not seen.grad[1].any(), "no slice of another sample"
    for name, parameter in model.injected.parameters.items():
        if ".depth." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    with torch.no_grad():
        whole, prefix = model(pixels), model.frozen_prefix(pixels)
        assert len(prefix.hidden) == 6
        assert_near(model(pixels, prefix), whole)
        assert_near(model(pixels[:1]), whole[:1])


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To rounding of float32, which is of the largest logit: a small one is a difference of large ones."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.slow
def test_depth_with_automatic_prompts_file_and_export(sam_folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    folder = sam_folders["tinyvit"]
    chosen = recipe(folder, adapter={"layers": [3]}, task={"prompt": "auto"})
    model, pixels = moved(chosen), normalised(chosen, slices(folder))
    saved = export.save(model, tmp_path / "adapter", {})
    loaded = fedvfm.load_adapter(saved)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels), model(pixels))
    fedvfm.export_adapter(saved, tmp_path / "onnx", "onnx")  # refused where the graph computes something else


def test_names_on_the_wire_and_memory(sam_folders: dict[str, Path]) -> None:
    chosen = recipe(sam_folders["sam"], adapter={"layers": [1]})
    model = adapted_model.AdaptedModel(chosen, with_weights=False)
    assert {spec.name: spec.shape for spec in model.manifest if ".depth." in spec.name} == {
        "block.01.depth.down.weight": (8, 32),
        "block.01.depth.down.bias": (8,),
        "block.01.depth.up.weight": (32, 24),
        "block.01.depth.up.bias": (32,),
    }
    beside = adapted_model.AdaptedModel(recipe(sam_folders["sam"], False, adapter={"layers": [1]}), with_weights=False)
    assert memory.feature_bytes(model, (64, 64)) == 3 * memory.feature_bytes(beside, (64, 64))
    assert memory.activations(model) > memory.activations(beside)


def test_refusals(sam_folders: dict[str, Path]) -> None:
    def fault(chosen: schema.Recipe) -> str:
        return "; ".join(adapted_model.examine(chosen)[1])

    assert "recipe.adapter.options.depth = 1: give true or false" in fault(recipe(sam_folders["sam"], depth=1))
    assert "which recipe.data.stack = 1 does not show" in fault(recipe(sam_folders["sam"], stack=1))
    other = recipe(sam_folders["sam"], adapter={"kind": "adaptformer"})
    assert "recipe.adapter.options.depth: unknown option of 'adaptformer'" in fault(other)
