"""Updates as whole numbers: what is lost to rounding, what is clipped, and sums that nobody could have sent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.secure_aggregation import fixed_point
from fedvfm.secure_aggregation import session as sessions
from fedvfm.state import state

NAMES = ("a", "b")
POINT = fixed_point.FixedPoint(10.0, 1_000_000)


def adapter(seed: int, size: float = 1e-2) -> state.AdapterState:
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 5), "b": (7,), "still": (4,)}
    return state.AdapterState({name: (size * rng.normal(size=shape)).astype("f4") for name, shape in shapes.items()})


START = adapter(0)


def moved(seed: int) -> state.AdapterState:
    after = START + adapter(seed)
    return state.AdapterState({**after, "still": START["still"]})


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 5)), min_size=3, max_size=9), st.randoms())
def test_the_mean_is_the_weighted_one_to_the_last_place_and_in_any_order(
    sites: list[tuple[int, float]], order: object
) -> None:
    updates = [moved(seed) for seed in range(1, len(sites) + 1)]
    rows = [POINT.encode(own, START, NAMES, weight, loss) for own, (weight, loss) in zip(updates, sites, strict=True)]
    mean = POINT.decode(np.add.reduce(rows), START, NAMES, len(rows))
    order.shuffle(rows)  # type: ignore[attr-defined]
    assert POINT.decode(np.add.reduce(rows), START, NAMES, len(rows)) == mean
    total = sum(weight for weight, _ in sites)
    assert mean.weight == total
    assert mean.loss == pytest.approx(sum(w * loss for w, loss in sites) / total, abs=1e-5)
    for name in NAMES:
        wide = [w * own[name].astype(np.float64) for own, (w, _) in zip(updates, sites, strict=True)]
        np.testing.assert_allclose(mean.state[name], sum(wide) / total, rtol=1e-6, atol=2.0**-POINT.places)
    assert np.array_equal(mean.state["still"], START["still"])


def test_a_large_update_is_shortened_and_keeps_its_direction() -> None:
    far = state.AdapterState({**START, "a": START["a"] + np.float32(50), "b": START["b"] - np.float32(50)})
    rows = [POINT.encode(far, START, NAMES, 2, None)] * 3
    mean = POINT.decode(np.add.reduce(rows), START, NAMES, 3)
    assert mean.norm == pytest.approx(10.0, rel=1e-6)
    assert mean.loss is None
    change = np.concatenate([(mean.state[name] - START[name]).reshape(-1) for name in NAMES])
    assert np.ptp(np.abs(change)) < 1e-5


def test_the_largest_updates_of_the_most_sites_do_not_overflow() -> None:
    far = state.AdapterState({**START, "a": START["a"] + np.eye(3, 5, dtype="f4")[:1] * np.float32(1e6)})
    row = POINT.encode(far, START, NAMES, POINT.most, 1e9)
    total = (np.int64(sessions.MOST_SITES) * row.view(np.int64)).view(np.uint64)
    assert max(abs(int(x)) for x in row.view(np.int64)) * sessions.MOST_SITES < 2**63
    mean = POINT.decode(total, START, NAMES, sessions.MOST_SITES)
    assert mean.norm == pytest.approx(10.0, rel=1e-6)
    assert mean.loss == fixed_point.MOST_LOSS


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_masked(value: float) -> None:
    bad = state.AdapterState({**START, "b": np.full(7, value, "f4")})
    with pytest.raises(errors.SecureAggregationError) as caught:
        POINT.encode(bad, START, NAMES, 1, None)
    assert caught.value.reason == "secure-numbers"


@pytest.mark.parametrize("weight", [0, -1, 1_000_001])
def test_a_weight_out_of_bounds_is_never_masked(weight: int) -> None:
    with pytest.raises(errors.SecureAggregationError) as caught:
        POINT.encode(moved(1), START, NAMES, weight, None)
    assert caught.value.reason == "secure-numbers"


@pytest.mark.parametrize("tellers", [0, 1, 2, 3])
def test_a_loss_is_told_only_where_every_site_tells_its_own(tellers: int) -> None:
    """Of one site that tells, among others whose policies do not, the mean would be its loss."""
    rows = [POINT.encode(moved(seed), START, NAMES, 50 * seed, 0.5 if seed <= tellers else None) for seed in (1, 2, 3)]
    assert POINT.decode(np.add.reduce(rows), START, NAMES, 3).loss == (0.5 if tellers == 3 else None)
    assert sum(int(row[-2]) for row in rows) == tellers, "how many tell, and not how many images these have"


def test_a_loss_that_nobody_tells_is_refused() -> None:
    total = np.add.reduce([POINT.encode(moved(seed), START, NAMES, 5, None) for seed in (1, 2, 3)])
    total[-1] = np.uint64(1)
    with pytest.raises(errors.SecureAggregationError) as caught:
        POINT.decode(total, START, NAMES, 3)
    assert caught.value.reason == "secure-sum"


@pytest.mark.parametrize("place", [0, -3, -2, -1])
def test_a_sum_that_nobody_could_have_sent_is_refused(place: int) -> None:
    total = np.add.reduce([POINT.encode(moved(seed), START, NAMES, 5, 1.0) for seed in (1, 2, 3)])
    total[place] = np.uint64(2**62 + 5)
    with pytest.raises(errors.SecureAggregationError) as caught:
        POINT.decode(total, START, NAMES, 3)
    assert caught.value.reason == "secure-sum"


def test_a_sum_with_a_mask_left_in_it_is_refused() -> None:
    rng = np.random.default_rng(1)
    with pytest.raises(errors.SecureAggregationError) as caught:
        POINT.decode(rng.integers(0, 2**64, 22 + fixed_point.TAIL, dtype=np.uint64), START, NAMES, 3)
    assert caught.value.reason == "secure-sum"
