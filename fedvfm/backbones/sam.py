"""SAM ViT-B, L and H, and everything of the same architecture (MedSAM), through ``transformers``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedvfm.backbones import base, promptable, stock
from fedvfm.config import schema

BLOCKS = "vision_encoder.layers"
PROJECTIONS = {"o": "attn.proj", "fc1": "mlp.lin1", "fc2": "mlp.lin2"}
NAMES = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "attn.qkv": "qkv",
    "attn.proj": "o",
    "attn.rel_pos_h": "rel_pos_h",
    "attn.rel_pos_w": "rel_pos_w",
    "mlp.lin1": "fc1",
    "mlp.lin2": "fc2",
}


class SegmentAnything(promptable.Promptable):
    """A stock SAM, frozen. Grids are what its blocks give, before the neck; masks are the decoder's.

    At another input size than its own the absolute position table is resized bilinearly and those of the blocks with
    global attention linearly (the stock attention does that by itself); windowed blocks keep theirs.

    Shapes: pixels (B, 3, H, W) -> grids (B, D, H/16, W/16), masks (B, M, H/4, W/4).
    Source: Kirillov et al., "Segment Anything", ICCV 2023; the resizing is that of SAMed (Zhang and Liu, 2023).
    """

    def __init__(self, name: str, model: nn.Module, sha256: str, *, checkpointing: bool = False) -> None:
        super().__init__(name, model, sha256, checkpointing=checkpointing)
        settings: Any = model.config
        vision = settings.vision_config
        self.width, self.depth, self.patch = vision.hidden_size, vision.num_hidden_layers, vision.patch_size
        self.heads, self.window = vision.num_attention_heads, vision.window_size
        self.wide = tuple(index for index in range(self.depth) if self._blocks[index].window_size == 0)

    @property
    def _blocks(self) -> Any:
        return self.model.get_submodule(BLOCKS)

    def projection(self, block: int, part: str) -> str | None:
        """See base. Query, key and value are slices of one layer: see ``fused``."""
        return f"{BLOCKS}.{block}.{PROJECTIONS[part]}" if part in PROJECTIONS else None

    def fused(self, block: int, part: str) -> base.Slice | None:
        """See base."""
        if part not in ("q", "k", "v"):
            return None
        start = "qkv".index(part) * self.width
        return base.Slice(f"{BLOCKS}.{block}.attn.qkv", start, start + self.width)

    def seats(self) -> tuple[base.Seat, ...]:
        """See base: two a block (behind attention, beside the feed-forward branch), three a decoder layer.

        Those of the decoder only where it is open.
        """
        found = []
        for block in range(self.depth):
            found.append(base.Seat(f"block.{block:02d}.attention", (f"{BLOCKS}.{block}.attn",), self.width, "behind"))
            found.append(base.Seat(f"block.{block:02d}.ffn", (f"{BLOCKS}.{block}.mlp",), self.width))
        return (*found, *(promptable.decoder_seats(self._decoder) if self.masks_open else ()))

    def encoder_name(self, parameter: str) -> str:
        """See base."""
        found = promptable.numbered(parameter, BLOCKS, NAMES)
        if found is not None:
            return found
        if parameter == "shared_image_embedding.positional_embedding":
            return "prompt.shared_embedding.positional_embedding"
        renamed = parameter.removeprefix("vision_encoder.")
        return renamed.replace("patch_embed.projection.", "embed.patch.").replace("pos_embed", "embed.position")

    def prefix(self, pixels: Tensor, stop: int, taps: Sequence[int]) -> base.Prefix:
        """See base."""
        return self._walk(self._embed(pixels), range(stop), taps)

    def advanced(self, prefix: base.Prefix, stop: int, taps: Sequence[int]) -> base.Prefix:
        """See base."""
        rest = self._walk(prefix.hidden, range(prefix.stop, stop), taps)
        return base.Prefix(stop, rest.hidden, {**prefix.taken, **rest.taken})

    def features(
        self,
        pixels: Tensor,
        taps: Sequence[int],
        prefix: base.Prefix | None = None,
        prompts: promptable.Told = None,
    ) -> base.Features:
        """See base. The pooled vector is the mean of the last grid."""
        prefix = prefix or self.prefix(pixels, 0, taps)
        rest = self.advanced(prefix, self.depth, taps)
        taken = rest.taken
        grids = tuple(taken[tap].movedim(-1, 1) for tap in taps)
        masks = None
        if self.masks_open:
            embedding, size = self.neck(rest.hidden), pixels.shape[-2:]
            masks = self._masks(lambda given: self.decode(embedding, taken, given, size), prompts, embedding, size)
        return base.Features(pixels, grids, grids[-1].mean(dim=(2, 3)), masks)

    def neck(self, hidden: Tensor) -> Tensor:
        """The image embedding. Shapes: (B, h, w, D) -> (B, C, h, w)."""
        encoder: Any = self.model.vision_encoder
        result: Tensor = encoder.neck(hidden)
        return result

    def decode(
        self, embedding: Tensor, taken: Mapping[int, Tensor], prompts: base.Prompts | None, size: Sequence[int]
    ) -> Tensor:
        """Low-resolution logits of every mask token.

        Shapes: embedding (B, C, h, w) of an input of ``size`` (height, width) -> (B, M, 4h, 4w).
        """
        decoder = self._decoder
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        found, grid = self._attend(embedding, tokens, prompts, size)
        return self._mix(decoder.output_hypernetworks_mlps, found[:, 1:], self._upscale(grid))

    def _upscale(self, grid: Tensor) -> Tensor:
        decoder = self._decoder
        half = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(grid)))
        result: Tensor = decoder.activation(decoder.upscale_conv2(half))
        return result

    def _embed(self, pixels: Tensor) -> Tensor:
        """First hidden states (B, h, w, D); the stock embedding refuses inputs of another size."""
        encoder: Any = self.model.vision_encoder
        hidden: Tensor = encoder.patch_embed.projection(pixels).permute(0, 2, 3, 1)
        table = encoder.pos_embed
        if table is None:
            return hidden
        if table.shape[1:3] != hidden.shape[1:3]:
            table = base.resize(table.permute(0, 3, 1, 2), hidden.shape[1:3]).permute(0, 2, 3, 1)
        result: Tensor = hidden + table
        return result

    def _kept(self) -> tuple[int, ...]:
        """Block counts whose hidden states the decoder needs too."""
        return ()

    def _walk(self, hidden: Tensor, blocks: range, taps: Sequence[int]) -> base.Prefix:
        taken: dict[int, Tensor] = {}
        for index in blocks:
            hidden = self.block(self._blocks[index], hidden)
            if index + 1 in taps or index + 1 in self._kept():
                taken[index + 1] = hidden
        return base.Prefix(blocks.stop, hidden, taken)

    def activations(self, size: Sequence[int]) -> int:
        """See base: the position bias of global attention grows with the square of the tokens."""
        rows, columns = size[0] // self.patch, size[1] // self.patch
        tokens, side = rows * columns, self.window
        padded = -(-rows // side) * -(-columns // side) * side * side if side else 0
        linear = 34 * self.width
        wide = linear * tokens + self.heads * tokens * tokens
        narrow = linear * tokens + self.heads * padded * side * side
        blocks = len(self.wide) * wide + (self.depth - len(self.wide)) * narrow
        if self.checkpointing:
            blocks = tokens * self.width * self.depth + max(wide, narrow)
        return int(blocks + (2400 * tokens if self.masks_open else 0))


def shape(values: Mapping[str, Any]) -> tuple[str, Any]:
    """The stock class and its configuration."""
    made = stock.transformers_class("SamConfig").from_dict(dict(values))
    made._attn_implementation = "sdpa"
    return "SamModel", made


@base.takes("gradient_checkpointing")
def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> SegmentAnything:
    """A frozen SAM by table name, Hugging Face name or local folder; without weights on the meta device.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if an option has no meaning.
    """
    return stock.load(settings, shape, SegmentAnything, with_weights=with_weights, device=device)
