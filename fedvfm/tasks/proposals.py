"""Automatic prompts: a light head on the image embedding says where each class is, and the mask decoder is told that.

No oracle takes part, in training or in prediction. The head is part of the adapter: it trains in the federation beside
the decoder and travels with it.

A coarse map of the classes becomes one box a class, the decoder's mask under that box becomes the next pass's prompt
beside it, and the last pass is the answer. Boxes and masks go on as plain numbers: the coarse map learns from a loss of
its own, and so does every pass, so that none has to learn through another's prompt.

Source: Kirillov et al., "Segment Anything", ICCV 2023, appendix A (training in passes, the mask before as a prompt).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedvfm.backbones import base

STAGE_WEIGHT = 0.5
"""Of the loss of the coarse map and of each pass but the last, whose weight is 1."""

PASSES = 2
MOST_PASSES = 4
WIDE = 2.0
"""Half a box's side in standard deviations of the coarse map: exact for an ellipse that is filled evenly."""

LEAST_SIDE = 1.0
"""Of a box, in cells of the image embedding."""


class AutomaticMasks(nn.Module):
    """Proposes a box a class, has the decoder draw the masks, and resizes them to the input.

    Evaluation gives the logits of every class. Training gives those of the last pass, of the passes before and of the
    coarse map, side by side: :class:`fedvfm.tasks.segmentation.Segmentation` knows how to read them.

    Args:
        width: channels of the image embedding.
        classes: of the task, the background first.
        passes: of the decoder.
        inner: channels of the coarse map's network.

    Shapes: masks (B, M, h, w) -> (B, K, H, W), in training (B, K + passes * K, H, W).
    """

    grids = 1
    masks = True

    def __init__(self, width: int, classes: int, passes: int = PASSES, inner: int = 32) -> None:
        super().__init__()
        self.passes = passes
        self.narrow = nn.Conv2d(width, inner, 1)
        self.around = nn.Conv2d(inner, inner, 3, padding=1)
        self.classify = nn.Conv2d(inner, classes, 1)

    def coarse(self, embedding: Tensor) -> Tensor:
        """Logits of every class for each cell. Shapes: (B, C, h, w) -> (B, K, h, w)."""
        activation = nn.functional.gelu
        logits: Tensor = self.classify(activation(self.around(activation(self.narrow(embedding)))))
        return logits

    def propose(self, embedding: Tensor, size: Sequence[int], decode: base.Decode) -> Tensor:
        """See :data:`fedvfm.backbones.base.Propose`; in training all stages, the last pass first."""
        coarse = self.coarse(embedding)
        boxes = boxes_of(coarse.detach().softmax(dim=1)[:, 1:], size)
        stages: list[Tensor] = []
        for _ in range(self.passes):
            before = stages[-1].detach() if stages else None
            prompts = [
                base.Prompts(boxes=boxes[:, number], masks=None if before is None else before[:, 1 + number])
                for number in range(boxes.shape[1])
            ]
            stages.append(decode(prompts))
        if not self.training:
            return stages[-1]
        return torch.cat([*reversed(stages), base.resize(coarse, stages[-1].shape[-2:])], dim=1)

    def forward(self, features: base.Features) -> Tensor:
        """See the class."""
        if features.masks is None:
            raise ValueError("the backbone's mask decoder is not open")
        return base.resize(features.masks, features.image.shape[-2:])


def boxes_of(shares: Tensor, size: Sequence[int]) -> Tensor:
    """The box round where each class is likeliest: its centre and spread, weighted by the square of the probability.

    The square leaves little weight to what is faint everywhere. A class that is nowhere gets some box all the same, and
    the decoder learns to draw nothing in it.

    Shapes: shares (B, P, h, w), probabilities -> (B, P, 4) as (left, top, right, bottom).
    Units: pixels of the input of ``size`` (height, width); 0 is the middle of the first.
    """
    weights = shares.float().square() + 1e-8
    weights = weights / weights.sum(dim=(2, 3), keepdim=True)
    sides = []
    for axis, other in ((3, 2), (2, 3)):
        cells = weights.shape[axis]
        step = size[0 if axis == 2 else 1] / cells
        along = weights.sum(dim=other)
        places = (torch.arange(cells, device=weights.device) + 0.5) * step - 0.5
        middle = (along * places).sum(dim=2)
        spread = (along * (places - middle.unsqueeze(2)).square()).sum(dim=2).sqrt()
        half = (WIDE * spread).clamp(min=LEAST_SIDE * step / 2)
        most = float(size[0 if axis == 2 else 1] - 1)
        sides.append(((middle - half).clamp(0.0, most), (middle + half).clamp(0.0, most)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=2)
