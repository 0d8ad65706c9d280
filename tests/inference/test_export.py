"""An exported adapter loads where the card says it does, with equal outputs; damaged ones are refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

import fedvfm
from fedvfm import errors
from fedvfm.config import schema
from fedvfm.inference import export
from fedvfm.model import adapted_model
from fedvfm.state import state

MLP = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "intermediate_size": 64,
    "patch_size": 14,
}
STOCK = {
    "dinov2": (transformers.Dinov2Model, None),
    "vit": (transformers.ViTModel, transformers.ViTConfig),
    "dinov3": (transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig),
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
}
MADE = {
    "experiment": "tiny",
    "primary": "dice",
    "arms": {"federated": {"macro": 0.5, "worst": {"site": "north", "value": 0.25}}},
}


@pytest.fixture(scope="session")
def folders(tiny_dino: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stock")
    for name, (model, config) in STOCK.items():
        if config is not None:
            torch.manual_seed(3)
            model(config(**MLP)).save_pretrained(root / name)
    return {name: tiny_dino if name == "dinov2" else root / name for name in STOCK}


def moved(backbone: Path | str, kind: str, task: str = "segmentation", **adapter: Any) -> adapted_model.AdaptedModel:
    """A model whose every trainable number is off its start, as after training."""
    values = {
        "backbone": {"name": str(backbone), "options": {"channels": [4, 8]} if backbone == "unet" else {}},
        "adapter": {"kind": kind, "rank": 2, "alpha": 6.0, **adapter},
        "task": {"kind": task},
        "personal": {"kind": "dual" if "personal" in adapter.get("options", {}) else "none"},
        "data": {"class_names": ["rest", "cell"], "input_size": [56, 56]},
    }
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    rng = np.random.default_rng(0)
    start = model.initial()
    model.write(
        state.AdapterState({name: a + rng.normal(0, 0.1, a.shape).astype(np.float32) for name, a in start.items()})
    )
    return model.eval()


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(7))


def last_grid(model: adapted_model.AdaptedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.backbone.features(pixels(), (model.backbone.depth,)).grids[-1].flatten(2).transpose(1, 2)


def stock_grid(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(pixels()).last_hidden_state
    return found[:, -16:]


@pytest.mark.parametrize("kind", ["lora", "core", "norm"])
@pytest.mark.parametrize("name", STOCK)
def test_peft_loads_it_into_the_stock_model(folders: dict[str, Path], tmp_path: Path, name: str, kind: str) -> None:
    settings: dict[str, Any] = {"layers": [1, 3], "targets": ["q", "v", "fc1"]} if kind != "norm" else {}
    model = moved(folders[name], kind, **settings)
    export.save(model, tmp_path / "adapter", MADE)
    stock = STOCK[name][0].from_pretrained(folders[name])
    plain = stock_grid(stock)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")  # PEFT warns of keys it does not find
        tuned = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter")
    torch.testing.assert_close(stock_grid(tuned), last_grid(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, last_grid(model), atol=1e-3)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "PeftModel.from_pretrained(stock_backbone" in card
    assert f"those of transformers {transformers.__version__}; transformers >= 5 is needed" in card
    assert "library_name: peft" in card


@pytest.mark.parametrize("task", ["segmentation", "classification"])
@pytest.mark.parametrize("kind", ["lora", "core", "norm", "bias", "full", "head-only"])
def test_load_adapter_gives_equal_logits(tiny_dino: Path, tmp_path: Path, kind: str, task: str) -> None:
    model = moved(tiny_dino, kind, task)
    folder = export.save(model, tmp_path / "adapter", MADE, note="one average brain, no patient claim")
    loaded = fedvfm.load_adapter(folder)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(pixels()), model(pixels()))
    assert loaded.read().fingerprint == model.read().fingerprint
    card = (folder / "README.md").read_text()
    with_peft = kind in ("lora", "core", "norm")
    assert (folder / "adapter_config.json").exists() == with_peft
    assert (folder / "adapter_model.safetensors").exists() == with_peft
    assert ("This kind is not one of PEFT's" in card) == (not with_peft)
    assert model.read().fingerprint in card
    assert "one average brain, no patient claim" in card
    assert "| federated | 0.500 | 0.250 |" in card


def test_the_unet_loads_too(tmp_path: Path) -> None:
    model = moved("unet", "full")
    loaded = fedvfm.load_adapter(export.save(model, tmp_path / "adapter", {}))
    with torch.no_grad():
        assert torch.equal(loaded(pixels()), model(pixels()))


def test_the_head_lies_beside_it_under_its_own_names(tiny_dino: Path, tmp_path: Path) -> None:
    model = moved(tiny_dino, "lora", "classification")
    folder = export.save(model, tmp_path / "adapter", MADE)
    stored = safetensors.numpy.load_file(folder / "head.safetensors")
    assert set(stored) == {name for name, _ in model.head.named_parameters()}
    for name, value in model.head.named_parameters():
        np.testing.assert_array_equal(stored[name], value.detach().numpy())


@pytest.mark.parametrize("kind", ["lora", "core", "norm", "bias", "full"])
@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_merged_equals_unmerged(folders: dict[str, Path], name: str, kind: str) -> None:
    model = moved(folders[name], kind)
    before = last_grid(model)
    merged = export.merge(model)
    assert type(merged) is STOCK[name][0]
    assert not [path for path, _ in merged.named_parameters() if "lora" in path or "ln_tuning" in path]
    torch.testing.assert_close(stock_grid(merged), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(last_grid(model), before)
    shared = {p.data_ptr() for p in model.backbone.model.parameters()}
    assert not shared & {p.data_ptr() for p in merged.parameters()}
    torch.testing.assert_close(
        stock_grid(STOCK[name][0].from_pretrained(folders[name])), last_grid(fresh(folders[name])), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("option", "group"), [("residual", "residual"), ("personal", "own")])
def test_a_second_pair_is_exported_and_merged_with_its_pair(
    tiny_dino: Path, tmp_path: Path, option: str, group: str
) -> None:
    model = moved(tiny_dino, "lora", options={option: 3})
    assert {spec.shape for spec in model.manifest if spec.group == group} == {(3, 32), (32, 3)}
    assert not [name for name in model.trained(1) if f".{group}." in name]
    export.save(model, tmp_path / "adapter", MADE)
    tuned = peft.PeftModel.from_pretrained(STOCK["dinov2"][0].from_pretrained(tiny_dino), tmp_path / "adapter")
    bare = {name: a * np.float32(f".{group}." not in name) for name, a in model.read().items()}
    for loaded in (stock_grid(tuned), stock_grid(export.merge(model))):
        torch.testing.assert_close(loaded, last_grid(model), rtol=1e-5, atol=1e-5)
    before = last_grid(model)
    model.write(state.AdapterState(bare))
    assert not torch.allclose(last_grid(model), before, atol=1e-3)


def fresh(folder: Path) -> adapted_model.AdaptedModel:
    """A model loaded after a merge: the shared frozen weights must still be the file's."""
    model = moved(folder, "head-only")
    return model


# -- damaged ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def exported(tiny_dino: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.save(moved(tiny_dino, "lora"), tmp_path_factory.mktemp("export") / "adapter", MADE)


def edit(folder: Path, change: Any) -> None:
    about = json.loads((folder / export.ABOUT).read_text())
    change(about)
    (folder / export.ABOUT).write_text(json.dumps(about))


DAMAGES: dict[str, Any] = {
    "no folder": lambda f: shutil.rmtree(f),
    "no about": lambda f: (f / export.ABOUT).unlink(),
    "about is no JSON": lambda f: (f / export.ABOUT).write_text("{"),
    "about is a list": lambda f: (f / export.ABOUT).write_text("[]"),
    "about is not text": lambda f: (f / export.ABOUT).write_bytes(b"\xff"),
    "about lacks a key": lambda f: edit(f, lambda about: about.pop("backbone_sha256")),
    "recipe of another release": lambda f: edit(f, lambda about: about["recipe"].update(schema_version=9)),
    "recipe is a word": lambda f: edit(f, lambda about: about.update(recipe="lora")),
    "recipe of another rank": lambda f: edit(f, lambda about: about["recipe"]["adapter"].update(rank=3)),
    "recipe of another scale": lambda f: edit(f, lambda about: about["recipe"]["adapter"].update(alpha=900.0)),
    "recipe of other classes": lambda f: edit(f, lambda about: about["recipe"]["data"]["class_names"].reverse()),
    "recipe of layers that are not there": lambda f: edit(f, lambda a: a["recipe"]["adapter"].update(layers=[77])),
    "about is too deep": lambda f: (f / export.ABOUT).write_text("[" * 100_000),
    "another fingerprint": lambda f: edit(f, lambda about: about.update(fingerprint="0" * 64)),
    "no arrays": lambda f: (f / export.STATE).unlink(),
    "arrays cut short": lambda f: (f / export.STATE).write_bytes((f / export.STATE).read_bytes()[:-8]),
    "one bit flipped": lambda f: (f / export.STATE).write_bytes(flipped((f / export.STATE).read_bytes())),
    "float64 arrays": lambda f: safetensors.numpy.save_file({"a": np.zeros(2)}, f / export.STATE),
    "someone else's arrays": lambda f: safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, f / export.STATE),
}


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_a_checkpoint_error(exported: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(exported, folder)
    DAMAGES[damage](folder)
    with pytest.raises(errors.CheckpointError, match="adapter"):
        fedvfm.load_adapter(folder)


def test_another_backbone_is_refused(exported: Path, tiny_dino: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    transformers.Dinov2Model(transformers.Dinov2Config.from_pretrained(tiny_dino)).save_pretrained(other)
    with pytest.raises(errors.WeightsError, match="the recipe pins"):
        fedvfm.load_adapter(exported, backbone=str(other))
    moved_folder = tmp_path / "moved"
    shutil.copytree(tiny_dino, moved_folder)
    assert fedvfm.load_adapter(exported, backbone=str(moved_folder)).read().fingerprint
    gone = exported.parent / "gone"
    with pytest.raises((errors.WeightsError, errors.UnknownName)):
        fedvfm.load_adapter(exported, backbone=str(gone))
