"""The ``classical`` baseline of prognosis: Cox's regression on what the frozen backbone makes of each case.

All training cases in one place, no adapter, no rounds, and no random number, as
:mod:`fedvfm.simulation.linear_probe` is for classes. The baseline hazard is made of single event times, which hospitals
would not share: it is there in a simulation alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedvfm.simulation import linear_probe

PENALTY = 1.0
STEPS = 1000
"""Iterations of L-BFGS at most."""
HIGHEST = 700.0
"""Of a log-risk; the exponential of more is no finite number."""

Floats = NDArray[np.float64]
Events = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CoxRegression:
    """A fitted Cox regression.

    Attributes:
        centre: mean of the training features, shape (D,).
        spread: their standard deviation, 1 where it is 0; shape (D,).
        weight: shape (D,).
        times: of the training cases, each once, ascending; shape (T,).
        hazard: cumulative baseline hazard at these times, that of a case with log-risk 0; shape (T,).
    """

    centre: Floats
    spread: Floats
    weight: Floats
    times: Floats
    hazard: Floats

    def log_risk(self, features: Floats) -> float:
        """Logarithm of the hazard ratio against the mean training case. Shapes: (D,)."""
        return float(self.weight @ ((features - self.centre) / self.spread))

    def survival(self, features: Floats, points: Floats) -> Floats:
        """Chance of no event up to each point in time. Shapes: features (D,), points (J,) -> (J,)."""
        steps = np.concatenate([[0.0], self.hazard])[np.searchsorted(self.times, points, side="right")]
        return np.asarray(np.exp(-steps * np.exp(min(self.log_risk(features), HIGHEST))), dtype=np.float64)

    def describe(self) -> str:
        """What was fitted."""
        return (
            "Cox regression on the frozen backbone's pooled features of all training cases in one place, standardised, "
            f"ties by Efron, L2 with weight {PENALTY:g}, baseline hazard by Breslow"
        )


class _AtRisk:
    """Cases by falling time, so that a risk set is a beginning of them, and their groups of one time.

    Attributes:
        order: numbers of the cases.
        ends: for each distinct time, falling, how many cases have it or a later one.
        group: of each ordered case, the number of its time.
        event: of each ordered case.
        place: of each ordered case with an event, how many events of its time stand before it, as a share of all of
            them; 0 of the others.
    """

    def __init__(self, time: Floats, event: Events) -> None:
        self.order = np.argsort(-time, kind="stable")
        falling, self.event = time[self.order], event[self.order]
        _, first, counts = np.unique(-falling, return_index=True, return_counts=True)
        self.ends, self.group = first + counts, np.repeat(np.arange(len(counts)), counts)
        before: Ints = np.cumsum(self.event) - self.event
        events = np.add.reduceat(self.event.astype(np.int64), first)
        place = (before - before[first][self.group]) / np.maximum(events[self.group], 1)
        self.place: Floats = np.where(self.event, place, 0.0)

    def sums(self, values: Floats, *, tied: bool) -> Floats:
        """Of each ordered case with an event the sum over its risk set; ``tied``: over the events of its time alone.

        Shapes: values (N, ...) as ordered -> (events, ...).
        """
        if tied:
            own = np.zeros((len(self.ends), *values.shape[1:]))
            np.add.at(own, self.group[self.event], values[self.event])
        else:
            own = np.cumsum(values, axis=0)[self.ends - 1]
        return np.asarray(own[self.group[self.event]])


def fit(features: Floats, time: Floats, event: Events) -> CoxRegression:
    """Minimise minus the logarithm of the partial likelihood with an L2 penalty.

    The objective is scikit-survival's ``CoxPHSurvivalAnalysis(alpha=1, ties="efron")`` on standardised features: the
    sum over events, plus ``|w|^2 / 2``.

    Shapes: features (N, D), time and event (N,).
    Source: Cox, "Regression models and life-tables", 1972; Efron, "The efficiency of Cox's likelihood function for
        censored data", 1977; Breslow's discussion of the first.
    """
    from scipy import optimize

    inputs, centre, spread = linear_probe.standardised(features)
    at_risk = _AtRisk(time, event)
    ordered = inputs[at_risk.order]
    best = optimize.minimize(
        lambda weight: _objective(weight, ordered, at_risk),
        np.zeros(inputs.shape[1]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": STEPS, "ftol": 1e-12, "gtol": 1e-7},
    )
    weight = np.asarray(best.x, dtype=np.float64)
    times = np.unique(time)
    ratio = np.exp(inputs @ weight)
    left = np.array([ratio[time >= when].sum() for when in times])
    happened = np.array([(event & (time == when)).sum() for when in times])
    return CoxRegression(centre, spread, weight, times, np.cumsum(happened / left))


def _objective(weight: Floats, ordered: Floats, at_risk: _AtRisk) -> tuple[float, Floats]:
    """Value and gradient; of the l-th of d tied events the risk set is without the share l / d of each of them."""
    log_risk = ordered @ weight
    most = log_risk.max(initial=0.0)
    ratio = np.exp(log_risk - most)
    share = at_risk.place[at_risk.event]
    total = at_risk.sums(ratio, tied=False) - share * at_risk.sums(ratio, tied=True)
    value = (np.log(total) + most - log_risk[at_risk.event]).sum() + weight @ weight / 2 * PENALTY
    # What each case adds to the gradient of the logarithms: its ratio times the sum of 1 / total over its risk sets.
    inverse, tied = np.zeros(len(at_risk.ends)), np.zeros(len(at_risk.ends))
    np.add.at(inverse, at_risk.group[at_risk.event], 1 / total)
    np.add.at(tied, at_risk.group[at_risk.event], share / total)
    later = np.cumsum(inverse[::-1])[::-1]
    each = ratio * (later[at_risk.group] - at_risk.event * tied[at_risk.group])
    gradient = ordered.T @ (each - at_risk.event) + PENALTY * weight
    return float(value), np.asarray(gradient, dtype=np.float64)
