"""Every adapter kind in every promptable model: pairs on slices, decoder parts by name, further mask tokens, PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

import fedvfm
from fedvfm import errors
from fedvfm.adapters import fused
from fedvfm.backbones import base as backbones
from fedvfm.backbones import table as backbone_table
from fedvfm.config import schema
from fedvfm.inference import export
from fedvfm.model import adapted_model
from fedvfm.state import state

FAMILIES = ("sam", "sam_hq", "sam2", "sam3")
KINDS = ("lora", "core", "norm", "bias", "head-only", "full")
DEFAULT = ("upscale", "output_hypernetworks_mlps", "mask_tokens")
STOCK = {"sam": "SamModel", "sam2": "Sam2Model", "sam3": "Sam3TrackerModel"}
PAIRS = [(family, kind) for family in FAMILIES for kind in KINDS]
matrix = pytest.mark.parametrize(("family", "kind"), PAIRS)
part = pytest.mark.parametrize(("family", "kind"), [(f, kind) for f, kind in PAIRS if f == "sam" or kind == "lora"])


def side(folder: Path | str) -> int:
    return 56 if Path(folder).name == "sam3" else 64


def recipe(folder: Path | str, kind: str = "lora", classes: int = 3, task: Any = None, **adapter: Any) -> schema.Recipe:
    values = {
        "backbone": {"name": str(folder)},
        "adapter": {"kind": kind, "rank": 2, "alpha": 6.0, **adapter},
        "task": task or {},
        "data": {"class_names": [f"class {k}" for k in range(classes)], "input_size": [side(folder)] * 2},
        "seed": 3,
    }
    return schema.parse(schema.Recipe, values, "recipe")


def pixels(folder: Path | str) -> torch.Tensor:
    return torch.randn(2, 3, side(folder), side(folder), generator=torch.Generator().manual_seed(7))


def started(folder: Path | str, *arguments: Any, **adapter: Any) -> adapted_model.AdaptedModel:
    model = adapted_model.AdaptedModel(recipe(folder, *arguments, **adapter))
    model.write(model.initial())
    return model.eval()


def moved(folder: Path | str, *arguments: Any, **adapter: Any) -> adapted_model.AdaptedModel:
    """A model whose every trainable number is off its start, as after training."""
    model, rng = started(folder, *arguments, **adapter), np.random.default_rng(0)
    start = model.initial()
    model.write(
        state.AdapterState({name: a + rng.normal(0, 0.1, a.shape).astype(np.float32) for name, a in start.items()})
    )
    return model


def step(model: adapted_model.AdaptedModel, image: torch.Tensor) -> None:
    groups = model.trainable()
    optimiser = torch.optim.AdamW([p for group in groups.values() for p in group], lr=0.02)
    target = torch.randint(0, 3, (2, *image.shape[2:]), generator=torch.Generator().manual_seed(9))
    model.train()
    for _ in range(2):
        optimiser.zero_grad()
        model.task.loss(model(image), target).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.eval()


@torch.no_grad()
def masks(model: adapted_model.AdaptedModel, image: torch.Tensor) -> torch.Tensor:
    found = model.backbone.features(image, model.taps).masks
    assert found is not None
    return found


def plain(folder: Path | str, classes: int = 3) -> backbones.Backbone:
    chosen = recipe(folder).backbone
    made: backbones.Backbone = backbone_table.loader(chosen)(chosen)
    made.open_masks(classes, 3)
    return made


# -- the matrix ------------------------------------------------------------------------------------------------------


@matrix
def test_adapter_off_is_the_backbone_and_training_moves_the_manifest_alone(
    sam_folders: dict[str, Path], family: str, kind: str
) -> None:
    folder = sam_folders[family]
    model, image = started(folder, kind), pixels(folder)
    with torch.no_grad():
        expected = plain(folder).features(image, model.taps)
        assert expected.masks is not None
        ours = model.backbone.features(image, model.taps)
        # Adding nothing to a slice is another kernel: equal but for the last bits.
        torch.testing.assert_close(ours.masks, expected.masks, rtol=1e-5, atol=1e-5)
        logits = model(image)
    wanted = backbones.resize(expected.masks[:, :3], image.shape[2:])
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)

    trained = {id(p) for group in model.trainable().values() for p in group}
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if id(p) not in trained}
    assert {key for key, p in model.named_parameters() if p.requires_grad}.isdisjoint(frozen)
    start = model.read()
    step(model, image)
    for key, before in frozen.items():
        assert torch.equal(before, model.get_parameter(key)), key
    after = model.read()
    assert list(after) == [spec.name for spec in model.manifest]
    still = {name for name in after if np.array_equal(after[name], start[name])}
    if kind == "lora":
        assert not still
    with torch.no_grad():
        assert not torch.allclose(model(image), logits, atol=1e-3)
        other = plain(folder).features(image, model.taps).masks
    assert other is not None
    assert torch.equal(other, expected.masks), "another model on the same tensors"


@part
def test_state_round_trip_and_shapes_without_weights(sam_folders: dict[str, Path], family: str, kind: str) -> None:
    folder, image = sam_folders[family], pixels(sam_folders[family])
    one, other = moved(folder, kind, 5), started(folder, kind, 5)
    learned = one.read()
    other.write(learned)
    assert other.read().fingerprint == learned.fingerprint
    with torch.no_grad():
        assert torch.equal(one(image), other(image))
    meta = adapted_model.AdaptedModel(recipe(folder, kind, 5), with_weights=False).locked()
    real = adapted_model.AdaptedModel(recipe(folder, kind, 5)).locked()
    assert meta.manifest == real.manifest == one.manifest
    assert meta.initial == real.initial
    assert meta.recipe == real.recipe == one.recipe
    assert meta.backbone_parameters == real.backbone_parameters


@part
def test_merged_equals_unmerged(sam_folders: dict[str, Path], family: str, kind: str) -> None:
    folder, image = sam_folders[family], pixels(sam_folders[family])
    model = moved(folder, kind, 5, **({"targets": ["q", "v", "o", "fc2"]} if kind == "lora" else {}))
    before = masks(model, image)
    merged = export.merge(model)
    assert not [path for path, _ in merged.named_parameters() if "lora" in path or "pairs" in path]
    witness = plain(folder, 5)
    witness.model = merged.eval()
    with torch.no_grad():
        after = witness.features(image, model.taps).masks
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(masks(model, image), before)
    assert not {p.data_ptr() for p in model.backbone.model.parameters()} & {p.data_ptr() for p in merged.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(("parts", "least", "most"), [(None, 0.8, 1.0), ((), 0.0, 0.6)], ids=["default", "LoRA only"])
def test_four_discs_are_learned_by_heart_with_decoder_parts_and_not_without(
    sam_folders: dict[str, Path], parts: Any, least: float, most: float
) -> None:
    """On random weights this shows the mechanics alone: nothing is said of SAM."""
    rng, (rows, columns) = np.random.default_rng(0), np.mgrid[:64, :64]
    discs = np.stack(
        [(rows - y) ** 2 + (columns - x) ** 2 < r**2 for y, x, r in rng.uniform((20, 20, 8), (44, 44, 14), (4, 3))]
    )
    image = torch.tensor(2.0 * discs[:, None] + rng.normal(0, 0.2, (4, 3, 64, 64)), dtype=torch.float32)
    target = torch.tensor(discs).long()
    model = started(sam_folders["sam"], "lora", 2, parts=parts)
    trained = [p for group in model.trainable().values() for p in group]
    optimiser = torch.optim.AdamW(trained, lr=0.01)
    model.train()
    for _ in range(60):
        optimiser.zero_grad()
        model.task.loss(model(image), target).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    found = model(image).argmax(dim=1)
    dice = 2 * float((found * target).sum()) / float(found.sum() + target.sum())
    assert least <= dice <= most


# -- pairs on slices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [("q", "v"), ("v", "q"), ("k",), ("q", "k", "v")], ids="-".join)
def test_a_pair_changes_its_own_rows_alone(sam_folders: dict[str, Path], targets: tuple[str, ...]) -> None:
    model = moved(sam_folders["sam"], targets=targets, parts=())
    learned = model.read()
    layer = model.backbone.model.get_submodule("vision_encoder.layers.2.attn.qkv")
    assert isinstance(layer, fused.Fused)
    delta = layer.folded().weight - layer.base.weight
    assert not layer.folded().weight.requires_grad
    for part, rows in zip("qkv", delta.detach().split(32), strict=True):
        if part not in targets:
            assert torch.equal(rows, torch.zeros_like(rows)), part
            continue
        assert torch.linalg.matrix_rank(rows, tol=1e-4) == 2
        down, up = (torch.tensor(learned[f"block.02.{part}.{role}"]) for role in "AB")
        torch.testing.assert_close(rows, 3.0 * up @ down, rtol=1e-4, atol=1e-5)
    entering = torch.randn(2, 5, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(entering), layer.folded()(entering), rtol=1e-4, atol=1e-5)
        down, up = layer.block_form()
        assert (down.shape, up.shape) == ((2 * len(targets), 32), (96, 2 * len(targets)))
        torch.testing.assert_close(3.0 * up @ down, delta.detach(), rtol=1e-4, atol=1e-5)


def test_manifest_of_the_default(sam_folders: dict[str, Path]) -> None:
    """Names, shapes, groups and roles are a promise: an adapter of an earlier release must load."""
    model = started(sam_folders["sam"], "lora", 2, layers=[1])
    rows = {spec.name: (spec.shape, spec.group, spec.role, spec.pair, spec.scale) for spec in model.manifest}
    pairs = {
        f"block.01.{part}.{role}": (shape, "lora", role, f"block.01.{part}", 3.0)
        for part in "qv"
        for role, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    shapes = {"upscale_conv1.weight": (16, 4, 2, 2), "upscale_conv1.bias": (4,), "mask_tokens.weight": (4, 16)}
    shapes |= {"upscale_conv2.weight": (4, 2, 2, 2), "upscale_conv2.bias": (2,)}
    shapes |= {"upscale_layer_norm.weight": (4,), "upscale_layer_norm.bias": (4,)}
    for token in range(4):
        for layer, out in (("proj_in", 16), ("layers.0", 16), ("proj_out", 2)):
            shapes[f"output_hypernetworks_mlps.{token}.{layer}.weight"] = (out, 16)
            shapes[f"output_hypernetworks_mlps.{token}.{layer}.bias"] = (out,)
    parts = {f"decoder.{name}": (shape, "decoder", "dense", "", 1.0) for name, shape in shapes.items()}
    assert rows == pairs | parts
    assert model.frozen_blocks == 1
    assert not any(model.initial()[name].any() for name in parts), "decoder parts travel as differences"
    assert {spec.group for spec in model.manifest.pairs()["block.01.q"]} == {"lora"}


def test_dropout_is_drawn_in_training_only_and_for_each_pair(sam_folders: dict[str, Path]) -> None:
    model, image = moved(sam_folders["sam"], dropout=0.5), pixels(sam_folders["sam"])
    with torch.no_grad():
        assert torch.equal(model(image), model(image))
        model.train()
        assert not torch.equal(model(image), model(image))
        model.eval()
        assert torch.equal(model(image), model(image))
        layer: Any = model.backbone.model.get_submodule("vision_encoder.layers.2.attn.qkv")
        layer.pairs["q"].A.copy_(torch.eye(32)[:2]), layer.pairs["v"].A.copy_(torch.eye(32)[:2])
        layer.pairs["v"].B.copy_(layer.pairs["q"].B)
        model.train()
        change = layer(torch.ones(4, 32)) - layer.base(torch.ones(4, 32))
    assert not torch.equal(change[:, :32], change[:, 64:])


def test_decoder_parts_learn_at_the_heads_rate(sam_folders: dict[str, Path]) -> None:
    groups = started(sam_folders["sam"]).trainable()
    assert len(groups["adapter"]) == 4 * 4
    assert len(groups["head"]) == 31


# -- what the recipe states ------------------------------------------------------------------------------------------


def test_the_resolved_recipe_states_head_and_parts(sam_folders: dict[str, Path], tiny_dino: Path) -> None:
    open_ = recipe(sam_folders["sam"])
    assert (open_.task.head, open_.adapter.parts) == (None, None)
    model = adapted_model.AdaptedModel(open_, with_weights=False)
    locked = model.locked()
    assert (locked.recipe.task.head, locked.recipe.adapter.parts) == ("sam-masks", DEFAULT)
    assert locked.recipe == model.recipe
    again = adapted_model.AdaptedModel(locked.recipe, with_weights=False).locked()
    assert again.recipe.hash == locked.recipe.hash
    assert again.initial == locked.initial
    assert json.loads(locked.recipe.model_dump_json())["adapter"]["parts"] == list(DEFAULT)
    for changes in ({"kind": "full"}, {"task": {"head": "pyramid"}}, {"task": {"kind": "classification"}}):
        assert (
            adapted_model.AdaptedModel(recipe(sam_folders["sam"], **changes), with_weights=False)
            .locked()
            .recipe.adapter.parts
            == ()
        )
    dino = adapted_model.AdaptedModel(
        recipe(tiny_dino).model_copy(update={"data": recipe("x/sam3").data}), with_weights=False
    ).locked()
    assert (dino.recipe.task.head, dino.recipe.adapter.parts) == (None, ())


def test_lora_only_is_asked_for_by_an_empty_list(sam_folders: dict[str, Path]) -> None:
    model = adapted_model.AdaptedModel(recipe(sam_folders["sam"], parts=[]), with_weights=False)
    locked = model.locked()
    assert locked.recipe.adapter.parts == ()
    assert {spec.group for spec in model.manifest} == {"lora"}
    named = adapted_model.AdaptedModel(recipe(sam_folders["sam"], parts=["mask_tokens", "decoder"]), with_weights=False)
    whole = sum(p.numel() for p in named.backbone.model.get_submodule("mask_decoder").parameters())
    assert sum(spec.size for spec in named.manifest if spec.group == "decoder") == whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [{"head": "pyramid"}, {"head": "patch"}, {"kind": "classification"}], ids=str)
def test_other_heads_stand_on_the_encoder(sam_folders: dict[str, Path], family: str, task: dict[str, str]) -> None:
    folder, image = sam_folders[family], pixels(sam_folders[family])
    assert adapted_model.examine(recipe(folder, task=task))[1] == []
    model = moved(folder, task=task)
    with torch.no_grad():
        logits = model(image)
        assert model.backbone.features(image, model.taps).masks is None, "no mask is computed for nothing"
        prefix = started(folder, "head-only", task=task).frozen_prefix(image)
    assert logits.shape == ((2, 3) if task.get("kind") else (2, 3, side(folder), side(folder)))
    assert prefix.stop == model.backbone.depth
    logits = model(image)
    logits.square().mean().backward()  # type: ignore[no-untyped-call]
    silent = {name for name, p in model._parameters_by_name.items() if p.grad is None}
    assert not silent


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_blocks_are_kept(sam_folders: dict[str, Path], family: str) -> None:
    folder, image = sam_folders[family], pixels(sam_folders[family])
    model = moved(folder, layers=[2, 3])
    assert model.frozen_blocks == 2
    before = model.frozen_prefix(image)
    step(model, image)
    after = model.frozen_prefix(image)
    assert torch.equal(before.hidden, after.hidden)
    with torch.no_grad():
        torch.testing.assert_close(model(image, after), model(image), rtol=1e-5, atol=1e-5)
    assert started(folder, "head-only").frozen_blocks == model.backbone.depth


def test_numbers_of_the_default_payload() -> None:
    values = {
        "backbone": {"name": "sam-vit-base"},
        "adapter": {"rank": 4},
        "data": {"class_names": ["background", "nucleus"], "input_size": [1024, 1024]},
    }
    default = schema.parse(schema.Recipe, values, "recipe")
    assert adapted_model.examine(default)[1] == []
    model = adapted_model.AdaptedModel(default, with_weights=False)
    locked = model.locked()
    sizes = {group: sum(s.size for s in model.manifest if s.group == group) for group in ("lora", "decoder")}
    assert sizes == {"lora": 147_456, "decoder": 634_208}
    assert locked.manifest.parameters == 781_664
    assert locked.manifest.nbytes == pytest.approx(3.1e6, rel=0.01)
    assert locked.manifest.parameters / locked.backbone_parameters == pytest.approx(0.0083, abs=5e-5)
    more = default.model_copy(update={"data": default.data.model_copy(update={"class_names": tuple("abcdef")})})
    larger = adapted_model.AdaptedModel(more, with_weights=False).locked()
    assert larger.manifest.parameters == 781_664 + 2 * 140_064
    assert larger.backbone_parameters == locked.backbone_parameters == 93_735_728


def faults(folder: Path | str, *arguments: Any, **adapter: Any) -> list[str]:
    return adapted_model.examine(recipe(folder, *arguments, **adapter))[1]


def test_faults(sam_folders: dict[str, Path], tiny_dino: Path) -> None:
    sam = sam_folders["sam"]
    for family in FAMILIES:
        assert [faults(sam_folders[family], kind) for kind in KINDS] == [[]] * len(KINDS)
    assert any("unknown part 'upscales'" in f and "nearest: 'upscale'" in f for f in faults(sam, parts=["upscales"]))
    assert any("no loss reads the predicted IoU" in f for f in faults(sam, parts=["iou_prediction_head"]))
    assert any("trains every part of the model already" in f for f in faults(sam, "full", parts=["upscale"]))
    assert any("set recipe.task.head" in f for f in faults(sam, task={"head": "patch"}, parts=["upscale"]))
    assert any("has no mask decoder; leave parts out" in f for f in faults(tiny_dino, parts=["upscale"]))
    assert any("has no mask decoder; use another head" in f for f in faults(tiny_dino, task={"head": "sam-masks"}))
    assert any("use 'linear'" in f for f in faults(sam, task={"kind": "classification", "head": "sam-masks"}))
    assert any("recipe.adapter.targets" in f for f in faults(sam, targets=["q", "w"]))
    assert any("nothing would train" in f for f in faults(sam, "head-only", parts=[]))
    with pytest.raises(errors.ConfigError, match="nothing would train"):
        adapted_model.AdaptedModel(recipe(sam, "head-only", parts=[]), with_weights=False)


# -- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "adapter"),
    [
        ("sam", "lora", {}),
        ("sam", "lora", {"targets": ["q", "k", "v", "o", "fc1"], "layers": [1, 3]}),
        ("sam", "lora", {"parts": ["decoder"]}),
        ("sam", "lora", {"targets": ["o"], "parts": []}),
        ("sam", "lora", {"options": {"residual": 3}}),
        ("sam", "norm", {}),
        ("sam2", "lora", {"targets": ["q", "v", "fc2"]}),
        ("sam2", "norm", {}),
        ("sam3", "lora", {}),
    ],
    ids=str,
)
def test_peft_loads_it_into_the_stock_model(
    sam_folders: dict[str, Path], tmp_path: Path, family: str, kind: str, adapter: dict[str, Any]
) -> None:
    folder, image = sam_folders[family], pixels(sam_folders[family])
    model = moved(folder, kind, **adapter)
    export.save(model, tmp_path, {})
    stock = getattr(transformers, STOCK[family]).from_pretrained(folder).eval()
    expected = masks(model, image)[:, 1:]
    with torch.no_grad(), warnings.catch_warnings():
        before = stock(image).pred_masks[:, 0]
        warnings.filterwarnings("error", message=".*missing.*")  # PEFT warns of keys it does not find
        tuned = peft.PeftModel.from_pretrained(stock, tmp_path).eval()
        after = tuned(image).pred_masks[:, 0]
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert "head.safetensors" not in card, "the head has no numbers of its own"


def test_peft_layout_of_the_default(sam_folders: dict[str, Path], tmp_path: Path) -> None:
    import safetensors.torch

    export.save(moved(sam_folders["sam"]), tmp_path, {})
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 12)
    assert "mask_decoder.mask_tokens" in settings["modules_to_save"]
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    up = stored["base_model.model.vision_encoder.layers.1.attn.qkv.lora_B.weight"]
    assert up.shape == (96, 4)
    assert not up[32:64].any()
    assert not up[:32, 2:].any()
    assert not up[64:, :2].any()
    mixed = tmp_path / "mixed"
    export.save(moved(sam_folders["sam"], targets=["q", "v", "o"]), mixed, {})
    settings = json.loads((mixed / "adapter_config.json").read_text())
    assert settings["rank_pattern"]["vision_encoder.layers.1.attn.proj"] == 2
    assert settings["alpha_pattern"]["vision_encoder.layers.1.attn.proj"] == 6


@pytest.mark.parametrize(
    ("family", "classes", "why"),
    [("sam", 6, "has 4 mask tokens, this one 6"), ("sam_hq", 2, "rows and columns exchanged")],
)
def test_where_the_stock_model_cannot_hold_it_our_loader_does(
    sam_folders: dict[str, Path], tmp_path: Path, family: str, classes: int, why: str
) -> None:
    model, image = moved(sam_folders[family], "lora", classes), pixels(sam_folders[family])
    export.save(model, tmp_path, {})
    assert not (tmp_path / "adapter_config.json").exists()
    card = (tmp_path / "README.md").read_text()
    assert "load it with fedvfm" in card
    assert why in card
    loaded = fedvfm.load_adapter(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
    assert loaded.read().fingerprint == model.read().fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_load_adapter_gives_equal_logits(sam_folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model, image = moved(sam_folders["sam"], kind), pixels(sam_folders["sam"])
    loaded = fedvfm.load_adapter(export.save(model, tmp_path, {}))
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))


def test_a_frozen_layer_that_is_not_linear_is_refused() -> None:
    with pytest.raises(TypeError, match="no linear layer"):
        fused.put_in(nn.Sequential(nn.GELU()), "0", {}, rank=1, scale=1.0, dropout=0.0)
