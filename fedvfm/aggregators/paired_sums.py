"""What rules that need the mean of the factors and the mean of the products have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedvfm.aggregators import base, exact_sum, products
from fedvfm.state import state


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of all arrays, and of the products of every pair.

    Attributes:
        manifest: of the global adapter.
        arrays: sums of all arrays.
        pairs: pair -> sum of its products B A, without their scale.
        kept: what the rule left in the round before.
    """

    manifest: state.Manifest
    arrays: exact_sum.ExactSum
    pairs: dict[str, products.Product]
    kept: Mapping[str, state.Array]


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
