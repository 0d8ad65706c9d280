"""The own ViT and DINOv2 are those of transformers to the last bit; what is not known to the last key is left to it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from fedvfm import errors
from fedvfm.adapters import lora
from fedvfm.backbones import encoder, table, vit, weights
from fedvfm.config import schema

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56}
CLASSES: dict[str, tuple[Any, Any]] = {
    "vit": (transformers.ViTModel, transformers.ViTConfig(**SHAPE, intermediate_size=48, patch_size=8)),
    "vit without bias": (
        transformers.ViTModel,
        transformers.ViTConfig(**SHAPE, intermediate_size=48, patch_size=8, qkv_bias=False, layer_norm_eps=1e-3),
    ),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config(**SHAPE, mlp_ratio=2, patch_size=14)),
}
OLD = {
    "vit": (
        ("layers.", "encoder.layer."),
        *((f".attention.{x[0]}_proj.", f".attention.attention.{x}.") for x in ("query", "key", "value")),
        (".attention.o_proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ),
    "dinov2": (
        *((f".attention.{x[0]}_proj.", f".attention.attention.{x}.") for x in ("query", "key", "value")),
        (".attention.o_proj.", ".attention.output.dense."),
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """Kind -> folder and stock model with random numbers everywhere."""
    made = {}
    for kind, (model_class, settings) in CLASSES.items():
        more = {"add_pooling_layer": False} if model_class is transformers.ViTModel else {}
        settings._attn_implementation = "sdpa"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = model_class(settings, **more).eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.15)
        folder = tmp_path_factory.mktemp("encoders") / kind
        model.save_pretrained(folder)
        made[kind] = folder, model
    return made


def load(folder: Path, **more: Any) -> vit.VisionTransformer:
    found: vit.VisionTransformer = table.loader(chosen := schema.BackboneConfig(name=str(folder)))(chosen, **more)
    return found


def by_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> vit.VisionTransformer:
    """The same backbone on the stock model."""
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "settings_of", lambda values: None)
        patch.setattr("fedvfm.backbones.stock._masters", {})
        found = load(folder)
    assert isinstance(found.model, transformers.PreTrainedModel)
    return found


def answers(backbone: vit.VisionTransformer, size: tuple[int, int]) -> list[Tensor]:
    """Grids and the pooled vector, and the gradients of LoRA's factors in every block."""
    settings = schema.AdapterConfig(kind="lora", rank=2, targets=("q", "v", "o", "fc1"))
    injected = lora.Lora().inject(settings, backbone)
    generator = torch.Generator().manual_seed(2)
    for parameter in injected.parameters.values():
        parameter.requires_grad_(True).data.normal_(std=0.1, generator=generator)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))
    features = backbone.features(pixels, backbone.taps(2))
    (features.grids[0].square().mean() + features.grids[1].square().mean() + features.pooled.mean()).backward()
    return [*features.grids, features.pooled, *(parameter.grad for parameter in injected.parameters.values())]  # type: ignore[list-item]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(56, 56), (112, 56), (168, 112)], ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_features_and_gradients_are_the_stock_model_s_to_the_last_bit(
    saved: Any, kind: str, size: tuple[int, int], precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = load(saved[kind][0]), by_transformers(saved[kind][0], monkeypatch)
    assert isinstance(ours.model, encoder.Encoder)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        for mine, other in zip(answers(ours, size), answers(theirs, size), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize("kind", CLASSES)
def test_names_shapes_and_order_of_parameters_are_the_stock_model_s(saved: Any, kind: str, with_weights: bool) -> None:
    """The order too: it is that of the manifest where all of them train."""
    folder, stock = saved[kind]
    ours = load(folder, with_weights=with_weights).model
    assert [(name, one.shape) for name, one in ours.named_parameters()] == [
        (name, one.shape) for name, one in stock.named_parameters()
    ]
    if with_weights:
        assert all(torch.equal(one, dict(stock.named_parameters())[name]) for name, one in ours.named_parameters())
    assert not list(stock.buffers()), "they would stay on the meta device"


@pytest.mark.parametrize("kind", CLASSES)
def test_the_stock_form_has_the_same_settings_and_tensors(saved: Any, kind: str) -> None:
    folder, stock = saved[kind]
    backbone = load(folder)
    made: Any = backbone.stock(backbone.model)
    assert type(made) is type(stock)
    ignored = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    told, expected = ({k: v for k, v in one.config.to_dict().items() if k not in ignored} for one in (made, stock))
    assert told == expected
    assert all(torch.equal(one, stock.state_dict()[name]) for name, one in made.state_dict().items())
    assert made.embeddings.cls_token.data_ptr() == backbone.model.get_parameter("embeddings.cls_token").data_ptr()


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_published_names_are_read_as_by_transformers(saved: Any, tmp_path: Path, kind: str, prefix: bool) -> None:
    """Those of the time before transformers 5, as they are on Hugging Face; in a file of a classifier with a prefix."""
    folder, stock = saved[kind]
    shutil.copytree(folder, tmp_path / "old")
    arrays = {}
    for name, value in stock.state_dict().items():
        for new, old in OLD[kind]:
            name = name.replace(new, old, 1) if new != "layers." or name.startswith(new) else name
        arrays[f"{kind}." * prefix + name] = value.contiguous()
    assert any(".attention.attention.query." in name for name in arrays)
    arrays["classifier.weight"] = torch.zeros(3, 32)
    safetensors.torch.save_file(arrays, tmp_path / "old" / "model.safetensors", {"format": "pt"})
    ours = load(tmp_path / "old").model
    assert isinstance(ours, encoder.Encoder)
    theirs = type(stock).from_pretrained(tmp_path / "old").state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


def test_half_precision_weights_are_read_as_float32(saved: Any, tmp_path: Path) -> None:
    folder, stock = saved["dinov2"]
    shutil.copytree(folder, tmp_path / "half")
    arrays = {name: value.half() for name, value in stock.state_dict().items()}
    safetensors.torch.save_file(arrays, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    ours = load(tmp_path / "half").model
    assert all(torch.equal(one, arrays[name].float()) for name, one in ours.named_parameters())
    assert {one.dtype for one in ours.parameters()} == {torch.float32}


def test_weights_in_several_files_are_read(saved: Any, tmp_path: Path) -> None:
    stock = saved["vit"][1]
    stock.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    ours = load(tmp_path / "many").model
    assert isinstance(ours, encoder.Encoder)
    assert all(torch.equal(one, stock.state_dict()[name]) for name, one in ours.state_dict().items())


def test_arrays_of_unknown_names_are_left_to_transformers(saved: Any, tmp_path: Path) -> None:
    folder, stock = saved["dinov2"]
    shutil.copytree(folder, tmp_path / "other")
    arrays = {name.replace("layer_scale1.lambda1", "ls1.gamma"): value for name, value in stock.state_dict().items()}
    safetensors.torch.save_file(arrays, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(errors.WeightsError, match="the weights lack 3 arrays"):
        load(tmp_path / "other")


def test_an_array_of_another_shape_is_refused(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved["dinov2"][0], tmp_path / "other")
    values = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**values, "mlp_ratio": 3}))
    with pytest.raises(errors.WeightsError, match=r"fc1.bias has shape \(64,\), config.json asks for \(96,\)"):
        load(tmp_path / "other")


@pytest.mark.parametrize(("kind", "config"), [("vit", transformers.ViTConfig), ("dinov2", transformers.Dinov2Config)])
def test_defaults_are_those_of_transformers(kind: str, config: Any) -> None:
    stock, ours = config(), encoder.settings_of({"model_type": kind})
    assert ours is not None
    shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "image_size", "patch_size")
    assert {key: getattr(ours, key) for key in (*shared, "qkv_bias")} == {
        key: getattr(stock, key) for key in (*shared, "qkv_bias")
    }
    expected = stock.intermediate_size if kind == "vit" else stock.hidden_size * stock.mlp_ratio
    assert ours.intermediate_size == expected
    assert encoder.settings_of(stock.to_dict()) == ours, "what transformers writes is known to the last key"


CHANGES: list[Mapping[str, Any]] = [
    {"unheard_of": 1},
    {"head_dim": 8},
    {"hidden_act": "gelu_new"},
    {"use_swiglu_ffn": True},
    {"use_mask_token": False},
    {"num_channels": 1},
    {"image_size": [56, 56]},
    {"patch_size": 5},
    {"num_attention_heads": 5},
    {"mlp_ratio": 2.5},
    {"layer_norm_eps": 1},
    {"qkv_bias": 1},
    {"hidden_size": True},
    {"num_hidden_layers": 0},
    {"vision_config": {}},
    {"model_type": "deit"},
    {"model_type": "dinov2_with_registers"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_settings_that_are_not_known_to_the_last_key_are_left_to_transformers(change: Mapping[str, Any]) -> None:
    plain = {"model_type": "dinov2", **SHAPE, "patch_size": 14, "mlp_ratio": 2}
    assert encoder.settings_of(plain) is not None
    assert encoder.settings_of({**plain, **change}) is None


def test_every_vit_and_dinov2_of_the_table_is_read_without_transformers() -> None:
    for name, known in weights.KNOWN.items():
        if known.config["model_type"] in ("vit", "dinov2"):
            assert encoder.settings_of(known.config) is not None, name


def test_transformers_and_peft_are_not_loaded(tiny_dino: Path) -> None:
    script = (
        "import sys\n"
        "from fedvfm.config import schema as config\n"
        "from fedvfm.adapters import lora\n"
        "from fedvfm.backbones import table\n"
        f"chosen = config.BackboneConfig(name={str(tiny_dino)!r})\n"
        "backbone = table.loader(chosen)(chosen)\n"
        "lora.Lora().inject(config.AdapterConfig(kind='lora'), backbone)\n"
        "print({'transformers', 'peft', 'torch._dynamo', 'sympy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"
