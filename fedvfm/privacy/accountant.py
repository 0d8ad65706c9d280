"""From events to epsilon, and from epsilon to noise. Every epsilon here is an upper bound.

"rdp" is ours (:mod:`fedvfm.privacy.rdp`): held equal to Opacus's by test, and never above dp-accounting's, which sums
absolute values where the terms of a fractional order alternate. "pld" is the privacy loss distribution of dp-accounting
(Doroshenko et al., "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions", PETS 2022):
tighter, about a second a call. Neither loads torch, so both ends count alike. Events of different noise, rate or length
compose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedvfm.config import privacy
from fedvfm.privacy import base, rdp

KINDS = ("rdp", "pld")
MOST_NOISE = 1e6
PRECISION = 1000
"""Noise multipliers are found to a thousandth, rounded up."""

Curve = tuple[tuple[float, float, int], ...]
"""(sample rate, noise multiplier, steps) of what is composed: sorted, no pair of the first two twice."""

# Beyond these the grid of losses grows past memory or below the precision of floating point; RDP still bounds.
_LARGEST_PLD, _LEAST_DELTA = 50.0, 1e-10


@dataclass(frozen=True)
class Epsilon:
    """What was spent, as a bound that holds.

    Attributes:
        value: epsilon at ``delta``; infinite where nothing is bounded.
        delta: the delta.
        accountant: "rdp" or "pld", whichever gave the bound.
        order: of RDP; NaN for "pld" and where nothing was spent.
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
    """
    if accountant not in KINDS:
        raise ValueError(f"accountant '{accountant}' is none of {', '.join(KINDS)}")
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} is not between 0 and 1")
    if not spent:
        return Epsilon(0.0, delta, accountant)
    bound = _rdp(spent, delta)
    if accountant == "rdp" or not bound.value < _LARGEST_PLD or delta < _LEAST_DELTA:
        return bound
    tight = _pld(spent, delta)
    return bound if tight is None or bound.value <= tight else Epsilon(tight, delta, "pld")


@functools.lru_cache(maxsize=1000)
def _rdp(spent: Curve, delta: float) -> Epsilon:
    divergences = np.zeros(len(rdp.ORDERS))
    for rate, noise, steps in spent:
        with np.errstate(over="ignore"):  # infinite, as it should be
            divergences += steps * rdp.divergence(rate, noise)
    value, order = rdp.epsilon(divergences, delta)
    return Epsilon(value, delta, "rdp", order)


@functools.lru_cache(maxsize=1000)
def _pld(spent: Curve, delta: float) -> float | None:
    """The pessimistic estimate of dp-accounting; None where its numbers do not work out, which RDP then bounds."""
    import dp_accounting
    from dp_accounting import pld

    try:
        composed = pld.PLDAccountant()
        for rate, noise, steps in spent:
            step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
            composed.compose(step, steps)
        epsilon = float(composed.get_epsilon(delta))
    except (RuntimeError, ValueError, MemoryError, OverflowError, ZeroDivisionError):
        return None
    return epsilon if math.isfinite(epsilon) and epsilon > 0 else None


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
