"""Logits of a whole image: in one piece, or in overlapping windows.

Evaluation, the report's pictures and prediction all compute them here, so that what was scored is what is delivered.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedvfm.backbones import base as backbones
from fedvfm.data import transforms
from fedvfm.model import adapted_model

WHOLE = 1.6
OVERLAP = 1 / 9
SIGMA = 0.25
LEAST = 1e-3

BATCH = 8
"""Windows computed at a time on a GPU, at least: they need no gradients, so more fit than in training."""


@dataclass(frozen=True)
class Window:
    """A part of an image, or all of it.

    Attributes:
        number: of the image.
        image: its pixels. Shapes: (3, h, w), of a volume (3, d, h, w).
        corner: its upper left corner in the image; of a volume its first slice, too.
    """

    number: int
    image: transforms.Image
    corner: tuple[int, ...]


Run = Callable[[Sequence[Window]], Tensor]
"""Windows of one shape -> logits (B, K, h, w) or (B, K) as float32 on the CPU."""


Boxes = tuple[NDArray[np.float64], ...]
"""Boxes of one image, for each foreground class those that are given.

Shapes: (N, 4) each, as (left, top, right, bottom). Units: pixels; 0 is the middle of the first.
"""


class WithRows(Protocol):
    """A :data:`Run` that takes the rows of a table too, of each image one, and boxes."""

    def __call__(
        self, windows: Sequence[Window], /, table: Tensor | None = None, boxes: Sequence[Boxes] | None = None
    ) -> Tensor:
        """Shapes: table (number of images, C), boxes of each image."""
        ...


def logits(model: adapted_model.AdaptedModel, image: transforms.Image, run: Run) -> Tensor:
    """Logits of a whole prepared image.

    Shapes: image (3, h, w) -> (K, h, w) in segmentation, (K,) in classification.
    """
    (found,) = many(model, [image], run, 1)
    return found


def batch_of(model: adapted_model.AdaptedModel) -> int:
    """How many windows are computed at a time: one on a CPU, where more are hardly quicker and change the last bits."""
    return 1 if model.device == "cpu" else max(BATCH, model.recipe.optimiser.batch_size)


@torch.no_grad()
def many(
    model: adapted_model.AdaptedModel, images: Sequence[transforms.Image], run: Run, batch: int
) -> Iterator[Tensor]:
    """Logits of prepared images, one after the other: windows of the training size where one is much larger than that.

    In segmentation windows overlap and their middles count most; in classification each window counts the same.

    Args:
        model: the model.
        images: prepared. Shapes: (3, h, w) each, not all of one size.
        run: computes windows.
        batch: how many of them at a time at most; fewer where the memory of a GPU holds no more.

    Yields: in the order of the images. Shapes: (K, h, w) in segmentation, of volumes (K, d, h, w), (K,) in
        classification.

    Raises:
        OutOfMemoryError: if not even one window fits.
    """
    size = model.recipe.data.patch_size
    joined = [_Joined(model.task.width, image.shape[1:], size) for image in images]
    waiting: list[Window] = []
    done = 0
    for number, (image, whole) in enumerate(zip(images, joined, strict=True)):
        for corner in whole.corners:
            window = Window(number, whole.cut(image, corner), corner)
            if waiting and waiting[0].image.shape != window.image.shape:
                _compute(waiting, run, joined)
                waiting = []
            waiting.append(window)
            if len(waiting) == batch:
                _compute(waiting, run, joined)
                waiting = []
        ready = waiting[0].number if waiting else number + 1
        for whole in joined[done:ready]:
            yield whole.result()
        done = ready
    if waiting:
        _compute(waiting, run, joined)
    for whole in joined[done:]:
        yield whole.result()


def _compute(windows: Sequence[Window], run: Run, joined: Sequence[_Joined]) -> None:
    """Compute windows and add them to their images; in halves where they do not fit together."""
    try:
        found = run(windows)
    except torch.OutOfMemoryError:
        if len(windows) == 1:
            raise
        half = len(windows) // 2
        _compute(windows[:half], run, joined)
        _compute(windows[half:], run, joined)
        return
    for window, piece in zip(windows, found, strict=True):
        joined[window.number].add(piece, window.corner)


class _Joined:
    """An image's windows, and what is known of its logits.

    Args:
        classes: how many.
        whole: height and width of the image, of a volume slices before them.
        size: of a window in training.
    """

    def __init__(self, classes: int, whole: Sequence[int], size: Sequence[int]) -> None:
        self._classes, self._whole = classes, tuple(whole)
        single = all(side <= WHOLE * trained for side, trained in zip(whole, size, strict=True))
        self._window = self._whole if single else tuple(min(pair) for pair in zip(size, whole, strict=True))
        self.corners = [(0,) * len(self._whole)] if single else _corners(self._whole, self._window)
        self._total: Tensor | None = None
        self._weights: Tensor | None = None
        self._votes: list[Tensor] = []

    def cut(self, image: transforms.Image, corner: Sequence[int]) -> transforms.Image:
        """A window's pixels. Shapes: (3, H, W) -> (3, h, w)."""
        return image[:, *place(corner, self._window)]

    def add(self, piece: Tensor, corner: Sequence[int]) -> None:
        """Take the logits of one window, in the order of the corners. Shapes: (K, h, w) or (K,)."""
        if piece.ndim == 1 or self._window == self._whole:
            self._votes.append(piece)
            return
        if self._total is None or self._weights is None:
            self._total, self._weights = torch.zeros(self._classes, *self._whole), torch.zeros(self._whole)
        weight, where = _importance(self._window), place(corner, self._window)
        self._total[:, *where] += piece * weight
        self._weights[where] += weight

    def result(self) -> Tensor:
        """Logits of the whole image, once all windows are there; what was held for them is let go."""
        votes, total, weights = self._votes, self._total, self._weights
        self._votes, self._total, self._weights = [], None, None
        if total is not None and weights is not None:
            return total / weights
        return votes[0] if len(self.corners) == 1 else torch.stack(votes).mean(dim=0)


def place(corner: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """Where a window of a size lies in its image."""
    return tuple(slice(start, start + side) for start, side in zip(corner, size, strict=True))


def tiling(model: adapted_model.AdaptedModel, size: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Size and number of the windows in which an image of ``size`` ([slices,] height, width) is run."""
    window = model.recipe.data.patch_size
    if all(side <= WHOLE * trained for side, trained in zip(size, window, strict=True)):
        return size, 1
    window = tuple(min(pair) for pair in zip(window, size, strict=True))
    return window, len(_corners(size, window))


def alone(model: adapted_model.AdaptedModel) -> WithRows:
    """The run of images that are seen once: nothing is kept of them.

    Where the recipe has inputs, it takes their rows; where it trains with boxes, it takes boxes.
    """

    def run(windows: Sequence[Window], table: Tensor | None = None, boxes: Sequence[Boxes] | None = None) -> Tensor:
        images = np.stack([window.image for window in windows])
        pixels = torch.from_numpy(transforms.normalise(images, model.recipe.data)).to(model.device)
        rows = None if table is None else table[[window.number for window in windows]].to(model.device)
        prompts = None if boxes is None else drawing([shown(window, boxes[window.number]) for window in windows])
        result: Tensor = model(pixels, None, prompts, rows=rows).float().cpu()
        return result

    return run


def shown(window: Window, boxes: Boxes) -> Boxes:
    """What a window shows of boxes of its image, from its own upper left corner; those beside it are left out."""
    (height, width), (top, left) = window.image.shape[1:], window.corner  # a volume has no boxes
    inside = []
    for own in boxes:
        moved = own - (left, top, left, top)
        seen = (moved[:, :2] <= (width - 1, height - 1)).all(axis=1) & (moved[:, 2:] >= 0).all(axis=1)
        inside.append(np.clip(moved[seen], 0, (width - 1, height - 1) * 2))
    return tuple(inside)


def drawing(boxes: Sequence[Boxes]) -> backbones.Propose:
    """Draws the masks of a batch of images from their boxes, on one embedding.

    Each box of a class is drawn by itself, and a pixel keeps the highest logit; a class without box is absent, as in
    training.
    """

    def draw(embedding: Tensor, size: Sequence[int], decode: backbones.Decode) -> Tensor:
        most = max(1, *(len(own) for image in boxes for own in image))
        drawn = decode([_told(boxes, number, 0, embedding.device) for number in range(len(boxes[0]))])
        for at in range(1, most):
            prompts = [_told(boxes, number, at, embedding.device) for number in range(len(boxes[0]))]
            drawn = torch.maximum(drawn, decode(prompts))
        return drawn

    return draw


def _told(boxes: Sequence[Boxes], number: int, at: int, device: torch.device) -> backbones.Prompts:
    """The box ``at`` of a class in every image; absent where it has fewer."""
    present = [len(image[number]) > at for image in boxes]
    given = [image[number][at] if there else np.zeros(4) for image, there in zip(boxes, present, strict=True)]
    values = torch.from_numpy(np.stack(given).astype(np.float32)).to(device)
    return backbones.Prompts(boxes=values, present=torch.tensor(present, device=device))


def _corners(size: Sequence[int], window: Sequence[int]) -> list[tuple[int, ...]]:
    """Upper left corners of windows that cover the image with ``OVERLAP``."""
    starts = []
    for side, part in zip(size, window, strict=True):
        step = max(1, round(part * (1 - OVERLAP)))
        starts.append([min(start, side - part) for start in range(0, side - part + step, step)])
    return list(itertools.product(*(dict.fromkeys(side) for side in starts)))


@functools.lru_cache(maxsize=4)
def _importance(window: tuple[int, ...]) -> Tensor:
    """Gaussian weight of a window's pixels, as MONAI's ``compute_importance_map``: its middle counts most.

    Shapes: those of the window. Its standard deviation is ``SIGMA`` of each side, its least value ``LEAST``.
    """
    lines = []
    for side in window:
        offset = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        lines.append(torch.exp(offset**2 / (-2 * (SIGMA * side) ** 2)))
    return functools.reduce(lambda whole, line: whole[..., None] * line, lines).clamp(min=LEAST)
