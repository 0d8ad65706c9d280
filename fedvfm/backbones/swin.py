"""Swin transformers of ``transformers`` (Swin-B at 224, Ark+'s Swin-L at 768): shifted windows, stage by stage."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedvfm.backbones import base, hierarchical, stock
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


class Swin(hierarchical.Hierarchical):
    """A stock Swin, frozen. The pooled vector is the mean of the normalised last grid.

    Windows are set anew at every block: the stock model remembers the smallest input that it saw, and from then on
    does not shift the windows of the stages that were small (``findings/``).

    Shapes: see Hierarchical.
    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.
    """

    def stages_of(self, settings: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """See Hierarchical."""
        self.window = int(settings.window_size)
        depths = tuple(int(depth) for depth in settings.depths)
        return depths, tuple(int(settings.embed_dim) * 2**stage for stage in range(len(depths))), settings.patch_size

    def check_size(self, size: Sequence[int]) -> list[str]:
        """See base. The last stage needs a whole window: tables of positions in smaller ones are not in the weights."""
        wrong, least = super().check_size(size), self.patch * self.window
        if not wrong and min(size) < least:
            wrong = [
                f"recipe.data.input_size = {list(size)}: sides must be at least {least}, {self.window} cells of "
                f"{self.patch} pixels in the last stage"
            ]
        return wrong

    def _path(self, block: int) -> str:
        stage, number = self.stage(block)
        return f"{STAGES}.{stage}.blocks.{number}"

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
        stage, last = int(inner[1]), inner[4]
        if inner[3] is None:
            return f"block.{self.ends[stage]:02d}.merge.{last}"
        for path, ours in NAMES.items():
            if last == path or last.startswith(f"{path}."):
                last = ours + last.removeprefix(path)
                break
        return f"block.{self.first(stage) + int(inner[3]):02d}.{last}"

    def embed(self, pixels: Tensor) -> Tensor:
        """See Hierarchical; a table of positions, where there is one, is resized."""
        model: Any = self.model
        return _grid(*model.embeddings(pixels, interpolate_pos_encoding=True))

    def merge(self, stage: int, hidden: Tensor) -> Tensor:
        """See Hierarchical."""
        module: Any = self.model.get_submodule(f"{STAGES}.{stage - 1}.downsample")
        rows, columns = hidden.shape[-2:]
        return _grid(module(_tokens(hidden), (rows, columns)), ((rows + 1) // 2, (columns + 1) // 2))

    def compute(self, stage: int, number: int, hidden: Tensor) -> Tensor:
        """See Hierarchical; a grid of one window is not shifted."""
        module: Any = self.model.get_submodule(f"{STAGES}.{stage}.blocks.{number}")
        rows, columns = (int(side) for side in hidden.shape[-2:])
        module.window_size = self.window
        module.shift_size = self.window // 2 if number % 2 and min(rows, columns) > self.window else 0
        answer: Any = module(_tokens(hidden), (rows, columns), always_partition=True)
        return _grid(answer[0] if isinstance(answer, tuple) else answer, (rows, columns))

    def last(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See Hierarchical."""
        model: Any = self.model
        grid = model.layernorm(hidden.movedim(1, -1)).movedim(-1, 1)
        return grid, grid.mean(dim=(2, 3))


def _tokens(grid: Tensor) -> Tensor:
    """Shapes: (B, D, h, w) -> (B, h w, D)."""
    return grid.flatten(2).transpose(1, 2)


def _grid(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Shapes: (B, h w, D) -> (B, D, h, w)."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], size[0], size[1])


def shape(values: Mapping[str, Any]) -> tuple[str, Any]:
    """The stock class and its configuration."""
    config = stock.transformers_class("SwinConfig").from_dict(dict(values))
    config._attn_implementation = "sdpa"
    return "SwinModel", config


@base.takes("gradient_checkpointing")
def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> Swin:
    """A frozen Swin by table name, Hugging Face name or local folder; without weights on the meta device.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if an option has no meaning.
    """
    return stock.load(settings, shape, Swin, with_weights=with_weights, device=device)
