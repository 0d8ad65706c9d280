"""Whether a backbone of somebody's own does what it says: grids, widths, and the same numbers for the same image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedvfm.backbones import base


def kind_faults(name: str, loaded: object) -> list[str]:
    """Why what a loader returned is no backbone, one sentence."""
    if isinstance(loaded, base.Backbone):
        return []
    return [
        f"'{name}' was loaded as {type(loaded).__name__}; the function that was registered must return a "
        "fedvfm.backbones.base.Backbone (docs/own-parts.md)"
    ]


def is_own(backbone: base.Backbone) -> bool:
    """Whether it comes from outside this package, whose own backbones have tests."""
    return type(backbone).__module__.partition(".")[0] != "fedvfm"


def faults(backbone: base.Backbone, size: Sequence[int], taps: Sequence[int], device: str) -> list[str]:
    """What of one image's features is not as :class:`fedvfm.backbones.base.Features` says, one sentence each.

    The image is computed twice, as at a site when it validates. Whole volumes and slices between neighbours are left
    out.

    Args:
        backbone: with its weights.
        size: height and width of the input, in pixels.
        taps: block counts at which grids are taken.
        device: where it lies.
    """
    if backbone.volumetric or backbone.slices != 1:
        return []
    rows = torch.linspace(-1, 1, size[0] * size[1], device=device).reshape(1, 1, *size).expand(1, 3, *size)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            computed: list[Any] = [backbone.features(rows.clone(), taps) for _ in range(2)]
    finally:
        for module, training in modes:
            module.training = training
    first, second = computed
    if not isinstance(first, base.Features):
        return [f"features() returned {type(first).__name__}; a fedvfm.backbones.base.Features is needed"]
    return _shape_faults(backbone, first, taps) or _difference(first, second)


def _shape_faults(backbone: base.Backbone, features: base.Features, taps: Sequence[int]) -> list[str]:
    wrong = []
    if len(features.grids) != len(taps):
        wrong.append(f"features() gave {len(features.grids)} grids for {len(taps)} taps; one for each is needed")
    for index, grid in enumerate(features.grids):
        if grid.dim() != 4 or tuple(grid.shape[:2]) != (1, backbone.width):
            wrong.append(
                f"grid {index} of one image has shape {_shape(grid)}; (1, {backbone.width}, rows, columns) is needed, "
                f"since width = {backbone.width}"
            )
    if tuple(features.pooled.shape) != (1, backbone.width):
        wrong.append(
            f"pooled of one image has shape {_shape(features.pooled)}; (1, {backbone.width}) is needed, since width = "
            f"{backbone.width}"
        )
    return wrong


def _difference(first: base.Features, second: base.Features) -> list[str]:
    pairs = zip((*first.grids, first.pooled), (*second.grids, second.pooled), strict=True)
    if all(torch.equal(value, again) for value, again in pairs):
        return []
    return [
        "the same image gave two different answers (or one that is not a number); draw nothing in features(), or only "
        "while self.training"
    ]


def _shape(tensor: Any) -> str:
    return str(tuple(tensor.shape))
