"""Logits of a volume's slices, each mixed with those of the slices beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from fedvfm.data import sample as samples

MOST = 1 / 3
"""Share of a neighbour at most: then a slice counts as much as either of them."""

Thing = TypeVar("Thing")


def mixed(rows: Iterable[tuple[Thing, samples.Part | None, Tensor]], share: float) -> Iterator[tuple[Thing, Tensor]]:
    """Each with its logits, those of a slice mixed with its two neighbours'.

    A slice without a neighbour on one side stands there itself, as at the ends of a volume. One slice is held back at a
    time, so a volume is never in memory as a whole.

    Args:
        rows: what each row is of, which slice of which volume (None: of none), its logits; neighbours follow each other
            in ascending order.
        share: of each neighbour; 0 leaves all as it is.

    Shapes: logits (K, h, w), in and out.
    """
    if not share:
        yield from ((thing, logits) for thing, _, logits in rows)
        return
    held: tuple[Thing, samples.Part | None, Tensor] | None = None
    before: Tensor | None = None
    for row in rows:
        if held is not None:
            beside = _follows(held[1], row[1])
            yield held[0], _mix(before, held[2], row[2] if beside else None, share)
            before = held[2] if beside else None
        held = row
    if held is not None:
        yield held[0], _mix(before, held[2], None, share)


def in_order(chosen: Sequence[samples.Sample]) -> list[samples.Sample]:
    """The same where slices of one volume follow each other in ascending order, each volume at its first slice.

    Elsewhere samples are in the order of their names, where z1000 comes before z101.
    """
    first: dict[str, int] = {}
    for at, sample in enumerate(chosen):
        first.setdefault(sample.unit, at)
    return sorted(chosen, key=lambda sample: (first[sample.unit], 0 if sample.part is None else sample.part.index))


def _follows(part: samples.Part | None, other: samples.Part | None) -> bool:
    return part is not None and other is not None and (part.volume, part.index + 1) == (other.volume, other.index)


def _mix(before: Tensor | None, own: Tensor, after: Tensor | None, share: float) -> Tensor:
    both = (own if before is None else before) + (own if after is None else after)
    return (1 - 2 * share) * own + share * both
