"""Swin transformers of ``transformers`` (Swin-B at 224, Ark+'s Swin-L at 768): shifted windows, stage by stage."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedvfm.backbones import base, stock
from fedvfm.config import schema

STAGES = "encoder.layers"
PARTS = {
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
NAMES = {
    **{path: part for part, path in PARTS.items()},
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.relative_position_bias.relative_position_bias_table": "position_bias",
}


class Swin(stock.Stock):
    """A stock Swin, frozen. Blocks are counted through all stages; the layer that halves a grid goes with the next one.

    Windows are set anew at every block: the stock model remembers the smallest input that it saw, and from then on
    does not shift the windows of the stages that were small (``findings/``).

    One grid is the last stage's, after the last norm. Of two, the first is that of the stage two before, each four of
    its cells made one of as many channels as the last stage has, and the last is resized to it: 16 pixels a cell.

    Shapes: pixels (B, 3, H, W) -> grid (B, D, H/32, W/32), or two (B, D, H/16, W/16), of four stages; pooled (B, D),
        the mean of the normalised last grid.
    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.
    """

    def __init__(self, name: str, model: nn.Module, sha256: str, *, checkpointing: bool = False) -> None:
        super().__init__(name, model, sha256, checkpointing=checkpointing)
        settings: Any = model.config
        self.depths = tuple(int(depth) for depth in settings.depths)
        self.ends = tuple(itertools.accumulate(self.depths))
        self.depth, self.stem = self.ends[-1], int(settings.embed_dim)
        self.width = self.stem * 2 ** (len(self.depths) - 1)
        self.stride, self.window = int(settings.patch_size), int(settings.window_size)
        self.patch = self.stride * 2 ** (len(self.depths) - 1)

    def taps(self, count: int) -> tuple[int, ...]:
        """See base: the stage two before the last is as fine as its channels let it be."""
        fine = self.ends[-3] if len(self.ends) > 2 else self.depth
        return (*(fine,) * (count - 1), self.depth)

    def check_size(self, size: Sequence[int]) -> list[str]:
        """See base. The last stage needs a whole window: tables of positions in smaller ones are not in the weights."""
        wrong, least = super().check_size(size), self.patch * self.window
        if not wrong and min(size) < least:
            wrong = [
                f"recipe.data.input_size = {list(size)}: sides must be at least {least}, {self.window} cells of "
                f"{self.patch} pixels in the last stage"
            ]
        return wrong

    def stage(self, block: int) -> tuple[int, int]:
        """Stage of a block, and its number in there."""
        number = sum(block >= end for end in self.ends)
        return number, block - (self.ends[number - 1] if number else 0)

    def block_width(self, block: int) -> int:
        """Channels that leave a block."""
        return int(self.stem * 2 ** self.stage(block)[0])

    def _path(self, block: int) -> str:
        number, inner = self.stage(block)
        return f"{STAGES}.{number}.blocks.{inner}"

    def projection(self, block: int, part: str) -> str | None:
        """See base."""
        return f"{self._path(block)}.{PARTS[part]}" if part in PARTS else None

    def seats(self) -> tuple[base.Seat, ...]:
        """See base: the feed-forward branch of every block."""
        return tuple(
            base.Seat(f"block.{block:02d}.ffn", (f"{self._path(block)}.mlp",), self.block_width(block))
            for block in range(self.depth)
        )

    def wire_name(self, parameter: str) -> str:
        """Our stable name: ``block.03.q.weight``; the layer between two stages is the next stage's first block's."""
        inner = re.match(rf"^{re.escape(STAGES)}\.(\d+)\.(blocks\.(\d+)|downsample)\.(.+)$", parameter)
        if inner is None:
            renamed = parameter.replace("embeddings.patch_embeddings.projection.", "embed.patch.")
            return renamed.replace("embeddings.norm.", "embed.norm.").replace("layernorm.", "final_norm.")
        number, last = int(inner[1]), inner[4]
        if inner[3] is None:
            return f"block.{self.ends[number]:02d}.merge.{last}"
        for path, ours in NAMES.items():
            if last == path or last.startswith(f"{path}."):
                last = ours + last.removeprefix(path)
                break
        return f"block.{self.ends[number] - self.depths[number] + int(inner[3]):02d}.{last}"

    def prefix(self, pixels: Tensor, stop: int, taps: Sequence[int]) -> base.Prefix:
        """See base. Shapes: hidden (B, h, w, D) of the last block's stage."""
        return self._walk(self._embed(pixels), range(stop), taps)

    def features(self, pixels: Tensor, taps: Sequence[int], prefix: base.Prefix | None = None) -> base.Features:
        """See base."""
        prefix = prefix or self.prefix(pixels, 0, taps)
        rest = self._walk(prefix.hidden, range(prefix.stop, self.depth), taps)
        model: Any = self.model
        last = model.layernorm(rest.hidden).movedim(-1, 1)
        taken = {**prefix.taken, **rest.taken}
        grids = tuple(last if tap == self.depth else self._folded(taken[tap]) for tap in taps)
        finest = max(grids, key=lambda grid: grid.shape[-1]).shape[-2:]
        same = tuple(grid if grid.shape[-2:] == finest else base.resize(grid, finest) for grid in grids)
        return base.Features(pixels, same, last.mean(dim=(2, 3)))

    @staticmethod
    def _folded(hidden: Tensor) -> Tensor:
        """Each four cells as one. Shapes: (B, h, w, D) -> (B, 4 D, h/2, w/2)."""
        return functional.pixel_unshuffle(hidden.movedim(-1, 1), 2)

    def _embed(self, pixels: Tensor) -> Tensor:
        """First hidden states (B, h, w, D); a table of positions, where there is one, is resized."""
        model: Any = self.model
        hidden, (rows, columns) = model.embeddings(pixels, interpolate_pos_encoding=True)
        result: Tensor = hidden.reshape(hidden.shape[0], rows, columns, hidden.shape[-1])
        return result

    def _walk(self, hidden: Tensor, blocks: range, taps: Sequence[int]) -> base.Prefix:
        taken: dict[int, Tensor] = {}
        stages: Any = self.model.get_submodule(STAGES)
        for index in blocks:
            number, inner = self.stage(index)
            if number and not inner:
                hidden = self._merged(stages[number - 1].downsample, hidden)
            hidden = self._block(stages[number].blocks[inner], hidden, shifted=inner % 2 == 1)
            if index + 1 in taps:
                taken[index + 1] = hidden
        return base.Prefix(blocks.stop, hidden, taken)

    @staticmethod
    def _merged(downsample: Any, hidden: Tensor) -> Tensor:
        """The first grid of a stage. Shapes: (B, h, w, D) -> (B, h/2, w/2, 2 D)."""
        batch, rows, columns, width = hidden.shape
        merged: Tensor = downsample(hidden.reshape(batch, rows * columns, width), (rows, columns))
        return merged.reshape(batch, (rows + 1) // 2, (columns + 1) // 2, 2 * width)

    def _block(self, module: Any, hidden: Tensor, *, shifted: bool) -> Tensor:
        """One block; a grid of one window is not shifted. Shapes: (B, h, w, D)."""
        batch, rows, columns, width = hidden.shape
        module.window_size = self.window
        module.shift_size = self.window // 2 if shifted and min(rows, columns) > self.window else 0

        def run(flat: Tensor) -> Tensor:
            answer: Any = module(flat, (int(rows), int(columns)), always_partition=True)
            result: Tensor = answer[0] if isinstance(answer, tuple) else answer
            return result

        flat = hidden.reshape(batch, rows * columns, width)
        if self.checkpointing and torch.is_grad_enabled():
            flat = torch.utils.checkpoint.checkpoint(run, flat, use_reentrant=False)
        else:
            flat = run(flat)
        return flat.reshape(batch, rows, columns, width)

    def activations(self, size: Sequence[int]) -> int:
        """See base: every stage has a quarter of the tokens of the one before, and twice the channels."""
        cells = (size[0] // self.stride) * (size[1] // self.stride)
        kept = [(cells >> 2 * self.stage(block)[0]) * self.block_width(block) for block in range(self.depth)]
        return int(sum(kept) + 34 * max(kept) if self.checkpointing else 34 * sum(kept))


def shape(values: Mapping[str, Any]) -> tuple[str, Any]:
    """The stock class and its configuration."""
    made = stock.transformers_class("SwinConfig").from_dict(dict(values))
    made._attn_implementation = "sdpa"
    return "SwinModel", made


@base.takes("gradient_checkpointing")
def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> Swin:
    """A frozen Swin by table name, Hugging Face name or local folder; without weights on the meta device.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if an option has no meaning.
    """
    return stock.load(settings, shape, Swin, with_weights=with_weights, device=device)
