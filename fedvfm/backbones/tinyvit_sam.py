"""Light SAMs with a TinyViT encoder: LiteMedSAM, MobileSAM and what is of the same architecture.

``transformers`` has no such model: its own prompt encoder and mask decoder of SAM stand here on :mod:`tinyvit`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fedvfm import errors
from fedvfm.backbones import base, identity, promptable, sam, stock, tinyvit, weights
from fedvfm.config import schema

BLOCKS = "vision_encoder.blocks"
PROJECTIONS = {"o": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
NAMES = {
    "attn.qkv": "qkv",
    "attn.proj": "o",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "mlp.norm": "norm2",
    "attn.norm": "norm1",
}


class LightSam(nn.Module):
    """TinyViT with SAM's prompt encoder and mask decoder; its parts are named as ``SamModel`` of transformers has them.

    Args:
        values: of ``config.json``.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        parts: Any = importlib.import_module(stock.transformers_class("SamModel").__module__)
        vision, prompt = values["vision_config"], values["prompt_encoder_config"]
        config = stock.transformers_class("SamConfig")(
            vision_config={"num_pos_feats": prompt["num_pos_feats"], "image_size": prompt["image_size"]},
            prompt_encoder_config=dict(prompt),
            mask_decoder_config=dict(values["mask_decoder_config"]),
        )
        config.mask_decoder_config._attn_implementation = "sdpa"
        self.shared_image_embedding = parts.SamPositionalEmbedding(config.vision_config)
        self.vision_encoder = tinyvit.Encoder(shape_of(vision))
        self.prompt_encoder = parts.SamPromptEncoder(config)
        self.prompt_encoder.shared_embedding = self.shared_image_embedding
        self.mask_decoder = parts.SamMaskDecoder(config.mask_decoder_config)


def shape_of(vision: Mapping[str, Any]) -> tinyvit.Shape:
    """The encoder's shape by ``vision_config``."""
    rows = {
        key: tuple(int(value) for value in vision[key]) for key in ("widths", "depths", "heads", "windows", "strides")
    }
    return tinyvit.Shape(
        **rows,
        patch_kernel=int(vision["patch_kernel"]),
        expansion=int(vision["expansion"]),
        mlp_ratio=int(vision["mlp_ratio"]),
        output=int(vision["output_channels"]),
    )


class TinyVitSam(sam.SegmentAnything):
    """A frozen light SAM. Blocks have different widths, so the one grid is the image embedding, as in SAM 2.

    The embedding and the convolutions before the first attention block are no blocks and never train. Any input whose
    sides are multiples of the encoder's stride is taken; the published models were trained with squares of
    ``image_size`` pixels, values from 0 to 1 without mean and deviation (LiteMedSAM), padded right and below.

    Shapes: pixels (B, 3, H, W) -> grid (B, C, H/s, W/s), masks (B, M, 4H/s, 4W/s); s is 4 for LiteMedSAM, 16 for
    MobileSAM.
    Source: Ma et al., LiteMedSAM (2024); Zhang et al., MobileSAM (2023).
    """

    stock_differs = "transformers has no SAM with a TinyViT encoder"
    behind = 1

    def __init__(self, name: str, model: LightSam, sha256: str, *, checkpointing: bool = False) -> None:
        promptable.Promptable.__init__(self, name, model, sha256, checkpointing=checkpointing)
        self.shape = model.vision_encoder.shape
        self.width, self.patch = self.shape.output, self.shape.stride
        self.depth = len(self.shape.stages)

    @property
    def _blocks(self) -> Any:
        return self.model.get_submodule(BLOCKS)

    def taps(self, count: int) -> tuple[int, ...]:
        """There is one grid, after the last block."""
        return (self.depth,) * count

    def block_width(self, block: int) -> int:
        """Channels that leave a block."""
        return self.shape.widths[self.shape.stages[block]]

    def projection(self, block: int, part: str) -> str | None:
        """See base. Query, key and value are slices of one layer: see ``fused``."""
        return f"{BLOCKS}.{block}.{PROJECTIONS[part]}" if part in PROJECTIONS else None

    def fused(self, block: int, part: str) -> base.Slice | None:
        """See base."""
        if part not in ("q", "k", "v"):
            return None
        width = self.block_width(block)
        start = "qkv".index(part) * width
        return base.Slice(f"{BLOCKS}.{block}.attn.qkv", start, start + width)

    def seats(self) -> tuple[base.Seat, ...]:
        """See base: one a block (beside the feed-forward branch), three a decoder layer where the decoder is open.

        What leaves the attention is still cut into windows, so no bottleneck sits behind it.
        """
        found = [
            base.Seat(f"block.{block:02d}.ffn", (f"{BLOCKS}.{block}.mlp",), self.block_width(block))
            for block in range(self.depth)
        ]
        return (*found, *(promptable.decoder_seats(self._decoder) if self.masks_open else ()))

    def encoder_name(self, parameter: str) -> str:
        """See base."""
        found = promptable.numbered(parameter, BLOCKS, NAMES)
        if found is not None:
            return found
        if parameter == "shared_image_embedding.positional_embedding":
            return "prompt.shared_embedding.positional_embedding"
        return parameter.removeprefix("vision_encoder.")

    def features(
        self,
        pixels: Tensor,
        taps: Sequence[int],
        prefix: base.Prefix | None = None,
        prompts: promptable.Told = None,
    ) -> base.Features:
        """See base. The pooled vector is the mean of the grid."""
        prefix = prefix or self.prefix(pixels, 0, taps)
        embedding = self._necked(prefix).hidden
        size = pixels.shape[-2:]
        masks = self._masks(lambda given: self.decode(embedding, {}, given, size), prompts, embedding, size)
        return base.Features(pixels, (embedding,) * len(taps), embedding.mean(dim=(2, 3)), masks)

    def prefix(self, pixels: Tensor, stop: int, taps: Sequence[int]) -> base.Prefix:
        """See base."""
        found = self._walk(self._embed(pixels), range(min(stop, self.depth)), ())
        return self._necked(found) if stop > self.depth else found

    def _necked(self, prefix: base.Prefix) -> base.Prefix:
        """With the blocks that are left and the neck done: hidden is the image embedding (B, C, h, w)."""
        if prefix.stop > self.depth:
            return prefix
        rest = self.advanced(prefix, self.depth, ())
        return base.Prefix(self.depth + self.behind, self.neck(rest.hidden), {})

    def _embed(self, pixels: Tensor) -> Tensor:
        encoder: Any = self.model.vision_encoder
        hidden: Tensor = encoder.embed(pixels)
        return hidden

    def activations(self, size: Sequence[int]) -> int:
        """See base: every stage has its own grid; attention within windows keeps no table of all pairs."""
        rows, columns = (side // self.shape.patch_stride for side in size)
        kept, most = 0, 0
        for stage in self.shape.stages:
            step = 1
            for stride in self.shape.strides[:stage]:
                step *= stride
            numbers = 34 * (rows // step) * (columns // step) * self.shape.widths[stage]
            kept, most = kept + numbers, max(most, numbers)
        blocks = kept // 34 + most if self.checkpointing else kept
        return int(blocks + (2400 * (size[0] // self.patch) * (size[1] // self.patch) if self.masks_open else 0))


def _read(located: weights.Located) -> LightSam:
    """The weights in our layout, float32, in evaluation mode.

    Raises:
        WeightsError: if arrays are missing, too many or of another shape.
    """
    model = LightSam(located.config)
    file = Path(located.folder) / identity.SINGLE
    try:
        arrays = {name: value.float() for name, value in safetensors.torch.load_file(file).items()}
        missing, unknown = model.load_state_dict(arrays, strict=False)
    except Exception as error:  # damaged files and foreign shapes break the reader in several ways
        raise errors.WeightsError(
            f"{file}: the weights cannot be read into a SAM with a TinyViT encoder ({type(error).__name__}). Fetch or "
            "import them again"
        ) from None
    # The two names of one array: the prompt encoder's place code is the shared one.
    missing = [name for name in missing if name != "prompt_encoder.shared_embedding.positional_embedding"]
    if missing or unknown:
        raise errors.WeightsError(
            f"{file}: {len(missing)} arrays are missing and {len(unknown)} unknown (first: "
            f"{(*missing, *unknown)[0]}). Fetch or import them again"
        )
    model.eval()
    return model


@base.takes("gradient_checkpointing")
def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> TinyVitSam:
    """A frozen light SAM by table name, imported name or local folder; without weights on the meta device.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if an option has no meaning.
    """
    checkpointing = stock.switch(settings.options, "gradient_checkpointing", settings.name)
    if with_weights:
        located = weights.locate(settings)
        with stock.described(settings.name):
            model = stock.shared(located.key, "LightSam", device, lambda: _read(located))
        sha256, config_sha256 = located.sha256, located.config_sha256
    else:
        values = weights.describe(settings)
        with stock.described(settings.name), torch.device("meta"):
            model = LightSam(values)
        sha256, config_sha256 = weights.pinned(settings)
    with stock.described(settings.name):
        backbone = TinyVitSam(settings.name, model, sha256, checkpointing=checkpointing)  # type: ignore[arg-type]
    backbone.config_sha256 = config_sha256
    return backbone
