"""LoRA on slices of a fused linear layer: one true pair a projection, the other rows untouched.

PEFT's own LoRA on a fused ``qkv`` has one pair for all three: it adapts the keys too and ties queries to values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedvfm.backbones import base as backbones


class Pair(nn.Module):
    """scale * B A x of one projection.

    Shapes: A (r, d_in), B (d_out, r); (..., d_in) -> (..., d_out).
    """

    def __init__(self, base: nn.Linear, rows: backbones.Slice, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.start, self.stop, self.scale = rows.start, rows.stop, scale
        self.A = nn.Parameter(base.weight.new_zeros(rank, base.in_features))
        self.B = nn.Parameter(base.weight.new_zeros(rows.stop - rows.start, rank))
        self.core: nn.Module = nn.Identity()
        self.residual: Residual | None = None
        self.own: Residual | None = None
        self.lora_dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return self.A, self.B

    def forward(self, entering: Tensor) -> Tensor:
        """See the class."""
        dropped = self.lora_dropout(entering)
        down = self.core(nn.functional.linear(dropped, self.A))
        change = added(nn.functional.linear(down, self.B), self.residual, entering)
        return added(change, self.own, dropped) * self.scale


class Residual(nn.Module):
    """A second pair beside a pair. It begins as zeros.

    A residual is one that no site trains (see :mod:`fedvfm.aggregators.residual`); another is each site's own (see
    :mod:`fedvfm.state.groups`, ``dual``).

    Shapes: A (k, d_in), B (d_out, k); (..., d_in) -> (..., d_out).
    """

    def __init__(self, a: Tensor, b: Tensor, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(a.new_zeros(rank, a.shape[1]))
        self.B = nn.Parameter(b.new_zeros(b.shape[0], rank))

    def forward(self, entering: Tensor) -> Tensor:
        """See the class."""
        return nn.functional.linear(nn.functional.linear(entering, self.A), self.B)


def added(change: Tensor, residual: Residual | None, entering: Tensor) -> Tensor:
    """What a pair changes, and what a second one does, where it has one."""
    return change if residual is None else change + residual(entering)


def factors(a: Tensor, b: Tensor, core: nn.Module, *second: Residual | None) -> tuple[Tensor, Tensor]:
    """A and B of all that a pair adds: of a core B is B R, and second pairs come behind.

    Shapes: (k, d_in) and (d_out, k).
    """
    b = b @ core.weight if isinstance(core, nn.Linear) else b
    for pair in second:
        if pair is not None:
            a, b = torch.cat([a, pair.A]), torch.cat([b, pair.B], dim=1)
    return a.detach(), b.detach()


class Fused(nn.Module):
    """A frozen fused layer with a pair on some of its slices.

    Args:
        base: the frozen layer, in place as it is: its weights may be shared by other models.
        slices: projection -> its rows.
        rank: of every pair.
        scale: alpha / rank.
        dropout: before A, drawn for each pair.
    """

    def __init__(
        self, base: nn.Linear, slices: Mapping[str, backbones.Slice], rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.base = base
        ordered = sorted(slices.items(), key=lambda item: item[1].start)
        self.pairs = nn.ModuleDict({part: Pair(base, rows, rank, scale, dropout) for part, rows in ordered})

    def _of(self) -> list[Pair]:
        return [pair for pair in self.pairs.values() if isinstance(pair, Pair)]

    def forward(self, entering: Tensor) -> Tensor:
        """W x + scale B A x on the rows of each slice. Shapes: (..., d_in) -> (..., d_out)."""
        leaving: Tensor = self.base(entering)
        rows: list[Tensor] = []
        done = 0
        for pair in self._of():
            rows += [leaving[..., done : pair.start], leaving[..., pair.start : pair.stop] + pair(entering)]
            done = pair.stop
        return torch.cat([*rows, leaving[..., done:]], dim=-1)

    @torch.no_grad()
    def block_form(self) -> tuple[Tensor, Tensor]:
        """The same change as one pair of the whole layer: A = [A_q; A_v], B with zeros outside the slices.

        It is exact with the scale of a single pair: rank and alpha both grow by the number of pairs.

        Shapes: n pairs of rank r -> A (n r, d_in), B (d_out, n r).
        """
        pairs = self._of()
        parts = [factors(*pair.factors, pair.core, pair.residual, pair.own) for pair in pairs]
        rank = len(parts[0][0])
        whole = self.base.weight.new_zeros(self.base.out_features, rank * len(pairs))
        for index, (pair, (_, b)) in enumerate(zip(pairs, parts, strict=True)):
            whole[pair.start : pair.stop, index * rank : (index + 1) * rank] = b
        return torch.cat([a for a, _ in parts]), whole

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """A plain layer with the pairs in its weights; it shares nothing with this one."""
        made = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None)
        made = made.to(self.base.weight)
        made.load_state_dict(self.base.state_dict())
        for pair in self._of():
            a, b = factors(*pair.factors, pair.core, pair.residual, pair.own)
            made.weight[pair.start : pair.stop] += pair.scale * b @ a
        return made.requires_grad_(False)


def put_in(
    model: nn.Module,
    path: str,
    slices: Mapping[str, backbones.Slice],
    *,
    rank: int,
    scale: float,
    dropout: float,
) -> dict[str, Pair]:
    """Put pairs on slices of the layer at ``path``; the pairs by projection."""
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"{path} is {type(layer).__name__}, no linear layer")
    made = Fused(layer, slices, rank, scale, dropout)
    model.set_submodule(path, made)
    return {part: pair for part, pair in made.pairs.items() if isinstance(pair, Pair)}


def fold(model: nn.Module) -> None:
    """Fold every fused layer's pairs into plain layers, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Fused):
            model.set_submodule(path, module.folded())
