"""Vision transformers under the names of timm, DINOv2, MAE and open_clip compute what their authors' code does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from fedvfm import errors
from fedvfm.backbones import convert, vit, vit_original
from fedvfm.config import schema

WIDTH, HEADS, DEPTH, PATCH, SIDE = 192, 3, 2, 14, 4


class Form(NamedTuple):
    """One way in which such a model is published."""

    scale: bool = False
    gated: str = ""
    registers: str = ""
    lead: int = 1
    prefix: str = ""
    left: tuple[str, ...] = ("head.weight",)
    norm: str = "norm"

    @property
    def model_type(self) -> str:
        return "dinov2_with_registers" if self.registers else "dinov2" if self.scale else "vit"


FORMS = {
    "MAE, RETFound": Form(left=("head.weight", "decoder_embed.weight", "decoder_pos_embed", "mask_token")),
    "RETFound, pooled": Form(norm="fc_norm"),
    "open_clip, BiomedCLIP": Form(prefix="visual.trunk.", left=()),
    "timm, UNI": Form(scale=True, left=()),
    "timm, Virchow": Form(scale=True, gated="packed", left=()),
    "timm, H-optimus": Form(scale=True, gated="packed", registers="reg_token", lead=0, left=()),
    "timm, positions of registers too": Form(scale=True, registers="reg_token", lead=3, left=()),
    "DINOv2": Form(scale=True, gated="w12", registers="register_tokens", left=("mask_token",)),
}


def arrays(form: Form) -> dict[str, Tensor]:
    """Random numbers under the names of a form."""
    hidden = 512 if form.gated else 4 * WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, form.lead + SIDE * SIDE, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        f"{form.norm}.weight": (WIDTH,),
        f"{form.norm}.bias": (WIDTH,),
    }
    up, down = ("mlp.w12", "mlp.w3") if form.gated == "w12" else ("mlp.fc1", "mlp.fc2")
    for block in range(DEPTH):
        linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), down: (WIDTH, hidden)}
        linear[up] = (hidden * (2 if form.gated else 1), WIDTH)
        for part, shape in linear.items():
            shapes |= {f"blocks.{block}.{part}.weight": shape, f"blocks.{block}.{part}.bias": shape[:1]}
        for part in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{part}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
        shapes |= {f"blocks.{block}.{part}.gamma": (WIDTH,) for part in ("ls1", "ls2") if form.scale}
    if form.registers:
        shapes[form.registers] = (1, 2, WIDTH)
    rng = torch.Generator().manual_seed(len(form.prefix) + form.lead)
    made = {name: torch.randn(shape, generator=rng) * 0.1 for name, shape in shapes.items()}
    return made | {name: torch.zeros(2, 2) for name in form.left}


def tokens(form: Form, own: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """What the authors' code computes, written here a second time: all tokens after the last norm."""
    hidden = functional.conv2d(pixels, own["patch_embed.proj.weight"], own["patch_embed.proj.bias"], stride=PATCH)
    hidden = hidden.flatten(2).transpose(1, 2)
    lead = [own["cls_token"].expand(len(pixels), -1, -1)]
    extra = [own[form.registers].expand(len(pixels), -1, -1)] if form.registers else []
    places = own["pos_embed"]
    if form.lead == 0:
        hidden = torch.cat([*lead, *extra, hidden + places], 1)
    elif form.lead == 1:
        hidden = torch.cat([*lead, hidden], 1) + places
        hidden = torch.cat([hidden[:, :1], *extra, hidden[:, 1:]], 1)
    else:
        hidden = torch.cat([*lead, *extra, hidden], 1) + places
    norm = lambda value, name: functional.layer_norm(value, (WIDTH,), own[f"{name}.weight"], own[f"{name}.bias"], 1e-6)  # noqa: E731
    linear = lambda value, name: functional.linear(value, own[f"{name}.weight"], own[f"{name}.bias"])  # noqa: E731
    for block in range(DEPTH):
        at = f"blocks.{block}."
        qkv = linear(norm(hidden, f"{at}norm1"), f"{at}attn.qkv")
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5, -1) @ v
        branch = linear(mixed.transpose(1, 2).flatten(2), f"{at}attn.proj")
        hidden = hidden + branch * own.get(f"{at}ls1.gamma", torch.ones(1))
        inner = norm(hidden, f"{at}norm2")
        if form.gated:
            up, down = ("mlp.w12", "mlp.w3") if form.gated == "w12" else ("mlp.fc1", "mlp.fc2")
            first, second = linear(inner, at + up).chunk(2, -1)
            branch = linear(functional.silu(first) * second, at + down)
        else:
            branch = linear(functional.gelu(linear(inner, f"{at}mlp.fc1")), f"{at}mlp.fc2")
        hidden = hidden + branch * own.get(f"{at}ls2.gamma", torch.ones(1))
    return norm(hidden, form.norm)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDVFM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_it_computes_what_the_authors_code_does(form: Form, tmp_path: Path) -> None:
    own = arrays(form)
    whole = {form.prefix + name: value for name, value in own.items()}
    whole |= {"text.embedding.weight": torch.zeros(3, 3)} if form.prefix else {}
    safetensors.torch.save_file(whole, tmp_path / "model.safetensors")
    located = convert.bring(tmp_path / "model.safetensors", "mine")
    assert located.config["model_type"] == form.model_type
    backbone = vit.load(schema.BackboneConfig(name="mine"))
    pixels = torch.rand(2, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made, right = backbone.features(pixels, (DEPTH,)), tokens(form, own, pixels)
    grid = right[:, -SIDE * SIDE :].transpose(1, 2).reshape(2, WIDTH, SIDE, SIDE)
    torch.testing.assert_close(made.grids[0], grid, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.pooled, right[:, 0], rtol=1e-4, atol=1e-4)


def test_a_training_scripts_file_and_a_folder_of_timm(tmp_path: Path) -> None:
    own = arrays(FORMS["MAE, RETFound"])
    torch.save({"model": own, "epoch": 3, "args": argparse.Namespace(blr=0.1)}, tmp_path / "retfound.pth")
    first = convert.bring(tmp_path / "retfound.pth", "retfound")
    folder = tmp_path / "timm"
    folder.mkdir()
    torch.save(own, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"architecture": "vit_tiny_patch14_56", "num_features": 192}')
    assert convert.bring(folder, "other").sha256 == first.sha256


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("blocks.0.attn.q_norm.weight", (64,), "has a part that is not known here .*q_norm"),
        ("blocks.0.gamma_1", (WIDTH,), "has a part that is not known here .*gamma_1"),
        ("blocks.0.attn.relative_position_bias_table", (9, 3), "has a part that is not known here .*relative"),
        ("blocks.400000.norm1.weight", (WIDTH,), "arrays are not of the shapes"),
        ("norm_pre.weight", (WIDTH,), "has a part that is not known here .*norm_pre"),
        ("pos_embed", (1, 15, WIDTH), "arrays are not of the shapes"),
        ("patch_embed.proj.weight", (100, 3, PATCH, PATCH), "width 100: how many heads"),
        ("patch_embed.proj.weight", (WIDTH, 1, PATCH, PATCH), "1 channels; only"),
        ("cls_token", None, "lacks 'cls_token'"),
    ],
)
def test_what_would_compute_something_else_is_refused(name: str, shape: Any, said: str, tmp_path: Path) -> None:
    own = arrays(FORMS["timm, UNI"])
    own.pop(name, None)
    if shape is not None:
        own[name] = torch.zeros(shape)
    safetensors.torch.save_file(own, tmp_path / "model.safetensors")
    with pytest.raises(errors.WeightsError, match=said):
        convert.bring(tmp_path / "model.safetensors", "mine")


def test_of_several_transformers_none_is_chosen(tmp_path: Path) -> None:
    own = arrays(FORMS["timm, UNI"])
    both = {f"{part}.{name}": value.clone() for part in ("student", "teacher") for name, value in own.items()}
    safetensors.torch.save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(errors.WeightsError, match=r"several vision transformers \(student\., teacher\.\)"):
        convert.bring(tmp_path / "model.safetensors", "mine")


def test_the_encoder_of_sam_2_is_none() -> None:
    names = {f"image_encoder.trunk.{name}" for name in (vit_original.QKV, vit_original.PATCHES)}
    assert not vit_original.recognise(names)


class Published(NamedTuple):
    """What the arrays of a published checkpoint look like, as its page and timm's definition of it say."""

    width: int
    depth: int
    up: int
    down: int
    places: int
    patch: int
    registers: int = 0
    scale: bool = True
    norm: str = "norm"


PUBLISHED = {
    "UNI": Published(1024, 24, 4096, 4096, 197, 16),
    "UNI2-h": Published(1536, 24, 8192, 4096, 256, 14, registers=8),
    "Virchow": Published(1280, 32, 6832, 3416, 257, 14),
    "Virchow2": Published(1280, 32, 6832, 3416, 257, 14, registers=4),
    "H-optimus-0": Published(1536, 40, 8192, 4096, 256, 14, registers=4),
    "Prov-GigaPath": Published(1536, 40, 8192, 4096, 197, 16),
    "BiomedCLIP": Published(768, 12, 3072, 3072, 197, 16, scale=False),
    "RETFound": Published(1024, 24, 4096, 4096, 197, 16, scale=False, norm="fc_norm"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_shapes_make_a_model_of_their_size(name: str) -> None:
    """Settings read off the shapes alone build a stock model with a place for every array."""
    form = PUBLISHED[name]
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, form.width),
        "pos_embed": (1, form.places, form.width),
        "patch_embed.proj.weight": (form.width, 3, form.patch, form.patch),
        "patch_embed.proj.bias": (form.width,),
        f"{form.norm}.weight": (form.width,),
        f"{form.norm}.bias": (form.width,),
    }
    shapes |= {"reg_token": (1, form.registers, form.width)} if form.registers else {}
    for block in range(form.depth):
        linear = {"attn.qkv": (3 * form.width, form.width), "attn.proj": (form.width, form.width)}
        linear |= {"mlp.fc1": (form.up, form.width), "mlp.fc2": (form.width, form.down)}
        for part, shape in linear.items():
            shapes |= {f"blocks.{block}.{part}.weight": shape, f"blocks.{block}.{part}.bias": shape[:1]}
        for part in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{part}.{kind}": (form.width,) for kind in ("weight", "bias")}
        shapes |= {f"blocks.{block}.{part}.gamma": (form.width,) for part in ("ls1", "ls2") if form.scale}
    values = vit_original.settings(shapes)
    with torch.device("meta"):
        arrays = vit_original.convert({part: torch.empty(shape) for part, shape in shapes.items()})
        stock = vit._stock_model(vit.FAMILIES[values["model_type"]], values)
    expected = sum(value.numel() for value in arrays.values())
    own = sum(value.numel() for name, value in stock.named_parameters() if name != "embeddings.mask_token")
    assert own == expected
    assert values["num_hidden_layers"] == form.depth
    assert values.get("num_register_tokens", 0) == form.registers
