"""LoRA on projections chosen by our names, resolved per backbone: whole layers, or slices of a fused layer.

What trains is computed as by PEFT, whose import takes seconds; an export is in its form (:func:`peft_config`).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fedvfm.adapters import base, fused
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.state import state

if TYPE_CHECKING:
    import peft


def peft_config(settings: schema.AdapterConfig, backbone: backbones.Backbone) -> peft.LoraConfig:
    """The PEFT configuration of the same adapter in the stock model; it is what an export carries.

    Pairs on slices of a fused layer become one pair of the whole layer (see :meth:`fused.Fused.block_form`).
    """
    whole, sliced = _whole(settings, backbone), _sliced(settings, backbone)
    number = len(next(iter(sliced.values()), {0: 0}))
    plain = list(whole.values()) if sliced else []
    return _config(
        settings,
        [*whole.values(), *sliced],
        settings.rank * number,
        rank_pattern=dict.fromkeys(plain, settings.rank),
        alpha_pattern=dict.fromkeys(plain, _alpha(settings, settings.rank)),
    )


def _config(settings: schema.AdapterConfig, paths: list[str], rank: int, **patterns: Any) -> peft.LoraConfig:
    import peft

    return peft.LoraConfig(
        r=rank,
        lora_alpha=_alpha(settings, rank),
        lora_dropout=settings.dropout,
        target_modules=paths,
        bias="none",
        **patterns,
    )


def _alpha(settings: schema.AdapterConfig, rank: int) -> float:
    alpha = settings.scale * rank
    return int(alpha) if float(alpha).is_integer() else alpha


def _whole(settings: schema.AdapterConfig, backbone: backbones.Backbone) -> dict[str, str]:
    """Pair -> path of a layer that is one projection."""
    found = {
        f"block.{block:02d}.{part}": backbone.projection(block, part)
        for block in base.blocks_of(settings, backbone)
        for part in settings.targets
    }
    return {pair: path for pair, path in found.items() if path}


def _sliced(settings: schema.AdapterConfig, backbone: backbones.Backbone) -> dict[str, dict[str, backbones.Slice]]:
    """Path of a fused layer -> pair -> its rows."""
    found: dict[str, dict[str, backbones.Slice]] = {}
    for block in base.blocks_of(settings, backbone):
        for part in settings.targets:
            rows = backbone.fused(block, part)
            if rows is not None:
                found.setdefault(rows.path, {})[f"block.{block:02d}.{part}"] = rows
    return found


class Layer(nn.Module):
    """A frozen linear layer with a pair beside it: W x + scale * B A x, in PEFT's order.

    Shapes: A (r, d_in), B (d_out, r); (..., d_in) -> (..., d_out).
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        place: Any = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, entering: Tensor) -> Tensor:
        """See the class."""
        leaving: Tensor = self.base(entering)
        change: Tensor = self.lora_B(self.lora_A(self.lora_dropout(entering))) * self.scale
        return leaving + change

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """A plain layer with the pair in its weights; it shares nothing with this one."""
        made = copy.deepcopy(self.base)
        made.weight += self.lora_B.weight @ self.lora_A.weight * self.scale
        return made.requires_grad_(False)


def fold(model: nn.Module) -> None:
    """Fold all pairs into the layers they sit on, in place: the weights must be the model's own."""
    fused.fold(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, Layer):
            model.set_submodule(path, module.folded())


class Lora(base.Adapter):
    """W + (alpha / rank) B A on the chosen projections.

    Shapes: A (rank, d_in), B (d_out, rank).
    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. (3).
    """

    pairs: ClassVar[bool] = True

    def faults(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> list[str]:
        """See base."""
        found = super().faults(settings, backbone)
        if backbone.depth == 0:
            return [
                f"recipe.adapter.kind = 'lora': backbone '{backbone.name}' has no projections to adapt; use kind 'full'"
            ]
        unknown = [part for part in settings.targets if not (backbone.projection(0, part) or backbone.fused(0, part))]
        if unknown or not settings.targets:
            found.append(f"recipe.adapter.targets = {list(settings.targets)}: known: q, k, v, o, fc1, fc2")
        return found

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
        """See base."""
        pairs = self._whole_layers(settings, backbone) | self._slices(settings, backbone)
        specs: list[state.ArraySpec] = []
        parameters: dict[str, nn.Parameter] = {}
        for pair, weights in pairs.items():
            for role, weight in zip("AB", weights, strict=True):
                name = f"{pair}.{role}"
                specs.append(state.ArraySpec(name, tuple(weight.shape), "lora", role, pair, settings.scale))
                parameters[name] = weight
        return base.Injected(tuple(specs), parameters)

    @staticmethod
    def _whole_layers(
        settings: schema.AdapterConfig, backbone: backbones.Backbone
    ) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Pair -> A and B put beside whole layers."""
        found: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for pair, path in _whole(settings, backbone).items():
            frozen = backbone.model.get_submodule(path)
            if not isinstance(frozen, nn.Linear):
                raise TypeError(f"{path} is {type(frozen).__name__}, no linear layer")
            made = Layer(frozen, settings.rank, settings.scale, settings.dropout)
            backbone.model.set_submodule(path, made)
            down, up = (layer.get_parameter("weight") for layer in (made.lora_A, made.lora_B))
            found[pair] = down, up
        return found

    @staticmethod
    def _slices(
        settings: schema.AdapterConfig, backbone: backbones.Backbone
    ) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Pair -> A and B put on slices."""
        found: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for path, slices in _sliced(settings, backbone).items():
            parts = {pair.rpartition(".")[2]: (pair, rows) for pair, rows in slices.items()}
            made = fused.put_in(
                backbone.model,
                path,
                {part: rows for part, (_, rows) in parts.items()},
                rank=settings.rank,
                scale=settings.scale,
                dropout=settings.dropout,
            )
            found |= {parts[part][0]: (one.A, one.B) for part, one in made.items()}
        return found
