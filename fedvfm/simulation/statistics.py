"""Confidence intervals and paired tests over samples, sites and seeds.

One *arm* (federated, local-only, ...) is a list of :class:`Scores`, one a seed. The statistic is always the macro mean:
per sample, then per site, then the mean over sites, then over seeds. Intervals are percentiles of a hierarchical
bootstrap; the two arms of a comparison share every draw, sample by sample, so what they have in common cancels.

What is resampled, with replacement:

* seeds: one draw of runs for all sites. With few seeds the spread is understated, with one it is not seen at all.
* samples, inside a site and apart from other sites; whole patients where patients are given. A sample drawn is drawn
  in every run that tested it, because a hard image is hard for every seed.
* sites: fixed by default (a statement about *these* hospitals). ``resample_sites=True`` makes it one about hospitals
  like these; with six of them such an interval is wide and rough.

Source: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, sections 3.8 and 5.3.
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
BLOCK = 4_000_000  # numbers held at once while samples are resampled: 32 MB

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """What one arm reached with one seed, sample by sample.

    Attributes:
        arm: name of the arm.
        seed: the run's seed.
        sites: site -> sample id -> value. With ``labels`` the value is 1 for a correct prediction, else 0.
        labels: sample id -> class, by site. A site's value is then the mean over classes of the mean in the class,
            which for 0 and 1 is balanced accuracy; without labels it is the plain mean.
        patients: sample id -> patient, by site, where samples of one patient must be drawn together.
    """

    arm: str
    seed: int
    sites: Mapping[str, Mapping[str, float]]
    labels: Mapping[str, Mapping[str, int]] | None = None
    patients: Mapping[str, Mapping[str, str]] | None = None

    def __post_init__(self) -> None:
        for site, values in self.sites.items():
            if not values or not all(np.isfinite(value) for value in values.values()):
                raise errors.DataError(
                    f"{self.arm}, seed {self.seed}: site '{site}' has no or non-finite sample values"
                )
            for name, given in (("label", self.labels), ("patient", self.patients)):
                if given is not None and not values.keys() <= given.get(site, {}).keys():
                    raise errors.DataError(f"{self.arm}, seed {self.seed}: a sample of site '{site}' has no {name}")
        if not self.sites:
            raise errors.DataError(f"{self.arm}, seed {self.seed}: no site has sample values")

    @classmethod
    def from_tables(
        cls,
        arm: str,
        seed: int,
        tables: Mapping[str, tuple[Sequence[str], Mapping[str, Sequence[float]]]],
        *,
        column: str = "dice",
        patients: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Self:
        """From each site's ``(ids, per_sample())`` of a metric set.

        A table with a ``label`` column is classification: values are correct or not, ``column`` is not used.
        """
        sites: dict[str, dict[str, float]] = {}
        labels: dict[str, dict[str, int]] = {}
        for site, (ids, table) in tables.items():
            values = table.get(column, ())
            if "label" in table:
                labels[site] = {sample: int(label) for sample, label in zip(ids, table["label"], strict=True)}
                rows = np.array([table[f"probability_{k}"] for k in range(len(table) - 1)])
                values = (rows.argmax(axis=0) == np.array(table["label"])).astype(np.float64).tolist()
            if not values:
                raise errors.DataError(f"site '{site}' has no column '{column}'; it has: {', '.join(sorted(table))}")
            sites[site] = dict(zip(ids, values, strict=True))
        return cls(arm, seed, sites, labels or None, patients)


@dataclass(frozen=True, slots=True)
class Interval:
    """The macro mean of one arm and its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Macro mean of the first arm minus that of the second, and its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SiteTest:
    """Paired Wilcoxon test in one site.

    Attributes:
        pairs: number of pairs (patients, where given, else samples).
        difference: mean of first minus second over the pairs.
        p: two-sided p value of this site alone.
        adjusted: p after Holm's correction over all sites.
    """

    pairs: int
    difference: float
    p: float
    adjusted: float


def interval(
    runs: Sequence[Scores],
    *,
    rng: Generator,
    draws: int = DRAWS,
    level: float = 0.95,
    resample_sites: bool = False,
) -> Interval:
    """Macro mean of one arm over sites and seeds, with a percentile interval.

    Raises:
        DataError: if there is no run, two runs have one seed, or the runs differ in their sites.
    """
    means, table = _bootstrap([runs], rng, draws, resample_sites)
    return Interval(float(means[0]), *_bounds(table[0], level))


def paired(
    first: Sequence[Scores],
    second: Sequence[Scores],
    *,
    rng: Generator,
    draws: int = DRAWS,
    level: float = 0.95,
    resample_sites: bool = False,
) -> Difference:
    """Macro mean of ``first`` minus ``second``, both resampled by the same draws.

    Raises:
        DataError: as :func:`interval`, and if the two arms differ in seeds, sites or samples.
    """
    _check_pairs(first, second)
    means, table = _bootstrap([first, second], rng, draws, resample_sites)
    return Difference(float(means[0] - means[1]), *_bounds(table[0] - table[1], level))


def wilcoxon(first: Sequence[Scores], second: Sequence[Scores]) -> dict[str, SiteTest]:
    """Paired Wilcoxon signed-rank test in every site, with Holm's correction over the sites.

    Each pair is one sample (or patient), averaged over the seeds, which are no independent pairs. Equal pairs
    are left out, as Wilcoxon did; where all are equal p is 1. On correct-or-not values it is a sign test.

    Raises:
        DataError: as :func:`paired`.
    """
    from scipy import stats

    _check_pairs(first, second)
    names, changes, alone = sorted(first[0].sites), [], []
    for site in names:
        change = _per_patient(first, site) - _per_patient(second, site)
        # Means that are equal on paper differ in the last bits, and would then count as a pair with a sign.
        change = np.where(np.abs(change) < 1e-12, 0.0, change)
        changes.append(change)
        alone.append(float(stats.wilcoxon(change).pvalue) if change.any() else 1.0)
    adjusted = holm(alone)
    rows = zip(names, changes, alone, adjusted, strict=True)
    return {site: SiteTest(len(change), float(change.mean()), p, corrected) for site, change, p, corrected in rows}


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number, in the order given.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scand. J. Statist. 6, 1979.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(p) for p in adjusted]


def _bootstrap(arms: Sequence[Sequence[Scores]], rng: Generator, draws: int, resample: bool) -> tuple[Floats, Floats]:
    """(means, table): the macro mean of every arm, shape (arms,), and of every draw, shape (arms, draws)."""
    if draws < 1:
        raise errors.DataError(f"draws is {draws}; a bootstrap needs at least 1, and about 2000 for stable bounds")
    arms = [_ordered(runs) for runs in arms]
    sites, seeds = sorted(arms[0][0].sites), len(arms[0])
    columns = [_site_draws([run for runs in arms for run in runs], site, rng, draws) for site in sites]
    points = np.stack([point for point, _ in columns], axis=-1).reshape(len(arms), seeds, len(sites))
    table = np.stack([drawn for _, drawn in columns], axis=-1).reshape(draws, len(arms), seeds, len(sites))
    runs_drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    over_seeds = np.zeros((len(arms), draws))
    for slot in range(len(sites)):
        picked = rng.integers(len(sites), size=draws) if resample else np.full(draws, slot)
        # Every slot reads other rows of the table, so that a site picked twice brings two resamples of its samples.
        row = (np.arange(draws) + slot * resample) % draws
        over_seeds += np.einsum("das,ds->ad", table[row, :, :, picked], runs_drawn)
    return points.mean(axis=(1, 2)), over_seeds / len(sites)


def _site_draws(runs: Sequence[Scores], site: str, rng: Generator, draws: int) -> tuple[Floats, Floats]:
    """One site's value in every run: as measured, shape (runs,), and in every draw, shape (draws, runs).

    A resample is a vector of how often each patient was drawn, so that all draws are one matrix product. A draw that
    misses all samples of one run (seeds with test sets of their own) leaves that run at its measured value.
    """
    patients, sums, counts = _totals(runs, site)
    point = _class_mean(sums.sum(axis=0), counts.sum(axis=0))
    block = max(1, BLOCK // patients)
    tables = []
    for start in range(0, draws, block):
        size = min(block, draws - start)
        drawn = rng.multinomial(patients, np.full(patients, 1 / patients), size=size).astype(np.float64)
        tables.append(_class_mean(np.tensordot(drawn, sums, axes=1), np.tensordot(drawn, counts, axes=1)))
    table = np.concatenate(tables)
    return point, np.where(np.isnan(table), point, table)


def _totals(runs: Sequence[Scores], site: str) -> tuple[int, Floats, Floats]:
    """(patients, sums, counts): values summed and samples counted, both of shape (patients, runs, classes)."""
    rows = [
        (at, value, *_about(run, site, sample))
        for at, run in enumerate(runs)
        for sample, value in run.sites[site].items()
    ]
    at, values, names, labels = zip(*rows, strict=True)
    patients, drawn_with = np.unique(names, return_inverse=True)
    classes, label = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(patients), len(runs), len(classes)))
    counts = np.zeros_like(sums)
    np.add.at(sums, (drawn_with, at, label), values)
    np.add.at(counts, (drawn_with, at, label), 1.0)
    return len(patients), sums, counts


def _class_mean(sums: Floats, counts: Floats) -> Floats:
    """Mean over the classes drawn of the mean in the class; NaN where nothing was drawn. The last axis is classes."""
    drawn = counts > 0
    recalls = np.divide(sums, counts, out=np.zeros_like(sums), where=drawn)
    number = drawn.sum(axis=-1)
    means = np.full(number.shape, np.nan)
    np.divide(recalls.sum(axis=-1), number, out=means, where=number > 0)
    return means


def _per_patient(runs: Sequence[Scores], site: str) -> Floats:
    """Mean over samples and seeds of every patient (or sample), in the order of their names."""
    _, sums, counts = _totals(runs, site)
    return np.asarray(sums.sum(axis=(1, 2)) / counts.sum(axis=(1, 2)), dtype=np.float64)


def _about(run: Scores, site: str, sample: str) -> tuple[str, int]:
    """(patient, class) of a sample; without patients each sample stands for itself."""
    return run.patients[site][sample] if run.patients else sample, run.labels[site][sample] if run.labels else 0


def _ordered(runs: Sequence[Scores]) -> list[Scores]:
    """Runs by seed, after the checks that every run is comparable with the next."""
    if not runs:
        raise errors.DataError("an arm without runs has no mean; give at least one run")
    seeds = [run.seed for run in runs]
    if len(set(seeds)) != len(seeds):
        raise errors.DataError(f"arm '{runs[0].arm}' has seeds {sorted(seeds)}; every run needs its own seed")
    for run in runs:
        if run.sites.keys() != runs[0].sites.keys():
            raise errors.DataError(
                f"arm '{run.arm}': seed {run.seed} has the sites {', '.join(sorted(run.sites))}, seed {seeds[0]} "
                f"{', '.join(sorted(runs[0].sites))}; compare runs of one experiment"
            )
    return sorted(runs, key=lambda run: run.seed)


def _check_pairs(first: Sequence[Scores], second: Sequence[Scores]) -> None:
    """Both arms must have tested the same samples, site by site and seed by seed."""
    left, right = _ordered(first), _ordered(second)
    names = f"'{left[0].arm}' and '{right[0].arm}'"
    if [run.seed for run in left] != [run.seed for run in right]:
        raise errors.DataError(f"arms {names} have different seeds; compare them on the seeds both have")
    for one, other in zip(left, right, strict=True):
        if one.sites.keys() != other.sites.keys():
            raise errors.DataError(
                f"arms {names}, seed {one.seed}: different sites; compare them on the sites both have"
            )
        for site in one.sites:
            tested, again = ({at: _about(run, site, at) for at in run.sites[site]} for run in (one, other))
            if tested != again:
                raise errors.DataError(
                    f"arms {names}, seed {one.seed}: site '{site}' was tested on different samples ({len(tested)} and "
                    f"{len(again)}, or other labels or patients); compare arms tested on one split"
                )


def _bounds(values: Floats, level: float) -> tuple[float, float]:
    """Lower and upper percentile that enclose ``level`` of the draws."""
    if not 0 < level < 1:
        raise errors.DataError(f"level is {level}; a confidence level lies between 0 and 1, for example 0.95")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
