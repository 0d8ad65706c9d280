"""The sampler is what it says, number by number, and what a sum of its parts proves is an upper bound."""

from __future__ import annotations

import math

import dp_accounting
import dp_accounting.rdp
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fedvfm.privacy import accountant, rdp
from fedvfm.secure_aggregation import discrete_gaussian

Chances = NDArray[np.float64]
SURE = 1e-4
"""Fixed keys, so a test fails always or never; by chance one in so many samplers that are right would."""


def key(number: int) -> bytes:
    return bytes([number]) * discrete_gaussian.KEY_SIZE


def chances(sigma: int, reach: int) -> Chances:
    """Of each whole number from -reach to reach, by definition."""
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def of_sum(sigma: int, sites: int) -> Chances:
    """Of the sum of so many parts, by convolution."""
    part = total = chances(sigma, 12 * sigma)
    for _ in range(sites - 1):
        total = np.convolve(total, part)
    return total


def counted(drawn: NDArray[np.int64], expected: Chances) -> float:
    """p of a chi-square test; numbers that come less than ten times are one."""
    reach = len(expected) // 2
    seen = np.bincount(drawn + reach, minlength=len(expected)).astype(float)
    often = expected * len(drawn) >= 10
    observed = np.append(seen[often], seen[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * len(drawn)
    if wanted[-1] < 10:
        observed, wanted = np.append(observed[:-2], observed[-2:].sum()), np.append(wanted[:-2], wanted[-2:].sum())
    return float(stats.chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize("sigma", [1, 2, 7, 17])
def test_each_whole_number_comes_as_often_as_it_should(sigma: int) -> None:
    drawn = discrete_gaussian.drawn(key(sigma), sigma, 60_000)
    assert counted(drawn, chances(sigma, 12 * sigma)) > SURE


@pytest.mark.parametrize("sites", [2, 5])
def test_the_sum_of_parts_is_spread_as_the_convolution_says(sites: int) -> None:
    total = np.sum([discrete_gaussian.drawn(key(10 + site), 16, 50_000) for site in range(sites)], axis=0)
    assert counted(total, of_sum(16, sites)) > SURE


def test_of_large_sigma_it_is_the_normal_distribution() -> None:
    sigma = 3 * 2**40 + 1
    parts = [discrete_gaussian.drawn(key(20 + site), sigma, 60_000) for site in range(6)]
    assert min(stats.kstest(part / sigma, "norm").pvalue for part in parts) > SURE
    assert stats.kstest(np.sum(parts, axis=0) / (sigma * math.sqrt(6)), "norm").pvalue > SURE
    assert abs(np.corrcoef(parts)[np.triu_indices(6, 1)]).max() < 5 / math.sqrt(60_000)
    low = np.bincount(np.concatenate(parts) & 7, minlength=8)
    assert stats.chisquare(low).pvalue > SURE, "the low bits are uniform"


def test_a_key_gives_the_same_numbers_and_another_one_others() -> None:
    first, again, other = (discrete_gaussian.drawn(key(number), 1 << 30, 70_000) for number in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not (first == other).any()


@pytest.mark.parametrize("sigma", [0, -1, discrete_gaussian.MOST_SIGMA + 1])
def test_a_parameter_out_of_bounds_draws_nothing(sigma: int) -> None:
    with pytest.raises(ValueError, match="sigma"):
        discrete_gaussian.drawn(key(1), sigma, 1)


def renyi(first: Chances, second: Chances, order: int) -> float:
    """The divergence of two distributions over the same whole numbers."""
    both = (first > 0) & (second > 0)
    terms = order * np.log(first[both]) - (order - 1) * np.log(second[both])
    return float(np.logaddexp.reduce(terms) / (order - 1))


def shifted(sigma: int, sites: int, by: int) -> tuple[Chances, Chances]:
    total = of_sum(sigma, sites)
    return np.append(total, np.zeros(by)), np.append(np.zeros(by), total)


@pytest.mark.parametrize("sites", [1, 2, 5])
@pytest.mark.parametrize(("sigma", "by"), [(1, 1), (2, 3), (16, 16)])
def test_the_divergence_of_a_shifted_sum_is_never_above_the_bound(sigma: int, sites: int, by: int) -> None:
    """Computed number by number; with a sigma of 1 the correction for summing is what makes it hold."""
    bound = discrete_gaussian.spent(sigma, sites, float(by), 1)
    for order in (2, 3, 5, 8):
        exact = renyi(*shifted(sigma, sites, by), order)
        assert exact <= order * bound**2 / 2
        if sigma == 16:
            assert exact > 0.99 * order * bound**2 / 2, "and it is no loose one"


@pytest.mark.parametrize("rate", [0.05, 0.3])
@pytest.mark.parametrize("order", [2, 3, 4, 7])
def test_with_sampling_the_divergence_is_never_above_the_bound_in_either_direction(rate: float, order: int) -> None:
    without, there = shifted(16, 3, 20)
    mixed = (1 - rate) * without + rate * there
    multiplier = 1 / discrete_gaussian.spent(16, 3, 20.0, 1)
    (bound,) = rdp.divergence(rate, multiplier, [order], summed=True)
    assert max(renyi(mixed, without, order), renyi(without, mixed, order)) <= bound * (1 + 1e-9)


def test_between_whole_orders_the_upper_one_counts() -> None:
    assert rdp.divergence(0.1, 1.0, [2.1, 3.0], summed=True).tolist() == [rdp.divergence(0.1, 1.0, [3.0])[0]] * 2
    assert rdp.divergence(1.0, 1.0, [2.5], summed=True) == rdp.divergence(1.0, 1.0, [2.5])


@pytest.mark.parametrize(
    ("multiplier", "sensitivity", "sites", "numbers"),
    [(1.0, 1.0, 2, 1), (0.01, 1.0, 2, 10**6), (4.5, 2.0**40, 5, 10**6), (1e3, 2.0**30 + 0.5, 62, 10**9)],
)
def test_the_least_part_keeps_what_the_multiplier_promises(
    multiplier: float, sensitivity: float, sites: int, numbers: int
) -> None:
    sigma = discrete_gaussian.least_sigma(multiplier, sensitivity, sites, numbers)
    assert discrete_gaussian.spent(sigma, sites, sensitivity, numbers) <= 1 / multiplier
    assert sigma <= max(discrete_gaussian.LEAST_SIGMA, 1.00001 * multiplier * sensitivity / math.sqrt(sites) + 2)


def test_a_part_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma"):
        discrete_gaussian.least_sigma(1.0, 2.0**60, 2, 1)


GOLDEN = [
    # rate, noise multiplier, steps, epsilon at delta 1e-5
    (1.0, 4.5, 50, 8.019221),
    (1.0, 1.0, 1, 4.728507),
    (0.1, 1.0, 100, 7.972922),
    (0.05, 1.5, 300, 3.198546),
]


@pytest.mark.parametrize(("rate", "multiplier", "steps", "wanted"), GOLDEN)
def test_golden_epsilons(rate: float, multiplier: float, steps: int, wanted: float) -> None:
    """Held to dp-accounting's at the same orders, which are the whole ones where units are sampled."""
    shared = accountant.epsilon(accountant.steps(rate, multiplier, steps, shared=True), 1e-5)
    alone = accountant.epsilon(accountant.steps(rate, multiplier, steps), 1e-5)
    orders = [order for order in rdp.ORDERS if rate == 1.0 or float(order).is_integer()]
    theirs = dp_accounting.rdp.RdpAccountant(orders)
    gaussian = dp_accounting.GaussianDpEvent(multiplier)
    theirs.compose(gaussian if rate == 1.0 else dp_accounting.PoissonSampledDpEvent(rate, gaussian), steps)
    assert shared.value == pytest.approx(wanted, abs=1e-6)
    assert shared.value == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-9)
    assert alone.value <= shared.value <= 1.03 * alone.value
    asked = accountant.epsilon(accountant.steps(rate, multiplier, steps, shared=True), 1e-5, "pld")
    assert asked == shared, "no proof takes its privacy loss for a Gaussian's"


def test_both_kinds_compose_and_stay_apart() -> None:
    both = accountant.joined([accountant.steps(0.1, 1.0, 5), accountant.steps(0.1, 1.0, 5, shared=True)])
    assert len(both) == 2
    alike = accountant.epsilon(accountant.steps(0.1, 1.0, 10, shared=True), 1e-5).value
    assert accountant.epsilon(both, 1e-5).value <= alike
    assert accountant.joined([both, both]) == accountant.joined([both, both, ()])


def test_noise_is_found_by_the_same_account() -> None:
    multiplier = accountant.noise(8.0, 1e-5, 0.1, 100, shared=True)
    assert multiplier is not None
    assert accountant.epsilon(accountant.steps(0.1, multiplier, 100, shared=True), 1e-5).value <= 8.0
    assert accountant.epsilon(accountant.steps(0.1, multiplier - 0.002, 100, shared=True), 1e-5).value > 8.0
