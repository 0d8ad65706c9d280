"""Epsilons against what others published or what is computed another way here; never against our own code alone."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import warnings

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting import rdp as google
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant

from fedvfm import errors
from fedvfm.config import privacy, schema
from fedvfm.privacy import accountant, base, rdp
from tests.privacy import gaussian

OPACUS_ORDERS = [*(1 + x / 10 for x in range(1, 100)), *range(12, 64)]


def event(q: float = 0.01, sigma: float = 1.1, steps: int = 100) -> base.PrivacyEvent:
    return base.PrivacyEvent("record-level", "record", sigma, q, steps, 1.0)


def value(q: float, sigma: float, steps: int, delta: float = 1e-5, kind: str = "rdp") -> float:
    return accountant.epsilon(accountant.steps(q, sigma, steps), delta, kind).value


# -- the torch-free accountant is Opacus's -----------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1e-4, 0.004, 0.03, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("sigma", [0.5, 1.1, 4.5, 20.0])
def test_equal_to_opacus(q: float, sigma: float) -> None:
    from opacus.accountants.analysis import rdp as theirs

    mine = rdp.divergence(q, sigma, OPACUS_ORDERS)
    other = theirs.compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=OPACUS_ORDERS)
    np.testing.assert_allclose(mine, other, rtol=1e-9, atol=5e-12)
    for steps, delta in ((1, 1e-5), (1000, 1e-6)):
        want, _ = theirs.get_privacy_spent(orders=OPACUS_ORDERS, rdp=steps * other, delta=delta)
        got, order = rdp.epsilon(steps * mine, delta, OPACUS_ORDERS)
        assert got == pytest.approx(max(want, 0.0), rel=1e-7, abs=1e-7)
        assert order in OPACUS_ORDERS


def test_equal_to_opacus_over_different_events() -> None:
    from opacus.accountants import RDPAccountant

    theirs = RDPAccountant()
    theirs.history = [(1.1, 0.02, 300), (0.9, 0.05, 40), (2.0, 0.02, 1000)]
    mine = accountant.curve([event(0.02, 1.1, 300), event(0.05, 0.9, 40), event(0.02, 2.0, 1000)])
    assert accountant.epsilon(mine, 1e-5).value == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-9)


@pytest.mark.parametrize(
    ("q", "sigma", "order"),
    [
        (0.01, 4.0, 2),
        (0.1, 1.1, 3),
        (0.2, 0.7, 7),
        (0.5, 2.0, 16),
        (0.05, 1.3, 1.5),
        (0.3, 2.0, 2.7),
        (0.02, 0.8, 10.4),
    ],
)
def test_equal_to_numerical_integration(q: float, sigma: float, order: float) -> None:
    """E over N(0, sigma^2) of ((1 - q) + q mu1 / mu0)^order, integrated with 40 digits."""
    with mpmath.workdps(40):

        def density(x: mpmath.mpf) -> mpmath.mpf:
            ratio = mpmath.exp((2 * x - 1) / (2 * mpmath.mpf(sigma) ** 2))
            return mpmath.npdf(x, 0, sigma) * ((1 - q) + q * ratio) ** mpmath.mpf(order)

        middle = order / 2 if order == int(order) else sigma**2 * math.log(1 / q - 1) + 0.5
        points = sorted({-12 * sigma, 0, middle, order, order + 12 * sigma})
        want = mpmath.log(mpmath.quad(density, points)) / (order - 1)
    close = 1e-9 if order == int(order) else 1e-7
    assert rdp.divergence(q, sigma, [order])[0] == pytest.approx(float(want), rel=close)


# -- published numbers -------------------------------------------------------------------------------------------------


def published(q: float, sigma: float, steps: int, orders: list[float]) -> tuple[float, float]:
    """With the conversion that was used then: Mironov, "Renyi Differential Privacy", CSF 2017, proposition 3."""
    found = steps * rdp.divergence(q, sigma, orders) + math.log(1e5) / (np.array(orders) - 1)
    return float(found.min()), float(orders[int(found.argmin())])


TF_ORDERS = [1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 4.5, *range(5, 64), 128, 256, 512]


@pytest.mark.parametrize(
    ("batch", "sigma", "epochs", "want"),
    [(250, 1.3, 15, 1.18), (256, 1.1, 60, 3.01), (256, 0.7, 45, 7.1), (256, 1.12, 60, 2.92)],
)
def test_tensorflow_privacy_mnist(batch: int, sigma: float, epochs: int, want: float) -> None:
    """TensorFlow Privacy's tutorial and README: n = 60000, delta 1e-5; 1.12 gives 2.92 at order 9."""
    found, order = published(batch / 60000, sigma, math.ceil(epochs * 60000 / batch), TF_ORDERS)
    assert found == pytest.approx(want, abs=0.03)
    assert sigma != 1.12 or order == 9
    assert value(batch / 60000, sigma, math.ceil(epochs * 60000 / batch)) < found, "today's conversion is tighter"


def test_abadi_moments_accountant() -> None:
    """Abadi et al., "Deep Learning with Differential Privacy", CCS 2016: q 0.01, sigma 4, 10000 steps: 1.26."""
    assert published(0.01, 4.0, 10000, list(range(2, 65)))[0] == pytest.approx(1.26, abs=0.005)


@pytest.mark.parametrize(
    ("units", "batch", "steps", "sigma", "want"),
    [(40, 8, 200, 1.1, 19.8), (300, 8, 500, 1.1, 3.5), (6, 6, 50, 4.5, 8.0)],
)
def test_what_small_sites_get(units: int, batch: int, steps: int, sigma: float, want: float) -> None:
    assert value(base.sample_rate(units, batch), sigma, steps) == pytest.approx(want, abs=0.05)


# -- the Gaussian mechanism, exactly -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (4.5, 50), (10.0, 30)])
def test_without_sampling_it_is_the_gaussian_mechanism(sigma: float, steps: int) -> None:
    """T Gaussians are one with noise sigma / sqrt(T)."""
    exact = gaussian.epsilon(sigma / math.sqrt(steps), 1e-5)
    assert exact <= value(1.0, sigma, steps) <= 1.12 * exact
    assert exact <= value(1.0, sigma, steps, kind="pld") <= exact + 0.03


# -- laws --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.0043, 1.1, 14063), (0.2, 1.1, 200), (0.05, 2.0, 400)])
def test_pld_is_a_tighter_bound(q: float, sigma: float, steps: int) -> None:
    tight = accountant.epsilon(accountant.steps(q, sigma, steps), 1e-5, "pld")
    assert tight.accountant == "pld"
    assert math.isnan(tight.order)
    assert 0.7 * value(q, sigma, steps) < tight.value < value(q, sigma, steps)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(0.1, 1.0, 200), (0.02, 0.8, 1000), (0.5, 2.0, 100), (1.0, 5.0, 50), (0.2, 4.0, 2000)]
)
def test_beside_the_accountants_of_google_and_opacus(q: float, sigma: float, steps: int) -> None:
    """Ours is never looser than the same way elsewhere, and the tighter one agrees with Opacus's third way."""
    theirs = google.RdpAccountant(orders=list(rdp.ORDERS))
    theirs.compose(dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps)
    assert 0.97 * theirs.get_epsilon(1e-5) < value(q, sigma, steps) <= theirs.get_epsilon(1e-5) + 1e-9
    prv = PRVAccountant()
    prv.history = [(sigma, q, steps)]
    assert value(q, sigma, steps, kind="pld") == pytest.approx(prv.get_epsilon(1e-5), abs=0.015)


def test_pld_composes_unlike_steps() -> None:
    """Two kinds of steps cost more than either, and less than by RDP."""
    both = ((0.1, 1.5, 100), (0.2, 2.0, 50))
    spent = accountant.joined(accountant.steps(*row) for row in both)
    tight = accountant.epsilon(spent, 1e-5, "pld")
    assert tight.accountant == "pld"
    assert max(value(*row, kind="pld") for row in both) < tight.value < accountant.epsilon(spent, 1e-5).value


def test_pld_gives_way_to_rdp_where_its_numbers_do_not_work() -> None:
    assert accountant.epsilon(accountant.steps(0.2, 0.5, 2000), 1e-5, "pld").accountant == "rdp"
    assert accountant.epsilon(accountant.steps(0.01, 2.0, 10), 1e-12, "pld").accountant == "rdp"


rates, noises = st.floats(1e-3, 1.0), st.floats(0.5, 20.0)


@settings(max_examples=15, deadline=None)
@given(q=rates, sigma=noises, steps=st.integers(1, 5000), more=st.floats(1.01, 3.0))
def test_more_noise_fewer_steps_and_a_smaller_rate_cost_less(q: float, sigma: float, steps: int, more: float) -> None:
    here = value(q, sigma, steps)
    assert value(q, sigma * more, steps) <= here + 1e-9
    assert value(q, sigma, steps + 1) >= here
    assert value(q / more, sigma, steps) <= here + 1e-9
    assert value(q, sigma, steps, 1e-6) >= here


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(rates, noises, st.integers(1, 50)), min_size=1, max_size=4), st.randoms())
def test_order_and_grouping_of_events_do_not_matter(rows: list[tuple[float, float, int]], random: object) -> None:
    events = [event(*row) for row in rows]
    whole = accountant.curve(events)
    assert accountant.curve(reversed(events)) == whole
    assert accountant.joined([accountant.curve(events[:1]), accountant.curve(events[1:])]) == whole
    assert accountant.epsilon(whole, 1e-5).value >= max(
        accountant.epsilon(accountant.curve([e]), 1e-5).value for e in events
    )


@pytest.mark.parametrize(("wanted", "q", "steps"), [(8.0, 1.0, 50), (1.0, 0.02, 1000), (3.0, 0.2, 200)])
def test_noise_is_the_least_that_holds(wanted: float, q: float, steps: int) -> None:
    found = accountant.noise(wanted, 1e-5, q, steps)
    assert found is not None
    assert value(q, found, steps) <= wanted < value(q, found - 0.002, steps)


def test_noise_for_what_is_left() -> None:
    before = accountant.steps(0.1, 1.1, 60)
    found = accountant.noise(8.0, 1e-5, 0.1, 300, before=before)
    assert found is not None
    after = accountant.joined([before, accountant.steps(0.1, found, 300)])
    assert 7.9 < accountant.epsilon(after, 1e-5).value <= 8.0
    assert accountant.noise(5.0, 1e-5, 0.1, 300, before=before) is None


def test_nothing_spent_is_nothing() -> None:
    assert accountant.epsilon((), 1e-5).value == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: accountant.epsilon(accountant.steps(0.1, 1.0, 1), 0.0),
        lambda: accountant.epsilon(accountant.steps(0.1, 1.0, 1), 1.0),
        lambda: accountant.epsilon((), 1e-5, "gdp"),
        lambda: rdp.divergence(1.1, 1.0),
        lambda: rdp.divergence(0.1, -1.0),
        lambda: rdp.divergence(0.1, 1.0, [1.0]),
        lambda: event(sigma=0.0),
        lambda: event(sigma=math.nan),
        lambda: event(sigma=0.009),
        lambda: base.PrivacyEvent("x", "record", 1.0, 0.1, 1, 9e-7),
        lambda: base.PrivacyEvent("x", "record", 1.0, 0.1, 1, 1.1e6),
        lambda: event(q=0.0),
        lambda: event(steps=0),
        lambda: base.PrivacyEvent("x", "scan", 1.0, 0.1, 1, 1.0),
    ],
)
def test_nonsense_is_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r"delta|accountant|subsampled|noise multiplier|release|unit"):
        call()  # type: ignore[operator]


def test_no_noise_is_no_privacy() -> None:
    assert math.isinf(rdp.divergence(0.1, 0.0)[0])
    assert rdp.divergence(0.0, 1.0)[0] == 0.0


@pytest.mark.parametrize("sigma", [5e-324, 1e-200, 1e-163, 1e-160, 1e-154, 1e-30, 1e-4])
@pytest.mark.parametrize("q", [1e-6, 0.1, 0.5, 1.0])
def test_next_to_no_noise_is_no_privacy(sigma: float, q: float) -> None:
    """Its square is lost to floating point, and what is no number must not pass for nought; nor cost a minute."""
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value(q, sigma, 3) > 1e7
    assert time.process_time() - started < 5


@pytest.mark.parametrize("sigma", [1e6, 1e100, 1e155, 1e200, 1.7e308])
def test_noise_beyond_all_measure_costs_next_to_nothing(sigma: float) -> None:
    assert 0 <= value(0.1, sigma, 10) <= value(0.1, 1e5, 10)


def test_what_is_no_number_proves_nothing() -> None:
    orders = [2.0, 4.0]
    for wrong in (math.nan, math.inf, -math.inf):
        assert rdp.epsilon(np.array([wrong, 3.0]), 1e-5, orders)[1] == 4.0
        assert math.isinf(rdp.epsilon(np.array([wrong, wrong]), 1e-5, orders)[0])


def test_no_noise_is_found_that_no_event_takes() -> None:
    found = accountant.noise(1e9, 1e-5, 0.1, 1)
    assert found == privacy.LEAST_NOISE
    assert event(sigma=found).noise_multiplier == found


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"noise_multiplier": 0.009}, "noise_multiplier.*0.01"),
        ({"noise_multiplier": 1e-163}, "noise_multiplier.*0.01"),
        ({"clip": 9e-7}, "clip.*0.000001"),
        ({"clip": 1.1e6}, "clip.*1000000"),
    ],
)
def test_a_recipe_asks_for_noise_and_clips_that_mean_something(change: dict[str, float], match: str) -> None:
    given = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    values = {"backbone": {"name": "x"}, "data": {"class_names": ["a", "b"]}, "privacy": {**given, **change}}
    with pytest.raises(errors.ConfigError, match=match):
        schema.parse(schema.Recipe, values, "recipe")
    schema.parse(schema.Recipe, {**values, "privacy": given | {"noise_multiplier": 0.01, "clip": 1e-6}}, "recipe")


def test_the_server_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from fedvfm.privacy import accountant, planner, rdp, table\n"
        "from fedvfm.ledger import ledger, reconcile, summary\n"
        "print(accountant.epsilon(accountant.steps(0.01, 1.1, 100), 1e-5).value)\n"
        "print([n for n in ('torch', 'opacus', 'monai', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "[]"
