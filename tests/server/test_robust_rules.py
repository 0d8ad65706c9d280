"""What robust rules promise: how far bad updates move them, against plain arithmetic; and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.aggregators import base, held
from fedvfm.aggregators import table as rules
from fedvfm.config import schema
from fedvfm.state import state

ROWS = state.Manifest.of(
    [state.ArraySpec("head.bias", (), "head"), state.ArraySpec("head.weight", (2, 3), "head")],
)
NUMBERS = 7
few = settings(max_examples=25, deadline=None)
ROBUST = [name for name in rules.TABLE.names() if rules.TABLE.get(name).robust]


def adapter(numbers: Sequence[float] | NDArray[Any]) -> state.AdapterState:
    flat = np.asarray(numbers, dtype=np.float32)
    return state.AdapterState({"head.bias": flat[0].reshape(()), "head.weight": flat[1:].reshape(2, 3)})


def flat(found: state.AdapterState) -> NDArray[np.float64]:
    return np.concatenate([found[name].reshape(-1) for name in found]).astype(np.float64)


def aggregate(
    name: str, updates: Sequence[Any], weights: Sequence[float] | None = None, **options: Any
) -> NDArray[np.float64]:
    settings = schema.AggregationConfig(rule=name, weighting="uniform", options=options)
    rule = rules.make(settings)
    acc = rule.init(ROWS)
    for update, weight in zip(updates, weights or [1.0] * len(updates), strict=True):
        acc = rule.fold(acc, base.Contribution(weight, adapter(update), ROWS, adapter(np.zeros(NUMBERS))))
    return flat(rule.finish(acc)[0])


def normal(seed: int, sites: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((sites, NUMBERS)).astype(np.float32)


honest_and_bad = st.tuples(st.integers(0, 2**32 - 1), st.integers(3, 7), st.floats(-1e6, 1e6))


@few
@given(case=honest_and_bad, bad=st.integers(0, 2))
@pytest.mark.parametrize("name", ["median", "trimmed-mean"])
def test_every_number_lies_between_two_honest_ones(name: str, case: tuple[int, int, float], bad: int) -> None:
    seed, good, size = case
    honest = normal(seed, good)
    wrong = [size * row for row in normal(seed + 1, bad)]
    found = aggregate(name, [*honest, *wrong], **({} if name == "median" else {"bad": bad}))
    assert (found >= honest.min(axis=0) - 1e-6).all()
    assert (found <= honest.max(axis=0) + 1e-6).all()


@pytest.mark.parametrize("sites", [1, 2, 3, 6, 9])
def test_median_and_trimmed_mean_are_numpys(sites: int) -> None:
    updates = normal(sites, sites)
    np.testing.assert_allclose(aggregate("median", updates), np.median(updates, axis=0), rtol=1e-6)
    for bad in range((sites - 1) // 2 + 1):
        cut = np.sort(updates.astype(np.float64), axis=0)[bad : sites - bad].mean(axis=0)
        np.testing.assert_allclose(aggregate("trimmed-mean", updates, bad=bad), cut, rtol=1e-5, atol=1e-7)
    usual = 0 if sites < 3 else max(1, sites // 4)
    assert aggregate("trimmed-mean", updates).tolist() == aggregate("trimmed-mean", updates, bad=usual).tolist()


def test_krum_is_the_formula() -> None:
    updates = normal(5, 9).astype(np.float64)
    squares = np.square(updates[:, None] - updates[None]).sum(axis=2)
    scores = [np.sort(np.delete(row, own))[: 9 - 3 - 2].sum() for own, row in enumerate(squares)]
    best = np.argsort(scores)
    np.testing.assert_array_equal(aggregate("krum", updates, bad=3), updates[best[0]].astype(np.float32))
    whole = updates[best[:4]].mean(axis=0)
    np.testing.assert_allclose(aggregate("krum", updates, bad=3, average=4), whole, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(aggregate("krum", updates), aggregate("krum", updates, bad=3))


@few
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(100.0, 1e4))
def test_krum_takes_an_honest_update(seed: int, size: float) -> None:
    """Two bad ones of seven that stand together, far off."""
    honest = normal(seed, 5)
    wrong = [np.full(NUMBERS, size, np.float32), np.full(NUMBERS, size + 1, np.float32)]
    found = aggregate("krum", [*wrong, *honest], bad=2)
    assert any((found == row).all() for row in honest)


@few
@given(seed=st.integers(0, 2**32 - 1), sites=st.integers(1, 8))
@example(seed=1242, sites=2)  # weights so alike that the iteration has not come to the heavier one when it ends
def test_no_step_from_the_geometric_median_is_downhill(seed: int, sites: int) -> None:
    updates = normal(seed, sites).astype(np.float64)
    weights = np.random.default_rng(seed).uniform(0.5, 2.0, sites)

    def cost(point: NDArray[np.float64]) -> float:
        return float(weights @ np.linalg.norm(updates - point, axis=1))

    found = aggregate("geometric-median", updates, list(weights))
    least = cost(found)
    assert all(least <= cost(row) + 1e-5 for row in updates)
    steps = 1e-2 * np.random.default_rng(seed + 1).standard_normal((50, NUMBERS))
    assert all(least <= cost(found + step) + 1e-6 for step in steps)


@few
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(-1e5, 1e5))
def test_the_geometric_median_of_a_majority_that_agrees_is_what_it_says(seed: int, size: float) -> None:
    agreed = normal(seed, 1)[0]
    wrong = [size * row for row in normal(seed + 1, 3)]
    found = aggregate("geometric-median", [*wrong, *[agreed] * 4])
    np.testing.assert_allclose(found, agreed, atol=1e-3)


@few
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(1.0, 1e4), bound=st.floats(0.1, 10.0))
def test_one_site_moves_the_clipped_mean_by_its_share_of_the_bound(seed: int, size: float, bound: float) -> None:
    honest, wrong = normal(seed, 4), size * normal(seed + 1, 1)[0]
    with_it, without = (aggregate("clipped-mean", [*honest, row], bound=bound) for row in (wrong, np.zeros(NUMBERS)))
    assert np.linalg.norm(with_it - without) <= bound / 5 * (1 + 1e-5)
    updates = np.array([*honest, wrong], dtype=np.float64)
    norms = np.linalg.norm(updates, axis=1)
    for option in (bound, 0.0):
        most = option or float(np.median(norms))
        expected = (updates * np.minimum(1.0, most / norms)[:, None]).mean(axis=0)
        np.testing.assert_allclose(aggregate("clipped-mean", updates, bound=option), expected, rtol=1e-4, atol=1e-5)


def test_a_stated_bound_is_a_sum_and_holds_nothing() -> None:
    def rule(bound: float) -> base.Aggregator:
        return rules.make(schema.AggregationConfig(rule="clipped-mean", options={"bound": bound}))

    assert (rule(1.0).sum_only, rule(0.0).sum_only) == (True, False)
    one = base.Contribution(1.0, adapter(np.ones(NUMBERS)), ROWS, adapter(np.zeros(NUMBERS)))
    assert [len(rule(bound).fold(rule(bound).init(ROWS), one).held.contributions) for bound in (1.0, 0.0)] == [0, 1]


def test_distances_are_those_of_the_whole_flat_update_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = normal(0, 5)
    expected = np.square(updates[:, None].astype(np.float64) - updates[None]).sum(axis=2)
    monkeypatch.setattr(held, "CHUNK", 4)
    np.testing.assert_allclose(held.squares([adapter(row) for row in updates]), expected, rtol=1e-9, atol=1e-9)
    assert aggregate("median", updates).tolist() == np.median(updates, axis=0).tolist()


# -- what is refused -------------------------------------------------------------------------------------------------


def recipe(rule: str, weighting: str = "uniform", options: dict[str, Any] | None = None, **more: Any) -> schema.Recipe:
    aggregation = {"rule": rule, "weighting": weighting, "options": options or {}, **more.pop("aggregation", {})}
    values = {"backbone": {"name": "x"}, "data": {"class_names": ["a", "b"]}, "aggregation": aggregation}
    return schema.parse(schema.Recipe, {**values, **more}, "recipe")


@pytest.mark.parametrize("name", ROBUST)
def test_what_a_site_says_of_itself_is_no_weight_under_a_robust_rule(name: str) -> None:
    assert rules.faults(recipe(name)) == []
    (told,) = rules.faults(recipe(name, "examples"))
    assert told.startswith("recipe.aggregation.weighting = 'examples'")


@pytest.mark.parametrize("name", ROBUST)
def test_site_level_privacy_and_a_robust_rule_exclude_each_other(name: str) -> None:
    private = {"mechanism": "site-level", "clip": 1.0, "epsilon": 8.0, "delta": 1e-5}
    for options in ({}, {"bound": 1.0}) if name == "clipped-mean" else ({},):
        (told,) = rules.faults(recipe(name, options=options, privacy=private))
        assert told.startswith("recipe.privacy.mechanism = 'site-level'")


@pytest.mark.parametrize("name", ROBUST)
def test_a_frozen_factor_and_a_server_step_go_with_every_robust_rule(name: str) -> None:
    moved = {"server_momentum": 0.5, "server_learning_rate": 0.5}
    assert rules.faults(recipe(name, adapter={"factors": "freeze-A"}, aggregation=moved)) == []
    assert len(rules.faults(recipe("svd", adapter={"factors": "freeze-A"}, aggregation=moved))) == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("median", {"bad": 1}),
        ("trimmed-mean", {"bad": -1}),
        ("trimmed-mean", {"bad": True}),
        ("krum", {"average": 0}),
        ("krum", {"bad": 1.5}),
        ("geometric-median", {"smoothing": 0.0}),
        ("clipped-mean", {"bound": -1.0}),
        ("clipped-mean", {"bound": "much"}),
    ],
)
def test_a_wrong_option_is_one_clear_fault(name: str, options: dict[str, Any]) -> None:
    (told,) = rules.faults(recipe(name, options=options))
    assert told.startswith("recipe.aggregation.options." + next(iter(options)))
    with pytest.raises(errors.ConfigError):
        rules.make(recipe(name, options=options).aggregation)


def test_too_few_updates_for_the_promise_are_no_aggregate() -> None:
    """Before a run by its sites, and in a round by what came."""
    for name, needed in (("krum", 7), ("trimmed-mean", 5)):
        assert rules.site_faults(recipe(name, options={"bad": 2}), needed) == []
        (told,) = rules.site_faults(recipe(name, options={"bad": 2}), needed - 1)
        assert f"needs {needed} updates" in told
        with pytest.raises(errors.QuorumMissed) as caught:
            aggregate(name, normal(0, needed - 1), bad=2)
        assert caught.value.code == "quorum-missed"
    assert [rules.site_faults(recipe(name), 1) for name in ROBUST] == [[]] * len(ROBUST)
