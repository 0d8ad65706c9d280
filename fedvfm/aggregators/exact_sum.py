"""Weighted sums of arrays in fixed point: exact additions, so the order of the terms does not matter, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.state import state as states

Wide = NDArray[np.float64]

PLACES = 64
"""Binary places that count: every term is rounded to a multiple of 2^-64."""
SLICE = 40
"""Binary places of a bin. A float64 holds 53, so 2^13 slices add up before any can overflow into the next bin."""
MOST = 1 << 13
"""Terms between two carries."""
BUFFER_BYTES = 48 << 20
BUFFER_TERMS = 16
CHUNK = 1 << 13
"""Numbers whose sums are held together, and added to at once."""
_LARGEST = 2.0**500

Bins = Mapping[int, Wide]
"""Exponent of a bin's unit -> the sums of its slices."""


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
    chunks: tuple[Bins, ...] = ()
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
        now = ExactSum(self.weight + Fraction(rounded), self.chunks, shapes, terms, self.terms)
        size = sum(array.nbytes for array in arrays.values())
        full = len(terms) >= BUFFER_TERMS or size * len(terms) >= BUFFER_BYTES
        return now.emptied() if full else now

    def totals(self) -> dict[str, Wide]:
        """The sums, each rounded to float64 once more than it has bins, relative to its own size."""
        chunks = self.emptied().chunks
        flat, found, start = np.zeros(self._size), {}, 0
        for index, bins in enumerate(chunks):
            carried = _carried(bins)  # the same bins, however the terms came
            for unit in sorted(carried, reverse=True):  # from the top: what cancels, cancels exactly
                flat[index * CHUNK : (index + 1) * CHUNK] += carried[unit]
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            found[name] = flat[start:stop].reshape(shape)
            start = stop
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

    def emptied(self) -> ExactSum:
        """The same sums with every term in its bins."""
        if not self.buffer:
            return self
        weights = [weight for weight, _ in self.buffer]
        rows = [[arrays[name].reshape(-1) for name in self.shapes] for _, arrays in self.buffer]
        chunks, terms = self.chunks or ({},) * -(-self._size // CHUNK), self.terms + len(weights)
        if terms > MOST:
            chunks, terms = tuple(map(_carried, chunks)), len(weights) + 1
        pieces = _pieces([math.prod(shape) for shape in self.shapes.values()])
        after = _added(chunks, pieces, rows, weights)
        return ExactSum(self.weight, tuple(after), self.shapes, (), terms)

    @property
    def _size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())


Piece = tuple[int, slice, slice]
"""Number of an array, what of it lies in a chunk, and where there."""


def _pieces(sizes: Sequence[int]) -> list[list[Piece]]:
    """What of the arrays, laid one behind another, lies in each chunk."""
    found: list[list[Piece]] = [[] for _ in range(-(-sum(sizes) // CHUNK))]
    start = 0
    for number, size in enumerate(sizes):
        done = 0
        while done < size:
            place = (start + done) % CHUNK
            count = min(CHUNK - place, size - done)
            found[(start + done) // CHUNK].append((number, slice(done, done + count), slice(place, place + count)))
            done += count
        start += size
    return found


def _rounder(unit: int) -> float:
    """Adding it to a number below 2^(unit + 51) and subtracting it again rounds to a multiple of 2^unit."""
    return math.ldexp(1.5, 52 + unit)


def _added(
    chunks: Sequence[Bins], pieces: Sequence[list[Piece]], rows: list[list[NDArray[Any]]], weights: list[float]
) -> list[Bins]:
    """The chunks' bins with the slices of all rows added."""
    after: list[Bins] = []
    ones = np.ones(len(rows))
    block, part = np.empty((len(rows), CHUNK)), np.empty((len(rows), CHUNK))
    for bins, own in zip(chunks, pieces, strict=True):
        size = own[-1][2].stop
        left, cut = block[:, :size], part[:, :size]
        for line, row, weight in zip(left, rows, weights, strict=True):
            for number, source, target in own:
                line[target] = row[number][source]
            if weight != 1.0:
                line *= weight
        after.append(_sliced(bins, left, cut, ones))
    return after


def _sliced(bins: Bins, left: Wide, cut: Wide, ones: Wide) -> dict[int, Wide]:
    """The bins with the slices of every line of ``left`` added, which is used up; ``cut`` is room to work in."""
    largest = max(float(left.max()), -float(left.min()))
    if not largest < _LARGEST:
        raise ValueError("a term of a sum is not a finite number of usual size")
    after = dict(bins)
    for unit in _units(largest) if largest > 0 else ():
        np.add(left, _rounder(unit), out=cut)
        np.subtract(cut, _rounder(unit), out=cut)
        if unit != -PLACES:
            np.subtract(left, cut, out=left)
        slices = ones @ cut  # exact: whole multiples of the unit, and their sum is below 2^53 of them
        if unit in bins:
            slices += bins[unit]
        after[unit] = slices
    return after


def _units(largest: float) -> list[int]:
    """Exponents of the bins that terms up to this size have slices in, from the top."""
    above = math.frexp(largest)[1] - (SLICE - 1) + PLACES
    top = max(0, math.ceil(above / SLICE))
    return [SLICE * number - PLACES for number in range(top, -1, -1)]


def _carried(bins: Bins) -> dict[int, Wide]:
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
