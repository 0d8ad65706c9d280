"""What a backbone is: a frozen model that turns pixels into token grids, with our own names for its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Features:
    """What a head sees.

    Shapes: image (B, 3, H, W) normalised; each grid (B, D, h, w); pooled (B, D).
    """

    image: Tensor
    grids: tuple[Tensor, ...]
    pooled: Tensor


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the first blocks computed: it does not change while the blocks before the first adapted one are frozen.

    Attributes:
        stop: number of blocks done.
        hidden: tokens after them, (B, T, D).
        taken: block count -> tokens tapped there.
    """

    stop: int
    hidden: Tensor
    taken: Mapping[int, Tensor]


class Backbone(nn.Module):
    """Base of all backbones.

    Attributes:
        name: as the recipe names it.
        sha256: of the weights file; empty where the weights are made from the seed.
        pretrained: whether dense adapters travel as differences from the frozen weights.
        width: channels of a grid.
        depth: number of blocks; 0 where the model has none that can be adapted apart.
        patch: side of a patch in pixels; sides of the input are multiples of it.
    """

    name: str
    sha256: str
    pretrained: bool
    width: int
    depth: int
    patch: int
    model: nn.Module

    def taps(self, count: int) -> tuple[int, ...]:
        """Block counts after which ``count`` grids are taken, evenly spaced, the last after the last block.

        A model of fewer blocks than grids gives a grid twice.
        """
        return tuple(max(1, round(self.depth * (index + 1) / count)) for index in range(count))

    def check_size(self, size: Sequence[int]) -> list[str]:
        """Faults of an input size (height, width), one sentence each."""
        raise NotImplementedError

    def prefix(self, pixels: Tensor, stop: int, taps: Sequence[int]) -> Prefix:
        """Embedding and the first ``stop`` blocks."""
        raise NotImplementedError

    def features(self, pixels: Tensor, taps: Sequence[int], prefix: Prefix | None = None) -> Features:
        """Run the model, or what is left of it after ``prefix``.

        Shapes: pixels (B, 3, H, W); see Features.
        """
        raise NotImplementedError

    def projection(self, block: int, part: str) -> str | None:
        """Module path of a linear projection (``part`` in q, k, v, o, fc1, fc2), or None if there is none."""
        raise NotImplementedError

    def wire_name(self, parameter: str) -> str:
        """Our stable name for one of the model's parameters."""
        raise NotImplementedError

    def parameters_total(self) -> int:
        """Number of the model's own parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of (B, C, H, W) to ``size`` (H, W)."""
    return torch.nn.functional.interpolate(image, size=tuple(size), mode="bilinear", align_corners=False)
