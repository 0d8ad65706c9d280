"""SAM, MedSAM and SAM-Med2D as their authors publish them: names and settings in the layout of ``transformers``."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import layout_fault

EXACT = True
"""Every array that :func:`convert` gives must be one of the model's."""
HEADS = 8
"""Heads of the mask decoder's attention: no array's shape tells them, and the published code fixes them."""

ADAPTER = "image_encoder.blocks.0.Adapter.channel.0.weight"
"""Of SAM-Med2D: the first linear layer of an adapter."""
_CONSTANTS = ("pixel_mean", "pixel_std")
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^image_encoder\.", "vision_encoder."),
        (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
        (r"^(vision_encoder\.layers\.\d+)\.Adapter\.", r"\1.mlp.adapter."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
        (r"\.neck\.0\.", ".neck.conv1."),
        (r"\.neck\.1\.", ".neck.layer_norm1."),
        (r"\.neck\.2\.", ".neck.conv2."),
        (r"\.neck\.3\.", ".neck.layer_norm2."),
        (
            r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
            "shared_image_embedding.positional_embedding",
        ),
        (r"\.point_embeddings\.", ".point_embed."),
        (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
        (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
        (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
        (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
        (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
        (r"\.output_upscaling\.0\.", ".upscale_conv1."),
        (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
        (r"\.output_upscaling\.3\.", ".upscale_conv2."),
        (r"\.(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r".\1.proj_in."),
        (r"\.(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.1\.", r".\1.layers.0."),
        (r"\.(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.2\.", r".\1.proj_out."),
        (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    )
)


def recognise(names: Collection[str]) -> bool:
    """Whether these are the array names of an original SAM.

    Raises:
        WeightsError: if they are those of SAM-HQ, whose original layout is not converted.
    """
    if "image_encoder.blocks.0.attn.qkv.weight" not in names:
        return False
    if "mask_decoder.hf_token.weight" in names:
        raise errors.WeightsError(
            "this is SAM-HQ in its authors' layout, which is not converted; take the safetensors of its Hugging Face "
            "page and import their folder"
        )
    return True


def rename(name: str) -> str | None:
    """The array's name in ``SamModel``; None for constants that are no weights.

    Source: Kirillov et al., "Segment Anything", ICCV 2023 (modules of the authors' code); ``SamModel`` of transformers.
    """
    if name in _CONSTANTS:
        return None
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name


def convert(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays under the names of ``SamModel``."""
    return {new: value for old, value in arrays.items() if (new := rename(old)) is not None}


@layout_fault.raised("SAM", "SAM's")
def settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """``config.json`` of an original SAM, read off the shapes of its arrays.

    Raises:
        WeightsError: if arrays are missing.
    """
    adapted = {"architectures": ["SamMed2dModel"], "model_type": "sam_med2d"}
    plain = {"architectures": ["SamModel"], "model_type": "sam"}
    kind = plain if ADAPTER not in shapes else {**adapted, "adapter_width": shapes[ADAPTER][0]}
    return {
        **kind,
        "vision_config": _vision(shapes),
        "prompt_encoder_config": _prompt(shapes),
        "mask_decoder_config": decoder(shapes),
    }


def _vision(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width, (_, _, _, patch) = shapes["image_encoder.pos_embed"][3], shapes["image_encoder.patch_embed.proj.weight"]
    grid = shapes["image_encoder.pos_embed"][1]
    depth = count(shapes, r"image_encoder\.blocks\.(\d+)\.norm1\.weight")
    # A table of relative positions has 2 n - 1 rows for n cells a side: the window's, or the whole grid's.
    sides = [(shapes[f"image_encoder.blocks.{index}.attn.rel_pos_h"][0] + 1) // 2 for index in range(depth)]
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // shapes["image_encoder.blocks.0.attn.rel_pos_h"][1],
        "mlp_dim": shapes["image_encoder.blocks.0.mlp.lin1.weight"][0],
        "patch_size": patch,
        "image_size": grid * patch,
        "window_size": min((side for side in sides if side != grid), default=14),
        "global_attn_indexes": [index for index, side in enumerate(sides) if side == grid],
        "output_channels": shapes["image_encoder.neck.0.weight"][0],
        "num_pos_feats": shapes["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"][1],
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "qkv_bias": "image_encoder.blocks.0.attn.qkv.bias" in shapes,
    }


def _prompt(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    patch, grid = shapes["image_encoder.patch_embed.proj.weight"][3], shapes["image_encoder.pos_embed"][1]
    return {
        "hidden_size": shapes["prompt_encoder.point_embeddings.0.weight"][1],
        "num_point_embeddings": count(shapes, r"prompt_encoder\.point_embeddings\.(\d+)\.weight"),
        "mask_input_channels": shapes["prompt_encoder.mask_downscaling.3.weight"][0],
        "patch_size": patch,
        "image_size": grid * patch,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }


def decoder(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Settings of the mask decoder."""
    masks, width = shapes["mask_decoder.mask_tokens.weight"]
    first = "mask_decoder.transformer.layers.0"
    return {
        "hidden_size": width,
        "num_hidden_layers": count(shapes, r"mask_decoder\.transformer\.layers\.(\d+)\.norm1\.weight"),
        "num_attention_heads": HEADS,
        "attention_downsample_rate": width // shapes[f"{first}.cross_attn_token_to_image.q_proj.weight"][0],
        "mlp_dim": shapes[f"{first}.mlp.lin1.weight"][0],
        "num_multimask_outputs": masks - 1,
        "iou_head_depth": count(shapes, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\.weight"),
        "iou_head_hidden_dim": shapes["mask_decoder.iou_prediction_head.layers.0.weight"][0],
        "layer_norm_eps": 1e-6,
        "hidden_act": "relu",
    }


def count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """How many arrays have a name of this form."""
    return sum(re.fullmatch(pattern, name) is not None for name in shapes)
