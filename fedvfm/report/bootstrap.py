"""Resampling the test samples of one site: intervals of a score, and of the difference of two models' scores.

Units are drawn with replacement, whole patients where patients are given, else samples; a unit that is drawn is drawn
for every run and both models, because a hard image is hard for all of them. With classes, units are drawn class by
class: a draw then never loses a class, and balanced accuracy is a mean over the same classes in every draw. Of a class
with n units n - 1 are drawn, so that the variance is that of the sample and not (n - 1) / n of it.

NumPy only, and no wing of the package: a site, a server and a simulation all state their results with it.

Source: Rao and Wu, "Resampling Inference with Complex Survey Data", JASA 83, 1988, section 2 (n - 1 of n in each
    stratum); Davison and Hinkley, "Bootstrap Methods and their Application", 1997, sections 3.2 and 5.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fedvfm import errors

DRAWS = 2000
LEAST_UNITS = 10
"""Independent units (patients, else samples) a site must have tested for an interval to be stated."""

BLOCK = 4_000_000  # numbers held at once while samples are resampled: 32 MB
NOTHING = 1e-12  # spread below this is rounding

GAINS, LOSES, UNKNOWN = "gains", "loses", "cannot tell"

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SiteScores:
    """What one model reached at one site with one seed, sample by sample.

    Attributes:
        values: sample id -> value, higher is better. With ``labels`` it is 1 for a correct prediction, else 0.
        labels: sample id -> class. The site's value is then the mean over classes of the mean in the class, which for
            0 and 1 is balanced accuracy; without labels it is the plain mean.
        patients: sample id -> patient, where samples of one patient must be drawn together.
    """

    values: Mapping[str, float]
    labels: Mapping[str, int] | None = None
    patients: Mapping[str, str] | None = None

    @classmethod
    def from_table(
        cls,
        ids: Sequence[str],
        table: Mapping[str, Sequence[float]],
        column: str = "dice",
        patients: Mapping[str, str] | None = None,
    ) -> Self:
        """From ``ids`` and ``per_sample()`` of a metric set.

        A table with a ``label`` column is classification: values are correct or not, ``column`` is not used.

        Raises:
            DataError: if the table has no such column.
        """
        if "label" in table:
            labels = {sample: int(label) for sample, label in zip(ids, table["label"], strict=True)}
            correct = [float(guess == label) for guess, label in zip(predicted(table), table["label"], strict=True)]
            return cls(dict(zip(ids, correct, strict=True)), labels, patients)
        if not table.get(column):
            raise errors.DataError(f"no column '{column}'; there are: {', '.join(sorted(table))}")
        return cls(dict(zip(ids, table[column], strict=True)), None, patients)

    def about(self, sample: str) -> tuple[str, int]:
        """(patient, class) of a sample; without patients each sample stands for itself."""
        return self.patients[sample] if self.patients else sample, self.labels[sample] if self.labels else 0


def predicted(table: Mapping[str, Sequence[float]]) -> list[int]:
    """The likeliest class of every sample of a classification table, the lower number where two are equal."""
    rows = np.array([table[f"probability_{k}"] for k in range(len(table) - 1)])
    return [int(label) for label in rows.argmax(axis=0)]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One site's value in every run: as measured, shape (runs,), and in every draw, shape (draws, runs)."""

    point: Floats
    table: Floats
    units: int


@dataclass(frozen=True, slots=True)
class Difference:
    """The first model minus the second at one site, both tested on the same samples.

    Attributes:
        first, second: the value of each, mean over seeds.
        mean: first minus second.
        low, high: the 95 % interval; None where ``reason`` says why there is none.
        units: independent units tested: patients where known, else samples.
        word: "gains" if the interval lies above 0, "loses" if below, else "cannot tell".
        reason: why there is no interval, empty where there is one.
    """

    first: float
    second: float
    mean: float
    low: float | None
    high: float | None
    units: int
    word: str
    reason: str = ""


def difference(
    first: Sequence[SiteScores],
    second: Sequence[SiteScores],
    *,
    rng: Generator,
    draws: int = DRAWS,
    level: float = 0.95,
) -> Difference:
    """One site's paired difference with a percentile interval.

    Args:
        first: one model's scores, a run (seed) each.
        second: the other's, in the same order of seeds.
        rng: of the draws.
        draws: how many.
        level: of confidence.

    Raises:
        DataError: if there is no run, the models have unequally many, or a pair was tested on different samples.
    """
    if not first or len(first) != len(second):
        raise errors.DataError(f"{len(first)} runs of one model and {len(second)} of the other; pair them by seed")
    for pair in zip(first, second, strict=True):
        check_pair(*pair)
    drawn = resample([*first, *second], rng, draws)
    ours, theirs = (float(part.mean()) for part in np.split(drawn.point, 2))
    each = drawn.table[:, : len(first)] - drawn.table[:, len(first) :]
    # Seeds are drawn too, as units are: with one seed their spread is not seen.
    changes = (each * rng.multinomial(len(first), np.full(len(first), 1 / len(first)), size=draws)).mean(axis=1)
    low, high = bounds(changes, level)
    reason = withheld(drawn.units, low, high)
    if reason:
        return Difference(ours, theirs, ours - theirs, None, None, drawn.units, UNKNOWN, reason)
    word = GAINS if low > 0 else LOSES if high < 0 else UNKNOWN
    return Difference(ours, theirs, ours - theirs, low, high, drawn.units, word)


def withheld(units: int, low: float, high: float) -> str:
    """Why an interval must not be stated, empty where it may be.

    Args:
        units: independent units behind it.
        low: its lower bound.
        high: its upper bound. Of equal values the bootstrap sees no spread, which is no proof that there is none.
    """
    if units < LEAST_UNITS:
        return f"{units} independent test {'unit' if units == 1 else 'units'}; an interval needs {LEAST_UNITS}"
    return "no spread among the test samples" if high - low < NOTHING else ""


def check_pair(first: SiteScores, second: SiteScores) -> None:
    """Both must have tested the same samples, with the same classes and patients.

    Raises:
        DataError: if they did not.
    """
    tested, again = ({sample: scores.about(sample) for sample in scores.values} for scores in (first, second))
    if tested != again:
        raise errors.DataError(
            f"the models were tested on different samples ({len(tested)} and {len(again)}, or other labels or "
            "patients); compare models tested on one split"
        )


def resample(runs: Sequence[SiteScores], rng: Generator, draws: int = DRAWS) -> Drawn:
    """A site's value in every run and draw. All runs share the draws.

    A draw is a vector of how often each unit was drawn, so that all draws are one matrix product. What a draw misses
    of a run (seeds with test sets of their own) keeps its measured value.

    Raises:
        DataError: if there is no draw.
    """
    if draws < 1:
        raise errors.DataError(f"draws is {draws}; a bootstrap needs at least 1, and about 2000 for stable bounds")
    sums, counts = totals(runs)
    measured = _ratio(sums.sum(axis=0), counts.sum(axis=0), np.zeros(sums.shape[1:]))
    tested = counts.sum(axis=0) > 0
    groups = strata(counts)
    block = max(1, BLOCK // len(sums))
    tables = []
    for start in range(0, draws, block):
        drawn = _weights(groups, rng, min(block, draws - start))
        means = _ratio(np.tensordot(drawn, sums, axes=1), np.tensordot(drawn, counts, axes=1), measured)
        tables.append(_class_mean(means, tested))
    return Drawn(_class_mean(measured, tested), np.concatenate(tables), len(sums))


def totals(runs: Sequence[SiteScores]) -> tuple[Floats, Floats]:
    """(sums, counts): values summed and samples counted, both of shape (units, runs, classes), units by name."""
    rows = [(at, value, *run.about(sample)) for at, run in enumerate(runs) for sample, value in run.values.items()]
    at, values, names, labels = zip(*rows, strict=True)
    units, drawn_with = np.unique(names, return_inverse=True)
    classes, label = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(units), len(runs), len(classes)))
    counts = np.zeros_like(sums)
    np.add.at(sums, (drawn_with, at, label), values)
    np.add.at(counts, (drawn_with, at, label), 1.0)
    return sums, counts


def strata(counts: Floats) -> Ints:
    """The class each unit is drawn with: of a patient with several, the one that fewest units have.

    Shapes: counts (units, runs, classes); the result (units,).
    """
    has = counts.sum(axis=1) > 0
    owners = np.where(has, has.sum(axis=0), len(counts) + 1)
    return np.asarray(owners.argmin(axis=1), dtype=np.int64)


def bounds(values: Floats, level: float) -> tuple[float, float]:
    """Lower and upper percentile that enclose ``level`` of the draws.

    Raises:
        DataError: if the level is no share.
    """
    if not 0 < level < 1:
        raise errors.DataError(f"level is {level}; a confidence level lies between 0 and 1, for example 0.95")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _weights(groups: Ints, rng: Generator, size: int) -> Floats:
    """How often each unit counts, shape (size, units): n - 1 draws in a class of n units, scaled back to n."""
    weights = np.ones((size, len(groups)))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        n = len(members)
        if n > 1:
            weights[:, members] = rng.multinomial(n - 1, np.full(n, 1 / n), size=size) * (n / (n - 1))
    return weights


def _ratio(sums: Floats, counts: Floats, otherwise: Floats) -> Floats:
    """``sums / counts``, and ``otherwise`` where nothing was counted."""
    return np.divide(sums, counts, out=np.broadcast_to(otherwise, sums.shape).copy(), where=counts > 0)


def _class_mean(means: Floats, tested: NDArray[np.bool_]) -> Floats:
    """Mean over the classes that a run tested. The last axis is classes; ``tested`` has shape (runs, classes)."""
    number = np.maximum(tested.sum(axis=-1), 1)
    return np.asarray(np.where(tested, means, 0.0).sum(axis=-1) / number, dtype=np.float64)
