"""The numbers of a survey's answer: which groups there are, what each bin of a group holds, and in which unit.

Every number is a sum over patients. One patient adds :data:`WHOLE` to a group in all, whatever the number and size of
its images: to one bin where it is counted, in parts where it is a share of its pixels. So each group is a histogram
over patients in whole numbers, sums of sites are exact, and what one patient can change is bounded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedvfm.config import survey as surveys

WHOLE = 1 << 16
"""What one patient adds to a group."""

IMAGE_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513, 1025)
"""Edges of the bins of images a patient: 1, 2, 3 to 4, 5 to 8, ..."""

UNKNOWN = "not known"
NO_STRUCTURE, NO_PIXEL = "no structure", "no pixel"

MOMENTS = ("have a value", "sum", "sum of squares")
"""Of a column of a table, each patient's value as a share of the column's range: 1, the share, its square."""

Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """One histogram.

    Attributes:
        name: of the group: ``rows``, ``intensity-0``.
        statistic: the one it belongs to, by its name in the survey.
        edges: between its bins, ascending; empty where its bins are no intervals.
        labels: of its bins, in words.
        unit: of the edges.
        several: whether a patient may be in several bins with all it adds, as one that has several classes.
        span: of a column of a table, its least and greatest value, in units of which its sums are; None of histograms.
    """

    name: str
    statistic: str
    labels: tuple[str, ...]
    edges: tuple[float, ...] = ()
    unit: str = ""
    several: bool = False
    span: tuple[float, float] | None = None

    @property
    def sensitivity(self) -> float:
        """Most that one patient changes the group by in L2 norm, where it is there or not."""
        return WHOLE * math.sqrt(len(self.labels) if self.several else 1)


def groups(survey: surveys.Survey) -> tuple[Group, ...]:
    """The groups that a survey asks for, in their order."""
    intensity = intensity_edges(survey)
    unit = "file units" if survey.scale == "file" else "0 to 1"
    made_of: dict[str, list[Group]] = {
        "patients": [Group("patients", "patients", ("all",))],
        "images": [_histogram("images", "images", IMAGE_EDGES, "")],
        "sizes": [_histogram(name, "sizes", survey.size_edges, "pixels") for name in ("rows", "columns")],
        "spacings": [
            _histogram(name, "spacings", survey.spacing_edges, "mm", UNKNOWN)
            for name in ("row-spacing", "column-spacing", "slice-spacing")
        ],
        "intensities": [
            _histogram(f"intensity-{at}", "intensities", intensity, unit, NO_PIXEL) for at in range(survey.colours)
        ],
        "foreground": [
            _histogram(f"foreground-{at}", "foreground", intensity, unit, NO_STRUCTURE) for at in range(survey.colours)
        ],
        "classes": [Group("class-patients", "classes", survey.class_names, several=True)],
        "class-shares": [Group("class-shares", "class-shares", survey.class_names)],
        "columns": [
            Group(f"value-{name}", "columns", MOMENTS, unit=unit, several=True, span=span)
            for name, span, unit in zip(
                survey.columns, survey.column_ranges, survey.column_units or ("",) * len(survey.columns), strict=True
            )
        ],
    }
    return tuple(group for name in surveys.STATISTICS if name in survey.statistics for group in made_of[name])


def intensity_edges(survey: surveys.Survey) -> tuple[float, ...]:
    """Edges of the bins of intensities."""
    (low, high), bins = survey.intensity_range, survey.intensity_bins
    return tuple(low + (high - low) * at / bins for at in range(bins + 1))


def _histogram(name: str, statistic: str, edges: tuple[float, ...], unit: str, other: str = "") -> Group:
    between = [f"{low:g} to below {high:g}" for low, high in itertools.pairwise(edges)]
    labels = [f"below {edges[0]:g}", *between, f"{edges[-1]:g} and more", *([other] if other else [])]
    return Group(name, statistic, tuple(labels), tuple(edges), unit)


def place(group: Group, value: float | None) -> int:
    """The bin of a value; None stands for one that is not known, the last bin of such a group."""
    return len(group.labels) - 1 if value is None else int(np.searchsorted(group.edges, value, side="right"))


def counted(group: Group, at: int) -> Whole:
    """What a patient adds that is counted in one bin."""
    row = np.zeros(len(group.labels), np.int64)
    row[at] = WHOLE
    return row


def apportioned(amounts: Whole) -> Whole:
    """:data:`WHOLE` in proportion to these amounts, in whole numbers: largest remainders, the first of equal ones.

    Shapes: (bins,) -> (bins,), which sums to WHOLE.

    Raises:
        ValueError: if there is nothing, or so much that a product is out of bounds.
    """
    total = int(amounts.sum())
    if total < 1 or (amounts < 0).any() or total >= 2**46:
        raise ValueError(f"amounts of {total} in all")
    parts, rest = np.divmod(amounts.astype(np.int64) * WHOLE, total)
    order = np.argsort(-rest, kind="stable")
    parts[order[: WHOLE - int(parts.sum())]] += 1
    return parts


def powers(group: Group, value: float | None) -> Whole:
    """What a patient adds to a column: :data:`WHOLE`, its value as a share of the range, the square; 0 without one.

    Shapes: (3,), from 0 to WHOLE, none above the one before.
    """
    if value is None or group.span is None:
        return np.zeros(len(MOMENTS), np.int64)
    low, high = group.span
    share = round(WHOLE * min(1.0, max(0.0, (value - low) / (high - low))))
    return np.array([WHOLE, share, round(share * share / WHOLE)], np.int64)


@dataclass(frozen=True)
class Moments:
    """What the patients' values in a column come to.

    Attributes:
        count: patients that have one.
        mean, deviation: of these, in the column's unit; the deviation is that of all of them, not of a sample.
        variance: in units of the square of the range; with noise it may be below nought.
    """

    count: float
    mean: float
    deviation: float
    variance: float


def moments(group: Group, row: Sequence[float | None]) -> Moments | None:
    """Mean and standard deviation of a column's sums; None where they are withheld, or noise left nobody.

    Args:
        group: the column's.
        row: its numbers, in patients or in units of :data:`WHOLE` a patient.
    """
    known = [value for value in row if value is not None]
    if group.span is None or len(known) < len(MOMENTS) or known[0] <= 0:
        return None
    low, high = group.span
    share, square = known[1] / known[0], known[2] / known[0]
    variance = square - share**2
    return Moments(known[0], low + (high - low) * share, (high - low) * math.sqrt(max(0.0, variance)), variance)
