"""What rules that need the mean of the factors and the mean of the products have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedvfm.aggregators import base, exact_sum, held, products
from fedvfm.state import state


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of all arrays, and of the products of every pair.

    Attributes:
        manifest: of the global adapter.
        arrays: sums of all arrays.
        pairs: pair -> sum of its products B A, without their scale.
        kept: what the rule left in the round before.
        held: updates that are in no sum yet, under a rule that shortens some of them.
    """

    manifest: state.Manifest
    arrays: exact_sum.ExactSum
    pairs: dict[str, products.Product]
    kept: Mapping[str, state.Array]
    held: tuple[base.Contribution, ...] = ()


@dataclass(frozen=True)
class Rule:
    """Base: ``init``, ``fold`` and ``for_site`` of rules that need one rank at all sites.

    Attributes:
        name: in errors.
    """

    name: ClassVar[str]
    sum_only: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False
    any_order: ClassVar[bool] = False
    refactors: ClassVar[bool] = False
    joins_factors: ClassVar[bool] = True
    robust: ClassVar[bool] = False
    least: ClassVar[int] = 1

    def init(self, manifest: state.Manifest, kept: Mapping[str, state.Array] | None = None) -> Sums:
        """Empty sums."""
        return Sums(manifest, exact_sum.ExactSum(), {pair: products.Product() for pair in manifest.pairs()}, kept or {})

    def fold(self, acc: Sums, contribution: base.Contribution) -> Sums:
        """Add the weighted arrays, and the weighted product of every pair."""
        pairs = {
            pair: acc.pairs[pair].add(contribution.weight, contribution.state[b.name], contribution.state[a.name])
            for pair, (a, b) in contribution.manifest.pairs().items()
        }
        return Sums(acc.manifest, acc.arrays.add(contribution.weight, contribution.state), pairs, acc.kept)

    def for_site(self, adapter: state.AdapterState, manifest: state.Manifest) -> state.AdapterState:
        """See :func:`base.in_one_rank`."""
        return base.in_one_rank(self.name, adapter, manifest)


@dataclass(frozen=True)
class Shortening(Rule):
    """A rule that may shorten updates that are far longer than the others before it joins their products.

    The product of two factors grows with the square of how far both moved, so that one update of a hundred times the
    usual norm outweighs ten thousand others. An update longer than ``shorten`` times the median norm of the round's
    updates counts as one of that length, in its direction.

    Attributes:
        shorten: times the median norm, from 1 (half of the updates are shortened); 0, the default: no update is.

    Memory: with it all updates of a round, 4 bytes a number and site; else none.
    Source: as :class:`fedvfm.aggregators.clipped_mean.ClippedMean`.
    """

    shorten: float = 0.0

    def __post_init__(self) -> None:
        if self.shorten != 0.0:
            base.check_positive("shorten", self.shorten)
        if 0.0 < self.shorten < 1.0:
            raise ValueError(f"shorten = {self.shorten!r}: 0 or a number from 1 is needed, times the median norm")

    def fold(self, acc: Sums, contribution: base.Contribution) -> Sums:
        """Into the sums, or held where the length that is allowed is not known yet."""
        if not self.shorten:
            return super().fold(acc, contribution)
        return dataclasses.replace(acc, held=(*acc.held, contribution))

    def settled(self, acc: Sums) -> Sums:
        """The sums with every update that was held."""
        norms = [held.norm(each, self.name) for each in acc.held]
        most = self.shorten * float(np.median(norms)) if norms else 0.0
        settled = dataclasses.replace(acc, held=())
        for each, norm in zip(acc.held, norms, strict=True):
            if norm > most:
                short = held.shortened(each, self.name, most / norm)
                arrays = {name: array.astype(np.float32) for name, array in short.items()}
                each = dataclasses.replace(each, state=state.AdapterState(arrays))
            settled = super().fold(settled, each)
        return settled
