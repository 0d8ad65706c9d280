"""Every adapter kind in every backbone: identity at the start, only the manifest moves, round trips, stable names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedvfm import errors
from fedvfm.backbones import base as backbones
from fedvfm.backbones import table as backbone_table
from fedvfm.config import schema
from fedvfm.model import adapted_model
from fedvfm.state import state

GOLDEN = Path(__file__).with_name("golden_names.json")
KINDS = ("lora", "core", "norm", "bias", "head-only", "full", "adaptformer", "prompt-tokens")
MLP = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "intermediate_size": 64,
    "patch_size": 14,
}


@pytest.fixture(scope="session")
def folders(tiny_dino: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Backbone -> its name in a recipe: a folder of tiny random weights, or ``unet``."""
    root = tmp_path_factory.mktemp("matrix")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        made: dict[str, Any] = {
            "vit": transformers.ViTModel(transformers.ViTConfig(**MLP)),
            "dinov3": transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**MLP)),
            "clip": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**MLP)),
            "siglip": transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**MLP)),
        }
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {"dinov2": str(tiny_dino), **{name: str(root / name) for name in made}, "unet": "unet"}


def recipe(backbone: str, kind: str = "lora", task: str = "segmentation", **adapter: Any) -> schema.Recipe:
    options = {"channels": [4, 8]} if backbone == "unet" else {}
    values = {
        "backbone": {"name": backbone, "options": options},
        "adapter": {"kind": kind, "rank": 2, **adapter},
        "task": {"kind": task},
        "data": {"class_names": ["rest", "cell"], "input_size": [56, 56]},
        "seed": 3,
    }
    return schema.parse(schema.Recipe, values, "recipe")


PAIRS = [(name, kind) for name in ("dinov2", "vit", "dinov3", "clip", "siglip") for kind in KINDS] + [("unet", "full")]
matrix = pytest.mark.parametrize(("name", "kind"), PAIRS)
pretrained = pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS[:-1] if pair[1] != "prompt-tokens"])
partly_frozen = pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] != "full"])


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(7))


def steps(model: adapted_model.AdaptedModel, number: int = 2) -> None:
    groups = model.trainable()
    optimiser = torch.optim.AdamW([p for group in groups.values() for p in group], lr=0.05)
    target = torch.randint(0, 2, (2, 56, 56), generator=torch.Generator().manual_seed(9))
    model.train()
    for _ in range(number):
        optimiser.zero_grad()
        model.task.loss(model(pixels()), target).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.eval()


def fresh_backbone(name: str) -> backbones.Backbone:
    chosen = recipe(name).backbone
    found: backbones.Backbone = backbone_table.loader(chosen)(chosen)
    return found


@pretrained
def test_at_the_start_the_model_computes_what_the_backbone_computes(
    folders: dict[str, str], name: str, kind: str
) -> None:
    model = adapted_model.AdaptedModel(recipe(folders[name], kind))
    model.write(model.initial())
    plain = fresh_backbone(folders[name])
    with torch.no_grad():
        ours = model.backbone.features(pixels(), model.taps)
        theirs = plain.features(pixels(), model.taps)
    for one, other in zip((*ours.grids, ours.pooled), (*theirs.grids, theirs.pooled), strict=True):
        assert torch.equal(one, other)


@matrix
def test_training_moves_the_manifest_and_nothing_else(folders: dict[str, str], name: str, kind: str) -> None:
    model = adapted_model.AdaptedModel(recipe(folders[name], kind))
    start = model.initial()
    model.write(start)
    trained = {id(p) for group in model.trainable().values() for p in group}
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if id(p) not in trained}
    assert (
        sum(p.numel() for group in model.trainable().values() for p in group)
        == model.manifest.parameters
        == start.parameters
    )
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        key for key, p in model.named_parameters() if id(p) in trained
    }
    steps(model)
    for key, before in frozen.items():
        assert torch.equal(before, model.get_parameter(key)), key
    after = model.read()
    assert list(after) == [spec.name for spec in model.manifest]
    moved = {key.split(".")[0] for key in after if not np.array_equal(after[key], start[key])}
    assert "head" in moved
    assert (moved == {"head"}) == (kind == "head-only")


@matrix
def test_state_round_trip(folders: dict[str, str], name: str, kind: str) -> None:
    chosen = recipe(folders[name], kind)
    one, other = adapted_model.AdaptedModel(chosen), adapted_model.AdaptedModel(chosen)
    one.write(one.initial())
    assert one.read().fingerprint == one.initial().fingerprint
    steps(one)
    learned = one.read()
    assert learned.fingerprint != one.initial().fingerprint
    other.write(learned)
    assert other.read().fingerprint == learned.fingerprint, "what was written is what is read, to the last bit"
    other.eval()
    with torch.no_grad():
        torch.testing.assert_close(other(pixels()), one(pixels()), rtol=1e-4, atol=1e-5)


@matrix
def test_the_first_adapter_is_seeded_and_needs_no_weights(folders: dict[str, str], name: str, kind: str) -> None:
    chosen = recipe(folders[name], kind)
    model = adapted_model.AdaptedModel(chosen)
    real = model.locked()
    shapes = adapted_model.AdaptedModel(chosen, with_weights=False)
    meta = shapes.locked()
    assert meta.manifest == real.manifest
    assert meta.initial == real.initial
    assert {spec.name: spec.shape for spec in real.manifest} == {
        key: value.shape for key, value in real.adapter.items()
    }
    assert meta.backbone_parameters == real.backbone_parameters > 0
    assert all(p.device.type == "meta" for p in shapes.backbone.model.parameters())
    other = adapted_model.AdaptedModel(chosen.model_copy(update={"seed": 4}), with_weights=False).locked()
    assert other.initial != real.initial
    torch.manual_seed(123)
    again = adapted_model.AdaptedModel(chosen).locked()
    assert again.initial == real.initial
    model.write(real.adapter)


def test_building_a_model_leaves_the_global_random_state_alone(folders: dict[str, str]) -> None:
    for name, kind in (("dinov2", "lora"), ("dinov2", "full"), ("unet", "full")):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        adapted_model.AdaptedModel(recipe(folders[name], kind))
        assert torch.equal(torch.rand(3), expected), (name, kind)


@partly_frozen
def test_prefix_equals_the_whole_and_does_not_move(folders: dict[str, str], name: str, kind: str) -> None:
    model = adapted_model.AdaptedModel(recipe(folders[name], kind, layers=[2, 3]))
    model.write(model.initial())
    assert model.frozen_blocks == (4 if kind == "head-only" else 2)
    before = model.frozen_prefix(pixels())
    steps(model)
    after = model.frozen_prefix(pixels())
    assert torch.equal(before.hidden, after.hidden)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels(), after), model(pixels()), rtol=1e-5, atol=1e-5)


def test_frozen_parts_of_a_backbone_from_scratch_are_seeded_too() -> None:
    """Every site builds its own: what does not travel must be the same everywhere."""
    chosen = recipe("unet", "head-only")
    torch.manual_seed(1)
    one = adapted_model.AdaptedModel(chosen)
    torch.manual_seed(2)
    other = adapted_model.AdaptedModel(chosen)
    for (name, ours), (_, theirs) in zip(
        one.backbone.named_parameters(), other.backbone.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    whole = adapted_model.AdaptedModel(recipe("unet", "full"))
    whole.write(whole.initial())
    for (name, ours), (_, theirs) in zip(
        one.backbone.named_parameters(), whole.backbone.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_without_layers_everything_is_adapted(folders: dict[str, str]) -> None:
    for kind, frozen in (*((kind, 0) for kind in KINDS if kind != "head-only"), ("head-only", 4)):
        assert adapted_model.AdaptedModel(recipe(folders["dinov2"], kind), with_weights=False).frozen_blocks == frozen
    one = adapted_model.AdaptedModel(
        recipe(folders["dinov2"], "lora", layers=[3, 3], targets=["q", "fc2"]), with_weights=False
    )
    names = {spec.name for spec in one.manifest if spec.group == "lora"}
    assert names == {"block.03.q.A", "block.03.q.B", "block.03.fc2.A", "block.03.fc2.B"}
    assert one.frozen_blocks == 3


def test_dropout_is_drawn_in_training_only(folders: dict[str, str]) -> None:
    model = adapted_model.AdaptedModel(recipe(folders["dinov2"], "lora", dropout=0.5))
    model.write(model.initial())
    steps(model)
    with torch.no_grad():
        assert torch.equal(model(pixels()), model(pixels()))
        model.train()
        assert not torch.equal(model(pixels()), model(pixels()))
        model.eval()
        assert torch.equal(model(pixels()), model(pixels()))


def test_scale_stands_in_the_manifest_and_in_the_model(folders: dict[str, str]) -> None:
    model = adapted_model.AdaptedModel(recipe(folders["dinov2"], "lora", rank=4, alpha=6.0))
    assert {spec.scale for spec in model.manifest if spec.pair} == {1.5}
    assert {spec.scale for spec in model.manifest if not spec.pair} == {1.0}
    layer: Any = model.backbone.model.get_submodule(str(model.backbone.projection(1, "v")))
    assert layer.scale == 1.5
    pairs = model.manifest.pairs()
    assert pairs["block.01.v"][0].shape == (4, 32)
    assert pairs["block.01.v"][1].shape == (32, 4)


def test_names_on_the_wire_are_stable(folders: dict[str, str]) -> None:
    """An adapter of an earlier release must load: names, shapes, groups and roles are a promise."""
    golden = json.loads(GOLDEN.read_text())
    for kind in KINDS:
        for task in ("segmentation", "classification"):
            model = adapted_model.AdaptedModel(recipe(folders["dinov2"], kind, task), with_weights=False)
            rows = [[s.name, list(s.shape), s.group, s.role, s.pair] for s in model.manifest]
            assert rows == golden[kind][task]


# -- faults ----------------------------------------------------------------------------------------------------------


def faults(*arguments: Any, **adapter: Any) -> list[str]:
    return adapted_model.examine(recipe(*arguments, **adapter))[1]


def test_faults_of_each_kind(folders: dict[str, str]) -> None:
    dino = folders["dinov2"]
    assert [faults(dino, kind) for kind in KINDS] == [[]] * len(KINDS)
    assert faults("unet", "full") == []
    for kind in KINDS:
        assert any(
            "recipe.adapter.layers = [4, 9]" in f and "blocks 0 to 3" in f for f in faults(dino, kind, layers=[0, 4, 9])
        ), kind
    assert "recipe.adapter.targets = ['q', 'w']: known: q, k, v, o, fc1, fc2" in faults(
        dino, "lora", targets=["q", "w"]
    )
    assert any("recipe.adapter.targets = []" in f for f in faults(dino, "lora", targets=[]))
    for kind in ("lora", "core", "norm", "bias", "adaptformer"):
        assert any("backbone 'unet'" in f and "use kind 'full'" in f for f in faults("unet", kind)), kind
    assert any("layers" in f for f in faults("unet", "full", layers=[0]))
    for kind in ("norm", "bias", "full"):
        assert any("recipe.adapter.dropout = 0.1" in f and "leave it 0" in f for f in faults(dino, kind, dropout=0.1))


def test_all_faults_come_at_once(folders: dict[str, str]) -> None:
    found = faults(folders["dinov2"], "lorra", task="segmentatio")
    assert any("nearest: 'lora'" in f for f in found)
    assert any("nearest: 'segmentation'" in f for f in found)
    found = faults("dinov2-smal", "lorra")
    assert any("nearest: 'dinov2-small'" in f for f in found)
    assert any("nearest: 'lora'" in f for f in found)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(folders: dict[str, str], change: str) -> None:
    model = adapted_model.AdaptedModel(recipe(folders["dinov2"]))
    model.write(model.initial())
    arrays = {key: value + np.float32(1) for key, value in model.initial().items()}
    if change == "missing":
        arrays.popitem()
    elif change == "extra":
        arrays["more"] = np.zeros(1, np.float32)
    else:
        arrays["block.00.q.A"] = np.zeros((3, 32), np.float32)
    with pytest.raises(errors.CheckpointError, match="belongs to another recipe or backbone"):
        model.write(state.AdapterState(arrays))
    assert model.read().fingerprint == model.initial().fingerprint
