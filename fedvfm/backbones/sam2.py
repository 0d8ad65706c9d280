"""SAM 2 (and 2.1) for single images: a Hiera encoder, and a mask decoder that also takes finer features."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedvfm.backbones import base, promptable, stock
from fedvfm.config import schema


class SegmentAnything2(promptable.Promptable):
    """A stock SAM 2, frozen, without its memory: what it does with the first frame.

    Blocks have different widths and grids, so the one grid is the image embedding; a head of several grids gets it
    several times. Without prompts the decoder is told twice that there is no point, as the stock model does.

    The stock encoder resizes its position table to any input whose sides are multiples of 32.

    Shapes: pixels (B, 3, H, W) -> grid (B, C, H/16, W/16), masks (B, M, H/4, W/4).
    Source: Ravi et al., "SAM 2: Segment Anything in Images and Videos", ICLR 2025.
    """

    part_names: Mapping[str, tuple[str, ...]] = {**promptable.PARTS, "high_resolution": ("conv_s",)}
    blocks: ClassVar[str] = "vision_encoder.backbone.blocks"
    projections: ClassVar[Mapping[str, str]] = {"o": "attn.proj", "fc1": "mlp.proj_in", "fc2": "mlp.proj_out"}
    attention: ClassVar[str] = "attn"
    own_names: ClassVar[Mapping[str, str]] = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "attn.qkv": "qkv",
        "attn.proj": "o",
        "mlp.proj_in": "fc1",
        "mlp.proj_out": "fc2",
        "proj": "skip",
    }

    def __init__(self, name: str, model: nn.Module, sha256: str, *, checkpointing: bool = False) -> None:
        super().__init__(name, model, sha256, checkpointing=checkpointing)
        settings: Any = model.config
        self.width, self.depth = settings.vision_config.fpn_hidden_size, len(self._blocks)
        self._shape(settings.vision_config.backbone_config)

    def _shape(self, encoder: Any) -> None:
        """What the encoder's settings say."""
        self.patch = 32
        self.ends = tuple(itertools.accumulate(encoder.blocks_per_stage))
        self.stride = encoder.patch_stride[0] if isinstance(encoder.patch_stride, list) else encoder.patch_stride

    @property
    def _blocks(self) -> Any:
        return self.model.get_submodule(self.blocks)

    def taps(self, count: int) -> tuple[int, ...]:
        """There is one grid, after the last block."""
        return (self.depth,) * count

    def projection(self, block: int, part: str) -> str | None:
        """See base. Query, key and value are slices of one layer: see ``fused``."""
        return f"{self.blocks}.{block}.{self.projections[part]}" if part in self.projections else None

    def fused(self, block: int, part: str) -> base.Slice | None:
        """See base."""
        if part not in ("q", "k", "v"):
            return None
        width = int(self._blocks[block].attn.dim_out)
        start = "qkv".index(part) * width
        return base.Slice(f"{self.blocks}.{block}.attn.qkv", start, start + width)

    def block_width(self, block: int) -> int:
        """Channels that leave a block."""
        return int(self._blocks[block].dim_out)

    def seats(self) -> tuple[base.Seat, ...]:
        """See base: two a block (behind attention, beside the feed-forward branch), three a decoder layer.

        Those of the decoder only where it is open.
        """
        found = []
        for block in range(self.depth):
            name, path, width = f"block.{block:02d}", f"{self.blocks}.{block}", self.block_width(block)
            found.append(base.Seat(f"{name}.attention", (f"{path}.{self.attention}",), width, "behind"))
            found.append(base.Seat(f"{name}.ffn", (f"{path}.mlp",), width))
        return (*found, *(promptable.decoder_seats(self._decoder) if self.masks_open else ()))

    def encoder_name(self, parameter: str) -> str:
        """See base."""
        found = promptable.numbered(parameter, self.blocks, self.own_names)
        if found is not None:
            return found
        if parameter == "no_memory_embedding":
            return "neck.no_memory"
        return self._named(parameter.removeprefix("vision_encoder.").removeprefix("backbone."))

    def _named(self, parameter: str) -> str:
        """Our name of a parameter of the encoder that is in no block."""
        for theirs, ours in (("patch_embed.projection.", "embed.patch."), ("pos_embed", "embed.position")):
            if parameter.startswith(theirs):
                return ours + parameter.removeprefix(theirs)
        return parameter

    def prefix(self, pixels: Tensor, stop: int, taps: Sequence[int]) -> base.Prefix:
        """See base."""
        return self._walk(self._embed(pixels), range(stop))

    def advanced(self, prefix: base.Prefix, stop: int, taps: Sequence[int]) -> base.Prefix:
        """See base."""
        self._fit(prefix.hidden)
        rest = self._walk(prefix.hidden, range(prefix.stop, stop))
        return base.Prefix(stop, rest.hidden, {**prefix.taken, **rest.taken})

    def features(
        self,
        pixels: Tensor,
        taps: Sequence[int],
        prefix: base.Prefix | None = None,
        prompts: promptable.Told = None,
    ) -> base.Features:
        """See base. The pooled vector is the mean of the grid."""
        prefix = prefix or self.prefix(pixels, 0, taps)
        rest = self.advanced(prefix, self.depth, taps)
        levels = self.levels(rest.taken, rest.hidden)
        size = pixels.shape[-2:]
        masks = self._masks(lambda given: self.decode(levels, given, size), prompts, levels[2], size)
        return base.Features(pixels, (levels[2],) * len(taps), levels[2].mean(dim=(2, 3)), masks)

    def levels(self, taken: Mapping[int, Tensor], hidden: Tensor) -> list[Tensor]:
        """What the neck makes of the encoder, from fine to coarse; the last is the image embedding.

        Shapes: (B, C, h, w) each.
        """
        model: Any = self.model
        fine_last, _ = model.vision_encoder.neck(tuple(taken[end] for end in self.ends))
        return self._without_memory(list(fine_last[-3:][::-1]))[:3]

    def _without_memory(self, levels: list[Tensor]) -> list[Tensor]:
        model: Any = self.model
        levels[-1] = levels[-1] + model.no_memory_embedding.reshape(1, -1, 1, 1)
        return levels

    def decode(self, levels: Sequence[Tensor], prompts: base.Prompts | None, size: Sequence[int]) -> Tensor:
        """Low-resolution logits of every mask token.

        Shapes: levels of an input of ``size`` (height, width) -> (B, M, 4h, 4w) of the last level's (h, w).
        """
        decoder, embedding = self._decoder, levels[2]
        if prompts is None:
            nowhere = embedding.new_zeros(embedding.shape[0], 1, 2)
            prompts = base.Prompts(nowhere, -torch.ones_like(nowhere[..., 0]))
        tokens = torch.cat([decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight])
        found, grid = self._attend(embedding, tokens, prompts, size)
        half = decoder.upscale_conv1(grid) + decoder.conv_s1(levels[1])
        half = decoder.activation(decoder.upscale_layer_norm(half))
        fine = decoder.activation(decoder.upscale_conv2(half) + decoder.conv_s0(levels[0]))
        return self._mix(decoder.output_hypernetworks_mlps, found[:, 2:], fine)

    def _embed(self, pixels: Tensor) -> Tensor:
        """First hidden states. Shapes: (B, h, w, D)."""
        encoder: Any = self.model.vision_encoder
        hidden: Tensor = encoder.backbone.patch_embed(pixels)
        result: Tensor = hidden + encoder.backbone._get_pos_embed(hidden.shape[1:3])
        return result

    def _fit(self, hidden: Tensor) -> None:
        """Make blocks ready for a grid of this size, where they must be. Shapes: (B, h, w, D)."""

    def _walk(self, hidden: Tensor, blocks: range) -> base.Prefix:
        taken: dict[int, Tensor] = {}
        for index in blocks:
            hidden = self.block(self._blocks[index], hidden)
            if index + 1 in self.ends:
                taken[index + 1] = hidden
        return base.Prefix(blocks.stop, hidden, taken)

    def activations(self, size: Sequence[int]) -> int:
        """See base: every stage has a quarter of the tokens of the one before."""
        cells = (size[0] // self.stride) * (size[1] // self.stride)
        stages = [sum(block >= end for end in self.ends[:-1]) for block in range(self.depth)]
        kept = [(cells >> 2 * stage) * self.block_width(block) for block, stage in enumerate(stages)]
        blocks = sum(kept) + 34 * max(kept) if self.checkpointing else 34 * sum(kept)
        return int(blocks + (150 * cells if self.masks_open else 0))


def shape(values: Mapping[str, Any]) -> tuple[str, Any]:
    """The stock class and its configuration; of a model for videos, the image part."""
    kept = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    made = stock.transformers_class("Sam2Config")(**{key: values[key] for key in kept if key in values})
    made._attn_implementation = "sdpa"
    return "Sam2Model", made


@base.takes("gradient_checkpointing")
def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> SegmentAnything2:
    """A frozen SAM 2 by table name, Hugging Face name or local folder; without weights on the meta device.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if an option has no meaning.
    """
    return stock.load(settings, shape, SegmentAnything2, with_weights=with_weights, device=device)
