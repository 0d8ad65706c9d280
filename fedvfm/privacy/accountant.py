"""From events to epsilon, and from epsilon to noise. Every epsilon here is an upper bound.

"rdp" is ours (:mod:`fedvfm.privacy.rdp`, held equal to Opacus's by test), so that both ends count alike and nothing
loads torch. "prv" is Opacus's PRV accountant (Gopi, Lee, Wutschitz, "Numerical Composition of Differential Privacy",
NeurIPS 2021): tighter, some seconds a call, and it loads torch. Events of different noise, rate or length compose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedvfm import errors
from fedvfm.config import privacy
from fedvfm.privacy import base, rdp

KINDS = ("rdp", "prv")
MOST_NOISE = 1e6
PRECISION = 1000
"""Noise multipliers are found to a thousandth, rounded up."""

Curve = tuple[tuple[float, float, int], ...]
"""(sample rate, noise multiplier, steps) of what is composed: sorted, no pair of the first two twice."""

# Beyond these PRV's grid grows past memory or below the precision of floating point; RDP still bounds.
_LARGEST_PRV, _LEAST_DELTA = 50.0, 1e-10


@dataclass(frozen=True)
class Epsilon:
    """What was spent, as a bound that holds.

    Attributes:
        value: epsilon at ``delta``; infinite where nothing is bounded.
        delta: the delta.
        accountant: "rdp" or "prv", whichever gave the bound.
        order: of RDP; NaN for "prv" and where nothing was spent.
    """

    value: float
    delta: float
    accountant: str = "rdp"
    order: float = math.nan


def curve(events: Iterable[base.PrivacyEvent]) -> Curve:
    """What these events come to; their order does not matter."""
    return joined(((one.sample_rate, one.noise_multiplier, one.steps),) for one in events)


def joined(curves: Iterable[Curve]) -> Curve:
    """Composition of what was composed before."""
    total: dict[tuple[float, float], int] = {}
    for one in curves:
        for rate, noise, steps in one:
            total[rate, noise] = total.get((rate, noise), 0) + steps
    return tuple((*pair, total[pair]) for pair in sorted(total))


def epsilon(spent: Curve, delta: float, accountant: str = "rdp") -> Epsilon:
    """Epsilon of a composition.

    Raises:
        ValueError: if delta is not in (0, 1), or there is no such accountant.
        MissingExtra: for "prv" where Opacus is not installed.
    """
    if accountant not in KINDS:
        raise ValueError(f"accountant '{accountant}' is none of {', '.join(KINDS)}")
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} is not between 0 and 1")
    if not spent:
        return Epsilon(0.0, delta, accountant)
    bound = _rdp(spent, delta)
    if accountant == "rdp" or not bound.value < _LARGEST_PRV or delta < _LEAST_DELTA:
        return bound
    tight = _prv(spent, delta)
    return bound if tight is None or bound.value <= tight else Epsilon(tight, delta, "prv")


@functools.lru_cache(maxsize=1000)
def _rdp(spent: Curve, delta: float) -> Epsilon:
    divergences = np.zeros(len(rdp.ORDERS))
    for rate, noise, steps in spent:
        with np.errstate(over="ignore"):  # infinite, as it should be
            divergences += steps * rdp.divergence(rate, noise)
    value, order = rdp.epsilon(divergences, delta)
    return Epsilon(value, delta, "rdp", order)


@functools.lru_cache(maxsize=1000)
def _prv(spent: Curve, delta: float) -> float | None:
    """The upper bound of Opacus's PRV accountant; None where its numbers do not work out, which RDP then bounds."""
    try:
        from opacus import accountants
    except ModuleNotFoundError as error:
        raise errors.MissingExtra(
            f"accountant 'prv' needs {error.name}, which is not installed here. Run: pip install opacus, or use 'rdp'"
        ) from None
    made = accountants.PRVAccountant()
    made.history = [(noise, rate, steps) for rate, noise, steps in spent]
    try:
        with np.errstate(all="ignore"):
            found = float(made.get_epsilon(delta, eps_error=0.01))
    except (RuntimeError, ValueError, MemoryError, OverflowError, ZeroDivisionError):
        return None
    return found if math.isfinite(found) and found > 0 else None


def noise(
    wanted: float, delta: float, sample_rate: float, steps: int, accountant: str = "rdp", before: Curve = ()
) -> float | None:
    """The least noise multiplier with which ``steps`` more bring epsilon to at most ``wanted``; None if none does.

    None is below ``privacy_config.LEAST_NOISE``, whatever is wanted.

    Args:
        wanted: epsilon, what was spent before included.
        delta: the delta.
        sample_rate: chance of a unit to be in a step's batch.
        steps: that are still to come.
        accountant: see :func:`epsilon`.
        before: what was spent already.
    """

    def holds(candidate: float) -> bool:
        return epsilon(joined([before, ((sample_rate, candidate, steps),)]), delta, accountant).value <= wanted

    if not holds(MOST_NOISE):
        return None
    high = 1.0
    while not holds(high):
        high *= 2
    while high > 1 / 64 and holds(high / 2):
        high /= 2
    low = high / 2
    while high - low > 0.5 / PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return max(privacy.LEAST_NOISE, math.ceil(high * PRECISION) / PRECISION)
