"""SAM-HQ: SAM with one more token, whose mask is made from finer features of the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedvfm.backbones import base, promptable, sam, stock
from fedvfm.config import schema


class SegmentAnythingHQ(sam.SegmentAnything):
    """A stock SAM-HQ, frozen.

    The stock model adds the mask of its high-quality token to every mask it gives. So do we with prompts; without, it
    is added to every class but the background (class 0): added to all of them it would vanish in the softmax.

    This is the authors' decoder. That of transformers 5.23 drops the attended grid and mixes masks from the plain image
    embedding with rows and columns exchanged, so it gives other masks with the same weights (see ``stock_differs``).

    Shapes: as SAM.
    Source: Ke et al., "Segment Anything in High Quality", NeurIPS 2023.
    """

    stock_differs = (
        "the SAM-HQ decoder of transformers makes masks from the image embedding as it was before its transformer, "
        "with rows and columns exchanged"
    )
    part_names: Mapping[str, tuple[str, ...]] = {
        **promptable.PARTS,
        "hq": ("hq_token", "hq_mask_mlp", "compress_vit_", "encoder_", "mask_conv", "mask_norm"),
    }

    def decode(
        self, embedding: Tensor, taken: Mapping[int, Tensor], prompts: base.Prompts | None, size: Sequence[int]
    ) -> Tensor:
        """See base."""
        decoder = self._decoder
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight, decoder.hq_token.weight])
        found, grid = self._attend(embedding, tokens, prompts, size)
        fine = self._upscale(grid)
        masks = self._mix(decoder.output_hypernetworks_mlps, found[:, 1:-1], fine)
        early = taken[self._kept()[0]].permute(0, 3, 1, 2)
        sharp = self._mix([decoder.hq_mask_mlp], found[:, -1:], self._sharpen(fine, embedding, early))
        return masks + sharp if prompts is not None else torch.cat([masks[:, :1], masks[:, 1:] + sharp], dim=1)

    def _sharpen(self, fine: Tensor, embedding: Tensor, early: Tensor) -> Tensor:
        """The decoder's grid with what the last and the first block with global attention know."""
        d = self._decoder
        own = d.mask_conv2(d.activation(d.mask_norm(d.mask_conv1(fine))))
        late = d.encoder_conv2(d.activation(d.encoder_norm(d.encoder_conv1(embedding))))
        first = d.compress_vit_conv2(d.activation(d.compress_vit_norm(d.compress_vit_conv1(early))))
        result: Tensor = own + late + first
        return result

    def _kept(self) -> tuple[int, ...]:
        return (self.wide[0] + 1,)


def shape(values: Mapping[str, Any]) -> tuple[str, Any]:
    """The stock class and its configuration."""
    made = stock.transformers_class("SamHQConfig").from_dict(dict(values))
    made._attn_implementation = "sdpa"
    return "SamHQModel", made


@base.takes("gradient_checkpointing")
def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> SegmentAnythingHQ:
    """A frozen SAM-HQ by table name, Hugging Face name or local folder; without weights on the meta device.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if an option has no meaning.
    """
    return stock.load(settings, shape, SegmentAnythingHQ, with_weights=with_weights, device=device)
