"""Vision transformers of ``transformers``: ViT, DeiT, DINOv2 (with registers), DINOv3, CLIP and SigLIP vision.

A family says where a transformer keeps its blocks; the forward walks them itself, so that grids of several depths can
be taken. A test holds the last grid equal to the stock model's ``last_hidden_state`` for every family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedvfm import errors
from fedvfm.backbones import base, encoder, stock, table, weights
from fedvfm.config import schema


@dataclass(frozen=True)
class Family:
    """Where one of transformers' vision models keeps its parts.

    Attributes:
        model: class name in transformers.
        blocks: path of the list of blocks.
        parts: our part (q, k, v, o, fc1, fc2) -> its path inside a block.
        norms: names of a block's two norms, in order.
        feed_forward: the modules of a block's feed-forward branch, in order.
        lead: tokens before the patches, registers not counted.
        final: path of the last norm, applied to all tokens; empty where the stock model applies none to them.
        pooled_norm: path of a norm for the pooled vector alone; empty where there is none.
        arguments: further arguments of the class.
        settings: settings that differ from the stock model's: parts we do not use are not built.
    """

    model: str
    blocks: str
    parts: Mapping[str, str]
    norms: tuple[str, str]
    final: str
    pooled_norm: str = ""
    feed_forward: tuple[str, ...] = ("mlp",)
    lead: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def _parts(attention: str, out: str, up: str = "fc1", down: str = "fc2") -> dict[str, str]:
    projections = {
        "q": f"{attention}.q_proj",
        "k": f"{attention}.k_proj",
        "v": f"{attention}.v_proj",
        "o": f"{attention}.{out}",
    }
    return {**projections, "fc1": f"mlp.{up}", "fc2": f"mlp.{down}"}


_VIT = Family(
    "ViTModel",
    "layers",
    _parts("attention", "o_proj"),
    ("layernorm_before", "layernorm_after"),
    "layernorm",
    arguments={"add_pooling_layer": False},
)
_SCALED = ("mlp", "layer_scale2")
_DINOV2 = Family(
    "Dinov2Model",
    "encoder.layer",
    _parts("attention", "o_proj"),
    ("norm1", "norm2"),
    "layernorm",
    feed_forward=_SCALED,
)
FAMILIES: dict[str, Family] = {
    "vit": _VIT,
    "deit": replace(_VIT, model="DeiTModel", lead=2),
    "dinov2": _DINOV2,
    "dinov2_with_registers": replace(_DINOV2, model="Dinov2WithRegistersModel"),
    "dinov3_vit": Family(
        "DINOv3ViTModel",
        "model.layer",
        _parts("attention", "o_proj", "up_proj", "down_proj"),
        ("norm1", "norm2"),
        "norm",
        feed_forward=_SCALED,
    ),
    "clip_vision_model": Family(
        "CLIPVisionModel",
        "encoder.layers",
        _parts("self_attn", "out_proj"),
        ("layer_norm1", "layer_norm2"),
        "",
        "post_layernorm",
    ),
    "siglip_vision_model": Family(
        "SiglipVisionModel",
        "encoder.layers",
        _parts("self_attn", "out_proj"),
        ("layer_norm1", "layer_norm2"),
        "post_layernorm",
        lead=0,
        settings={"vision_use_head": False},
    ),
}


class VisionTransformer(stock.Stock):
    """One of the families, frozen.

    Args:
        name: as the recipe names it.
        family: where the model keeps its parts.
        model: the stock transformers model.
        sha256: of its weights file.
    """

    tokens_refused = ""

    def __init__(self, name: str, family: Family, model: nn.Module, sha256: str) -> None:
        super().__init__(name, model, sha256)
        self.family = family
        settings: Any = model.config
        self.width, self.depth = int(settings.hidden_size), int(settings.num_hidden_layers)
        self.patch = int(settings.patch_size)
        self.lead = family.lead + int(getattr(settings, "num_register_tokens", 0))
        self.tokens = nn.ParameterDict()

    def stock(self, model: nn.Module) -> nn.Module:
        """See base."""
        if not isinstance(model, encoder.Encoder):
            return model
        with torch.device("meta"):
            made = _stock_model(self.family, model.config.values)
        made.load_state_dict(model.state_dict(), assign=True)
        return made.eval().requires_grad_(False)

    def projection(self, block: int, part: str) -> str | None:
        """See base."""
        path = self.family.parts.get(part)
        return f"{self.family.blocks}.{block}.{path}" if path else None

    def seats(self) -> tuple[base.Seat, ...]:
        """See base: the feed-forward branch of every block, layer scale included."""
        return tuple(
            base.Seat(
                f"block.{block:02d}.ffn",
                tuple(f"{self.family.blocks}.{block}.{path}" for path in self.family.feed_forward),
                self.width,
            )
            for block in range(self.depth)
        )

    def wire_name(self, parameter: str) -> str:
        """Our stable name: ``block.03.q.weight``, ``block.03.norm1.bias``, ``final_norm.weight``.

        Others keep their own.
        """
        match = re.match(rf"{re.escape(self.family.blocks)}\.(\d+)\.(.+)\.([^.]+)$", parameter)
        if match:
            inner = {path: part for part, path in self.family.parts.items()}
            inner |= {path: f"norm{index}" for index, path in enumerate(self.family.norms, start=1)}
            return f"block.{int(match[1]):02d}.{inner.get(match[2], match[2])}.{match[3]}"
        final = self.family.final or self.family.pooled_norm
        return re.sub(rf"^{re.escape(final)}\.", "final_norm.", parameter)

    def prefix(self, pixels: Tensor, stop: int, taps: Sequence[int]) -> base.Prefix:
        """See base."""
        hidden, arguments = self._embed(pixels)
        return self._walk(hidden, arguments, range(stop), taps, math.prod(self._grid_size(pixels)))

    def features(self, pixels: Tensor, taps: Sequence[int], prefix: base.Prefix | None = None) -> base.Features:
        """See base. The pooled vector is the normalised class token, or the mean of the patches where there is none."""
        last = max(taps)
        if prefix is None:
            prefix = self.prefix(pixels, last, taps)
        else:
            arguments, patches = self._arguments(pixels), math.prod(self._grid_size(pixels))
            rest = self._walk(prefix.hidden, arguments, range(prefix.stop, last), taps, patches)
            prefix = base.Prefix(last, rest.hidden, {**prefix.taken, **rest.taken})
        taken = dict(prefix.taken)
        if last == self.depth and self.family.final:
            taken[last] = self.model.get_submodule(self.family.final)(prefix.hidden)
        rows, columns = self._grid_size(pixels)
        grids = tuple(self._grid(taken[tap], rows, columns) for tap in taps)
        return base.Features(pixels, grids, self._pooled(taken[last], rows * columns))

    def _grid_size(self, pixels: Tensor) -> tuple[int, int]:
        return pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch

    def _walk(
        self, hidden: Tensor, arguments: Mapping[str, Any], blocks: range, taps: Sequence[int], patches: int
    ) -> base.Prefix:
        taken: dict[int, Tensor] = {}
        modules: Any = self.model.get_submodule(self.family.blocks)
        for index in blocks:
            answer: Any = modules[index](self._with_tokens(hidden, index, patches), **arguments)
            hidden = answer[0] if isinstance(answer, tuple) else answer
            if index + 1 in taps:
                taken[index + 1] = hidden
        return base.Prefix(blocks.stop, hidden, taken)

    def _with_tokens(self, hidden: Tensor, block: int, patches: int) -> Tensor:
        """The block's prompt tokens, if any, between the leading tokens and the patches, in place of earlier ones.

        Shapes: hidden (B, T, D).
        """
        if str(block) not in self.tokens:
            return hidden
        fresh = self.tokens[str(block)].expand(hidden.shape[0], -1, -1)
        return torch.cat([hidden[:, : self.lead], fresh, hidden[:, -patches:]], dim=1)

    @staticmethod
    def _grid(tokens: Tensor, rows: int, columns: int) -> Tensor:
        patches = tokens[:, -rows * columns :]
        # Not len(tokens): an exporter would take it for a constant.
        return patches.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], rows, columns)

    def _pooled(self, tokens: Tensor, patches: int) -> Tensor:
        pooled = tokens[:, 0] if self.lead else tokens[:, -patches:].mean(dim=1)
        return self.model.get_submodule(self.family.pooled_norm)(pooled) if self.family.pooled_norm else pooled

    def _embed(self, pixels: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        """First hidden states and the blocks' further arguments.

        Position tables are interpolated to the input's size.
        """
        model: Any = self.model
        if self.family.model.startswith(("Dinov2", "DINOv3")) or isinstance(model, encoder.Encoder):
            return model.embeddings(pixels), self._arguments(pixels)
        hidden = model.embeddings(pixels, interpolate_pos_encoding=True)
        hidden = model.pre_layrnorm(hidden) if self.family.model == "CLIPVisionModel" else hidden
        return hidden, self._arguments(pixels)

    def _arguments(self, pixels: Tensor) -> Mapping[str, Any]:
        model: Any = self.model
        if self.family.model == "DINOv3ViTModel":
            return {"position_embeddings": model.rope_embeddings(pixels)}
        return {"attention_mask": None} if self.family.model in ("CLIPVisionModel", "SiglipVisionModel") else {}


def load(settings: schema.BackboneConfig, *, with_weights: bool = True, device: str = "cpu") -> VisionTransformer:
    """A frozen vision transformer by table name, Hugging Face name or local folder.

    With ``with_weights=False`` the model lies on the meta device: shapes without weights or network.

    Raises:
        WeightsError: if the weights are not here, damaged, or not the pinned ones.
        ConfigError: if the model is of no known family.
    """
    if not with_weights:
        values = weights.describe(settings)
        family = _family(settings.name, values)
        with stock.described(settings.name), torch.device("meta"):
            known = encoder.settings_of(values)
            model = encoder.Encoder(known) if known else _stock_model(family, values)
        sha256, config_sha256 = weights.pinned(settings)
    else:
        located = weights.locate(settings)
        family = _family(settings.name, located.config)
        model = stock.shared(located.key, family.model, device, lambda: _read(family, located))
        sha256, config_sha256 = located.sha256, located.config_sha256
    with stock.described(settings.name):
        made = VisionTransformer(settings.name, family, model, sha256)
    made.config_sha256 = config_sha256
    return made


def _family(name: str, values: Mapping[str, Any]) -> Family:
    kind = values.get("model_type")
    aliases = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
    kind = aliases.get(str(kind), str(kind))
    if kind not in FAMILIES:
        raise errors.ConfigError(
            f"backbone '{name}'",
            [f"model type '{kind}' is not supported; supported: {', '.join(sorted({*FAMILIES, *table.KINDS}))}"],
        )
    return FAMILIES[kind]


def _make_config(family: Family, values: Mapping[str, Any]) -> Any:
    vision = values.get("vision_config")
    settings = dict(vision if isinstance(vision, dict) else values)
    settings.pop("model_type", None)
    config_class: Any = stock.transformers_class(family.model).config_class
    made = config_class(**{**settings, **family.settings})
    made._attn_implementation = "sdpa"
    return made


def _stock_model(family: Family, values: Mapping[str, Any]) -> nn.Module:
    made: nn.Module = stock.transformers_class(family.model)(_make_config(family, values), **family.arguments)
    return made


def _read(family: Family, located: weights.Located) -> nn.Module:
    known = encoder.settings_of(located.config)
    made = encoder.read(known, located) if known else None
    if made is not None:
        return made
    with stock.described(str(located.folder)):
        settings = _make_config(family, located.config)
    return stock.read(family.model, located, settings, ("embeddings.mask_token",), **family.arguments)
