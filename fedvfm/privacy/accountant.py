"""From events to epsilon, and from epsilon to noise. Every epsilon here is an upper bound.

"rdp" is ours (:mod:`fedvfm.privacy.rdp`): held equal to Opacus's by test, and never above dp-accounting's, which sums
absolute values where the terms of a fractional order alternate. "pld" is the privacy loss distribution of dp-accounting
(Doroshenko et al., "Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions", PETS 2022):
tighter, about a second a call. Neither loads torch, so both ends count alike. Events of different noise, rate or length
compose.
"""

from __future__ import annotations

import functools
import itertools
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

Curve = tuple[tuple[float, float, int, bool], ...]
"""(sample rate, noise multiplier, steps, shared) of what is composed: sorted, each but for its steps once.

``shared``: the noise is a sum of the sites' discrete Gaussian parts. RDP alone bounds that: no proof says that its
privacy loss is that of a Gaussian at every point, which "pld" takes it for.
"""

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
    return joined(steps(event.sample_rate, event.noise_multiplier, event.steps, event.shared) for event in events)


def steps(rate: float, noise_multiplier: float, number: int, shared: bool = False) -> Curve:
    """So many steps of one kind.

    Args:
        rate: chance of a unit to be in one.
        noise_multiplier: of the noise in one.
        number: of steps.
        shared: see :data:`Curve`.
    """
    return ((rate, noise_multiplier, number, shared),)


def joined(curves: Iterable[Curve]) -> Curve:
    """Composition of what was composed before."""
    total: dict[tuple[float, float, bool], int] = {}
    for rate, noise, number, shared in itertools.chain.from_iterable(curves):
        total[rate, noise, shared] = total.get((rate, noise, shared), 0) + number
    return tuple((rate, noise, total[rate, noise, shared], shared) for rate, noise, shared in sorted(total))


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
    for rate, noise, number, shared in spent:
        with np.errstate(over="ignore"):  # infinite, as it should be
            divergences += number * rdp.divergence(rate, noise, summed=shared)
    value, order = rdp.epsilon(divergences, delta)
    return Epsilon(value, delta, "rdp", order)


@functools.lru_cache(maxsize=1000)
def _pld(spent: Curve, delta: float) -> float | None:
    """The pessimistic estimate of dp-accounting; None where its numbers do not work out, which RDP then bounds.

    None too where noise is shared; see :data:`Curve`.
    """
    if any(shared for _, _, _, shared in spent):
        return None
    import dp_accounting
    from dp_accounting import pld

    try:
        composed = pld.PLDAccountant()
        for rate, noise, number, _ in spent:
            step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
            composed.compose(step, number)
        epsilon = float(composed.get_epsilon(delta))
    except (RuntimeError, ValueError, MemoryError, OverflowError, ZeroDivisionError):
        return None
    return epsilon if math.isfinite(epsilon) and epsilon > 0 else None


def noise(
    wanted: float,
    delta: float,
    sample_rate: float,
    number: int,
    accountant: str = "rdp",
    before: Curve = (),
    shared: bool = False,
) -> float | None:
    """The least noise multiplier with which ``number`` steps bring epsilon to at most ``wanted``; None if none does.

    None is below ``privacy_config.LEAST_NOISE``, whatever is wanted.

    Args:
        wanted: epsilon, what was spent before included.
        delta: the delta.
        sample_rate: chance of a unit to be in a step's batch.
        number: of steps that are still to come.
        accountant: see :func:`epsilon`.
        before: what was spent already.
        shared: see :data:`Curve`.
    """

    def holds(candidate: float) -> bool:
        more = steps(sample_rate, candidate, number, shared)
        return epsilon(joined([before, more]), delta, accountant).value <= wanted

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
