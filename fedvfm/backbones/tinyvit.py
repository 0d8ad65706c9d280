"""TinyViT, the small image encoder of MobileSAM and LiteMedSAM, with its BatchNorm folded into the convolutions.

Convolutions first (a patch embedding and inverted bottlenecks), then three stages of windowed attention. Hidden states
are grids (B, h, w, C) everywhere, as in the other SAM encoders here.

Source: Wu et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers", ECCV 2022; Zhang et al.,
"Faster Segment Anything: Towards Lightweight SAM for Mobile Applications" (MobileSAM), 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM_EPSILON = 1e-5
"""Epsilon of the layer norms in the blocks."""


@dataclass(frozen=True)
class Shape:
    """What decides a TinyViT's arrays.

    Attributes:
        widths: channels of the convolutional stage and of the three attention stages.
        depths: blocks of each stage.
        heads, windows: of each stage's attention; those of the first stage are not used.
        strides: of the convolutions between the stages.
        patch_kernel: side of the two kernels of the patch embedding: 3 with stride 2 each, 1 with stride 1 each.
        expansion: hidden channels of an inverted bottleneck by its channels.
        mlp_ratio: the same for the feed-forward branch of a block.
        output: channels of the image embedding.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    strides: tuple[int, ...]
    patch_kernel: int
    expansion: int = 4
    mlp_ratio: int = 4
    output: int = 256

    @property
    def patch_stride(self) -> int:
        """Pixels of the input a cell of the first grid spans, along each side."""
        return 4 if self.patch_kernel == 3 else 1

    @property
    def stride(self) -> int:
        """Pixels of the input a cell of the image embedding spans, along each side."""
        total = self.patch_stride
        for step in self.strides:
            total *= step
        return total

    @property
    def stages(self) -> tuple[int, ...]:
        """Stage of each attention block, from 1."""
        return tuple(stage for stage in range(1, len(self.depths)) for _ in range(self.depths[stage]))


class Bottleneck(nn.Module):
    """An inverted bottleneck (MobileNetV2's). Shapes: (B, C, h, w) -> the same."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        self.conv1 = nn.Conv2d(width, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.conv3 = nn.Conv2d(hidden, width, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """See the class."""
        hidden = functional.gelu(self.conv2(functional.gelu(self.conv1(grid))))
        return functional.gelu(grid + self.conv3(hidden))


class Merging(nn.Module):
    """The convolutions between two stages. Shapes: (B, C, h, w) -> (B, C', h / stride, w / stride)."""

    def __init__(self, width: int, output: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, output, 1)
        self.conv2 = nn.Conv2d(output, output, 3, stride=stride, padding=1, groups=output)
        self.conv3 = nn.Conv2d(output, output, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.conv3(functional.gelu(self.conv2(functional.gelu(self.conv1(grid)))))
        return result


class Embedding(nn.Module):
    """What lies before the first attention block. Shapes: pixels (B, 3, H, W) -> (B, h, w, C).

    With the channels last in memory the convolutions of a CPU take about half the time in bfloat16, and their answer
    lies as the blocks take it.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, kernel = shape.widths[0], shape.patch_kernel
        step, padding = (2, 1) if kernel == 3 else (1, 0)
        self.conv1 = nn.Conv2d(3, width // 2, kernel, step, padding)
        self.conv2 = nn.Conv2d(width // 2, width, kernel, step, padding)
        self.bottlenecks = nn.ModuleList(Bottleneck(width, shape.expansion) for _ in range(shape.depths[0]))

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        grid = self.conv2(functional.gelu(self.conv1(pixels.contiguous(memory_format=torch.channels_last))))
        for bottleneck in self.bottlenecks:
            grid = bottleneck(grid)
        result: Tensor = grid.permute(0, 2, 3, 1)
        return result


class Attention(nn.Module):
    """Attention within a window, with a learnt bias for each distance. Shapes: (N, side * side, C) -> the same.

    ``qkv`` holds the rows of all queries, then of all keys, then of all values.
    """

    offsets: Tensor

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, side * side))
        self.register_buffer("offsets", offsets(side), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        windows, length, width = tokens.shape
        parts = self.qkv(self.norm(tokens)).reshape(windows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        bias = self.bias[:, self.offsets].to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(windows, length, width))
        return result


def offsets(side: int) -> Tensor:
    """Number of the bias of each pair of cells of a window: rows apart times ``side`` plus columns apart.

    Shapes: (side * side, side * side), integers.
    """
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    row, column = row.reshape(-1), column.reshape(-1)
    return (row[:, None] - row).abs() * side + (column[:, None] - column).abs()


class FeedForward(nn.Module):
    """The feed-forward branch. Shapes: (..., C) -> the same."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.fc2(functional.gelu(self.fc1(self.norm(hidden))))
        return result


class Block(nn.Module):
    """Windowed attention, a depthwise convolution and the feed-forward branch.

    A grid whose sides are no multiples of the window is padded with zeros right and below; the padding takes part in
    the attention, as in the authors' code, and is cut off after it.

    Shapes: (B, h, w, C) -> (B, h', w', C'): the first block of a stage begins with its merging convolutions.
    """

    def __init__(self, width: int, heads: int, side: int, ratio: int, merging: Merging | None) -> None:
        super().__init__()
        self.side, self.width = side, width
        self.merging = merging
        self.attn = Attention(width, heads, side)
        self.local_conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mlp = FeedForward(width, ratio)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        if self.merging is not None:
            hidden = self.merging(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = hidden + self._attend(hidden)
        hidden = self.local_conv(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        result: Tensor = hidden + self.mlp(hidden)
        return result

    def _attend(self, hidden: Tensor) -> Tensor:
        batch, rows, columns, width = hidden.shape
        side = self.side
        down, across = -rows % side, -columns % side
        padded = functional.pad(hidden, (0, 0, 0, across, 0, down))
        high, wide = (rows + down) // side, (columns + across) // side
        windows = padded.reshape(batch, high, side, wide, side, width).transpose(2, 3)
        mixed = self.attn(windows.reshape(-1, side * side, width))
        whole = mixed.reshape(batch, high, wide, side, side, width).transpose(2, 3)
        result: Tensor = whole.reshape(batch, rows + down, columns + across, width)[:, :rows, :columns]
        return result


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, grid: Tensor) -> Tensor:
        """See the class."""
        rows = functional.layer_norm(grid.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, eps=1e-6)
        result: Tensor = rows.permute(0, 3, 1, 2)
        return result


class Neck(nn.Module):
    """From the last block to the image embedding. Shapes: (B, h, w, D) -> (B, C, h, w)."""

    def __init__(self, width: int, output: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, output, 1, bias=False)
        self.layer_norm1 = ChannelNorm(output)
        self.conv2 = nn.Conv2d(output, output, 3, padding=1, bias=False)
        self.layer_norm2 = ChannelNorm(output)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        grid = self.layer_norm1(self.conv1(hidden.permute(0, 3, 1, 2)))
        result: Tensor = self.layer_norm2(self.conv2(grid))
        return result


class Encoder(nn.Module):
    """The whole encoder. Shapes: pixels (B, 3, H, W) -> image embedding (B, C, H / stride, W / stride)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = Embedding(shape)
        self.blocks = nn.ModuleList(_blocks(shape))
        self.neck = Neck(shape.widths[-1], shape.output)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        hidden = self.embed(pixels)
        for block in self.blocks:
            hidden = block(hidden)
        result: Tensor = self.neck(hidden)
        return result


def _blocks(shape: Shape) -> Sequence[Block]:
    blocks, before = [], 0
    for stage in shape.stages:
        merging = None
        if stage != before:
            merging = Merging(shape.widths[before], shape.widths[stage], shape.strides[before])
        before = stage
        blocks.append(Block(shape.widths[stage], shape.heads[stage], shape.windows[stage], shape.mlp_ratio, merging))
    return blocks
