"""Swin transformers as timm and their authors publish them (Ark+ too), in the layout of ``transformers``.

What comes behind the encoder (a classifier's head, Ark's ``projector`` and ``omni_heads``) is left behind, and so are
tables that follow from the shape (``relative_position_index``, ``attn_mask``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import layout_fault

FIRST = "layers.0.blocks.0.attn.relative_position_bias_table"
_LEFT = re.compile(r"(head|projector|omni_heads)\.|.*\.(relative_position_index|attn_mask)$")
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_OTHERS = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm": "layernorm",
}


def recognise(names: Collection[str]) -> bool:
    """Whether these are the array names of a Swin in the layout of timm."""
    return FIRST in names and "patch_embed.proj.weight" in names


def convert(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's arrays under the published names of ``SwinModel``.

    Raises:
        WeightsError: if there is one that is not known here.
    """
    later = _later(arrays)
    converted: dict[str, Tensor] = {}
    for name, value in arrays.items():
        if _LEFT.match(name):
            continue
        block = re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)$", name)
        merge = re.match(r"layers\.(\d+)\.downsample\.(reduction|norm)\.(weight|bias)$", name)
        if block:
            place = f"encoder.layers.{block[1]}.blocks.{block[2]}."
            converted |= {place + inner: part for inner, part in _inside(block[3], value).items()}
        elif merge:
            converted[f"encoder.layers.{int(merge[1]) - later}.downsample.{merge[2]}.{merge[3]}"] = value
        else:
            converted[_outside(name)] = value
    return converted


def _later(names: Collection[str]) -> int:
    """1 where the layer between two stages is counted with the next one, as newer releases of timm do; else 0."""
    return 0 if "layers.0.downsample.reduction.weight" in names else 1


def _inside(inner: str, value: Tensor) -> dict[str, Tensor]:
    part, _, kind = inner.rpartition(".")
    if inner == "attn.relative_position_bias_table":
        return {"attention.self.relative_position_bias_table": value}
    if part == "attn.qkv":
        thirds = zip(("query", "key", "value"), value.chunk(3), strict=True)
        return {f"attention.self.{name}.{kind}": third for name, third in thirds}
    if part not in _BLOCK:
        raise _unknown(inner)
    return {f"{_BLOCK[part]}.{kind}": value}


def _outside(name: str) -> str:
    part, _, kind = name.rpartition(".")
    if name == "absolute_pos_embed":
        return "embeddings.position_embeddings"
    if part not in _OTHERS:
        raise _unknown(name)
    return f"{_OTHERS[part]}.{kind}"


def _unknown(name: str) -> errors.WeightsError:
    return errors.WeightsError(
        f"this Swin has a part that is not known here ({ascii(name[:80])[1:-1]}), so it would compute something else "
        "(Swin V2 is another model). Import it in the layout of transformers, with its config.json"
    )


@layout_fault.raised("Swin")
def settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """``config.json`` of such a Swin, read off the shapes of its arrays.

    Raises:
        WeightsError: if arrays are missing, or have other shapes.
    """
    width, channels, patch, other = shapes["patch_embed.proj.weight"]
    if channels != 3 or patch != other:
        raise errors.WeightsError(
            f"patches of {patch} x {other} pixels and {channels} channels; only square ones of 3 channels are read"
        )
    blocks = {match.groups() for name in shapes if (match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))}
    stages = 1 + max(int(stage) for stage, _ in blocks)
    depths = [sum(int(stage) == number for stage, _ in blocks) for number in range(stages)]
    tables = [shapes[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in range(stages)]
    windows = {round((rows**0.5 + 1) / 2) for rows, _ in tables}
    if len(windows) != 1 or (2 * min(windows) - 1) ** 2 != tables[0][0]:
        raise errors.WeightsError(
            f"this Swin has windows of {sorted(windows)} cells: stages with smaller ones than the others are not read"
        )
    (window,) = windows
    for stage in range(stages - 1):
        shapes[f"layers.{stage + _later(shapes)}.downsample.reduction.weight"]  # a KeyError says what is missing
    return {
        "architectures": ["SwinModel"],
        "model_type": "swin",
        "embed_dim": width,
        "depths": depths,
        "num_heads": [heads for _, heads in tables],
        "window_size": window,
        "patch_size": patch,
        "image_size": _image(shapes, patch * 2 ** (stages - 1) * window, patch, window),
        "mlp_ratio": shapes["layers.0.blocks.0.mlp.fc1.weight"][0] / width,
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in shapes,
        "use_absolute_embeddings": "absolute_pos_embed" in shapes,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }


def _image(shapes: Mapping[str, tuple[int, ...]], least: int, patch: int, window: int) -> int:
    """Side of the images that it was made for: as its table of positions or its masks of shifted windows say.

    Where there are none, the smallest with a whole window in the last stage; nothing is computed with it then.
    """
    if "absolute_pos_embed" in shapes:
        return patch * math.isqrt(shapes["absolute_pos_embed"][1])
    masks = shapes.get("layers.0.blocks.1.attn_mask")
    return least if masks is None else patch * window * math.isqrt(masks[0])
