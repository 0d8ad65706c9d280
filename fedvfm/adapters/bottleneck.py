"""Bottlenecks: small two-layer branches that sit at frozen branches of the backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedvfm.adapters import base
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.state import state

SLICES = 3
"""A slice and its two neighbours: what a stack is."""


class Bottleneck(nn.Module):
    """scale * up(activation(down(x))).

    Shapes: (..., channels) -> (..., channels).
    """

    def __init__(
        self, channels: int, width: int, scale: float, activation: Callable[[Tensor], Tensor], dropout: float
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        self.scale, self.activation, self.adapter_dropout = scale, activation, nn.Dropout(dropout)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, entering: Tensor) -> Tensor:
        """See the class."""
        result: Tensor = self.up(self.adapter_dropout(self.activation(self.down(entering)))) * self.scale
        return result


class DepthBottleneck(Bottleneck):
    """A bottleneck between neighbouring slices: the up-projection sees a place in a slice and in those on both sides.

    That is a convolution of 3 x 1 x 1 over depth with zeros beyond the ends. Rows of the batch are the slices of each
    sample in their order.

    Shapes: (B * slices, ..., channels) -> the same; up (channels, 3 * width).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        scale: float,
        activation: Callable[[Tensor], Tensor],
        dropout: float,
        slices: int,
    ) -> None:
        super().__init__(channels, width, scale, activation, dropout)
        self.up, self.slices = nn.Linear(3 * width, channels), slices
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, entering: Tensor) -> Tensor:
        """See the class."""
        own = self.adapter_dropout(self.activation(self.down(entering))).unflatten(0, (-1, self.slices))
        beyond = torch.zeros_like(own[:, :1])
        below, above = torch.cat([beyond, own[:, :-1]], dim=1), torch.cat([own[:, 1:], beyond], dim=1)
        result: Tensor = self.up(torch.cat([below, own, above], dim=-1).flatten(0, 1)) * self.scale
        return result


class Seated(nn.Module):
    """A frozen branch with a bottleneck at one of its sides (see :class:`fedvfm.backbones.base.Seat`).

    Of a branch that gives several values the first is adapted.
    """

    def __init__(self, frozen: nn.Module, bottleneck: Bottleneck, side: str) -> None:
        super().__init__()
        self.frozen, self.bottleneck, self.side = frozen, bottleneck, side

    def forward(self, *entering: Any, **named: Any) -> Any:
        """What the frozen branch computes, and the bottleneck's share."""
        if self.side == "before":
            first, *others = entering
            return self.frozen(first + self.bottleneck(first), *others, **named)
        answer = self.frozen(*entering, **named)
        leaving = answer[0] if isinstance(answer, tuple) else answer
        leaving = leaving + self.bottleneck(leaving if self.side == "behind" else entering[0])
        return (leaving, *answer[1:]) if isinstance(answer, tuple) else leaving


def seat(model: nn.Module, place: backbones.Seat, bottleneck: Bottleneck) -> None:
    """Put a bottleneck in its place.

    The frozen modules move into the new one as they are: their weights may be shared by other models. A branch of
    several modules is computed where its last one was.
    """
    frozen = [model.get_submodule(path) for path in place.paths]
    for path in place.paths[:-1]:
        model.set_submodule(path, nn.Identity())
    whole = frozen[0] if len(frozen) == 1 else nn.Sequential(*frozen)
    model.set_submodule(place.paths[-1], Seated(whole, bottleneck, place.side))


def injected(seated: Mapping[str, Bottleneck]) -> base.Injected:
    """Specs and parameters of bottlenecks by wire name; only the down-projection does not begin as zeros.

    They are not a low-rank pair: a function stands between the two layers.
    """
    parameters = {f"{seat}.{name}": p for seat, module in seated.items() for name, p in module.named_parameters()}
    specs = tuple(state.ArraySpec(name, tuple(p.shape), "bottleneck") for name, p in parameters.items())
    # As nn.Linear begins (Kaiming with a = sqrt(5)), which is also the authors' choice.
    bounds = {spec.name: spec.shape[1] ** -0.5 for spec in specs if spec.name.endswith(".down.weight")}
    return base.Injected(specs, parameters, bounds=bounds)


def chosen(settings: schema.AdapterConfig, places: Iterable[backbones.Seat]) -> list[backbones.Seat]:
    """The places that ``layers`` chooses: those of the named blocks, and all that belong to no block."""
    named = tuple(f"block.{block:02d}." for block in settings.layers)
    return [place for place in places if place.name.startswith(named or "") or not place.name.startswith("block.")]


def feed_forward(backbone: backbones.Backbone) -> list[backbones.Seat]:
    """The feed-forward branches of the encoder's blocks."""
    return [place for place in backbone.seats() if place.name.startswith("block.") and place.name.endswith(".ffn")]


class Bottlenecks(base.Adapter):
    """Base of the kinds that put bottlenecks at frozen branches. The up-projections begin as zeros."""

    known_options: ClassVar[tuple[str, ...]] = ("width", "scale")
    foldable = False

    def places(self, backbone: backbones.Backbone) -> Sequence[backbones.Seat]:
        """Where the kind puts one."""
        raise NotImplementedError

    def make(self, settings: schema.AdapterConfig, place: backbones.Seat) -> Bottleneck:
        """The bottleneck of one place."""
        raise NotImplementedError

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
        """See base."""
        seated = {}
        for place in chosen(settings, self.places(backbone)):
            with torch.device(next(backbone.model.parameters()).device):
                seated[place.name] = self.make(settings, place)
            seat(backbone.model, place, seated[place.name])
        return injected(seated)


class AdaptFormer(Bottlenecks):
    """A bottleneck beside the feed-forward branch: x + FFN(LN(x)) + scale * up(ReLU(down(LN(x)))).

    The bottleneck sees what the frozen branch sees, and is added to the residual stream behind the branch's layer
    scale, where there is one.

    Options: ``width`` of the bottleneck, ``scale``. ``dropout`` acts between the two layers (the authors use 0.1).

    Shapes: down (width, D) and (width,), up (D, width) and (D,), a block.
    Source: Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022,
    section 3.2, width 64 and scale 0.1. The authors' code leaves the norm out of the adapted branch.
    """

    numbers: ClassVar[Mapping[str, tuple[float, float, float]]] = {"width": (64, 1, 4096), "scale": (0.1, 0.001, 100.0)}

    def faults(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> list[str]:
        """See base."""
        if not self.places(backbone):
            return [
                f"recipe.adapter.kind = '{settings.kind}': backbone '{backbone.name}' has no feed-forward branches to "
                f"adapt; use kind 'full'"
            ]
        return super().faults(settings, backbone)

    def places(self, backbone: backbones.Backbone) -> Sequence[backbones.Seat]:
        """See base."""
        return feed_forward(backbone)

    def make(self, settings: schema.AdapterConfig, place: backbones.Seat) -> Bottleneck:
        """See base."""
        width, scale = int(self.number(settings, "width")), self.number(settings, "scale")
        return Bottleneck(place.width, width, scale, nn.functional.relu, settings.dropout)


class MedicalSamAdapter(Bottlenecks):
    """Two bottlenecks a block of SAM's encoder (three with depth) and three a layer of its mask decoder, with GELU.

    In the encoder one behind attention, before its residual connection, and one beside the feed-forward branch, times
    ``scale``. In the decoder one behind the attention from tokens to image, one beside the feed-forward branch, times
    ``scale``, and one before the last norm, behind the residual connection of the attention from image to tokens; these
    only where the task takes the decoder's masks. The paper's branch over prompts is left out: the default is
    prompt-free.

    With ``depth`` the model sees each slice and its two neighbours (``data.stack = 3``) as three grey images, and a
    third bottleneck a block, beside the feed-forward branch, joins them at every place; behind the last of these blocks
    the middle slice goes on alone. It is a convolution over depth in place of the paper's second pass of the frozen
    attention, which SAM's windows and position tables bind to two dimensions.

    Options: ``width`` of the bottlenecks (0, the default: a quarter of the channels), ``scale``, ``depth`` (false).
    ``layers`` chooses blocks of the encoder; the decoder's bottlenecks are always there.

    Shapes: down (width, C) and (width,), up (C, width) and (C,), a place of C channels; up (C, 3 width) over depth.
    Source: Wu et al., "Medical SAM Adapter: Adapting Segment Anything Model for Medical Image Segmentation", 2023,
    section 3; ratio 1/4 and scale 0.5 as in the authors' code, which, unlike ours, does not begin as SAM. Over depth:
    Chen et al., "MA-SAM: Modality-agnostic SAM adaptation for 3D medical image segmentation", Medical Image Analysis
    2024, section 3.2.
    """

    known_options = ("width", "scale", "depth")

    numbers: ClassVar[Mapping[str, tuple[float, float, float]]] = {"width": (0, 0, 4096), "scale": (0.5, 0.001, 100.0)}

    def faults(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> list[str]:
        """See base."""
        if not backbone.mask_tokens or not backbone.seats():
            return [
                f"recipe.adapter.kind = '{settings.kind}': backbone '{backbone.name}' has no mask decoder to adapt; "
                f"this kind is for SAM, a plain transformer takes kind 'adaptformer'"
            ]
        wrong = [
            f"recipe.adapter.options.depth = {value!r}: give true or false"
            for value in [settings.options.get("depth", False)]
            if type(value) is not bool
        ]
        return super().faults(settings, backbone) + wrong

    def places(self, backbone: backbones.Backbone) -> Sequence[backbones.Seat]:
        """See base."""
        return backbone.seats()

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
        """See base."""
        beside = super().inject(settings, backbone)
        if not settings.options.get("depth", False):
            return beside
        seated: dict[str, Bottleneck] = {}
        for place in chosen(settings, feed_forward(backbone)):
            name, block = place.name.removesuffix("ffn") + "depth", int(place.name.split(".")[1])
            shape = (place.width, self.width(settings, place), self.number(settings, "scale"))
            with torch.device(next(backbone.model.parameters()).device):
                seated[name] = DepthBottleneck(*shape, nn.functional.gelu, settings.dropout, SLICES)
            seat(backbone.model, place, seated[name])
            backbone.slices, backbone.joined = SLICES, max(backbone.joined, block + 1)
        return base.joined(beside, injected(seated))

    def width(self, settings: schema.AdapterConfig, place: backbones.Seat) -> int:
        """Of the bottleneck at a place."""
        return int(self.number(settings, "width")) or max(1, place.width // 4)

    def make(self, settings: schema.AdapterConfig, place: backbones.Seat) -> Bottleneck:
        """See base."""
        width = self.width(settings, place)
        scale = self.number(settings, "scale") if place.side == "beside" else 1.0
        return Bottleneck(place.width, width, scale, nn.functional.gelu, settings.dropout)
