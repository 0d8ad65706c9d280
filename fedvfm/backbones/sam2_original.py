"""SAM 2 and 2.1 checkpoints as their authors publish them (MedSAM2 too): names and settings of ``transformers``.

What the model remembers of earlier frames (memory, pointers to objects) is left behind: single images need none of it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import layout_fault, sam_original

EXACT = True
"""Every array that :func:`convert` gives must be one of the model's."""
HEADS = 8
"""Heads of the mask decoder's attention: no array's shape tells them, and the published code fixes them."""
TRUNK, NECK = "image_encoder.trunk.", "image_encoder.neck.convs."
SHAPES: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    (96, (1, 2, 7, 2)): (1, (5, 7, 9), (8, 4, 14, 7)),
    (96, (1, 2, 11, 2)): (1, (7, 10, 13), (8, 4, 14, 7)),
    (112, (2, 3, 16, 3)): (2, (12, 16, 20), (8, 4, 14, 7)),
    (144, (2, 6, 36, 4)): (2, (23, 33, 43), (8, 4, 16, 8)),
}
"""Width and blocks a stage -> heads of the first stage, blocks with global attention, window of each stage.

No array tells these three; they are those of the published configurations (tiny, small, base plus, large).
"""

_MEMORY = (
    "memory_attention.",
    "memory_encoder.",
    "maskmem_tpos_enc",
    "no_mem_pos_enc",
    "no_obj_ptr",
    "no_obj_embed_spatial",
    "obj_ptr_proj.",
    "obj_ptr_tpos_proj.",
    "mask_downsample.",
)
_POINTS = re.compile(r"sam_prompt_encoder\.point_embeddings\.(\d+)\.weight")
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
        (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
        (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
        (r"^no_mem_embed$", "no_memory_embedding"),
        (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
        (r"^(mask_decoder\..*attn.*)\.out_proj\.", r"\1.o_proj."),
        (r"\.(mlp)\.layers\.0\.", r".\1.proj_in."),
        (r"\.(mlp)\.layers\.1\.", r".\1.proj_out."),
        (r"\.pred_obj_score_head\.layers\.0\.", ".pred_obj_score_head.proj_in."),
        (r"\.pred_obj_score_head\.layers\.1\.", ".pred_obj_score_head.layers.0."),
        (r"\.pred_obj_score_head\.layers\.2\.", ".pred_obj_score_head.proj_out."),
        (r"^(vision_encoder\.backbone\.blocks\.\d+)\.norm([12])\.", r"\1.layer_norm\2."),
    )
)


def recognise(names: Collection[str]) -> bool:
    """Whether these are the array names of an original SAM 2."""
    return f"{TRUNK}blocks.0.attn.qkv.weight" in names and "sam_mask_decoder.mask_tokens.weight" in names


def rename(name: str) -> str:
    """The array's name in ``Sam2Model``.

    Source: Ravi et al., "SAM 2: Segment Anything in Images and Videos", ICLR 2025 (modules of the authors' code);
    ``Sam2Model`` of transformers.
    """
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name if name.startswith("vision_encoder.") else sam_original.rename(name) or name


def convert(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of single images under the names of ``Sam2Model``."""
    points = {int(match[1]): value for name, value in arrays.items() if (match := _POINTS.fullmatch(name))}
    kept = {name: value for name, value in arrays.items() if not (name.startswith(_MEMORY) or _POINTS.fullmatch(name))}
    converted = {rename(name): value for name, value in kept.items()}
    converted["prompt_encoder.point_embed.weight"] = torch.cat([points[index] for index in sorted(points)])
    # The stock model holds one table twice: for prompts, and for the cells of the grid.
    table = converted["shared_image_embedding.positional_embedding"]
    return {**converted, "prompt_encoder.shared_embedding.positional_embedding": table.clone()}


@layout_fault.raised("SAM 2", "SAM 2's")
def settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """``config.json`` of an original SAM 2, read off the shapes of its arrays.

    Raises:
        WeightsError: if arrays are missing, or the encoder is none of the published ones.
    """
    return {
        "architectures": ["Sam2Model"],
        "model_type": "sam2",
        "vision_config": _vision(shapes),
        "prompt_encoder_config": _prompt(shapes),
        "mask_decoder_config": _decoder(shapes),
    }


def _vision(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    depth = sam_original.count(shapes, r"image_encoder\.trunk\.blocks\.(\d+)\.norm1\.weight")
    widths = [shapes[f"{TRUNK}blocks.{index}.attn.proj.weight"][0] for index in range(depth)]
    stages = sorted(set(widths))
    blocks = [widths.count(width) for width in stages]
    known = SHAPES.get((stages[0], tuple(blocks)))
    if known is None or shapes[f"{TRUNK}pos_embed_window"][2] != known[2][0]:
        raise errors.WeightsError(
            f"this SAM 2 has an encoder of width {stages[0]} with {blocks} blocks, none of the published ones, "
            "and arrays do not tell heads, windows and global attention. Give a config.json of Sam2Model with --config"
        )
    heads, wide, windows = known
    encoder = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": stages[0],
        "embed_dim_per_stage": stages,
        "num_attention_heads_per_stage": [heads * 2**stage for stage in range(len(stages))],
        "blocks_per_stage": blocks,
        "global_attention_blocks": list(wide),
        "window_size_per_stage": list(windows),
        "window_positional_embedding_background_size": list(shapes[f"{TRUNK}pos_embed"][2:]),
        "mlp_ratio": shapes[f"{TRUNK}blocks.0.mlp.layers.0.weight"][0] / stages[0],
    }
    channels = [shapes[f"{NECK}{index}.conv.weight"] for index in range(len(stages))]
    return {
        "model_type": "sam2_vision_model",
        "backbone_config": encoder,
        "backbone_channel_list": [channel[1] for channel in channels],
        "fpn_hidden_size": channels[0][0],
    }


def _prompt(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    own = {name.removeprefix("sam_"): shape for name, shape in shapes.items()}
    return {
        "hidden_size": own["prompt_encoder.point_embeddings.0.weight"][1],
        "num_point_embeddings": sam_original.count(own, r"prompt_encoder\.point_embeddings\.(\d+)\.weight"),
        "mask_input_channels": own["prompt_encoder.mask_downscaling.3.weight"][0],
    }


def _decoder(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    masks, width = shapes["sam_mask_decoder.mask_tokens.weight"]
    first = "sam_mask_decoder.transformer.layers.0"
    return {
        "hidden_size": width,
        "num_hidden_layers": sam_original.count(shapes, r"sam_mask_decoder\.transformer\.layers\.(\d+)\.norm1\.weight"),
        "num_attention_heads": HEADS,
        "attention_downsample_rate": width // shapes[f"{first}.cross_attn_token_to_image.q_proj.weight"][0],
        "mlp_dim": shapes[f"{first}.mlp.layers.0.weight"][0],
        "num_multimask_outputs": masks - 1,
        "iou_head_depth": sam_original.count(shapes, r"sam_mask_decoder\.iou_prediction_head\.layers\.(\d+)\.weight"),
        "iou_head_hidden_dim": shapes["sam_mask_decoder.iou_prediction_head.layers.0.weight"][0],
    }
