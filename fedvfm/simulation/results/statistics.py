"""Confidence intervals and paired tests over samples, sites and seeds.

One *arm* (federated, local-only, ...) is a list of :class:`Scores`, one a seed. The statistic is always the macro mean:
per sample, then per site, then the mean over sites, then over seeds. Intervals are percentiles of a hierarchical
bootstrap; the two arms of a comparison share every draw, sample by sample, so what they have in common cancels.

What is resampled, with replacement:

* seeds: one draw of runs for all sites. With few seeds the spread is understated, with one it is not seen at all.
* samples, inside a site and apart from other sites, as :mod:`fedvfm.report.bootstrap` draws them: whole patients
  where patients are given, and class by class where there are classes.
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
from fedvfm.report import bootstrap

DRAWS = bootstrap.DRAWS
SHOWN = 5

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
        sites: dict[str, Mapping[str, float]] = {}
        labels: dict[str, Mapping[str, int]] = {}
        for site, (ids, table) in tables.items():
            try:
                own = bootstrap.SiteScores.from_table(ids, table, column)
            except errors.DataError as error:
                raise errors.DataError(f"site '{site}': {error}") from error
            sites[site] = own.values
            labels |= {site: own.labels} if own.labels is not None else {}
        return cls(arm, seed, sites, labels or None, patients)

    def at(self, site: str) -> bootstrap.SiteScores:
        """The scores of one site."""
        labels = None if self.labels is None else self.labels[site]
        return bootstrap.SiteScores(self.sites[site], labels, None if self.patients is None else self.patients[site])


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
    return Interval(float(means[0]), *bootstrap.bounds(table[0], level))


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
    return Difference(float(means[0] - means[1]), *bootstrap.bounds(table[0] - table[1], level))


def by_site(
    first: Sequence[Scores],
    second: Sequence[Scores],
    *,
    rng: Generator,
    draws: int = DRAWS,
    level: float = 0.95,
) -> dict[str, bootstrap.Difference]:
    """``first`` minus ``second`` at every site with its interval: does this hospital gain, lose, or can none tell?

    Each interval stands for its site alone: of twenty sites without a difference about one lies outside by chance.

    Raises:
        DataError: as :func:`paired`.
    """
    _check_pairs(first, second)
    ours, theirs = _ordered(first), _ordered(second)
    return {
        site: bootstrap.difference(
            [run.at(site) for run in ours], [run.at(site) for run in theirs], rng=rng, draws=draws, level=level
        )
        for site in sorted(ours[0].sites)
    }


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


@dataclass(frozen=True, slots=True)
class Basis:
    """What an interval may rest on.

    Attributes:
        resample_sites: whether sites are drawn too: the units of the interval are then the sites.
        few: sites with under ten independent units, and how many units they have.
        reason: why there may be no interval, empty where there may.
    """

    resample_sites: bool
    few: Mapping[str, int]
    reason: str = ""


def basis(runs: Sequence[Scores]) -> Basis:
    """Ten independent units (patients, else samples) at every site; or else ten sites, which are then drawn as well.

    What a site of five patients contributes to the spread is next to unknown. With ten sites or more their own spread
    says it, and the interval is one about hospitals like these.

    Raises:
        DataError: if there is no run, or runs have different sites.
    """
    runs = _ordered(runs)
    every = {
        site: len({run.at(site).about(sample)[0] for run in runs for sample in run.sites[site]})
        for site in sorted(runs[0].sites)
    }
    few = {site: units for site, units in every.items() if units < bootstrap.LEAST_UNITS}
    enough = not few or len(every) >= bootstrap.LEAST_UNITS
    return Basis(bool(few) and enough, few, "" if enough else few_units(few))


def few_units(few: Mapping[str, int]) -> str:
    """The sentence about sites with too few units."""
    shown = [f"{site} ({units})" for site, units in list(few.items())[:SHOWN]]
    more = f" and {len(few) - SHOWN} more" if len(few) > SHOWN else ""
    return f"under {bootstrap.LEAST_UNITS} independent test units at {', '.join(shown)}{more}"


def _bootstrap(arms: Sequence[Sequence[Scores]], rng: Generator, draws: int, resample: bool) -> tuple[Floats, Floats]:
    """(means, table): the macro mean of every arm, shape (arms,), and of every draw, shape (arms, draws)."""
    arms = [_ordered(runs) for runs in arms]
    sites, seeds = sorted(arms[0][0].sites), len(arms[0])
    every = [run for runs in arms for run in runs]
    columns = [bootstrap.resample([run.at(site) for run in every], rng, draws) for site in sites]
    points = np.stack([column.point for column in columns], axis=-1).reshape(len(arms), seeds, len(sites))
    table = np.stack([column.table for column in columns], axis=-1).reshape(draws, len(arms), seeds, len(sites))
    runs_drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    over_seeds = np.zeros((len(arms), draws))
    for slot in range(len(sites)):
        picked = rng.integers(len(sites), size=draws) if resample else np.full(draws, slot)
        # Every slot reads other rows of the table, so that a site picked twice brings two resamples of its samples.
        row = (np.arange(draws) + slot * resample) % draws
        over_seeds += np.einsum("das,ds->ad", table[row, :, :, picked], runs_drawn)
    return points.mean(axis=(1, 2)), over_seeds / len(sites)


def _per_patient(runs: Sequence[Scores], site: str) -> Floats:
    """Mean over samples and seeds of every patient (or sample), in the order of their names."""
    sums, counts = bootstrap.totals([run.at(site) for run in runs])
    return np.asarray(sums.sum(axis=(1, 2)) / counts.sum(axis=(1, 2)), dtype=np.float64)


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
            try:
                bootstrap.check_pair(one.at(site), other.at(site))
            except errors.DataError as error:
                raise errors.DataError(f"arms {names}, seed {one.seed}, site '{site}': {error}") from error
