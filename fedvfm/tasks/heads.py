"""Heads: small modules from a backbone's features to logits.

No BatchNorm, so that sites and privacy do not mix samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedvfm import registry
from fedvfm.backbones import base
from fedvfm.tasks import fusion as fusions

TABLE = registry.Table(
    "head",
    {
        "linear": "fedvfm.tasks.heads:Linear",
        "patch": "fedvfm.tasks.heads:Patch",
        "voxel": "fedvfm.tasks.heads:Voxel",
        "pyramid": "fedvfm.tasks.heads:Pyramid",
        "unet": "fedvfm.tasks.heads:UNet",
        "unet-deep": "fedvfm.tasks.heads:DeepUNet",
        "sam-masks": "fedvfm.tasks.heads:SamMasks",
    },
)

CELL = 4
"""(pixels) Side of what :class:`Boxes` computes one number of."""
RARE = math.log(0.01 / 0.99)
"""Logit of a heat map at first: an object is rare (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017,
section 4.1)."""
USUAL, FARTHEST = 8.0, 6.0
"""(pixels) Distance of a box's side at first, and the logarithm of how many times as far or near it may come to be."""


class Linear(nn.Module):
    """Layer norm and one linear layer on the pooled vector, joined with a row of the table where there is one.

    Shapes: pooled (B, D), rows (B, C) -> (B, K).
    """

    grids = 1

    def __init__(self, width: int, classes: int, fusion: fusions.Fusion | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width if fusion is None else fusion.width, classes)
        self.fusion = fusion

    def forward(self, features: base.Features, rows: Tensor | None = None) -> Tensor:
        """See the class."""
        pooled = self.norm(features.pooled)
        return fusions.answer(self.classify, pooled if self.fusion is None else self.fusion(pooled, rows))


class Patch(nn.Module):
    """One linear layer on every cell of the last grid, resized to the input.

    The linear probe, and the U-Net's last layer.

    Shapes: grid (B, D, h, w) -> (B, K, H, W).
    """

    grids = 1

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, features: base.Features) -> Tensor:
        """See the class."""
        return base.resize(self.classify(features.grids[-1]), features.image.shape[-2:])


class Voxel(nn.Module):
    """One linear layer on every voxel: the last layer of a network of whole volumes.

    Shapes: grid (B, D, d, h, w) -> (B, K, d, h, w).
    """

    grids = 1

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv3d(width, classes, 1)

    def forward(self, features: base.Features) -> Tensor:
        """See the class."""
        result: Tensor = self.classify(features.grids[-1])
        return result


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    norm = nn.GroupNorm(max(1, outputs // 8), outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm, nn.GELU())


class Pyramid(nn.Module):
    """Token grids of two depths fused with a small convolutional pyramid of the image: sharp masks from coarse patches.

    A patch of 14 pixels is larger than a nucleus; the full-resolution path gives the edges, the tokens say what is
    inside.

    Shapes: image (B, 3, H, W), grids (B, D, h, w) -> (B, K, H, W).
    """

    grids = 2

    def __init__(self, width: int, classes: int, inner: int = 32, stem: Sequence[int] = (8, 16, 24)) -> None:
        super().__init__()
        full, half, quarter = stem
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(self.grids))
        self.project = nn.ModuleList(nn.Conv2d(width, inner, 1, bias=index == 0) for index in range(self.grids))
        self.stem1, self.stem2, self.stem4 = (
            _convolution(3, full),
            _convolution(full, half, 2),
            _convolution(half, quarter, 2),
        )
        self.fuse4 = _convolution(inner + quarter, inner)
        self.fuse2 = _convolution(inner + half, half)
        self.fuse1 = _convolution(half + full, full)
        self.classify = nn.Conv2d(full, classes, 1)

    def forward(self, features: base.Features) -> Tensor:
        """See the class."""
        parts = zip(self.norms, self.project, features.grids, strict=True)
        grid = sum(project(norm(tokens.movedim(1, -1)).movedim(-1, 1)) for norm, project, tokens in parts)
        full = self.stem1(features.image)
        half = self.stem2(full)
        quarter = self.stem4(half)
        merged = self.fuse4(_join(grid, quarter))
        merged = self.fuse2(_join(merged, half))
        result: Tensor = self.classify(self.fuse1(_join(merged, full)))
        return result


class UNet(nn.Module):
    """A small U-Net of the image whose coarse levels also see the last token grid.

    Against :class:`Pyramid` it looks further around each pixel (down to an eighth of the input, two convolutions a
    coarse level), for structures that are told apart by where they lie.

    Shapes: image (B, 3, H, W), grid (B, D, h, w) -> (B, K, H, W).
    Source of the form: Ronneberger et al., "U-Net", MICCAI 2015; Hatamizadeh et al., "UNETR", WACV 2022 (tokens as the
        skip of a level).
    """

    grids = 1

    def __init__(
        self, width: int, classes: int, down: Sequence[int] = (8, 16, 24, 48), up: Sequence[int] = (16, 24, 48)
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Conv2d(width, up[2], 1)
        self.down1, self.down2, self.down4 = (
            _convolution(3, down[0]),
            _convolution(down[0], down[1], 2),
            _convolution(down[1], down[2], 2),
        )
        self.down8 = nn.Sequential(_convolution(down[2], down[3], 2), _convolution(down[3], down[3]))
        self.up4 = nn.Sequential(_convolution(down[3] + down[2] + up[2], up[2]), _convolution(up[2], up[2]))
        self.up2 = _convolution(up[2] + down[1], up[1])
        self.up1 = _convolution(up[1] + down[0], up[0])
        self.classify = nn.Conv2d(up[0], classes, 1)

    def forward(self, features: base.Features) -> Tensor:
        """See the class."""
        grid = self.project(self.norm(features.grids[-1].movedim(1, -1)).movedim(-1, 1))
        full = self.down1(features.image)
        half = self.down2(full)
        quarter = self.down4(half)
        merged = self.up4(_join(self.down8(quarter), _join(grid, quarter)))
        merged = self.up2(_join(merged, half))
        result: Tensor = self.classify(self.up1(_join(merged, full)))
        return result


class DeepUNet(nn.Module):
    """A U-Net of two convolutions a level that works at half the image's resolution, and so costs as much as UNet.

    Two by two pixels are one cell of all their channels, so nothing of the image is lost; each cell of the answer is
    two by two pixels again. For images that were enlarged to ``input_size``, whose own grid is no finer than that: with
    three times the numbers of :class:`UNet` it learns more from augmented views. The token grid joins at a quarter of
    the input.

    Shapes: image (B, 3, H, W), grid (B, D, h, w) -> (B, K, H, W).
    Source of the form: Ronneberger et al., "U-Net", MICCAI 2015; Shi et al., "Real-Time Single Image and Video
        Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network", CVPR 2016 (pixels as channels).
    """

    grids = 1

    def __init__(self, width: int, classes: int, levels: Sequence[int] = (24, 48, 64, 96)) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = levels
        self.norm = nn.LayerNorm(width)
        self.project = nn.Conv2d(width, quarter, 1)
        self.down2 = _convolution(4 * 3, half)
        self.down4, self.down8, self.down16 = (
            nn.Sequential(_convolution(before, after, 2), _convolution(after, after))
            for before, after in itertools.pairwise(levels)
        )
        self.up8 = nn.Sequential(_convolution(sixteenth + eighth, eighth), _convolution(eighth, eighth))
        self.up4 = nn.Sequential(_convolution(eighth + 2 * quarter, quarter), _convolution(quarter, quarter))
        self.up2 = nn.Sequential(_convolution(quarter + half, half), _convolution(half, half))
        self.classify = nn.Conv2d(half, 4 * classes, 1)

    def forward(self, features: base.Features) -> Tensor:
        """See the class."""
        height, width = features.image.shape[-2:]
        even = nn.functional.pad(features.image, (0, width % 2, 0, height % 2), mode="replicate")
        grid = self.project(self.norm(features.grids[-1].movedim(1, -1)).movedim(-1, 1))
        half = self.down2(nn.functional.pixel_unshuffle(even, 2))
        quarter = self.down4(half)
        eighth = self.down8(quarter)
        merged = self.up8(_join(self.down16(eighth), eighth))
        merged = self.up4(_join(merged, _join(grid, quarter)))
        merged = self.up2(_join(merged, half))
        return nn.functional.pixel_shuffle(self.classify(merged), 2)[..., :height, :width]


class Boxes(nn.Module):
    """Anchor-free boxes: a heat map of each class, and how far the four sides of the box lie from every pixel.

    The last token grid is joined with two convolutions of the image at a quarter of its size, which is where heat and
    sides are computed. Both are resized to the image bilinearly: inside of one object the distance to a side is a
    linear function of the place, and so stays exact.

    Shapes: image (B, 3, H, W), grid (B, D, h, w) -> (B, K - 1 + 4, H, W): logits of the classes but the background,
        then the distances to the left, upper, right and lower side.
    Units: distances in pixels of the image.
    Source of the form: Tian et al., "FCOS", ICCV 2019, section 3 (four distances, exp); Zhou et al., "Objects as
        Points", 2019, section 3 (a heat map a class, a stride of four).
    """

    grids = 1

    def __init__(self, width: int, classes: int, inner: int = 64, stem: Sequence[int] = (16, 32)) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Conv2d(width, inner, 1)
        self.stem2, self.stem4 = _convolution(3, stem[0], 2), _convolution(stem[0], stem[1], 2)
        self.fuse, self.mix = _convolution(inner + stem[1], inner), _convolution(inner, inner)
        self.heat, self.sides = nn.Conv2d(inner, classes - 1, 1), nn.Conv2d(inner, 4, 1)
        nn.init.constant_(self.heat.bias, RARE)  # type: ignore[arg-type]
        nn.init.zeros_(self.sides.weight)
        nn.init.zeros_(self.sides.bias)  # type: ignore[arg-type]

    def forward(self, features: base.Features) -> Tensor:
        """See the class."""
        grid = self.project(self.norm(features.grids[-1].movedim(1, -1)).movedim(-1, 1))
        merged = self.mix(self.fuse(_join(grid, self.stem4(self.stem2(features.image)))))
        distances = USUAL * self.sides(merged).float().clamp(-FARTHEST, FARTHEST).exp()
        return base.resize(torch.cat([self.heat(merged).float(), distances], dim=1), features.image.shape[-2:])


class SamMasks(nn.Module):
    """The masks of a SAM decoder, resized to the input. It has no parameters of its own.

    Without prompts class k is mask token k; with them the decoder gives the logits of every class by itself.

    Shapes: masks (B, M, h, w) -> (B, K, H, W).
    """

    grids = 1
    masks = True

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, features: base.Features) -> Tensor:
        """See the class."""
        if features.masks is None:
            raise ValueError("the backbone's mask decoder is not open")
        return base.resize(features.masks[:, : self.classes], features.image.shape[-2:])


def _join(coarse: Tensor | int, fine: Tensor) -> Tensor:
    return torch.cat([base.resize(torch.as_tensor(coarse), fine.shape[-2:]), fine], dim=1)
