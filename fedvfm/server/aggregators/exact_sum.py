"""Weighted sums of arrays in fixed point: exact additions, so the order of the terms does not matter, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent import futures
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import capacity, errors
from fedvfm import state as states

Wide = NDArray[np.float64]

PLACES = 64
"""Binary places that count: every term is rounded to a multiple of 2^-64."""
SLICE = 40
"""Binary places of a bin. A float64 holds 53, so 2^13 slices add up before any can overflow into the next bin."""
MOST = 1 << 13
"""Terms between two carries."""
BUFFER_BYTES = 48 << 20
BUFFER_TERMS = 32
THREADS = 4
LARGE = 1 << 20
"""Numbers to add from which several threads are worth their start."""
_BLOCK = 1 << 15
_LARGEST = 2.0**900


@dataclass(frozen=True, slots=True)
class ExactSum:
    """``sum of weight x array`` for every array, in fixed point with 64 binary places and no upper bound.

    A term ``weight x array`` is computed in float64: exact for float32 arrays, since a weight is rounded to float32
    first (a number of examples up to 2^24 is exact). It is then cut into slices, multiples of 2^-64 below 2^-24,
    multiples of 2^-24 below 2^16, and so on; the sums of the slices are held apart, as float64 that never round,
    because they are whole multiples of their unit below 2^53. What is lost is what lies beyond the 64th place, at
    most 2^-65 a term. So the mean of terms of weight 1 or more is within 2^-64 of the true one before it is rounded to
    float32: below the last bit of every float32 whose size is 2^-40 (1e-12) or more.

    Nothing that was added is held but the last few terms, at most :data:`BUFFER_BYTES`: one pass over the sums serves
    them all. An accumulator is immutable; adding makes another one.

    Memory: 8 bytes a number and bin. Numbers with ``weight x size`` below 2^15 use two bins.
    A mean of negative zeros alone is zero.

    Source: Demmel and Nguyen, "Parallel Reproducible Summation", IEEE Transactions on Computers 64(7), 2015 (slices on
        absolute grids); Kulisch, "Computer Arithmetic and Validity", 2008 (the long accumulator).
    """

    weight: Fraction = Fraction(0)
    bins: Mapping[str, Mapping[int, Wide]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    buffer: tuple[tuple[float, Mapping[str, NDArray[Any]]], ...] = ()
    terms: int = 0

    def add(self, weight: float, arrays: Mapping[str, NDArray[Any]]) -> ExactSum:
        """The accumulator with ``weight x array`` added to each sum; every term brings the same arrays.

        Args:
            weight: positive; rounded to float32.
            arrays: float32 or float64, finite; must not be written to any more.
        """
        rounded = float(np.float32(weight))
        shapes = self.shapes or {name: array.shape for name, array in arrays.items()}
        terms = (*self.buffer, (rounded, arrays))
        now = ExactSum(self.weight + Fraction(rounded), self.bins, shapes, terms, self.terms)
        size = sum(array.nbytes for array in arrays.values())
        full = len(terms) >= BUFFER_TERMS or size * len(terms) >= BUFFER_BYTES
        return now._emptied() if full else now

    def totals(self) -> dict[str, Wide]:
        """The sums, each rounded to float64 once more than it has bins, relative to its own size."""
        found = {}
        bins = self._emptied().bins
        for name, shape in self.shapes.items():
            total = np.zeros(math.prod(shape))
            carried = _carried(bins[name])  # the same bins, however the terms came
            for unit in sorted(carried, reverse=True):  # from the top: what cancels, cancels exactly
                total += carried[unit]
            found[name] = total.reshape(shape)
        return found

    def mean(self) -> dict[str, states.Array]:
        """The weighted mean as float32.

        Raises:
            EmptyCohort: if nothing was added.
        """
        if self.weight <= 0:
            raise errors.EmptyCohort("no update was admitted, so there is nothing to aggregate")
        weight = float(self.weight)
        return {name: np.asarray(total / weight, dtype=np.float32) for name, total in self.totals().items()}

    def _emptied(self) -> ExactSum:
        """The same sums with every term in its bins."""
        if not self.buffer:
            return self
        weights = [weight for weight, _ in self.buffer]
        before, terms = self.bins, self.terms + len(weights)
        if terms > MOST:
            before = {name: _carried(bins) for name, bins in before.items()}
            terms = len(weights) + 1

        def added(name: str) -> dict[int, Wide]:
            rows = [arrays[name].reshape(-1) for _, arrays in self.buffer]
            return _added(before.get(name, {}), rows, weights)

        size = sum(math.prod(shape) for shape in self.shapes.values())
        threads = min(capacity.cores(), THREADS) if size * len(weights) >= LARGE else 1
        if threads == 1:
            after = {name: added(name) for name in self.shapes}
        else:
            with futures.ThreadPoolExecutor(threads) as pool:  # exact, so nobody sees which thread was first
                after = dict(zip(self.shapes, pool.map(added, self.shapes), strict=True))
        return ExactSum(self.weight, after, self.shapes, (), terms)


def _rounder(unit: int) -> float:
    """Adding it to a number below 2^(unit + 51) and subtracting it again rounds to a multiple of 2^unit."""
    return math.ldexp(1.5, 52 + unit)


def _added(bins: Mapping[int, Wide], rows: list[NDArray[Any]], weights: list[float]) -> dict[int, Wide]:
    """The bins with the slices of all rows added. Shapes: rows (n,) each."""
    size = rows[0].size
    sizes = [float(np.maximum(row.max(), -row.min())) * own for row, own in zip(rows, weights, strict=True) if size]
    largest = float(np.max(sizes, initial=0.0))
    if not largest < _LARGEST:
        raise ValueError("a term of a sum is not a finite number of usual size")
    if largest == 0.0:
        return dict(bins)
    units = _units(largest)
    after = {unit: np.empty(size) if unit in units else bins[unit] for unit in {*units, *bins}}
    step = max(_BLOCK // len(rows), 256)
    block, part = np.empty((len(rows), step)), np.empty((len(rows), step))
    ones = np.ones(len(rows))
    for start in range(0, size, step):
        stop = min(start + step, size)
        left, cut = block[:, : stop - start], part[:, : stop - start]
        for own, row, weight in zip(left, rows, weights, strict=True):
            own[:] = row[start:stop]
            if weight != 1.0:
                own *= weight
        for unit in units:
            np.add(left, _rounder(unit), out=cut)
            np.subtract(cut, _rounder(unit), out=cut)
            if unit != -PLACES:
                np.subtract(left, cut, out=left)
            slices = ones @ cut  # exact: whole multiples of the unit, and their sum is below 2^53 of them
            if unit in bins:
                slices += bins[unit][start:stop]
            after[unit][start:stop] = slices
    return after


def _units(largest: float) -> list[int]:
    """Exponents of the bins that terms up to this size have slices in, from the top."""
    above = math.frexp(largest)[1] - (SLICE - 1) + PLACES
    top = max(0, math.ceil(above / SLICE))
    return [SLICE * number - PLACES for number in range(top, -1, -1)]


def _carried(bins: Mapping[int, Wide]) -> dict[int, Wide]:
    """The same sums with no more in a bin than one slice: the rest is in the bins above, exactly."""
    after: dict[int, Wide] = {}
    carry: Wide | None = None
    units = sorted(bins)
    for unit in [*units, units[-1] + SLICE] if units else []:
        whole = bins[unit] if unit in bins else np.zeros_like(bins[units[0]])
        whole = whole if carry is None else whole + carry
        upper = whole + _rounder(unit + SLICE) - _rounder(unit + SLICE)
        if unit > units[-1]:
            if whole.any():
                after[unit] = whole
            break
        after[unit], carry = whole - upper, upper
    return after
