"""A small SAM with a TinyViT encoder in its authors' layout: every number follows from its array's name."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

WIDTHS, DEPTHS, HEADS, WINDOWS = (8, 16, 24, 320), (1, 1, 2, 1), (1, 2, 3, 5), (7, 5, 6, 5)
OUT, MLP, IOU, PROMPT_CHANNELS = 16, 32, 16, 4


def arrays(kernel: int = 3) -> dict[str, torch.Tensor]:
    """The state dict; the published patch embeddings have kernels of 3 (MobileSAM) or 1 (LiteMedSAM)."""
    return {name: _numbers(name, shape) for name, shape in shapes(kernel)}


def save(path: Path, kernel: int = 3) -> Path:
    torch.save(arrays(kernel), path)
    return path


def _numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.tensor(7)
    if name.endswith("running_var"):
        return torch.from_numpy(rng.uniform(0.5, 2.0, shape).astype(np.float32))
    values = rng.normal(0, 0.3, shape)
    if name.endswith(("bn.weight", "norm.weight", "norm1.weight", "norm2.weight", "norm3.weight", "norm4.weight")):
        values += 1.0
    return torch.from_numpy(values.astype(np.float32))


def shapes(kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _conv_bn("image_encoder.patch_embed.seq.0", WIDTHS[0] // 2, 3, kernel)
    yield from _conv_bn("image_encoder.patch_embed.seq.2", WIDTHS[0], WIDTHS[0] // 2, kernel)
    for stage, width in enumerate(WIDTHS):
        for index in range(DEPTHS[stage]):
            path = f"image_encoder.layers.{stage}.blocks.{index}"
            yield from _bottleneck(path, width) if stage == 0 else _block(path, width, HEADS[stage], WINDOWS[stage])
        if stage < 3:
            after, path = WIDTHS[stage + 1], f"image_encoder.layers.{stage}.downsample"
            yield from _conv_bn(f"{path}.conv1", after, width, 1)
            yield from _conv_bn(f"{path}.conv2", after, 1, 3)
            yield from _conv_bn(f"{path}.conv3", after, after, 1)
    yield from _affine("image_encoder.norm_head", WIDTHS[-1])
    yield from _linear("image_encoder.head", 5, WIDTHS[-1])
    yield "image_encoder.neck.0.weight", (OUT, WIDTHS[-1], 1, 1)
    yield from _affine("image_encoder.neck.1", OUT)
    yield "image_encoder.neck.2.weight", (OUT, OUT, 3, 3)
    yield from _affine("image_encoder.neck.3", OUT)
    yield from _prompt_encoder()
    yield from _decoder()


def _conv_bn(path: str, out: int, into: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.c.weight", (out, into, kernel, kernel)
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{path}.bn.{part}", (out,)
    yield f"{path}.bn.num_batches_tracked", ()


def _affine(path: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.weight", (width,)
    yield f"{path}.bias", (width,)


def _linear(path: str, out: int, into: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.weight", (out, into)
    yield f"{path}.bias", (out,)


def _bottleneck(path: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _conv_bn(f"{path}.conv1", 4 * width, width, 1)
    yield from _conv_bn(f"{path}.conv2", 4 * width, 1, 3)
    yield from _conv_bn(f"{path}.conv3", width, 4 * width, 1)


def _block(path: str, width: int, heads: int, window: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.attn.attention_biases", (heads, window * window)
    yield from _affine(f"{path}.attn.norm", width)
    yield from _linear(f"{path}.attn.qkv", 3 * width, width)
    yield from _linear(f"{path}.attn.proj", width, width)
    yield from _affine(f"{path}.mlp.norm", width)
    yield from _linear(f"{path}.mlp.fc1", 4 * width, width)
    yield from _linear(f"{path}.mlp.fc2", width, 4 * width)
    yield from _conv_bn(f"{path}.local_conv", width, 1, 3)


def _prompt_encoder() -> Iterator[tuple[str, tuple[int, ...]]]:
    path = "prompt_encoder"
    yield f"{path}.pe_layer.positional_encoding_gaussian_matrix", (2, OUT // 2)
    for index in range(4):
        yield f"{path}.point_embeddings.{index}.weight", (1, OUT)
    yield f"{path}.not_a_point_embed.weight", (1, OUT)
    first = PROMPT_CHANNELS // 4
    yield f"{path}.mask_downscaling.0.weight", (first, 1, 2, 2)
    yield f"{path}.mask_downscaling.0.bias", (first,)
    yield from _affine(f"{path}.mask_downscaling.1", first)
    yield f"{path}.mask_downscaling.3.weight", (PROMPT_CHANNELS, first, 2, 2)
    yield f"{path}.mask_downscaling.3.bias", (PROMPT_CHANNELS,)
    yield from _affine(f"{path}.mask_downscaling.4", PROMPT_CHANNELS)
    yield f"{path}.mask_downscaling.6.weight", (OUT, PROMPT_CHANNELS, 1, 1)
    yield f"{path}.mask_downscaling.6.bias", (OUT,)
    yield f"{path}.no_mask_embed.weight", (1, OUT)


def _decoder() -> Iterator[tuple[str, tuple[int, ...]]]:
    path = "mask_decoder"
    for index in range(2):
        layer = f"{path}.transformer.layers.{index}"
        yield from _attention(f"{layer}.self_attn", OUT)
        yield from _attention(f"{layer}.cross_attn_token_to_image", OUT // 2)
        yield from _attention(f"{layer}.cross_attn_image_to_token", OUT // 2)
        yield from _linear(f"{layer}.mlp.lin1", MLP, OUT)
        yield from _linear(f"{layer}.mlp.lin2", OUT, MLP)
        for norm in range(1, 5):
            yield from _affine(f"{layer}.norm{norm}", OUT)
    yield from _attention(f"{path}.transformer.final_attn_token_to_image", OUT // 2)
    yield from _affine(f"{path}.transformer.norm_final_attn", OUT)
    yield f"{path}.iou_token.weight", (1, OUT)
    yield f"{path}.mask_tokens.weight", (4, OUT)
    yield f"{path}.output_upscaling.0.weight", (OUT, OUT // 4, 2, 2)
    yield f"{path}.output_upscaling.0.bias", (OUT // 4,)
    yield from _affine(f"{path}.output_upscaling.1", OUT // 4)
    yield f"{path}.output_upscaling.3.weight", (OUT // 4, OUT // 8, 2, 2)
    yield f"{path}.output_upscaling.3.bias", (OUT // 8,)
    for index in range(4):
        yield from _network(f"{path}.output_hypernetworks_mlps.{index}", OUT, OUT // 8)
    yield from _network(f"{path}.iou_prediction_head", IOU, 4)


def _attention(path: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("q_proj", "k_proj", "v_proj"):
        yield from _linear(f"{path}.{part}", inner, OUT)
    yield from _linear(f"{path}.out_proj", OUT, inner)


def _network(path: str, hidden: int, out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _linear(f"{path}.layers.0", hidden, OUT)
    yield from _linear(f"{path}.layers.1", hidden, hidden)
    yield from _linear(f"{path}.layers.2", out, hidden)
