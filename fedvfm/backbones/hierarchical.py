"""What backbones of several stages share: each has a quarter of the cells of the one before, and more channels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional

from fedvfm.backbones import base, stock


class Hierarchical(stock.Stock):
    """A frozen model of stages. Blocks are counted through all of them; what halves a grid goes with the next block.

    One grid is the last stage's. Of two, the first is that of the stage two before, each four of its cells made one,
    where that gives as many channels as the last stage has, and the last is resized to it.

    Shapes: pixels (B, 3, H, W) -> grid (B, D, H/32, W/32), or two (B, D, H/16, W/16), of four stages; pooled (B, D).
    """

    def __init__(self, name: str, model: nn.Module, sha256: str, *, checkpointing: bool = False) -> None:
        super().__init__(name, model, sha256, checkpointing=checkpointing)
        self.depths, self.widths, self.stride = self.stages_of(model.config)
        self.ends = tuple(itertools.accumulate(self.depths))
        self.depth, self.width = self.ends[-1], self.widths[-1]
        self.patch = self.stride * 2 ** (len(self.depths) - 1)

    def stages_of(self, settings: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Blocks and channels of each stage, and the pixels of a cell of the first."""
        raise NotImplementedError

    def embed(self, pixels: Tensor) -> Tensor:
        """First hidden states. Shapes: (B, D, h, w)."""
        raise NotImplementedError

    def merge(self, stage: int, hidden: Tensor) -> Tensor:
        """The first grid of a stage from the last of the one before. Shapes: (B, D, h, w) -> (B, E, h/2, w/2)."""
        raise NotImplementedError

    def compute(self, stage: int, number: int, hidden: Tensor) -> Tensor:
        """One block of a stage. Shapes: (B, D, h, w) -> the same."""
        raise NotImplementedError

    def last(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised grid and the vector. Shapes: (B, D, h, w) -> the same, (B, D)."""
        raise NotImplementedError

    def stage(self, block: int) -> tuple[int, int]:
        """Stage of a block, and its number in there."""
        number = sum(block >= end for end in self.ends)
        return number, block - (self.ends[number - 1] if number else 0)

    def first(self, stage: int) -> int:
        """The number of a stage's first block."""
        return self.ends[stage] - self.depths[stage]

    def block_width(self, block: int) -> int:
        """Channels that leave a block."""
        return self.widths[self.stage(block)[0]]

    def taps(self, count: int) -> tuple[int, ...]:
        """See base: the last is after the last block, all others after the stage two before."""
        fits = len(self.ends) > 2 and 4 * self.widths[-3] == self.width
        return (*(self.ends[-3] if fits else self.depth,) * (count - 1), self.depth)

    def prefix(self, pixels: Tensor, stop: int, taps: Sequence[int]) -> base.Prefix:
        """See base. Shapes: hidden (B, D, h, w) of the last block's stage."""
        return self._walk(self.embed(pixels), range(stop), taps)

    def features(self, pixels: Tensor, taps: Sequence[int], prefix: base.Prefix | None = None) -> base.Features:
        """See base."""
        prefix = prefix or self.prefix(pixels, 0, taps)
        rest = self._walk(prefix.hidden, range(prefix.stop, self.depth), taps)
        grid, pooled = self.last(rest.hidden)
        taken = {**prefix.taken, **rest.taken}
        grids = tuple(grid if tap == self.depth else functional.pixel_unshuffle(taken[tap], 2) for tap in taps)
        finest = grids[0].shape[-2:]  # taps ascend, and grids only become coarser
        same = tuple(each if each.shape[-2:] == finest else base.resize(each, finest) for each in grids)
        return base.Features(pixels, same, pooled)

    def _walk(self, hidden: Tensor, blocks: range, taps: Sequence[int]) -> base.Prefix:
        taken: dict[int, Tensor] = {}
        for index in blocks:
            stage, number = self.stage(index)
            if stage and not number:
                hidden = self.merge(stage, hidden)
            if self.checkpointing and torch.is_grad_enabled():
                hidden = torch.utils.checkpoint.checkpoint(self.compute, stage, number, hidden, use_reentrant=False)
            else:
                hidden = self.compute(stage, number, hidden)
            if index + 1 in taps:
                taken[index + 1] = hidden
        return base.Prefix(blocks.stop, hidden, taken)

    def activations(self, size: Sequence[int]) -> int:
        """See base."""
        cells = (size[0] // self.stride) * (size[1] // self.stride)
        kept = [(cells >> 2 * self.stage(block)[0]) * self.block_width(block) for block in range(self.depth)]
        return int(sum(kept) + 34 * max(kept) if self.checkpointing else 34 * sum(kept))
