"""What averaging the factors of low-rank pairs apart costs: measured while the updates come, at a few pairs if many."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedvfm import seeding, state
from fedvfm.server.aggregators import base, products

ALL_BELOW = 1 << 22
"""Numbers of all products together up to which every pair is measured (32 MiB of float64)."""
SAMPLE = 1 << 20
"""Numbers of the products of a sample; one pair at least."""
DIGITS = 6
"""Significant digits that are told: the order in which updates come shows only behind them."""


def measured(manifest: state.Manifest) -> tuple[str, ...]:
    """Names of the pairs that are measured: all, or where that is much, a sample that the pairs' names alone decide."""
    sizes = {pair: b.shape[0] * a.shape[1] for pair, (a, b) in manifest.pairs().items()}
    names = list(sizes)
    if sum(sizes.values()) <= ALL_BELOW:
        return tuple(names)
    order = seeding.stream(0, "averaging-error", *names).permutation(len(names))
    chosen: list[str] = []
    for name in (names[index] for index in order):
        if not chosen or sum(sizes[one] for one in chosen) + sizes[name] <= SAMPLE:
            chosen.append(name)
    return tuple(sorted(chosen))


@dataclass
class _Pair:
    """Of one pair: the sum of the products, and of the factors.

    Attributes:
        product: sum of weight x scale x B A.
        first: B and A of the first update.
        sums: of weight x B and weight x A, less those of the first: no digit cancels where all are alike.
        alike: whether every B, and every A, is that of the first.
    """

    scale: float
    product: products.Product = field(default_factory=products.Product)
    first: tuple[state.Array, state.Array] | None = None
    sums: list[products.Matrix] = field(default_factory=list)
    alike: list[bool] = field(default_factory=lambda: [True, True])

    def add(self, weight: float, factors: tuple[state.Array, state.Array]) -> None:
        if self.first is None:
            self.first = factors
            self.sums = [np.zeros(factor.shape) for factor in factors]
        for index, (factor, first) in enumerate(zip(factors, self.first, strict=True)):
            if self.alike[index] and not np.array_equal(factor, first):
                self.alike[index] = False
            if not self.alike[index]:
                self.sums[index] += weight * (factor.astype(np.float64) - first)

    def difference(self, total: float) -> products.Product:
        """Sum of the products less total x the product of the mean factors."""
        if self.first is None:
            return self.product
        b, a = (first.astype(np.float64) + part / total for first, part in zip(self.first, self.sums, strict=True))
        return _less(self.product, total * self.scale, b, a)


def _less(product: products.Product, factor: float, b: products.Matrix, a: products.Matrix) -> products.Product:
    """The product less ``factor x B A``."""
    root = np.sqrt(factor)
    return products.Product((*product.left, -root * b), (*product.right, root * a), product.whole)


class AveragingError:
    """Takes every contribution once and holds a few matrices, however many there are.

    ``factor``: ``|| mean(B) mean(A) - mean(B A) ||_F / || mean(B A) ||_F`` with the scales in, over the measured pairs.
    Below about 0.01 no exact rule can help. ``aggregate``: the same of what a rule made of the updates; ranks may
    differ. Values below about 1e-7 are rounding.

    Args:
        manifest: of the global adapter.
    """

    def __init__(self, manifest: state.Manifest) -> None:
        self.pairs = measured(manifest)
        self._all = len(self.pairs) == len(manifest.pairs())
        self._manifest = manifest
        self._held = {pair: _Pair(manifest.pairs()[pair][0].scale) for pair in self.pairs}
        self._total = 0.0
        self._kinds: set[str] = set()

    @property
    def mixed(self) -> bool:
        """Whether the updates differ in rank: then their factors have no mean."""
        return len(self._kinds) > 1

    def add(self, contribution: base.Contribution) -> None:
        """Take one update in."""
        self._total += contribution.weight
        self._kinds.add(contribution.manifest.fingerprint)
        own = contribution.manifest.pairs()
        for pair, held in self._held.items():
            a, b = own[pair]
            factors = contribution.state[b.name], contribution.state[a.name]
            held.product = held.product.add(contribution.weight * a.scale, *factors)
            if not self.mixed:
                held.scale = a.scale
                held.add(contribution.weight, (factors[0].copy(), factors[1].copy()) if held.first is None else factors)

    def factor(self) -> float | None:
        """None where there is no pair, where the mean product is zero, or where ranks differ."""
        if self.mixed or not self._total:
            return None
        # One factor is the same everywhere, as where the other one trains alone: then nothing but rounding is lost.
        differences = [
            0.0 if any(held.alike) else held.difference(self._total).square() for held in self._held.values()
        ]
        return self._relative(sum(differences))

    def aggregate(self, aggregate: state.AdapterState) -> float | None:
        """None where there is no pair or the mean product is zero."""
        difference, pairs = 0.0, self._manifest.pairs()
        for pair, held in self._held.items():
            a, b = pairs[pair]
            factors = aggregate[b.name].astype(np.float64), aggregate[a.name].astype(np.float64)
            difference += _less(held.product, self._total * a.scale, *factors).square()
        return self._relative(difference)

    def sample(self) -> dict[str, list[str]]:
        """What the journal states beside the figures: the measured pairs, where they are not all."""
        return {} if self._all else {"error_measured_at": list(self.pairs)}

    def _relative(self, difference: float) -> float | None:
        whole = sum(held.product.square() for held in self._held.values())
        return float(f"{np.sqrt(difference / whole):.{DIGITS}g}") if whole > 0 else None
