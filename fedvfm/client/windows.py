"""Logits of a whole image: in one piece, or in overlapping windows.

Evaluation, the report's pictures and prediction all compute them here, so that what was scored is what is delivered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedvfm.client import model as models
from fedvfm.data import transforms

WHOLE = 1.6
OVERLAP = 1 / 9
SIGMA = 0.25
LEAST = 1e-3

Run = Callable[[transforms.Image, tuple[int, int]], Tensor]
"""(window (3, h, w), its upper left corner in the image) -> logits (K, h, w) or (K,) as float32 on the CPU."""


@torch.no_grad()
def logits(model: models.AdaptedModel, image: transforms.Image, run: Run) -> Tensor:
    """Logits of a whole prepared image: windows of the training size where it is much larger than that.

    In segmentation windows overlap and their middles count most; in classification each window counts the same.

    Shapes: image (3, h, w) -> (K, h, w) in segmentation, (K,) in classification.
    """
    size = model.recipe.data.input_size
    height, width = image.shape[1:]
    if height <= WHOLE * size[0] and width <= WHOLE * size[1]:
        return run(image, (0, 0))
    window = (min(size[0], height), min(size[1], width))
    weight = _importance(window)
    total = torch.zeros(len(model.recipe.data.class_names), height, width)
    weights = torch.zeros(height, width)
    votes = []
    for top, left in _corners((height, width), window):
        rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
        piece = run(image[:, rows, columns], (top, left))
        if piece.ndim == 1:
            votes.append(piece)
            continue
        total[:, rows, columns] += piece * weight
        weights[rows, columns] += weight
    return torch.stack(votes).mean(dim=0) if votes else total / weights


def tiling(model: models.AdaptedModel, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Size and number of the windows in which an image of ``size`` (height, width) is run."""
    window = model.recipe.data.input_size
    if size[0] <= WHOLE * window[0] and size[1] <= WHOLE * window[1]:
        return size, 1
    window = (min(window[0], size[0]), min(window[1], size[1]))
    return window, len(_corners(size, window))


def alone(model: models.AdaptedModel) -> Run:
    """The run of an image that is seen once: nothing is kept of it."""

    def run(image: transforms.Image, corner: tuple[int, int]) -> Tensor:
        pixels = torch.from_numpy(transforms.normalise(image[None], model.recipe.data)).to(model.device)
        result: Tensor = model(pixels)[0].float().cpu()
        return result

    return run


def _corners(size: Sequence[int], window: Sequence[int]) -> list[tuple[int, int]]:
    """Upper left corners of windows that cover the image with ``OVERLAP``."""
    starts = []
    for side, part in zip(size, window, strict=True):
        step = max(1, round(part * (1 - OVERLAP)))
        starts.append([min(start, side - part) for start in range(0, side - part + step, step)])
    return [(top, left) for top in dict.fromkeys(starts[0]) for left in dict.fromkeys(starts[1])]


@functools.lru_cache(maxsize=4)
def _importance(window: tuple[int, int]) -> Tensor:
    """Gaussian weight of a window's pixels, as MONAI's ``compute_importance_map``: its middle counts most.

    Shapes: (h, w). Its standard deviation is ``SIGMA`` of each side, its least value ``LEAST``.
    """
    lines = []
    for side in window:
        offset = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        lines.append(torch.exp(offset**2 / (-2 * (SIGMA * side) ** 2)))
    return (lines[0][:, None] * lines[1]).clamp(min=LEAST)
