"""SAM 3 for single images: its vision transformer, and the promptable mask decoder of its tracker.

What finds objects by words (text encoder, detector) is not here: a federation's classes need no words.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedvfm import errors
from fedvfm.backbones import base, sam2, stock
from fedvfm.config import schema


class SegmentAnything3(sam2.SegmentAnything2):
    """A stock SAM 3 tracker, frozen, without its memory: what it does with the first frame.

    Position tables are tiled by the stock encoder. The rotary positions of blocks with global attention are made for
    the input's grid by the stock rule: they always span the window of pretraining.

    Shapes: pixels (B, 3, H, W) -> grid (B, C, H/14, W/14), masks (B, M, 4h, 4w) of that grid.
    Source: Carion et al., "SAM 3: Segment Anything with Concepts", 2025.
    """

    blocks: ClassVar[str] = "vision_encoder.backbone.layers"
    attention: ClassVar[str] = "attention"
    projections: ClassVar[Mapping[str, str]] = {
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    own_names: ClassVar[Mapping[str, str]] = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        **{path: part for part, path in projections.items()},
    }

    def _shape(self, encoder: Any) -> None:
        self.patch = self.stride = encoder.patch_size
        self.ends = (self.depth,)
        self.inner, self.span = encoder.hidden_size, encoder.window_size

    def check_size(self, size: Sequence[int]) -> list[str]:
        """See base. The coarsest level halves the grid."""
        found = super().check_size(size)
        if found or min(size) >= 2 * self.patch:
            return found
        return [
            f"recipe.data.input_size = {list(size)}: sides must be {2 * self.patch} at least, two patches of "
            f"{self.patch}"
        ]

    def fused(self, block: int, part: str) -> base.Slice | None:
        """See base: query, key and value are layers of their own."""
        return None

    def block_width(self, block: int) -> int:
        """Channels that leave a block."""
        return int(self.inner)

    def _named(self, parameter: str) -> str:
        for theirs, ours in (
            ("embeddings.patch_embeddings.projection.", "embed.patch."),
            ("embeddings.position_embeddings", "embed.position"),
            ("layer_norm.", "embed.norm."),
        ):
            if parameter.startswith(theirs):
                return ours + parameter.removeprefix(theirs)
        return parameter

    def prefix(self, pixels: Tensor, stop: int, taps: Sequence[int]) -> base.Prefix:
        """See base."""
        hidden = self._embed(pixels)
        self._fit(hidden)
        return self._walk(hidden, range(stop))

    def levels(self, taken: Mapping[int, Tensor], hidden: Tensor) -> list[Tensor]:
        """See SAM 2. The tracker adds its no-memory embedding to the coarsest level and drops that; so do we."""
        model: Any = self.model
        found, _ = model.vision_encoder.neck(hidden.permute(0, 3, 1, 2))
        return self._without_memory(list(found))[:3]

    def _embed(self, pixels: Tensor) -> Tensor:
        encoder: Any = self.model.vision_encoder
        grid = (pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch)
        hidden: Tensor = encoder.backbone.layer_norm(encoder.backbone.embeddings(pixels).unflatten(1, grid))
        return hidden

    def _fit(self, hidden: Tensor) -> None:
        """The stock blocks know the positions of one input size alone."""
        rows, columns = hidden.shape[1:3]
        down = torch.arange(rows, device=hidden.device) * (self.span / rows)
        across = torch.arange(columns, device=hidden.device) * (self.span / columns)
        y, x = torch.meshgrid(down, across, indexing="ij")
        positions = torch.stack([x.flatten(), y.flatten()], dim=-1)
        for block in self._blocks:
            if block.window_size == 0:
                block.position_ids = positions

    def activations(self, size: Sequence[int]) -> int:
        """See base."""
        cells = (size[0] // self.patch) * (size[1] // self.patch)
        kept = cells * self.inner
        blocks = kept * (self.depth + 34) if self.checkpointing else 34 * kept * self.depth
        return int(blocks + (2400 * cells if self.masks_open else 0))


def shape(values: Mapping[str, Any]) -> tuple[str, Any]:
    """The stock class and its configuration; of the whole SAM 3, that of its tracker.

    Raises:
        ConfigError: if the model has no tracker.
    """
    if values.get("model_type") == "sam3":
        raise errors.ConfigError("backbone", ["model type 'sam3' is the detector alone; use one with SAM 3's tracker"])
    register()
    inner = values.get("tracker_config")
    settings = inner if isinstance(inner, Mapping) else values
    kept = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    made = stock.transformers_class("Sam3TrackerConfig")(**{key: settings[key] for key in kept if key in settings})
    made._attn_implementation = "sdpa"
    return "Sam3TrackerModel", made


def register() -> None:
    """Tell transformers where SAM 3's image classes are.

    It hides the whole module where torchvision is not installed, which only the geometry encoder of the detector needs.
    """
    transformers: Any = importlib.import_module("transformers")
    model = importlib.import_module("transformers.models.sam3.modeling_sam3")
    config = importlib.import_module("transformers.models.sam3.configuration_sam3")
    for settings, kind in (("Sam3VisionConfig", "Sam3VisionModel"), ("Sam3ViTConfig", "Sam3ViTModel")):
        transformers.AutoModel.register(getattr(config, settings), getattr(model, kind), exist_ok=True)


@base.takes("gradient_checkpointing")
def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> SegmentAnything3:
    """A frozen SAM 3 by table name, Hugging Face name or local folder; without weights on the meta device.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if an option has no meaning.
    """
    return stock.load(settings, shape, SegmentAnything3, with_weights=with_weights, device=device)
