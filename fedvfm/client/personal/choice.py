"""Which adapter a site uses: chosen by its own validation patients, with a guard for few of them. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedvfm.report import quantity

GLOBAL, PARTIAL, PERSONAL, ALONE = "global", "partial", "personal", "local-only"
"""``partial``: the global adapter with the site's own personal arrays, where the recipe has such a kind."""


def mix_name(share: float) -> str:
    """What a mix is called, by the personal adapter's share in it."""
    return f"mix {share:.2f}"


@dataclass(frozen=True, slots=True)
class Case:
    """One validation sample under one adapter.

    Attributes:
        unit: the patient, or the sample itself where none is known.
        value: higher is better, in [0, 1].
        stratum: its class in classification; a mean is then the mean over classes.
    """

    unit: str
    value: float
    stratum: int = 0


def cases(
    ids: Sequence[str], columns: Mapping[str, Sequence[float]], primary: str, units: Mapping[str, str]
) -> list[Case]:
    """Cases of an evaluation's values of single samples.

    In classification a value is the probability given to the true class: few samples that are right or wrong tie.

    Args:
        ids: of the samples.
        columns: their values, as a metric set has them.
        primary: the column that counts, where there are no labels.
        units: sample -> patient.
    """
    labels = [int(label) for label in columns["label"]] if "label" in columns else [0] * len(ids)
    if "label" in columns:
        values = [columns[f"probability_{label}"][at] for at, label in enumerate(labels)]
    else:
        values = list(columns[primary]) if ids else []
    return [Case(units.get(name, name), float(v), k) for name, v, k in zip(ids, values, labels, strict=True)]


@dataclass(frozen=True, slots=True)
class Gain:
    """Mean gain over another adapter on the same samples, its standard error (infinite under two units), and units."""

    mean: float
    error: float
    units: int


def gain(first: Sequence[Case], second: Sequence[Case]) -> Gain:
    """``first`` minus ``second``, paired sample by sample: the mean over units, within each class, then over classes.

    The error is that of a sum of independent units: n / (n - 1) times the sum of squared deviations of what each adds.
    """
    parts: dict[str, float] = {}
    strata = sorted({case.stratum for case in second})
    for stratum in strata:
        own = [(a.unit, a.value - b.value) for a, b in zip(first, second, strict=True) if b.stratum == stratum]
        sizes = {unit: sum(name == unit for name, _ in own) for unit, _ in own}
        for unit, difference in own:
            parts[unit] = parts.get(unit, 0.0) + difference / (sizes[unit] * len(sizes) * len(strata))
    added, number = np.array(list(parts.values())), len(parts)
    if number < 2:
        return Gain(float(added.sum()), math.inf, number)
    spread = float(np.square(added - added.mean()).sum())
    return Gain(float(added.sum()), math.sqrt(number / (number - 1) * spread), number)


FEWEST = 2
"""Validation units under which nothing can be told of a difference's error."""
FEW = 3
"""Validation units under which a choice says on how few it rests, and :data:`GUARD` holds."""
GUARD = 0.05
"""So far below the global adapter may lie what fewer than :data:`FEW` units choose, on these: docs/personal.md."""


@dataclass(frozen=True)
class Choice:
    """The adapter chosen.

    Attributes:
        name: of the candidate.
        reason: "validation", or "few" where there were too few patients to go by.
        units: independent validation units.
        gains: of every candidate over the global adapter.
    """

    name: str
    reason: str
    units: int
    gains: Mapping[str, Gain]

    def to_json(self) -> dict[str, Any]:
        """Plain values; an error that is not finite is None."""
        gains = {
            name: {"mean": over.mean, "error": over.error if math.isfinite(over.error) else None}
            for name, over in self.gains.items()
        }
        return {"name": self.name, "reason": self.reason, "units": self.units, "gains": gains}


PREFERENCE = (mix_name(0.75), PERSONAL, mix_name(0.5), mix_name(0.25), PARTIAL, GLOBAL, ALONE)
"""Where validation does not tell candidates apart, the first of these is taken.

Three quarters of the way lost least of all fixed candidates where two images chose and the third judged, and none at
all where nothing chose (validation images of brain-mri; docs/personal.md).
"""


def choose(seen: Mapping[str, Sequence[Case]]) -> Choice:
    """The first candidate of :data:`PREFERENCE` that validation does not put below the best one.

    Below means: by more than one standard error of the paired difference, widened to Student's t with few patients
    (1.84 errors with two, 1.32 with three, 1.14 with five, 1.0 with many), so that few of them move the choice only
    where they agree. So what is chosen is never below the global adapter, nor below any candidate, by more than that.

    Under :data:`FEW` units it is not below the global adapter by more than :data:`GUARD` either: the error of two says
    little, and one has none. With one the first candidate that this leaves is taken.

    Args:
        seen: candidate -> its cases, the same samples in the same order; the global adapter is among them.

    Source: the one-standard-error rule of Breiman, Friedman, Olshen and Stone, "Classification and Regression Trees",
    1984, section 3.4.3.
    """
    gains = {name: gain(cases, seen[GLOBAL]) for name, cases in seen.items()}
    units = gains[GLOBAL].units
    offered = [name for name in PREFERENCE if name in seen]
    if units < FEW:
        offered = [name for name in offered if gains[name].mean >= -GUARD]
    if units < FEWEST:
        return Choice(offered[0], "few", units, gains)
    best = max(offered, key=lambda name: gains[name].mean)
    for name in offered:
        behind = gain(seen[best], seen[name])
        if behind.mean <= widened(behind.error, units):
            return Choice(name, "validation", units, gains)
    return Choice(best, "validation", units, gains)


def rests_on(units: int) -> str:
    """What a choice by fewer than :data:`FEW` units can promise, for people."""
    if not units:
        return (
            "the choice rests on no validation patient: it is the first of a fixed order, and may be worse than others"
        )
    where = "on it" if units == 1 else "on them"
    return (
        f"the choice rests on {quantity.of(units, 'validation patient')}: {where} it is not below the global adapter "
        f"by more than {GUARD:g}, and of other patients that says little"
    )


def widened(error: float, units: int) -> float:
    """A standard error of ``units`` values as wide as Student's t has it: covers what one error of many does."""
    from scipy import stats

    return float(error * stats.t.ppf(stats.norm.cdf(1.0), units - 1))
