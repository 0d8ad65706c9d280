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


def injected(made: Mapping[str, Bottleneck]) -> base.Injected:
    """Specs and parameters of bottlenecks by wire name; only the down-projection does not begin as zeros.

    They are not a low-rank pair: a function stands between the two layers.
    """
    parameters = {f"{seat}.{name}": p for seat, module in made.items() for name, p in module.named_parameters()}
    specs = tuple(state.ArraySpec(name, tuple(p.shape), "bottleneck") for name, p in parameters.items())
    # As nn.Linear begins (Kaiming with a = sqrt(5)), which is also the authors' choice.
    bounds = {spec.name: spec.shape[1] ** -0.5 for spec in specs if spec.name.endswith(".down.weight")}
    return base.Injected(specs, parameters, bounds=bounds)


def chosen(settings: schema.AdapterConfig, places: Iterable[backbones.Seat]) -> list[backbones.Seat]:
    """The places that ``layers`` chooses: those of the named blocks, and all that belong to no block."""
    named = tuple(f"block.{block:02d}." for block in settings.layers)
    return [place for place in places if place.name.startswith(named or "") or not place.name.startswith("block.")]


class Bottlenecks(base.Adapter):
    """Base of the kinds that put bottlenecks at frozen branches. The up-projections begin as zeros."""

    known_options = ("width", "scale")
    foldable = False

    def places(self, backbone: backbones.Backbone) -> Sequence[backbones.Seat]:
        """Where the kind puts one."""
        raise NotImplementedError

    def make(self, settings: schema.AdapterConfig, place: backbones.Seat) -> Bottleneck:
        """The bottleneck of one place."""
        raise NotImplementedError

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
        """See base."""
        made = {}
        for place in chosen(settings, self.places(backbone)):
            with torch.device(next(backbone.model.parameters()).device):
                made[place.name] = self.make(settings, place)
            seat(backbone.model, place, made[place.name])
        return injected(made)


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
        return [place for place in backbone.seats() if place.name.startswith("block.") and place.name.endswith(".ffn")]

    def make(self, settings: schema.AdapterConfig, place: backbones.Seat) -> Bottleneck:
        """See base."""
        width, scale = int(self.number(settings, "width")), self.number(settings, "scale")
        return Bottleneck(place.width, width, scale, nn.functional.relu, settings.dropout)


class MedicalSamAdapter(Bottlenecks):
    """Two bottlenecks a block of SAM's encoder and three a layer of its mask decoder, with GELU.

    In the encoder one behind attention, before its residual connection, and one beside the feed-forward branch, times
    ``scale``. In the decoder one behind the attention from tokens to image, one beside the feed-forward branch, times
    ``scale``, and one before the last norm, behind the residual connection of the attention from image to tokens; these
    only where the task takes the decoder's masks. The paper's two further branches, over depth and over prompts, are
    left out: images are slices, and the default is prompt-free.

    Options: ``width`` of the bottlenecks (0, the default: a quarter of the channels), ``scale``. ``layers`` chooses
    blocks of the encoder; the decoder's bottlenecks are always there.

    Shapes: down (width, C) and (width,), up (C, width) and (C,), a place of C channels.
    Source: Wu et al., "Medical SAM Adapter: Adapting Segment Anything Model for Medical Image Segmentation", 2023,
    section 3; ratio 1/4 and scale 0.5 as in the authors' code, which, unlike ours, does not begin as SAM.
    """

    numbers: ClassVar[Mapping[str, tuple[float, float, float]]] = {"width": (0, 0, 4096), "scale": (0.5, 0.001, 100.0)}

    def faults(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> list[str]:
        """See base."""
        if not backbone.mask_tokens or not backbone.seats():
            return [
                f"recipe.adapter.kind = '{settings.kind}': backbone '{backbone.name}' has no mask decoder to adapt; "
                f"this kind is for SAM, a plain transformer takes kind 'adaptformer'"
            ]
        return super().faults(settings, backbone)

    def places(self, backbone: backbones.Backbone) -> Sequence[backbones.Seat]:
        """See base."""
        return backbone.seats()

    def make(self, settings: schema.AdapterConfig, place: backbones.Seat) -> Bottleneck:
        """See base."""
        width = int(self.number(settings, "width")) or max(1, place.width // 4)
        scale = self.number(settings, "scale") if place.side == "beside" else 1.0
        return Bottleneck(place.width, width, scale, nn.functional.gelu, settings.dropout)
