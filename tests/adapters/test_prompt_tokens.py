"""Prompt tokens: where they enter and what sees them, in every family, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fedvfm
from fedvfm import errors
from fedvfm.config import schema
from fedvfm.inference import export
from fedvfm.model import adapted_model
from fedvfm.state import state

SHAPE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
MLP = {**SHAPE, "intermediate_size": 32}
DINO = {**SHAPE, "mlp_ratio": 2}
FAMILIES: dict[str, Any] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**MLP)),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**MLP)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO)),
    "registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**MLP, num_register_tokens=4)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**MLP)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**MLP)),
}
LEAD = {"vit": 1, "deit": 2, "dinov2": 1, "registers": 4, "dinov3": 5, "clip": 1, "siglip": 0}
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for name, build in FAMILIES.items():
            model = build()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(root / name)
    return {name: str(root / name) for name in FAMILIES}


def recipe(backbone: str, task: str = "segmentation", layers: tuple[int, ...] = (), **options: Any) -> schema.Recipe:
    values = {
        "backbone": {"name": backbone},
        "adapter": {"kind": "prompt-tokens", "layers": list(layers), "options": options},
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


def pixels(height: int = 56, width: int = 56) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(7))


def by_hand(model: adapted_model.AdaptedModel, image: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """Token sequences after each block, and how many tokens stand before the patches, by a slow second way."""
    backbone: Any = model.backbone
    hidden, arguments = backbone._embed(image)
    blocks = backbone.model.get_submodule(backbone.family.blocks)
    lead = LEAD[Path(model.recipe.backbone.name).name]
    prompts, sequences, before = 0, [], []
    for index, block in enumerate(blocks):
        name = f"block.{index:02d}.prompt"
        if name in model.injected.parameters:
            fresh = model.injected.parameters[name]
            rows = [torch.cat([one[:lead], fresh, one[lead + prompts :]]) for one in hidden]
            hidden, prompts = torch.stack(rows), len(fresh)
        answer = block(hidden, **arguments)
        hidden = answer[0] if isinstance(answer, tuple) else answer
        sequences.append(hidden)
        before.append(lead + prompts)
    return sequences, before


@every_family
@pytest.mark.parametrize(
    ("layers", "options"),
    [((), {"count": 3}), ((1, 2), {"count": 3}), ((0, 2), {"count": 2}), ((), {"depth": "shallow"})],
)
def test_tokens_stand_before_the_patches_and_no_head_sees_them(
    folders: dict[str, str], name: str, layers: tuple[int, ...], options: dict[str, Any]
) -> None:
    model = adapted(folders[name], layers=layers, **options)
    image = pixels(56, 84)
    with torch.no_grad():
        found = model.backbone.features(image, (1, 2, 3))
        sequences, before = by_hand(model, image)
        family: Any = model.backbone.family
        if family.final:
            sequences[-1] = model.backbone.model.get_submodule(family.final)(sequences[-1])
        for grid, tokens, skipped in zip(found.grids, sequences, before, strict=True):
            assert grid.shape == (2, 16, 4, 6)
            assert tokens.shape[1] == skipped + 24
            torch.testing.assert_close(grid.flatten(2).transpose(1, 2), tokens[:, skipped:], rtol=1e-5, atol=1e-5)
        pooled = sequences[-1][:, 0] if LEAD[name] else sequences[-1][:, before[-1] :].mean(dim=1)
        if family.pooled_norm:
            pooled = model.backbone.model.get_submodule(family.pooled_norm)(pooled)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-5, atol=1e-5)


@every_family
def test_without_its_tokens_the_model_is_the_backbone(folders: dict[str, str], name: str) -> None:
    model = adapted(folders[name])
    plain = adapted_model.AdaptedModel(
        recipe(folders[name]).model_copy(update={"adapter": schema.AdapterConfig(kind="head-only")})
    )
    with torch.no_grad():
        prompted = model.backbone.features(pixels(), (1, 3))
        model.backbone.tokens.clear()
        ours, theirs = (one.backbone.features(pixels(), (1, 3)) for one in (model, plain))
    for one, other, with_tokens in zip(
        (*ours.grids, ours.pooled), (*theirs.grids, theirs.pooled), (*prompted.grids, prompted.pooled), strict=True
    ):
        assert torch.equal(one, other)
        assert not torch.allclose(one, with_tokens, rtol=1e-5, atol=1e-6)


@every_family
def test_prefix_equals_the_whole(folders: dict[str, str], name: str) -> None:
    for layers, frozen in (((2,), 2), ((1, 2), 1), ((), 0)):
        model = adapted(folders[name], layers=layers)
        assert model.frozen_blocks == frozen
        with torch.no_grad():
            torch.testing.assert_close(
                model(pixels(), model.frozen_prefix(pixels())), model(pixels()), rtol=1e-5, atol=1e-5
            )
    assert adapted(folders[name], depth="shallow").frozen_blocks == 0


def test_every_token_learns(folders: dict[str, str]) -> None:
    model = adapted(folders["vit"], layers=(0, 2), count=2)
    model.train()
    model(pixels()).square().sum().backward()
    for name, parameter in model.injected.parameters.items():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().amax(dim=1) > 0).all(), name


@pytest.mark.parametrize(("depth", "layers"), [("deep", (1, 2)), ("deep", ()), ("shallow", ())])
@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_saved_and_loaded_it_computes_the_same(
    folders: dict[str, str], tmp_path: Path, task: str, depth: str, layers: tuple[int, ...]
) -> None:
    model = adapted(folders["registers"], task, layers=layers, depth=depth)
    loaded = fedvfm.load_adapter(export.save(model, tmp_path / "adapter", {}))
    with torch.no_grad():
        assert torch.equal(loaded(pixels()), model(pixels()))
    assert "This kind is not one of PEFT's" in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(errors.ConfigError, match="no weights for"):
        export.merge(model)


def test_names_are_stable_and_first_values_bounded(folders: dict[str, str]) -> None:
    shallow = adapted_model.AdaptedModel(recipe(folders["vit"], depth="shallow"), with_weights=False)
    rows = {s.name: (s.shape, s.group, s.role) for s in shallow.injected.specs}
    assert rows == {"block.00.prompt": ((10, 16), "prompt", "dense")}
    deep = adapted_model.AdaptedModel(recipe(folders["vit"], layers=(2, 1), count=200), with_weights=False)
    assert [s.name for s in deep.injected.specs] == ["block.01.prompt", "block.02.prompt"]
    bound = (6 / (3 * 14 * 14 + 16)) ** 0.5
    first = deep.initial()
    assert not np.array_equal(first["block.01.prompt"], first["block.02.prompt"])
    for spec in deep.injected.specs:
        assert 0.98 * bound < np.abs(first[spec.name]).max() <= bound
        assert abs(first[spec.name].std() - bound / 3**0.5) < 0.03 * bound


def vit_b(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12})
    )
    return str(tmp_path)


def test_parameter_counts_on_vit_b(tmp_path: Path) -> None:
    """Literature: VPT-deep with 10 tokens trains 92 k numbers on ViT-B; shallow 10 tokens once."""
    folder = vit_b(tmp_path)
    for options, expected in (({}, 92_160), ({"depth": "shallow"}, 7_680), ({"depth": "shallow", "count": 50}, 38_400)):
        model = adapted_model.AdaptedModel(recipe(folder, **options), with_weights=False)
        assert sum(spec.size for spec in model.injected.specs) == expected


@pytest.mark.parametrize(
    ("layers", "options", "expected"),
    [
        ((), {"count": 0}, "recipe.adapter.options.count = 0: give a whole number from 1 to 1024"),
        ((), {"count": 2.5}, "recipe.adapter.options.count = 2.5: give a whole number"),
        ((), {"count": True}, "recipe.adapter.options.count = True: give a whole number"),
        ((), {"depth": "deeper"}, "recipe.adapter.options.depth = 'deeper': known: deep, shallow"),
        ((2,), {"depth": "shallow"}, "recipe.adapter.layers = [2]: shallow prompt tokens enter before block 0 alone"),
        ((), {"counts": 3}, "recipe.adapter.options.counts: unknown option of 'prompt-tokens'; known: depth, count"),
        ((9,), {}, "recipe.adapter.layers = [9]: backbone"),
    ],
)
def test_faults(folders: dict[str, str], layers: tuple[int, ...], options: dict[str, Any], expected: str) -> None:
    chosen = recipe(folders["vit"], layers=layers, **options)
    (found,) = adapted_model.examine(chosen)[1]
    assert found.startswith(expected)
    if options and "counts" not in options:
        with pytest.raises(errors.ConfigError, match=r"recipe\.adapter"):
            adapted_model.AdaptedModel(chosen)


def test_a_model_without_a_token_sequence_refuses(folders: dict[str, str]) -> None:
    (found,) = adapted_model.examine(recipe("unet"))[1]
    assert found == (
        "recipe.adapter.kind = 'prompt-tokens': backbone 'unet' takes no prompt tokens: it has no sequence of tokens"
    )
    dropped = schema.AdapterConfig(kind="prompt-tokens", dropout=0.1)
    (found,) = adapted_model.examine(recipe(folders["vit"]).model_copy(update={"adapter": dropped}))[1]
    assert found == "recipe.adapter.dropout = 0.1: prompt tokens are not dropped; leave it 0"
