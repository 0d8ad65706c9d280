"""What a site's patients come to: sums of whole numbers, and what of them may leave.

A number that fewer patients than the least have a part in is withheld, and so is one from which it could be worked out.
Nought is withheld too: that there is nobody would tell as much as that there is one.

Source: of withholding a further cell so that the first cannot be had by subtraction: Hundepool et al., "Statistical
    Disclosure Control", Wiley 2012, section 5.4 (secondary cell suppression).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedvfm.survey import layout

Row = Mapping[str, layout.Whole]
"""What one patient adds to each group."""

Shown = tuple[int | None, ...]
"""The numbers of a group; None is withheld."""


@dataclass(frozen=True)
class Totals:
    """The patients of one or several sites, group by group.

    Attributes:
        patients: how many.
        rows: what each of them adds, by group. Shapes: (patients, bins).
    """

    patients: int
    rows: Mapping[str, layout.Whole]

    @classmethod
    def of(cls, groups: Sequence[layout.Group], rows: Iterable[Row]) -> Totals:
        """Of these patients."""
        listed = list(rows)
        empty = {group.name: np.zeros((0, len(group.labels)), np.int64) for group in groups}
        stacked = {name: np.stack([row[name] for row in listed]) for name in empty} if listed else empty
        return cls(len(listed), stacked)

    def sums(self) -> dict[str, layout.Whole]:
        """The sums over patients; those of several sites add up to those of all their patients together."""
        return {name: rows.sum(axis=0, dtype=np.int64) for name, rows in self.rows.items()}

    def shown(self, groups: Sequence[layout.Group], least: int) -> dict[str, Shown]:
        """The sums without what fewer than ``least`` patients have a part in."""
        sums, shown = self.sums(), {}
        for group in groups:
            if group.span is not None:
                shown[group.name] = column_shown(self.rows[group.name], least)
                continue
            hidden = withheld(self.rows[group.name], least, several=group.several)
            numbers = zip(sums[group.name].tolist(), hidden.tolist(), strict=True)
            shown[group.name] = tuple(None if is_hidden else int(value) for value, is_hidden in numbers)
        return shown


def withheld(rows: layout.Whole, least: int, *, several: bool = False) -> NDArray[np.bool_]:
    """Which bins of a group are withheld.

    Where a patient is in one bin, or in parts in several, the bins add up to all patients: then the patients with a
    part in what is withheld must be at least ``least`` together, or none; the bin of the fewest goes too until they
    are. Where a patient may be in several bins whole, those in a bin, and those not in it, must be ``least`` or none.
    There what is shown may come to fewer than all patients: so many at least are in what is withheld, exactly so many
    where nobody is in two bins, and then the same holds.

    Args:
        rows: what each patient adds.
        least: patients.
        several: whether a patient may be in several bins whole.

    Shapes: (patients, bins) -> (bins,).
    """
    has = rows > 0
    support = has.sum(axis=0)
    hidden: NDArray[np.bool_] = support < least
    if several:
        without = len(rows) - support
        hidden |= (without > 0) & (without < least)
    while not hidden.all():
        behind = int(has[:, hidden].any(axis=1).sum())
        if behind == 0 or behind >= least or (several and support[~hidden].sum() >= len(rows)):
            break
        hidden[np.flatnonzero(~hidden)[np.argmin(support[~hidden])]] = True
    return hidden


def column_shown(rows: layout.Whole, least: int) -> Shown:
    """The sums of a column: all three or none.

    None where fewer than ``least`` patients have a value, and where the sums would tell of few or of everybody alike
    (:func:`_tells_of_few`). Where fewer than that have none, they count as patients with the mean and the spread of
    the others, whether there are any or not: how many they are would tell of them.

    Args:
        rows: what each patient adds. Shapes: (patients, 3).
        least: patients.
    """
    have = int((rows[:, 0] > 0).sum())
    if have < least or _tells_of_few(rows[rows[:, 0] > 0, 1], least):
        return tuple(None for _ in layout.MOMENTS)
    sums: list[int] = rows.sum(axis=0, dtype=np.int64).tolist()
    if len(rows) - have >= least:
        return tuple(sums)
    scaled: list[int] = [(value * len(rows) + have // 2) // have for value in sums]
    return tuple(scaled)


def _tells_of_few(shares: layout.Whole, least: int) -> bool:
    """Whether sums of these values let the values of few patients, or that of each, be worked out.

    A value that ``least`` patients share is as a bin that may be told. Of the others, which fewer share, there must be
    ``least`` patients or none: with a single one beside many noughts the sum is that patient's value. And there must be
    more such values than sums, which else say how many patients have each. One value alone is everybody's.

    Shapes: (patients,).
    """
    _, counts = np.unique(shares, return_counts=True)
    rare = counts[counts < least]
    few = len(rare) > 0 and (int(rare.sum()) < least or len(rare) <= len(layout.MOMENTS))
    return len(counts) < 2 or few
