"""Vision transformers as timm, DINOv2, MAE and open_clip publish them, in the layout of ``transformers``.

UNI, Virchow, H-optimus and GigaPath's tile encoder (timm), RETFound (MAE), BiomedCLIP (a timm trunk inside open_clip)
and DINOv2's own checkpoints name their arrays alike. With layer scale they become a DINOv2 of ``transformers``, without
it a ViT. Parts that no frozen encoder needs (heads, decoders of masked images, text towers) are left behind; a part
that changes what is computed and is not known here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import layout_fault

HEADS = {
    192: 3,
    384: 6,
    768: 12,
    1024: 16,
    1152: 16,
    1280: 16,
    1408: 16,
    1536: 24,
    1664: 16,
}
"""Width -> heads of attention, which no array's shape tells: those of the models named above, and of their families.

A model that has others (MoCo v3's small one has 12) needs its config.json in the layout of transformers.
"""
QKV = "blocks.0.attn.qkv.weight"
PATCHES = "patch_embed.proj.weight"
REGISTERS = ("reg_token", "register_tokens")
_LEFT = re.compile(
    r"(head|head_dist|fc_norm|pre_logits|attn_pool|decoder_\w+|dino_head|ibot_head)\.|decoder_pos_embed$|mask_token$"
)
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "ls1": "layer_scale1",
    "ls2": "layer_scale2",
}
"""Part of a block -> its name in ``Dinov2Model``."""
_VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""Where a ``ViTModel`` calls them otherwise."""
_GATED = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
"""timm's packed SwiGLU."""


def prefixes(names: Collection[str]) -> list[str]:
    """What stands before the names of each transformer in this layout."""
    begins = sorted(name.removesuffix(QKV) for name in names if name.endswith(QKV))
    return [prefix for prefix in begins if prefix + PATCHES in names and not prefix.startswith("image_encoder.")]


def recognise(names: Collection[str]) -> bool:
    """Whether these are array names of such a transformer."""
    return bool(prefixes(names))


def convert(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays under the names of ``ViTModel``, ``Dinov2Model`` or ``Dinov2WithRegistersModel``.

    Shapes: qkv.weight (3 D, D) becomes three of (D, D); pos_embed (1, N, D), (1, 1 + N, D) or (1, 1 + R + N, D) becomes
    (1, 1 + N, D), with what it adds to R registers added to them.

    Raises:
        WeightsError: if there is an array that is not known here, or one is missing.
    """
    own = _own(arrays)
    shape = settings({name: tuple(value.shape) for name, value in arrays.items()})
    vit, gated = shape["model_type"] == "vit", bool(shape.get("use_swiglu_ffn"))
    renamed: dict[str, Tensor] = {}
    for name, value in own.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+?)\.?(weight|bias|gamma)", name)
        if block is None:
            if _inner(name):
                raise _unknown(name)
            continue
        number, part, kind = block.groups()
        place = f"encoder.layer.{number}."
        if part == "attn.qkv":
            for piece, array in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{place}attention.attention.{piece}.{kind}"] = array.contiguous()
            continue
        table = {**_BLOCK, **(_VIT if vit else {}), **(_GATED if gated and "mlp.w12" not in name else {})}
        if part not in table or (kind == "gamma") != part.startswith("ls"):
            raise _unknown(name)
        renamed[f"{place}{table[part]}.{'lambda1' if kind == 'gamma' else kind}"] = value
    norm = "norm" if "norm.weight" in own else "fc_norm"
    renamed |= {f"layernorm.{kind}": own[f"{norm}.{kind}"] for kind in ("weight", "bias")}
    renamed |= {f"embeddings.patch_embeddings.projection.{kind}": own[f"patch_embed.proj.{kind}"] for kind in _KINDS}
    return renamed | _embedded(own)


_KINDS = ("weight", "bias")


def _embedded(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Class token, registers and the table of positions."""
    table, classes = own["pos_embed"], own["cls_token"]
    registers = next((own[name] for name in REGISTERS if name in own), None)
    count = 0 if registers is None else registers.shape[1]
    side = _side(table.shape[1], count)
    lead, places = table[:, : table.shape[1] - side * side], table[:, table.shape[1] - side * side :]
    if lead.shape[1] == 0:  # nothing is added to the leading tokens
        lead = torch.zeros_like(table[:, :1])
    embedded = {
        "embeddings.position_embeddings": torch.cat((lead[:, :1], places), dim=1),
        "embeddings.cls_token": classes,
    }
    if registers is not None:
        more = lead[:, 1:]
        embedded["embeddings.register_tokens"] = registers + more if more.shape[1] else registers
    return embedded


def settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """``config.json`` of such a transformer, read off the shapes of its arrays.

    Raises:
        WeightsError: if arrays are missing, or it has parts that are not known here.
    """
    return _settings(_own(shapes))


@layout_fault.raised("vision transformer")
def _settings(own: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width, channels, patch, other = own["patch_embed.proj.weight"]
    if channels != 3 or patch != other:
        raise errors.WeightsError(
            f"patches of {patch} x {other} pixels and {channels} channels; only square ones of 3 channels are read"
        )
    registers = next((own[name][1] for name in REGISTERS if name in own), 0)
    side, blocks = _side(own["pos_embed"][1], registers), {int(name.split(".")[1]) for name in own if _inner(name)}
    if max(blocks) >= len(blocks):
        raise ValueError
    for name in ("cls_token", "patch_embed.proj.bias", *(() if "fc_norm.weight" in own else ("norm.weight",))):
        own[name]  # a KeyError says what is missing
    if width not in HEADS:
        raise errors.WeightsError(
            f"a vision transformer of width {width}: how many heads it has is not known here; known widths: "
            f"{', '.join(map(str, HEADS))}. Import it in the layout of transformers, with its config.json"
        )
    shape = {
        "hidden_size": width,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": HEADS[width],
        "patch_size": patch,
        "image_size": side * patch,
        "layer_norm_eps": 1e-6,
        "qkv_bias": "blocks.0.attn.qkv.bias" in own,
        "hidden_act": "gelu",
    }
    up = own.get("blocks.0.mlp.w12.weight") or own["blocks.0.mlp.fc1.weight"]
    down = own.get("blocks.0.mlp.w3.weight") or own["blocks.0.mlp.fc2.weight"]
    gated = up[0] == 2 * down[1]
    if "blocks.0.ls1.gamma" not in own:
        if gated or registers or up[0] != down[1]:
            raise errors.WeightsError(
                "a vision transformer with gates or registers and without layer scale is not read; import it in the "
                "layout of transformers, with its config.json"
            )
        return {"architectures": ["ViTModel"], "model_type": "vit", **shape, "intermediate_size": up[0]}
    if up[0] != down[1] and not gated:
        raise ValueError
    scaled: dict[str, Any] = {**shape, "use_swiglu_ffn": gated, "mlp_ratio": _ratio(width, down[1], gated=gated)}
    if registers:
        known = {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers"}
        return {**known, **scaled, "num_register_tokens": registers}
    return {"architectures": ["Dinov2Model"], "model_type": "dinov2", **scaled}


def _ratio(width: int, hidden: int, *, gated: bool) -> int:
    """mlp_ratio with which ``Dinov2Model`` makes a feed-forward branch of this width.

    A gated one has two thirds of ``width ratio`` channels there, rounded up to a multiple of 8.

    Raises:
        ValueError: if no ratio gives it.
    """
    for ratio in range(1, 17):
        full = width * ratio
        if hidden == ((int(full * 2 / 3) + 7) // 8 * 8 if gated else full):
            return ratio
    raise ValueError


def _side(places: int, registers: int) -> int:
    """Patches a side of the table of positions, whose first rows may be those of class token and registers.

    Raises:
        ValueError: if it is no square.
    """
    for lead in (0, 1, 1 + registers):
        side = round((places - lead) ** 0.5) if places > lead else 0
        if side and side * side == places - lead:
            return side
    raise ValueError


def _inner(name: str) -> bool:
    return re.match(r"blocks\.\d+\.", name) is not None


def _own(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of the transformer by their own names, without what is left behind.

    Raises:
        WeightsError: if there is one that is not known here.
    """
    begins = prefixes(arrays)
    if len(begins) != 1:
        parts = ", ".join(ascii(each[:40])[1:-1] or "(no prefix)" for each in begins[:4])
        raise errors.WeightsError(
            f"this file holds several vision transformers ({parts}), of which one is meant (a teacher, a student?); "
            "save its arrays by themselves"
            if begins
            else "this is no vision transformer in the layout of timm"
        )
    (prefix,) = begins
    inside = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    norm = ("norm.", "fc_norm.") if "norm.weight" not in inside else ("norm.",)
    known = ("cls_token", "pos_embed", *REGISTERS)
    own = {}
    for name, value in inside.items():
        kept = name in known or name.startswith(("patch_embed.proj.", *norm)) or _inner(name)
        if kept:
            own[name] = value
        elif not _LEFT.match(name):
            raise _unknown(name)
    return own


def _unknown(name: str) -> errors.WeightsError:
    return errors.WeightsError(
        f"this vision transformer has a part that is not known here ({ascii(name[:80])[1:-1]}), so it would "
        "compute something else. Import it in the layout of transformers, with its config.json"
    )
