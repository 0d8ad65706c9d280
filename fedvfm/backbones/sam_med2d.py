"""SAM-Med2D: SAM ViT-B fine-tuned on medical images, with the authors' adapter layers beside each feed-forward branch.

Those layers are part of the encoder here, and frozen like it: what trains in a federation is an adapter of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fedvfm.backbones import base, sam, stock
from fedvfm.config import schema


class AdapterLayer(nn.Module):
    """Channels weighted by the whole image, then two strided convolutions, added and normalised.

    Shapes: (B, h, w, D) with even h and w -> the same.
    Source: Cheng et al., "SAM-Med2D", 2023, figure 3.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.channel = nn.Sequential(
            nn.Linear(width, inner, bias=False), nn.ReLU(), nn.Linear(inner, width, bias=False), nn.Sigmoid()
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False),
            nn.ReLU(),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        weighted = hidden * self.channel(hidden.mean(dim=(1, 2)))[:, None, None]
        added = hidden + self.spatial(weighted.movedim(-1, 1)).movedim(1, -1)
        result: Tensor = self.norm(added)
        return result


class AdaptedMlp(nn.Module):
    """A block's feed-forward branch and the adapter layer beside it. Shapes: (B, h, w, D) -> the same."""

    def __init__(self, mlp: Any, adapter: AdapterLayer) -> None:
        super().__init__()
        self.lin1, self.lin2, self.act = mlp.lin1, mlp.lin2, mlp.act
        self.adapter = adapter

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.lin2(self.act(self.lin1(hidden))) + self.adapter(hidden)
        return result


@functools.cache
def model_class() -> Any:
    """``SamModel`` with the adapter layers. It is built where it is used, since importing transformers takes long."""
    stock_class: Any = stock.transformers_class("SamModel")

    class SamMed2dModel(stock_class):  # type: ignore[misc]
        """See the module; ``save_pretrained`` is none, as no class of transformers would read it."""

        save_pretrained = None

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for layer in self.vision_encoder.layers:
                adapter = AdapterLayer(config.vision_config.hidden_size, config.adapter_width)
                layer.mlp = AdaptedMlp(layer.mlp, adapter)

    return SamMed2dModel


class SamMed2d(sam.SegmentAnything):
    """SAM-Med2D, frozen.

    Shapes: as SAM; sides of the input are multiples of two patches.
    Source: Cheng et al., "SAM-Med2D", 2023.
    """

    stock_differs = "SamModel of transformers has no place for the adapter layers of SAM-Med2D"

    def check_size(self, size: Sequence[int]) -> list[str]:
        """See base. The strided convolutions halve the grid."""
        wrong, least = super().check_size(size), 2 * self.patch
        if not wrong and any(side % least for side in size):
            wrong = [f"recipe.data.input_size = {list(size)}: sides must be multiples of {least}, two patches"]
        return wrong


def shape(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class and its configuration."""
    _, config = sam.shape({key: value for key, value in values.items() if key not in ("adapter_width", "model_type")})
    config.adapter_width = int(values["adapter_width"])
    return model_class(), config


@base.takes("gradient_checkpointing")
def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> SamMed2d:
    """A frozen SAM-Med2D by table name, imported name or local folder; without weights on the meta device.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if an option has no meaning.
    """
    return stock.load(settings, shape, SamMed2d, with_weights=with_weights, device=device)
