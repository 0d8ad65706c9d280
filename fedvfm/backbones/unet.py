"""Small U-Nets trained from scratch, of slices and of volumes: the honest baseline of every segmentation table."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import base
from fedvfm.config import schema


class UNet(base.Backbone):
    """MONAI's U-Net with instance norm; its grid has full resolution, so a linear head finishes it.

    Shapes: pixels (B, 3, H, W) -> one grid (B, channels[0], H, W). Sides that the strides do not divide are padded
    and cut.
    Source: Ronneberger et al., "U-Net", MICCAI 2015; Kerfoot et al., STACOM 2018 (residual units), as in MONAI.
    """

    dimensions: ClassVar[int] = 2

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MONAI's imports warn about optional packages
            from monai.networks.nets import UNet as MonaiUNet

        self.name = "unet" if self.dimensions == 2 else "unet3d"
        self.sha256, self.pretrained, self.width, self.depth, self.patch = "", False, channels[0], 0, 1
        self._multiple = 2 ** (len(channels) - 1)
        self.model = MonaiUNet(
            spatial_dims=self.dimensions,
            in_channels=3,
            out_channels=channels[0],
            channels=tuple(channels),
            strides=(2,) * (len(channels) - 1),
            num_res_units=1,
            norm=("INSTANCE", {"affine": True}),
        )

    def taps(self, count: int) -> tuple[int, ...]:
        """One grid only."""
        return (0,)

    def check_size(self, size: Sequence[int]) -> list[str]:
        """Any size fits."""
        return []

    def projection(self, block: int, part: str) -> str | None:
        """There is none."""
        return None

    def wire_name(self, parameter: str) -> str:
        """MONAI's own names behind ``unet.``."""
        return f"unet.{parameter}"

    def features(self, pixels: Tensor, taps: Sequence[int], prefix: base.Prefix | None = None) -> base.Features:
        """See base."""
        size = pixels.shape[2:]
        short = [-side % self._multiple for side in size]
        if all(side + more == self._multiple for side, more in zip(size, short, strict=True)):
            short[-1] += self._multiple  # the lowest level normalises over its cells, and there must be two
        missing = [number for more in reversed(short) for number in (0, more)]
        padded = torch.nn.functional.pad(pixels, missing, mode="replicate")
        grid = self.model(padded)[:, :, *(slice(side) for side in size)]
        return base.Features(pixels, (grid,), grid.mean(dim=tuple(range(2, grid.ndim))))


class UNet3D(UNet):
    """The same network of whole volumes.

    Shapes: pixels (B, 3, D, H, W) -> one grid (B, channels[0], D, H, W).
    Source: Çiçek et al., "3D U-Net", MICCAI 2016; residual units as in MONAI.
    """

    dimensions: ClassVar[int] = 3
    volumetric = True
    default_head = "voxel"

    def activations(self, size: Sequence[int]) -> int:
        """About ten grids a level: two residual units of convolutions, norms and activations."""
        return 10 * self.width * math.prod(size)


@base.takes("channels")
def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> UNet:
    """A U-Net with the channels of ``options.channels``; its weights are set from the initial adapter.

    Raises:
        ConfigError: as :func:`_load`.
    """
    return _load(UNet, settings, with_weights, device)


@base.takes("channels")
def load_volumetric(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> UNet:
    """A 3D U-Net of whole volumes (``recipe.data.depth``), otherwise as ``unet``.

    Raises:
        ConfigError: as :func:`_load`.
    """
    return _load(UNet3D, settings, with_weights, device)


def _load(kind: type[UNet], settings: schema.BackboneConfig, with_weights: bool, device: str) -> UNet:
    """A U-Net with the channels of ``options.channels``; its weights are set from the initial adapter.

    Raises:
        ConfigError: if the channels are not whole positive numbers, or weights are pinned.
    """
    if settings.sha256 is not None or settings.revision is not None:
        raise errors.ConfigError(
            f"backbone '{settings.name}'",
            ["sha256 and revision: it is trained from scratch, there are no weights to pin; leave both out"],
        )
    channels = settings.options.get("channels", [16, 32, 64, 128])
    if not isinstance(channels, list) or len(channels) < 2 or not all(type(c) is int and c > 0 for c in channels):
        raise errors.ConfigError(
            f"backbone '{settings.name}'", [f"options.channels = {channels!r}: give two or more positive whole numbers"]
        )
    with torch.device(device if with_weights else "meta"):
        return kind([int(c) for c in channels])
