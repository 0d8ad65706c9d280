"""A lower bound of epsilon from which units an attacker tells apart: one-run auditing. NumPy and SciPy alone.

Each of m units (canaries) is in the data or not, by a fair coin of its own. An attacker sees what was released, gives
each unit a score, and guesses: the highest are in, the lowest are out, of the others he says nothing. Under
(epsilon, delta)-differential privacy the number of right guesses is hardly above a binomial number of chance
e^epsilon / (1 + e^epsilon); more of them refute that epsilon, with a confidence.

Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, theorem 5.2, corollary
    5.4 and algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedvfm import errors

Scores = NDArray[np.float64]
Coins = NDArray[np.bool_]

SHARES = (0.25, 0.5, 1.0)
"""How many units are guessed at. Each share is tried, at a confidence that holds for all of them together."""
LEAST_CANARIES = 10
_MOST, _HALVINGS = 64.0, 24


@dataclass(frozen=True)
class LowerBound:
    """What an attack shows of epsilon.

    Attributes:
        epsilon: at least this, at ``delta``, with ``confidence``; 0 where nothing is shown.
        delta: the delta.
        confidence: chance, over coins and noise, that a bound so made is below the true epsilon.
        canaries: units with a coin.
        guesses: units that were guessed at, in the best of the tries.
        right: guesses that were right.
        most: what the bound would be if all guesses had been right: with so few canaries no attack shows more.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    guesses: int
    right: int
    most: float


def bound(scores: Scores, coins: Coins, delta: float, confidence: float = 0.95) -> LowerBound:
    """The lower bound of epsilon that an attack's scores show.

    Args:
        scores: of each unit; the higher, the more likely it was in the data. They must not be made from the coins.
        coins: whether it was. Each fair, and independent of the others.
        delta: that goes with epsilon.
        confidence: above 0 and below 1.

    Shapes: scores and coins (m,).

    Raises:
        ConfigError: if confidence or delta is not between 0 and 1.
        DataError: if there are fewer than ``LEAST_CANARIES`` units, or a score is not finite.
    """
    wrong = [
        f"{name} {value:g}: give a number above 0 and below 1"
        for name, value in (("confidence", confidence), ("delta", delta))
        if not 0 < value < 1
    ]
    if wrong:
        raise errors.ConfigError("privacy audit", wrong)
    units = len(coins)
    if units < LEAST_CANARIES or scores.shape != coins.shape or not np.isfinite(scores).all():
        raise errors.DataError(
            f"privacy audit: {units} units with a coin and {np.isfinite(scores).sum()} finite scores; at least "
            f"{LEAST_CANARIES} units are needed, each with one. Bring more units, or more --runs"
        )
    chance = (1 - confidence) / len(SHARES)
    tries = [(guesses, right_guesses(scores, coins, guesses)) for guesses in (round(units * share) for share in SHARES)]
    shown = [(least_epsilon(units, guesses, right, delta, chance), guesses, right) for guesses, right in tries]
    epsilon, guesses, right = max(shown)
    most = max(least_epsilon(units, guesses, guesses, delta, chance) for guesses, _ in tries)
    return LowerBound(epsilon, delta, confidence, units, guesses, right, most)


def right_guesses(scores: Scores, coins: Coins, guesses: int) -> int:
    """How many are right where the upper half of ``guesses`` is called in, and the lower half out.

    Equal scores stand in the order of the units, which knows nothing of the coins.
    """
    order = np.argsort(scores, kind="stable")
    low = guesses // 2
    called_in, called_out = order[len(order) - (guesses - low) :], order[:low]
    return int(coins[called_in].sum() + (~coins[called_out]).sum())


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The chance, at most, of so many right guesses or more against an (epsilon, delta)-private mechanism.

    With f(v) = P[Binomial(guesses, e^epsilon / (1 + e^epsilon)) >= v] it is
    ``f(v) + 2 m delta max_i (f(v - i) - f(v)) / i``, i from 1 to v, for m canaries.

    Source: Steinke et al. 2023, theorem 5.2.
    """
    chance = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, guesses, chance))
    if right < 1:
        return 1.0
    steps = np.arange(1, right + 1)
    more = np.cumsum(stats.binom.pmf(right - steps, guesses, chance)) / steps
    return min(1.0, tail + 2 * canaries * delta * float(more.max()))


def least_epsilon(canaries: int, guesses: int, right: int, delta: float, chance: float) -> float:
    """The largest epsilon that so many right guesses refute at error ``chance``; 0 where they refute none.

    Whoever refutes an epsilon refutes all below it, as what is private with those is private with this one.
    """
    if p_value(canaries, guesses, right, 0.0, delta) > chance:
        return 0.0
    low, high = 0.0, _MOST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) <= chance:
            low = middle
        else:
            high = middle
    return low
