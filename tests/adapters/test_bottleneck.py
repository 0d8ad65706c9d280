"""Bottlenecks: computed by hand at every side, zero at the start, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import fedvfm
from fedvfm import errors
from fedvfm.adapters import bottleneck
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.inference import export
from fedvfm.model import adapted_model
from fedvfm.state import state

SHAPE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
MLP = {**SHAPE, "intermediate_size": 32}
FAMILIES: dict[str, Any] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**MLP)),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**MLP)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, mlp_ratio=2)),
    "swiglu": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE, mlp_ratio=2, use_swiglu_ffn=True)),
    "registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, num_register_tokens=3)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**MLP, num_register_tokens=4)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**MLP)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**MLP)),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for name, build in FAMILIES.items():
            model = build()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(root / name)
    return {name: str(root / name) for name in FAMILIES}


def recipe(backbone: str, task: str = "segmentation", **adapter: Any) -> schema.Recipe:
    values = {
        "backbone": {"name": backbone},
        "adapter": {"kind": "adaptformer", **adapter},
        "task": {"kind": task},
        "data": {"class_names": ["rest", "cell"], "input_size": [56, 56]},
        "seed": 3,
    }
    return schema.parse(schema.Recipe, values, "recipe")


def adapted(*arguments: Any, **named: Any) -> adapted_model.AdaptedModel:
    """A model with every trainable number off its start."""
    model = adapted_model.AdaptedModel(recipe(*arguments, **named))
    rng = np.random.default_rng(0)
    moved = {key: a + rng.normal(0, 0.3, a.shape).astype(np.float32) for key, a in model.initial().items()}
    model.write(state.AdapterState(moved))
    return model.eval()


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(7))


@every_family
def test_it_is_added_to_the_residual_stream_of_its_block(folders: dict[str, str], name: str) -> None:
    """One block, by hand: the adapted output less the frozen one is scale * up(relu(down(LN(x'))))."""
    model = adapted(folders[name], options={"width": 5, "scale": 0.7}, layers=[0])
    frozen = adapted_model.AdaptedModel(recipe(folders[name], kind="head-only"))
    family: Any = model.backbone.family
    seen: list[torch.Tensor] = []
    norm = model.backbone.model.get_submodule(f"{family.blocks}.0.{family.norms[1]}")
    norm.register_forward_hook(lambda module, entering, leaving: seen.append(leaving))
    with torch.no_grad():
        ours = model.backbone.prefix(pixels(), 1, (1,)).hidden
        theirs = frozen.backbone.prefix(pixels(), 1, (1,)).hidden
        down, up = (
            [model.injected.parameters[f"block.00.ffn.{part}.{last}"] for last in ("weight", "bias")]
            for part in ("down", "up")
        )
        inner = (seen[0] @ down[0].T + down[1]).clamp(min=0)
        assert (inner > 0).any()
        assert (inner == 0).any()
        expected = 0.7 * (inner @ up[0].T + up[1])
    torch.testing.assert_close(ours - theirs, expected, rtol=1e-4, atol=1e-5)


@every_family
def test_at_the_start_nothing_changes_and_every_part_learns(folders: dict[str, str], name: str) -> None:
    model = adapted_model.AdaptedModel(recipe(folders[name], options={"width": 5}))
    model.write(model.initial())
    frozen = adapted_model.AdaptedModel(recipe(folders[name], kind="head-only"))
    with torch.no_grad():
        ours, theirs = (one.backbone.features(pixels(), (1, 3)) for one in (model, frozen))
    for one, other in zip((*ours.grids, ours.pooled), (*theirs.grids, theirs.pooled), strict=True):
        assert torch.equal(one, other)
    moved = adapted(folders[name], options={"width": 5})
    moved.train()
    moved(pixels()).square().sum().backward()
    for key, parameter in moved.injected.parameters.items():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_the_first_values_are_those_of_a_linear_layer(folders: dict[str, str]) -> None:
    model = adapted_model.AdaptedModel(recipe(folders["vit"]), with_weights=False)
    first = model.initial()
    names = [spec.name for spec in model.injected.specs]
    assert len(names) == 12
    for name in names:
        if name.endswith("down.weight"):
            assert 0.95 * 16**-0.5 < np.abs(first[name]).max() <= 16**-0.5
        else:
            assert not first[name].any(), name
    assert not np.array_equal(first["block.00.ffn.down.weight"], first["block.01.ffn.down.weight"])


class Twice(nn.Module):
    """A branch that answers with two values and takes its second argument by name."""

    def forward(self, entering: torch.Tensor, *, more: torch.Tensor) -> tuple[torch.Tensor, str]:
        return 2 * entering + more, "weights"


@pytest.mark.parametrize("side", ["beside", "behind", "before"])
def test_each_side_of_a_branch(side: Any) -> None:
    torch.manual_seed(0)
    own = bottleneck.Bottleneck(4, 3, 0.5, nn.functional.gelu, 0.0)
    nn.init.normal_(own.up.weight)
    model = nn.ModuleDict({"branch": Twice()})
    bottleneck.seat(model, backbones.Seat("block.00.ffn", ("branch",), 4, side), own)
    x, more = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    found, second = model["branch"](x, more=more)
    plain = 2 * x + more
    expected = {"beside": plain + own(x), "behind": plain + own(plain), "before": plain + 2 * own(x)}[side]
    torch.testing.assert_close(found, expected)
    assert second == "weights"


def test_a_branch_of_several_modules_keeps_its_weights_shared() -> None:
    first, last = nn.Linear(4, 6), nn.Linear(6, 4)
    model = nn.ModuleDict({"up": first, "rest": nn.ModuleDict({"down": last})})
    x = torch.randn(2, 4)
    own = bottleneck.Bottleneck(4, 3, 1.0, torch.relu, 0.0)
    bottleneck.seat(model, backbones.Seat("block.00.ffn", ("up", "rest.down"), 4), own)
    rest: Any = model["rest"]
    assert torch.equal(rest["down"](model["up"](x)), last(first(x)))
    assert {id(p) for p in (*first.parameters(), *last.parameters())} <= {id(p) for p in model.parameters()}


def test_two_models_on_one_backbone_do_not_see_each_other(folders: dict[str, str]) -> None:
    one, frozen = adapted(folders["dinov2"]), adapted_model.AdaptedModel(recipe(folders["dinov2"], kind="head-only"))
    with torch.no_grad():
        ours, theirs = (model.backbone.features(pixels(), (3,)).grids[0] for model in (one, frozen))
    assert not torch.allclose(ours, theirs, atol=1e-3)
    kept = {p.data_ptr() for p in frozen.backbone.model.parameters()}
    assert kept <= {p.data_ptr() for p in one.backbone.model.parameters()}, "one copy of the frozen weights"


def test_layers_choose_blocks_and_dropout_is_drawn_in_training_only(folders: dict[str, str]) -> None:
    model = adapted(folders["vit"], layers=[2], dropout=0.5)
    assert {spec.name for spec in model.injected.specs} == {
        f"block.02.ffn.{part}.{last}" for part in ("down", "up") for last in ("weight", "bias")
    }
    assert model.frozen_blocks == 2
    with torch.no_grad():
        prefix = model.frozen_prefix(pixels())
        torch.testing.assert_close(model(pixels(), prefix), model(pixels()), rtol=1e-5, atol=1e-5)
        model.train()
        assert not torch.equal(model(pixels()), model(pixels()))
        model.eval()
        assert torch.equal(model(pixels()), model(pixels()))


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_saved_and_loaded_it_computes_the_same(folders: dict[str, str], tmp_path: Path, task: str) -> None:
    model = adapted(folders["dinov2"], task, layers=[1, 2], options={"width": 6, "scale": 2})
    loaded = fedvfm.load_adapter(export.save(model, tmp_path / "adapter", {}))
    with torch.no_grad():
        assert torch.equal(loaded(pixels()), model(pixels()))
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    with pytest.raises(errors.ConfigError, match="no weights for"):
        export.merge(model)


def test_parameter_count_on_vit_b(tmp_path: Path) -> None:
    """Chen et al., table 1: AdaptFormer-64 trains 1.19 M numbers on ViT-B."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12})
    )
    for width, expected in ((64, 1_189_632), (1, 27_660)):
        model = adapted_model.AdaptedModel(recipe(str(tmp_path), options={"width": width}), with_weights=False)
        assert sum(spec.size for spec in model.injected.specs) == expected == 12 * (2 * 768 * width + width + 768)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"width": 0}, "recipe.adapter.options.width = 0: give a whole number from 1 to 4096"),
        ({"width": 8.0}, "recipe.adapter.options.width = 8.0: give a whole number"),
        ({"width": "wide"}, "recipe.adapter.options.width = 'wide': give a whole number"),
        ({"scale": 0}, "recipe.adapter.options.scale = 0: give a number from 0.001 to 100"),
        ({"scale": [0.1]}, "recipe.adapter.options.scale = [0.1]: give a number"),
        ({"withd": 8}, "recipe.adapter.options.withd: unknown option of 'adaptformer'; known: width, scale; nearest"),
    ],
)
def test_faults(folders: dict[str, str], options: dict[str, Any], expected: str) -> None:
    chosen = recipe(folders["vit"], options=options)
    (found,) = adapted_model.examine(chosen)[1]
    assert found.startswith(expected)
    if "withd" not in options:
        with pytest.raises(errors.ConfigError, match="give a"):
            adapted_model.AdaptedModel(chosen)
