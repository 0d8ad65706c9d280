"""ConvNeXt encoders of DINOv3, through ``transformers``: convolutions of 7 x 7 cells, stage by stage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedvfm.backbones import base, hierarchical, stock
from fedvfm.config import schema

STAGES = "model.stages"
PARTS = {"fc1": "pointwise_conv1", "fc2": "pointwise_conv2"}
NAMES = {"pointwise_conv1": "fc1", "pointwise_conv2": "fc2", "layer_norm": "norm1", "depthwise_conv": "conv"}


class ConvNext(hierarchical.Hierarchical):
    """A stock ConvNeXt of DINOv3, frozen. It has no attention: LoRA adapts fc1 and fc2.

    The pooled vector is the mean of the last grid, normalised after it, as the stock model's.

    Shapes: see Hierarchical.
    Source: Liu et al., "A ConvNet for the 2020s", CVPR 2022; Simeoni et al., "DINOv3", 2025.
    """

    def stages_of(self, settings: Any) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """See Hierarchical."""
        return tuple(map(int, settings.depths)), tuple(map(int, settings.hidden_sizes)), 4

    def projection(self, block: int, part: str) -> str | None:
        """See base."""
        stage, number = self.stage(block)
        return f"{STAGES}.{stage}.layers.{number}.{PARTS[part]}" if part in PARTS else None

    def wire_name(self, parameter: str) -> str:
        """Our stable name: ``block.03.fc1.weight``; what comes before a stage is its first block's, or ``embed``."""
        inner = re.match(rf"^{re.escape(STAGES)}\.(\d+)\.(layers|downsample_layers)\.(\d+)\.(.+)$", parameter)
        if inner is None:
            return re.sub(r"^layer_norm\.", "final_norm.", parameter)
        stage, number, last = int(inner[1]), int(inner[3]), inner[4]
        if inner[2] == "downsample_layers":
            return f"block.{self.first(stage):02d}.merge.{number}.{last}" if stage else f"embed.{number}.{last}"
        part, _, kind = last.partition(".")
        ours = ".".join(filter(None, (NAMES.get(part, part), kind)))
        return f"block.{self.first(stage) + number:02d}.{ours}"

    def embed(self, pixels: Tensor) -> Tensor:
        """See Hierarchical."""
        return self.merge(0, pixels)

    def merge(self, stage: int, hidden: Tensor) -> Tensor:
        """See Hierarchical."""
        layers: Any = self.model.get_submodule(f"{STAGES}.{stage}.downsample_layers")
        for layer in layers:
            hidden = layer(hidden)
        return hidden

    def compute(self, stage: int, number: int, hidden: Tensor) -> Tensor:
        """See Hierarchical."""
        computed: Tensor = self.model.get_submodule(f"{STAGES}.{stage}.layers.{number}")(hidden)
        return computed

    def last(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See Hierarchical."""
        model: Any = self.model
        return model.layer_norm(hidden.movedim(1, -1)).movedim(-1, 1), model.layer_norm(hidden.mean(dim=(2, 3)))


def shape(values: Mapping[str, Any]) -> tuple[str, Any]:
    """The stock class and its configuration."""
    return "DINOv3ConvNextModel", stock.transformers_class("DINOv3ConvNextConfig").from_dict(dict(values))


@base.takes("gradient_checkpointing")
def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> ConvNext:
    """A frozen DINOv3 ConvNeXt by table name, Hugging Face name or local folder; without weights on the meta device.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if an option has no meaning.
    """
    return stock.load(settings, shape, ConvNext, with_weights=with_weights, device=device)
