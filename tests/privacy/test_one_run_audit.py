"""Below the epsilon of mechanisms where it is known, as often as stated, and far above a claim that is false."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fedvfm import errors
from fedvfm.privacy import one_run_audit
from tests.privacy import gaussian

DELTA = 1e-5


def coins(rng: np.random.Generator, count: int) -> one_run_audit.Coins:
    return rng.integers(0, 2, count).astype(bool)


def test_the_p_value_by_hand() -> None:
    """One canary and one guess: f(1) = q, f(0) = 1. Of two right in three: q^3 + 3 q^2 (1 - q) at delta 0."""
    q = math.e / (1 + math.e)
    assert one_run_audit.p_value(1, 1, 1, 1.0, 0.0) == pytest.approx(q)
    assert one_run_audit.p_value(1, 1, 1, 1.0, 0.01) == pytest.approx(q + 2 * 0.01 * (1 - q))
    assert one_run_audit.p_value(3, 3, 2, 1.0, 0.0) == pytest.approx(q**3 + 3 * q**2 * (1 - q))
    best = max(3 * q * (1 - q) ** 2, (1 - q**3 - 3 * q**2 * (1 - q)) / 2)
    assert one_run_audit.p_value(9, 3, 2, 1.0, 0.01) == pytest.approx(q**3 + 3 * q**2 * (1 - q) + 18 * 0.01 * best)
    assert one_run_audit.p_value(5, 5, 0, 1.0, 0.0) == 1.0


def test_the_p_value_falls_with_right_guesses_and_rises_with_epsilon() -> None:
    values = [one_run_audit.p_value(40, 40, right, 0.5, DELTA) for right in range(41)]
    assert values == sorted(values, reverse=True)
    rising = [one_run_audit.p_value(40, 40, 36, epsilon, DELTA) for epsilon in np.linspace(0, 6, 30)]
    assert rising == sorted(rising)


def test_the_least_epsilon_is_where_the_p_value_is_the_chance() -> None:
    epsilon = one_run_audit.least_epsilon(100, 100, 90, DELTA, 0.05)
    assert one_run_audit.p_value(100, 100, 90, epsilon, DELTA) == pytest.approx(0.05, rel=1e-4)
    assert one_run_audit.least_epsilon(100, 100, 50, DELTA, 0.05) == 0.0
    # All right without delta: q^r = chance.
    alone = one_run_audit.least_epsilon(20, 20, 20, 0.0, 0.05)
    assert math.exp(alone) / (1 + math.exp(alone)) == pytest.approx(0.05 ** (1 / 20), rel=1e-5)


def test_no_deterministic_attack_on_randomised_response_beats_the_p_value() -> None:
    """All outcomes of three coins: right guesses are exactly binomial, so the p-value is reached, never passed."""
    epsilon = 0.7
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    for right in range(4):
        chance = sum(
            math.prod(q if hit else 1 - q for hit in hits)
            for hits in itertools.product((True, False), repeat=3)
            if sum(hits) >= right
        )
        assert one_run_audit.p_value(3, 3, right, epsilon, 0.0) == pytest.approx(chance)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_is_bounded_from_below_as_often_as_stated_and_closely(epsilon: float) -> None:
    rng, bounds = np.random.default_rng(1), []
    for _ in range(40):
        truth = coins(rng, 300)
        answers = truth ^ (rng.random(300) > 1 / (1 + math.exp(-epsilon)))
        bounds.append(one_run_audit.bound(answers + 0.5 * rng.random(300), truth, DELTA).epsilon)
    above = sum(value > epsilon for value in bounds)
    assert above <= stats.binom.ppf(0.999, 40, 0.05)
    assert 0.5 * epsilon < float(np.median(bounds)) <= epsilon


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_the_gaussian_mechanism_is_bounded_from_below_as_often_as_stated(sigma: float) -> None:
    """Each coin adds a unit vector of its own to a sum with noise: the score of a coin is its coordinate."""
    epsilon, rng, bounds = gaussian.epsilon(sigma, DELTA), np.random.default_rng(2), []
    for _ in range(40):
        truth = coins(rng, 300)
        bounds.append(one_run_audit.bound(truth + rng.normal(0, sigma, 300), truth, DELTA).epsilon)
    assert sum(value > epsilon for value in bounds) <= stats.binom.ppf(0.999, 40, 0.05)
    if sigma <= 1:
        assert float(np.median(bounds)) > 0.1 * epsilon, "not a bound that says nothing"


def test_a_mechanism_without_its_noise_is_far_above_its_claim() -> None:
    rng = np.random.default_rng(3)
    truth = coins(rng, 400)
    shown = one_run_audit.bound(truth + rng.normal(0, 1e-6, 400), truth, DELTA)
    claimed = gaussian.epsilon(4.0, DELTA)
    assert shown.most >= shown.epsilon > 3 * claimed
    half = np.arange(400) < 200  # as many in as out: then every guess is right
    assert one_run_audit.bound(half + 0.0, half, DELTA).epsilon == pytest.approx(shown.most)


def test_guesses_come_from_both_ends_alone() -> None:
    scores = np.array([5.0, 4.0, 0.1, 0.0, -4.0, -5.0])
    truth = np.array([True, True, False, True, False, False])
    assert one_run_audit.right_guesses(scores, truth, 2) == 2
    assert one_run_audit.right_guesses(scores, truth, 4) == 4
    assert one_run_audit.right_guesses(scores, truth, 6) == 4
    assert one_run_audit.right_guesses(np.zeros(6), truth, 6) == one_run_audit.right_guesses(np.ones(6), truth, 6)


@pytest.mark.parametrize(
    ("scores", "truth", "delta", "confidence", "kind"),
    [
        (np.zeros(9), np.ones(9, bool), DELTA, 0.95, errors.DataError),
        (np.full(20, np.nan), np.ones(20, bool), DELTA, 0.95, errors.DataError),
        (np.zeros(20), np.ones(20, bool), DELTA, 1.0, errors.ConfigError),
        (np.zeros(20), np.ones(20, bool), 0.0, 0.95, errors.ConfigError),
    ],
)
def test_what_shows_nothing_is_refused(
    scores: one_run_audit.Scores,
    truth: one_run_audit.Coins,
    delta: float,
    confidence: float,
    kind: type[errors.FedvfmError],
) -> None:
    with pytest.raises(kind):
        one_run_audit.bound(scores, truth, delta, confidence)
