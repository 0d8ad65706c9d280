"""LoRA on projections chosen by our names, resolved per backbone: whole layers, or slices of a fused layer.

Kind ``core`` leaves both factors of every pair as they are and trains a small matrix between them.

What trains is computed as by PEFT, whose import takes seconds; an export is in its form (:func:`peft_config`).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedvfm.adapters import base, fused
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.state import factors, state

if TYPE_CHECKING:
    import peft


def peft_config(settings: schema.AdapterConfig, backbone: backbones.Backbone) -> peft.LoraConfig:
    """The PEFT configuration of the same adapter in the stock model; it is what an export carries.

    Pairs on slices of a fused layer become one pair of the whole layer (see :meth:`fused.Fused.block_form`).
    """
    whole, sliced = _whole(settings, backbone), _sliced(settings, backbone)
    rank = settings.rank + sum(int(str(settings.options.get(key, 0))) for key in ("residual", "personal"))
    number = len(next(iter(sliced.values()), {0: 0}))
    plain = list(whole.values()) if sliced else []
    return _config(
        settings,
        [*whole.values(), *sliced],
        rank * number,
        rank_pattern=dict.fromkeys(plain, rank),
        alpha_pattern=dict.fromkeys(plain, _alpha(settings, rank)),
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
        self.core: nn.Module = nn.Identity()
        self.residual: fused.Residual | None = None
        self.own: fused.Residual | None = None
        nn.init.zeros_(self.lora_B.weight)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.lora_A.get_parameter("weight"), self.lora_B.get_parameter("weight")

    def forward(self, entering: Tensor) -> Tensor:
        """See the class."""
        leaving: Tensor = self.base(entering)
        dropped = self.lora_dropout(entering)
        change: Tensor = self.lora_B(self.core(self.lora_A(dropped)))
        change = fused.added(fused.added(change, self.residual, entering), self.own, dropped)
        return leaving + change * self.scale

    @torch.no_grad()
    def block_form(self) -> tuple[Tensor, Tensor]:
        """The change as one pair, see :func:`fused.factors`."""
        return fused.factors(*self.factors, self.core, self.residual, self.own)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """A plain layer with the pair in its weights; it shares nothing with this one."""
        made = copy.deepcopy(self.base)
        a, b = self.block_form()
        made.weight += b @ a * self.scale
        return made.requires_grad_(False)


def fold(model: nn.Module) -> None:
    """Fold all pairs into the layers they sit on, in place: the weights must be the model's own."""
    fused.fold(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, Layer):
            model.set_submodule(path, module.folded())


class Lora(base.Adapter):
    """W + (alpha / rank) B A on the chosen projections.

    Options: ``residual``, the rank of a second pair beside every pair, which the rules ``residual`` and ``stack`` fill;
    ``personal``, the rank of a second pair that is each site's own (``recipe.personal.kind = "dual"``).

    Shapes: A (rank, d_in), B (d_out, rank); of a second pair of rank k (k, d_in) and (d_out, k).
    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. (3).
    """

    known_options: ClassVar[tuple[str, ...]] = ("residual", "personal")
    numbers: ClassVar[Mapping[str, tuple[float, float, float]]] = {"residual": (0, 0, 4096), "personal": (0, 0, 4096)}
    pairs: ClassVar[bool] = True

    def faults(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> list[str]:
        """See base."""
        found = super().faults(settings, backbone)
        if backbone.depth == 0:
            return [
                f"recipe.adapter.kind = '{settings.kind}': backbone '{backbone.name}' has no projections to adapt; use "
                "kind 'full'"
            ]
        unknown = [part for part in settings.targets if not (backbone.projection(0, part) or backbone.fused(0, part))]
        if unknown or not settings.targets:
            found.append(f"recipe.adapter.targets = {list(settings.targets)}: known: q, k, v, o, fc1, fc2")
        return found

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
        """See base."""
        specs: list[state.ArraySpec] = []
        parameters: dict[str, nn.Parameter] = {}
        bounds: dict[str, float] = {}
        rank, own = int(self.number(settings, "residual")), int(self.number(settings, "personal"))
        for pair, layer in self._placed(settings, backbone).items():
            for role, weight in zip("AB", layer.factors, strict=True):
                name = f"{pair}.{role}"
                specs.append(state.ArraySpec(name, tuple(weight.shape), "lora", role, pair, settings.scale))
                parameters[name] = weight
            if rank:
                layer.residual = fused.Residual(*layer.factors, rank)
                for name, weight in zip(
                    factors.residual_names(pair), (layer.residual.A, layer.residual.B), strict=True
                ):
                    specs.append(state.ArraySpec(name, tuple(weight.shape), factors.RESIDUAL))
                    parameters[name] = weight
            if own:
                layer.own = fused.Residual(*layer.factors, own)
                names = factors.own_names(pair)
                for name, weight in zip(names, (layer.own.A, layer.own.B), strict=True):
                    specs.append(state.ArraySpec(name, tuple(weight.shape), factors.OWN))
                    parameters[name] = weight
                bounds[names[0]] = 1.0 / math.sqrt(layer.own.A.shape[1])
        return base.Injected(tuple(specs), parameters, bounds=bounds)

    def _placed(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> Mapping[str, Layer | fused.Pair]:
        """Pair -> the module that holds it, put into the backbone."""
        return self._whole_layers(settings, backbone) | self._slices(settings, backbone)

    @staticmethod
    def _whole_layers(settings: schema.AdapterConfig, backbone: backbones.Backbone) -> dict[str, Layer | fused.Pair]:
        """Pairs put beside whole layers."""
        placed: dict[str, Layer | fused.Pair] = {}
        for pair, path in _whole(settings, backbone).items():
            frozen = backbone.model.get_submodule(path)
            if not isinstance(frozen, nn.Linear):
                raise TypeError(f"{path} is {type(frozen).__name__}, no linear layer")
            placed[pair] = Layer(frozen, settings.rank, settings.scale, settings.dropout)
            backbone.model.set_submodule(path, placed[pair])
        return placed

    @staticmethod
    def _slices(settings: schema.AdapterConfig, backbone: backbones.Backbone) -> dict[str, Layer | fused.Pair]:
        """Pairs put on slices."""
        placed: dict[str, Layer | fused.Pair] = {}
        for path, slices in _sliced(settings, backbone).items():
            parts = {pair.rpartition(".")[2]: (pair, rows) for pair, rows in slices.items()}
            pairs = fused.put_in(
                backbone.model,
                path,
                {part: rows for part, (_, rows) in parts.items()},
                rank=settings.rank,
                scale=settings.scale,
                dropout=settings.dropout,
            )
            placed |= {parts[part][0]: module for part, module in pairs.items()}
        return placed


class Core(Lora):
    """W + (alpha / rank) B R A: A and B stay as they are drawn, and R between them trains and travels.

    The mean of the R is exactly the mean of the products, under every rule that averages. A and B never travel: every
    site draws them from ``basis`` and the pair's name (:func:`drawn`). R begins as zero. A pair trains
    ``rank`` x ``rank`` numbers, whatever the width of its layer, so ``rank`` should be larger than LoRA's.

    Options: ``basis``, a number that chooses A and B.

    Shapes: A (rank, d_in), B (d_out, rank), R (rank, rank).
    Source: Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
        Federated LoRA Fine-Tuning", 2025 (arXiv 2502.15436), section 4. There A and B come from gradients of data,
        which no site gives away here; as random ones: Balazy et al., "LoRA-XS", 2024 (arXiv 2405.17604), section 5.
    """

    known_options = ("basis",)
    numbers: ClassVar[Mapping[str, tuple[float, float, float]]] = {"basis": (0, 0, 2**31 - 1)}
    pairs: ClassVar[bool] = False

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
        """See base."""
        basis, parameters = int(self.number(settings, "basis")), {}
        for pair, layer in self._placed(settings, backbone).items():
            a, b = layer.factors
            with torch.no_grad():
                a.copy_(torch.from_numpy(drawn(basis, f"{pair}.A", (a.shape[0], a.shape[1]))))
                b.copy_(torch.from_numpy(drawn(basis, f"{pair}.B", (b.shape[1], b.shape[0])).T))
            core = nn.Linear(a.shape[0], a.shape[0], bias=False, device=a.device, dtype=a.dtype)
            nn.init.zeros_(core.weight)
            layer.core, parameters[f"{pair}.R"] = core, core.get_parameter("weight")
        specs = tuple(state.ArraySpec(name, tuple(weight.shape), "lora") for name, weight in parameters.items())
        return base.Injected(specs, parameters)


def drawn(basis: int, name: str, shape: tuple[int, int]) -> state.Array:
    """Uniform rows whose length is one in the mean. They are never told: they must be the same bits at every site.

    So they are made of a hash and of arithmetic that IEEE 754 fixes, and of no library's random stream.
    """
    raw = hashlib.shake_256(f"fedvfm core {basis} {name}".encode()).digest(4 * shape[0] * shape[1])
    whole = np.frombuffer(raw, "<u4").reshape(shape).astype(np.float64)
    return np.asarray((whole / 2**31 - 1.0) * np.sqrt(3.0 / shape[1]), dtype=np.float32)
