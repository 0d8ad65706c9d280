"""What averaging the factors of low-rank pairs apart costs: measured while the updates come, at a sample if many."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedvfm import seeding
from fedvfm.aggregators import base, exact_sum
from fedvfm.state import state

ALL_BELOW = 1 << 21
"""Numbers of all products together up to which every pair is measured whole (16 MiB of float64)."""
SAMPLE = 1 << 17
"""Numbers of the products of a sample; one row of one pair at least."""
PLACES = 9
"""Decimal places that are told; what lies behind them is rounding."""

Factors = Mapping[str, NDArray[np.float64]]


def measured(manifest: state.Manifest) -> dict[str, int]:
    """The measured pairs, each with every how many rows of B: all, or a sample that the names alone decide."""
    sizes = {pair: b.shape[0] * a.shape[1] for pair, (a, b) in manifest.pairs().items()}
    names = list(sizes)
    if sum(sizes.values()) <= ALL_BELOW:
        return dict.fromkeys(names, 1)
    order = seeding.stream(0, "averaging-error", *names).permutation(len(names))
    chosen: list[str] = []
    for name in (names[index] for index in order):
        if not chosen or sum(sizes[pair] for pair in chosen) + sizes[name] <= SAMPLE:
            chosen.append(name)
    return {name: -(-sizes[name] // SAMPLE) for name in sorted(chosen)}


class AveragingError:
    """Takes every contribution once and holds a few matrices, however many there are.

    ``factor``: ``|| mean(B) mean(A) - mean(B A) ||_F / || mean(B A) ||_F`` with the scales in, over the measured pairs.
    Below about 0.01 no exact rule can help. ``aggregate``: the same of what a rule made of the updates; ranks may
    differ. All sums are exact, so the order in which updates come changes no bit.

    Args:
        manifest: of the global adapter.
    """

    def __init__(self, manifest: state.Manifest) -> None:
        self.pairs = measured(manifest)
        self._all = len(self.pairs) == len(manifest.pairs())
        self._manifest = self._own = manifest
        self._products, self._factors = exact_sum.ExactSum(), exact_sum.ExactSum()
        self._kinds: set[str] = set()

    @property
    def mixed(self) -> bool:
        """Whether the updates differ in rank: then their factors have no mean."""
        return len(self._kinds) > 1

    def add(self, contribution: base.Contribution) -> None:
        """Take one update in."""
        self._kinds.add(contribution.manifest.fingerprint)
        factors = self._rows(contribution.state, contribution.manifest)
        pairs = contribution.manifest.pairs()
        products = {pair: _product(factors, *pairs[pair]) for pair in self.pairs}
        self._products = self._products.add(contribution.weight, products)
        if not self.mixed:
            self._own = contribution.manifest
            self._factors = self._factors.add(contribution.weight, factors)

    def factor(self) -> float | None:
        """None where there is no pair, where the mean product is zero, or where ranks differ."""
        weight = float(self._factors.weight)
        if self.mixed or not weight:
            return None
        return self._relative({name: total / weight for name, total in self._factors.totals().items()}, self._own)

    def factor_by_pair(self) -> dict[str, float]:
        """The same of every measured pair by itself; empty where ``factor`` is None."""
        weight = float(self._factors.weight)
        if self.mixed or not weight:
            return {}
        means = {name: total / weight for name, total in self._factors.totals().items()}
        return {
            pair: round(float(np.sqrt(lost / size)), PLACES)
            for pair, (lost, size) in self._squares(means, self._own).items()
            if size > 0
        }

    def aggregate(self, aggregate: state.AdapterState) -> float | None:
        """None where there is no pair or the mean product is zero."""
        return self._relative(self._rows(aggregate, self._manifest), self._manifest)

    def sample(self) -> dict[str, list[str]]:
        """What the journal states beside the figures: the measured pairs, where they are not all."""
        return {} if self._all else {"error_measured_at": list(self.pairs)}

    def _rows(self, adapter: state.AdapterState, manifest: state.Manifest) -> dict[str, NDArray[np.float64]]:
        """The factors of the measured pairs, of B the measured rows."""
        pairs = manifest.pairs()
        tall = {pairs[pair][1].name: step for pair, step in self.pairs.items()}
        wide = [pairs[pair][0].name for pair in self.pairs]
        return {name: adapter[name][:: tall.get(name, 1)].astype(np.float64) for name in (*tall, *wide)}

    def _relative(self, factors: Factors, manifest: state.Manifest) -> float | None:
        """Distance of these factors' products from the mean product, relative to its size."""
        squares = self._squares(factors, manifest).values()
        lost, size = (sum(pair[at] for pair in squares) for at in (0, 1))
        return round(float(np.sqrt(lost / size)), PLACES) if size > 0 else None

    def _squares(self, factors: Factors, manifest: state.Manifest) -> dict[str, tuple[float, float]]:
        """Pair -> squared distance of its product from the mean product, and the latter's squared size."""
        found = {}
        for pair, total in self._products.totals().items():
            mean = total / float(self._products.weight)
            lost = mean - _product(factors, *manifest.pairs()[pair])
            found[pair] = float(np.square(lost).sum()), float(np.square(mean).sum())
        return found


def _product(factors: Factors, a: state.ArraySpec, b: state.ArraySpec) -> NDArray[np.float64]:
    """Scale B A."""
    return a.scale * (factors[b.name] @ factors[a.name])
