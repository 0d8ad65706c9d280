"""SAMs with a TinyViT encoder as their authors publish them (LiteMedSAM, MobileSAM): converted to our layout.

Every BatchNorm is folded into the convolution before it: it is frozen, so the two are one affine map. The rows of
query, key and value, which the authors keep head by head, are put one projection after the other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import layout_fault, sam_original

BATCH_NORM_EPSILON = 1e-5
"""Of the published code; no array tells it."""

DECODER_EPSILON = 1e-5
"""Of the layer norms in the decoder's transformer, as the authors' code has it; transformers' SAM takes 1e-6."""

MODEL_TYPE = "tinyvit_sam"
_FIRST = "image_encoder.layers.0.blocks.0.conv1.c.weight"
_UNUSED = re.compile(r"^image_encoder\.(norm_head|head)\.|\.attention_bias_idxs$|\.num_batches_tracked$")


def recognise(names: Collection[str]) -> bool:
    """Whether these are the array names of a SAM with a TinyViT encoder."""
    return _FIRST in names


def convert(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays under our names, in float32.

    Raises:
        WeightsError: if some are missing or of shapes that do not belong together.
    """
    kept = {name: value for name, value in arrays.items() if not _UNUSED.search(name)}
    stages = _stages(kept)
    found: dict[str, Tensor] = {}
    for name in kept:
        if ".bn." in name:
            continue
        if name.endswith(".c.weight"):
            stem = name.removesuffix("c.weight")
            found |= _fused(stem, kept, _block_name(stem, stages))
        elif name.startswith("image_encoder.layers."):
            new = _block_name(name, stages)
            found[new] = _by_projection(new, kept[name], arrays, name)
        elif (renamed := sam_original.rename(name)) is not None:
            found[renamed] = kept[name].float()
    return found


def _fused(stem: str, arrays: Mapping[str, Tensor], new: str) -> dict[str, Tensor]:
    """A convolution and the BatchNorm after it as one convolution with a bias; computed in float64."""
    try:
        kernel = arrays[f"{stem}c.weight"].double()
        weight, bias, mean, variance = (
            arrays[f"{stem}bn.{part}"].double() for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = weight / torch.sqrt(variance + BATCH_NORM_EPSILON)
        return {
            f"{new}weight": (kernel * factor[:, None, None, None]).float(),
            f"{new}bias": (bias - mean * factor).float(),
        }
    except KeyError as error:
        raise errors.WeightsError(f"this is no whole SAM: it lacks {error}. Download it again") from None
    except RuntimeError:
        raise _misshapen(stem) from None


def _misshapen(stem: str) -> errors.WeightsError:
    return errors.WeightsError(
        f"this is no whole SAM: the arrays of {ascii(stem)[1:-1]} are not of the shapes that a SAM has. Download it "
        "again"
    )


def _by_projection(new: str, value: Tensor, arrays: Mapping[str, Tensor], name: str) -> Tensor:
    """Rows of the fused layer: all queries, all keys, all values, in place of these three head by head."""
    match = re.fullmatch(r"(.*\.attn\.)qkv\.(weight|bias)", name)
    if match is None:
        return value.float()
    try:
        rows = value.float().reshape(_heads(arrays, match[1]), 3, -1, *value.shape[1:])
    except (IndexError, RuntimeError):
        raise _misshapen(match[1]) from None
    return rows.transpose(0, 1).reshape(value.shape).contiguous()


def _heads(arrays: Mapping[str, Tensor], attention: str) -> int:
    biases = arrays.get(f"{attention}attention_biases")
    if biases is None:
        raise errors.WeightsError(f"this is no whole SAM: it lacks '{attention}attention_biases'. Download it again")
    return int(biases.shape[0])


def _stages(names: Collection[str]) -> list[int]:
    """Number of blocks of each stage."""
    at = [re.match(r"image_encoder\.layers\.(\d+)\.blocks\.(\d+)\.", name) for name in names]
    counts: dict[int, int] = {}
    for match in at:
        if match is not None:
            counts[int(match[1])] = max(counts.get(int(match[1]), 0), int(match[2]) + 1)
    return [counts[stage] for stage in sorted(counts)]


def _block_name(name: str, stages: list[int]) -> str:
    """Our name of an array, or of a layer, of the encoder."""
    patch = re.match(r"image_encoder\.patch_embed\.seq\.(0|2)\.(.*)$", name)
    if patch is not None:
        return f"vision_encoder.embed.conv{1 if patch[1] == '0' else 2}.{patch[2]}"
    match = re.match(r"image_encoder\.layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.(.*)$", name)
    if match is None:
        raise errors.WeightsError(f"this SAM holds an array of no known place: {ascii(name)[1:80]}")
    stage, inner = int(match[1]), match[3].replace("attention_biases", "bias")
    if match[2] is None:  # the convolutions after a stage are the first thing that the next one does
        return f"vision_encoder.blocks.{sum(stages[1 : stage + 1])}.merging.{inner}"
    if stage == 0:
        return f"vision_encoder.embed.bottlenecks.{match[2]}.{inner}"
    return f"vision_encoder.blocks.{sum(stages[1:stage]) + int(match[2])}.{inner}"


@layout_fault.raised("SAM", "SAM's")
def settings(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """``config.json`` read off the shapes of the authors' arrays.

    Strides are those of the published code: between the stages 2, and 1 before stages of 320 channels and more. The
    input that the prompt encoder was trained with is 1024 pixels; 256 where the patch embedding has no stride
    (LiteMedSAM).

    Raises:
        WeightsError: if arrays are missing.
    """
    stages = _stages(shapes)
    firsts = [f"image_encoder.layers.{stage}.blocks.0.attn" for stage in range(1, len(stages))]
    width = shapes[_FIRST][1]
    widths = [width, *(shapes[f"{first}.norm.weight"][0] for first in firsts)]
    biases = [shapes[f"{first}.attention_biases"] for first in firsts]
    kernel = shapes["image_encoder.patch_embed.seq.0.c.weight"][2]
    vision = {
        "widths": widths,
        "depths": stages,
        "heads": [2, *(row[0] for row in biases)],
        "windows": [7, *(round(row[1] ** 0.5) for row in biases)],
        "strides": [1 if after >= 320 else 2 for after in widths[1:]],
        "patch_kernel": kernel,
        "expansion": shapes[_FIRST][0] // width,
        "mlp_ratio": shapes["image_encoder.layers.1.blocks.0.mlp.fc1.weight"][0] // widths[1],
        "output_channels": shapes["image_encoder.neck.0.weight"][0],
        "image_size": 1024 if kernel == 3 else 256,
    }
    return {
        "model_type": MODEL_TYPE,
        "vision_config": vision,
        "prompt_encoder_config": _prompt(shapes, vision),
        "mask_decoder_config": {**sam_original.decoder(shapes), "layer_norm_eps": DECODER_EPSILON},
    }


def _prompt(shapes: Mapping[str, tuple[int, ...]], vision: Mapping[str, Any]) -> dict[str, Any]:
    patch = 4 if vision["patch_kernel"] == 3 else 1
    for stride in vision["strides"]:
        patch *= stride
    return {
        "hidden_size": shapes["prompt_encoder.point_embeddings.0.weight"][1],
        "num_point_embeddings": sam_original.count(shapes, r"prompt_encoder\.point_embeddings\.(\d+)\.weight"),
        "mask_input_channels": shapes["prompt_encoder.mask_downscaling.3.weight"][0],
        "num_pos_feats": shapes["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"][1],
        "patch_size": patch,
        "image_size": vision["image_size"],
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
