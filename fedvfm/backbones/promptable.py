"""Promptable segmentation models (SAM and its kin): an encoder, a prompt encoder and a mask decoder with mask tokens.

The stock decoders give back only the masks they choose. Here the decoder is walked, so that the logits of every mask
token come out: class k of a task is mask token k. Tokens and networks that no class uses travel
with the others: what travels does not hang on the number of classes while the stock tokens suffice.

With prompts the decoder runs once a foreground class, told where that class is. Class k is then mask token k - 1, so
that the first one is the mask the stock model gives for that prompt, and the background is the logit 0 that the stock
model compares masks with. A class that is not there gets no prompt and the logit ``ABSENT``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedvfm import seeding
from fedvfm.backbones import base, stock

PARTS: Mapping[str, tuple[str, ...]] = {
    "upscale": ("upscale_",),
    "output_hypernetworks_mlps": ("output_hypernetworks_mlps.",),
    "mask_tokens": ("mask_tokens",),
    "transformer": ("transformer.",),
    "decoder": ("",),
}
"""Name of a decoder part -> how its modules' names begin."""

ABSENT = -20.0
"""Below the background's 0 by a factor of 5e8 in the softmax, yet small enough for bfloat16 and for resizing."""

Told = base.Prompts | Sequence[base.Prompts] | base.Propose | None
"""One set an image (masks of every token), one for each foreground class (logits of every class), what makes them of
the image embedding, or nothing."""


class Promptable(stock.Stock):
    """Base of the SAM models: what their prompt encoders and mask decoders share.

    Without prompts the decoder is told nothing at all, as the stock model is where it gets no points and no boxes.
    """

    promptable = True
    default_parts = ("upscale", "output_hypernetworks_mlps", "mask_tokens")
    tokens_refused = "they do not fit the windowed two-dimensional grids of its blocks"
    part_names: Mapping[str, tuple[str, ...]] = PARTS

    def __init__(self, name: str, model: nn.Module, sha256: str, *, checkpointing: bool = False) -> None:
        super().__init__(name, model, sha256, checkpointing=checkpointing)
        self.mask_tokens = self.stock_mask_tokens = self._decoder.mask_tokens.num_embeddings
        self.masks_open = False
        self.prompt_width = int(self._decoder.hidden_size)

    @property
    def _decoder(self) -> Any:
        return self.model.mask_decoder

    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """See base."""
        owners = [
            name
            for name, module in self._decoder.named_modules()
            if next(module.parameters(recurse=False), None) is not None
        ]
        return {
            part: tuple(f"mask_decoder.{name}" for name in owners if name.startswith(begins))
            for part, begins in self.part_names.items()
        }

    @torch.no_grad()
    def open_masks(self, count: int, seed: int) -> None:
        """See base. A new token is drawn as torch draws an Embedding, its layers as torch draws a Linear."""
        self.masks_open = True
        fresh = range(self.mask_tokens, count)
        if not fresh:
            return
        decoder, old = self._decoder, self._decoder.mask_tokens.weight
        rows = [seeding.stream(seed, "initial", f"mask token {index}").normal(size=old.shape[1]) for index in fresh]
        added = torch.tensor(np.stack(rows), dtype=old.dtype).to(old.device)
        decoder.mask_tokens = nn.Embedding(count, old.shape[1], device="meta")
        decoder.mask_tokens.weight = nn.Parameter(torch.cat([old.detach(), added]), requires_grad=False)
        for index in fresh:
            layers = copy.deepcopy(decoder.output_hypernetworks_mlps[0])
            for name, parameter in layers.named_parameters():
                draw = seeding.stream(seed, "initial", f"mask token {index}", name)
                bound = old.shape[1] ** -0.5
                parameter.copy_(torch.tensor(draw.uniform(-bound, bound, tuple(parameter.shape))))
            decoder.output_hypernetworks_mlps.append(layers)
        decoder.num_mask_tokens += len(fresh)
        self.mask_tokens = count

    def wire_name(self, parameter: str) -> str:
        """Our stable name: ``decoder.upscale_conv1.weight``, ``prompt.no_mask_embed.weight``, or the encoder's."""
        for theirs, ours in (("mask_decoder.", "decoder."), ("prompt_encoder.", "prompt.")):
            if parameter.startswith(theirs):
                return ours + parameter.removeprefix(theirs)
        return self.encoder_name(parameter)

    def encoder_name(self, parameter: str) -> str:
        """Our stable name of a parameter outside decoder and prompt encoder."""
        raise NotImplementedError

    def features(
        self, pixels: Tensor, taps: Sequence[int], prefix: base.Prefix | None = None, prompts: Told = None
    ) -> base.Features:
        """See base."""
        raise NotImplementedError

    def prompted(
        self, pixels: Tensor, taps: Sequence[int], prefix: base.Prefix | None, prompts: Sequence[base.Prompts]
    ) -> base.Features:
        """See base."""
        return self.features(pixels, taps, prefix, tuple(prompts))

    def proposed(
        self, pixels: Tensor, taps: Sequence[int], prefix: base.Prefix | None, propose: base.Propose
    ) -> base.Features:
        """See base."""
        return self.features(pixels, taps, prefix, propose)

    def _masks(
        self,
        decode: Callable[[base.Prompts | None], Tensor],
        prompts: Told,
        embedding: Tensor,
        size: Sequence[int],
    ) -> Tensor | None:
        """What the decoder gives, if it is open: every token's mask, or every class's where each has a prompt.

        Shapes: embedding (B, C, h, w) of an input of ``size`` (height, width).
        """
        if not self.masks_open:
            return None
        if prompts is None or isinstance(prompts, base.Prompts):
            return decode(prompts)
        if callable(prompts):
            return prompts(embedding, size, lambda classes: _each(decode, classes))
        return _each(decode, prompts)

    def _position(self, embedding: Tensor) -> Tensor:
        """What the decoder is told of each cell's place; the stock model knows only the grid of its own size.

        Shapes: embedding (B, C, h, w) -> (1, C, h, w).
        """
        rows, columns = embedding.shape[2:]
        down = (torch.arange(rows, device=embedding.device) + 0.5) / rows
        across = (torch.arange(columns, device=embedding.device) + 0.5) / columns
        y, x = torch.meshgrid(down, across, indexing="ij")
        model: Any = self.model
        result: Tensor = model.shared_image_embedding(torch.stack([x, y], dim=-1)).permute(2, 0, 1).unsqueeze(0)
        return result

    def _sparse(self, prompts: base.Prompts | None, size: Sequence[int]) -> Tensor | None:
        """Prompt tokens (B, 1, N, C). The stock encoder divides by its own input size, so coordinates are rescaled."""
        if prompts is None or (prompts.points is None and prompts.boxes is None):
            return None
        encoder: Any = self.model.prompt_encoder
        own = float(encoder.input_image_size)
        points, labels, boxes = prompts.points, prompts.labels, prompts.boxes
        if points is not None:
            factor = points.new_tensor([own / size[1], own / size[0]])
            points = ((points + 0.5) * factor - 0.5).unsqueeze(1)
            labels = torch.ones_like(points[..., 0]) if labels is None else labels.unsqueeze(1)
            labels = labels.long()
        if boxes is not None:
            factor = boxes.new_tensor([own / size[1], own / size[0]] * 2)
            boxes = ((boxes + 0.5) * factor - 0.5).unsqueeze(1)
        # bfloat16 would round a coordinate to 4 of 1024 pixels.
        kind = self._dense().device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            sparse: Tensor = encoder(input_points=points, input_labels=labels, input_boxes=boxes, input_masks=None)[0]
        return sparse

    def _dense(self, prompts: base.Prompts | None = None) -> Tensor:
        """What the decoder adds to the embedding: the code of an earlier mask, or of none.

        Shapes: (B, C, h, w) or (1, C, 1, 1).
        """
        encoder: Any = self.model.prompt_encoder
        earlier = None if prompts is None else prompts.masks
        no_mask: Tensor = encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        result: Tensor = no_mask if earlier is None else encoder.mask_embed(earlier.unsqueeze(1))
        return result

    def _attend(
        self, embedding: Tensor, tokens: Tensor, prompts: base.Prompts | None, size: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The decoder's two-way transformer.

        Shapes: embedding (B, C, h, w) of an input of ``size`` (height, width), tokens (T, C) -> tokens (B, T, C) and
            grid (B, C, h, w).
        """
        batch, _, rows, columns = embedding.shape
        queries, sparse = tokens.expand(batch, 1, -1, -1), self._sparse(prompts, size)
        queries = queries if sparse is None else torch.cat([queries, sparse], dim=2)
        found, keys = self._decoder.transformer(
            point_embeddings=queries,
            image_embeddings=embedding + self._dense(prompts),
            image_positional_embeddings=self._position(embedding),
            attention_similarity=None,
        )[:2]
        return found[:, 0, : len(tokens)], keys[:, 0].transpose(1, 2).reshape(batch, -1, rows, columns)

    @staticmethod
    def _mix(networks: Sequence[nn.Module], tokens: Tensor, fine: Tensor) -> Tensor:
        """A mask a token: its network's output times the fine grid's channels.

        Shapes: tokens (B, M, C), fine (B, F, h, w) -> (B, M, h, w).
        """
        weights = torch.stack([network(tokens[:, index]) for index, network in enumerate(networks)], dim=1)
        return (weights @ fine.flatten(2)).reshape(fine.shape[0], -1, *fine.shape[2:])


def _each(decode: Callable[[base.Prompts | None], Tensor], classes: Sequence[base.Prompts]) -> Tensor:
    """Logits of every class, each under its own prompt; the background's are 0. Shapes: (B, 1 + P, 4h, 4w)."""
    masks = []
    for index, prompts in enumerate(classes):
        mask = decode(prompts)[:, index]
        if prompts.present is not None:
            mask = torch.where(prompts.present.to(mask.device)[:, None, None], mask, ABSENT)
        masks.append(mask)
    return torch.stack([torch.zeros_like(masks[0]), *masks], dim=1)


def numbered(parameter: str, path: str, names: Mapping[str, str]) -> str | None:
    """``block.03.norm1.bias`` for a parameter of a list of blocks, None for one elsewhere.

    Args:
        parameter: the stock name.
        path: of the list of blocks.
        names: name inside a block -> ours; others stay.
    """
    match = re.match(rf"^{re.escape(path)}\.(\d+)\.(.+)$", parameter)
    if match is None:
        return None
    inner = match[2]
    for theirs, ours in names.items():
        if inner == theirs or inner.startswith(f"{theirs}."):
            inner = ours + inner.removeprefix(theirs)
            break
    return f"block.{int(match[1]):02d}.{inner}"


def decoder_seats(decoder: Any) -> tuple[base.Seat, ...]:
    """Where bottlenecks can sit in a two-way transformer, three a layer.

    Source: Wu et al., "Medical SAM Adapter", Medical Image Analysis 2025: behind the attention from tokens to image,
    beside the feed-forward branch, and behind the residual connection of the attention from image to tokens, before
    the layer's last norm.
    """
    width, found = decoder.hidden_size, []
    for index in range(len(decoder.transformer.layers)):
        path = f"mask_decoder.transformer.layers.{index}"
        found += [
            base.Seat(f"decoder.{index}.to_image", (f"{path}.cross_attn_token_to_image",), width, "behind"),
            base.Seat(f"decoder.{index}.ffn", (f"{path}.mlp",), width),
            base.Seat(f"decoder.{index}.to_tokens", (f"{path}.layer_norm4",), width, "before"),
        ]
    return tuple(found)
