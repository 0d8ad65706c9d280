"""Rules that keep what averaged factors miss beside them: their laws, and what a recipe must say for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.aggregators import averaging_error, base, held
from fedvfm.aggregators import table as rules
from fedvfm.config import schema
from fedvfm.state import factors, groups, state

NAMES = ("residual", "stack")
OUT, IN, RANK, SCALE = 6, 9, 2, 1.5
PAIRS = ("block.00.q", "block.01.v")
few = settings(max_examples=25, deadline=None)
sites = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.floats(0.1, 1000.0)), min_size=1, max_size=5)
both = pytest.mark.parametrize("name", NAMES)


def manifest(rank: int = 6) -> state.Manifest:
    rows = [state.ArraySpec("head.weight", (3, 4), "head")]
    for pair in PAIRS:
        rows.append(state.ArraySpec(f"{pair}.A", (RANK, IN), "lora", "A", pair, SCALE))
        rows.append(state.ArraySpec(f"{pair}.B", (OUT, RANK), "lora", "B", pair, SCALE))
        for name, shape in zip(factors.residual_names(pair), ((rank, IN), (OUT, rank)), strict=True):
            rows.append(state.ArraySpec(name, shape, factors.RESIDUAL))
    return state.Manifest.of(rows)


def drawn(seed: int, rank: int = 6) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in manifest(rank)}


def started(rank: int = 6, seed: int = 0) -> state.AdapterState:
    """A global adapter with a residual of rank 1."""
    arrays = drawn(seed, rank)
    for pair in PAIRS:
        down, up = factors.residual_names(pair)
        arrays[down][1:] = 0.0
        arrays[up][:, 1:] = 0.0
    return state.AdapterState(arrays)


def updates(group: list[tuple[int, float]], start: state.AdapterState, rank: int = 6) -> list[base.Contribution]:
    """What sites trained: all but the residual, which is that of the start."""
    rows = manifest(rank)
    kept = {spec.name: start[spec.name] for spec in rows if spec.group == factors.RESIDUAL}
    return [base.Contribution(w, state.AdapterState({**drawn(seed, rank), **kept}), rows, start) for seed, w in group]


def aggregate(
    name: str, some: list[base.Contribution], kept: Any = None, **options: float
) -> tuple[state.AdapterState, dict[str, Any]]:
    rule = rules.TABLE.get(name)(**options)
    acc = rule.init(some[0].manifest, kept)
    for update in some:
        acc = rule.fold(acc, update)
    result: tuple[state.AdapterState, dict[str, Any]] = rule.finish(acc)
    return result


def effective(adapter: state.AdapterState, rank: int = 6) -> dict[str, NDArray[np.float64]]:
    """What the adapter adds to the weights of every layer."""
    pairs = manifest(rank).pairs()
    adapter = factors.whole(adapter, manifest(rank))
    return {pair: SCALE * adapter[b.name].astype(np.float64) @ adapter[a.name] for pair, (a, b) in pairs.items()}


def mean_effect(some: list[base.Contribution], pair: str) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.average(
        [effective(one.state)[pair] for one in some], axis=0, weights=[one.weight for one in some]
    )
    return found


@both
@few
@given(group=sites)
def test_every_layer_is_changed_by_exactly_the_mean_of_what_the_sites_change(
    name: str, group: list[tuple[int, float]]
) -> None:
    """The residual has as many directions as a layer here, so nothing is lost; over two rounds."""
    first = updates(group, started())
    adapter, kept = aggregate(name, first)
    second = updates([(seed ^ 1, weight) for seed, weight in group], adapter)
    for some, result in ((first, adapter), (second, aggregate(name, second, kept)[0])):
        assert {key: array.shape for key, array in result.items()} == {spec.name: spec.shape for spec in manifest()}
        for pair, change in effective(result).items():
            expected = mean_effect(some, pair)
            np.testing.assert_allclose(change, expected, rtol=0, atol=2e-5 * max(1.0, np.abs(expected).max()))


@both
def test_a_far_longer_update_counts_as_one_of_the_usual_length(name: str) -> None:
    """Four honest sites, and one whose factors are a hundred times as far away, so its product ten thousand times."""
    start = started()
    honest = updates([(seed, 1.0) for seed in range(1, 5)], start)
    (liar,) = updates([(9, 1.0)], start)
    trained = [spec.name for spec in manifest() if spec.group != factors.RESIDUAL]
    far = {key: start[key] + np.float32(100.0) * (liar.state[key] - start[key]) for key in trained}
    some = [*honest, dataclasses.replace(liar, state=state.AdapterState({**liar.state, **far}))]

    def largest(update: list[base.Contribution], **options: float) -> float:
        return max(
            float(np.linalg.norm(change)) for change in effective(aggregate(name, update, **options)[0]).values()
        )

    usual = largest(honest)
    assert largest(some) > 100.0 * usual
    assert largest(some, shorten=1.0) < 3.0 * usual
    # Nothing changes where no update is longer than that, to the bit.
    assert aggregate(name, honest, shorten=5.0)[0] == aggregate(name, honest)[0]
    norms = sorted(held.norm(each, name) for each in some)
    bound = 2.0 * norms[2]
    expected = [*honest, dataclasses.replace(liar, state=shortened(some[-1], bound / norms[-1]))]
    assert aggregate(name, some, shorten=2.0)[0] == aggregate(name, expected)[0]


def shortened(update: base.Contribution, factor: float) -> state.AdapterState:
    assert update.start is not None
    return state.AdapterState(
        {
            name: (update.start[name] + factor * (array.astype(np.float64) - update.start[name])).astype(np.float32)
            for name, array in update.state.items()
        }
    )


@pytest.mark.parametrize(("value", "refused"), [(0.0, False), (1.0, False), (0.5, True), (-1.0, True), (True, True)])
def test_how_long_an_update_may_be_is_a_multiple_of_the_median(value: float, refused: bool) -> None:
    asked = schema.AggregationConfig(rule="residual", options={"shorten": value})
    assert bool(rules.option_faults(asked)) == refused


@both
@few
@given(group=sites, order=st.randoms(use_true_random=False))
def test_order_of_sites_does_not_matter(name: str, group: list[tuple[int, float]], order: Any) -> None:
    some = updates(group, started())
    shuffled = list(some)
    order.shuffle(shuffled)
    other = effective(aggregate(name, shuffled)[0])
    for pair, change in effective(aggregate(name, some)[0]).items():
        np.testing.assert_allclose(change, other[pair], rtol=0, atol=2e-5 * max(1.0, np.abs(change).max()))


@few
@given(seed=st.integers(0, 2**32 - 1), many=st.lists(st.floats(0.1, 1000.0), min_size=1, max_size=5))
def test_equal_sites_are_their_mean_and_leave_no_residual(seed: int, many: list[float]) -> None:
    """Not even rounding's: where the factors' mean is exact, the rule is mean."""
    bare = {key: np.zeros_like(a) if ".residual." in key else a for key, a in started().items()}
    some = updates([(seed, weight) for weight in many], state.AdapterState(bare))
    assert aggregate("residual", some)[0] == some[0].state


def test_too_small_a_residual_keeps_the_largest_directions_and_the_loss_is_told() -> None:
    rank, start = 1, started(1)
    some = updates([(1, 1.0), (2, 3.0), (3, 2.0)], start, rank)
    adapter, _ = aggregate("residual", some)
    told = averaging_error.AveragingError(manifest(rank))
    for one in some:
        told.add(one)
    lost, size = 0.0, 0.0
    for pair, (a, b) in manifest(rank).pairs().items():
        products = [SCALE * one.state[b.name].astype(np.float64) @ one.state[a.name] for one in some]
        mean = np.average(products, axis=0, weights=[one.weight for one in some])
        factor = SCALE * adapter[b.name].astype(np.float64) @ adapter[a.name]
        down, up = factors.residual_names(pair)
        old = SCALE * start[up].astype(np.float64) @ start[down]
        s = np.linalg.svd(mean - factor + old, compute_uv=False)
        best = float(np.square(s[1:]).sum())
        off = float(np.square(mean + old - effective(adapter, rank)[pair]).sum())
        assert off == pytest.approx(best, rel=1e-4)
        lost, size = lost + off, size + float(np.square(mean).sum())
    stated = told.aggregate(factors.whole(adapter, manifest(rank), start))
    assert stated == pytest.approx(np.sqrt(lost / size), rel=1e-4)


def test_stack_begins_every_round_with_fresh_factors_that_are_the_same_again() -> None:
    some = updates([(1, 1.0), (2, 3.0)], started())
    first, kept = aggregate("stack", some)
    again, _ = aggregate("stack", some)
    second, _ = aggregate("stack", some, kept)
    assert first == again
    for pair, (a, b) in manifest().pairs().items():
        assert not first[b.name].any()
        assert np.abs(first[a.name]).max() <= IN**-0.5
        assert not np.array_equal(first[a.name], second[a.name]), pair


@both
def test_an_adapter_without_a_residual_and_an_empty_cohort_are_refused(name: str) -> None:
    rule, rows = rules.TABLE.get(name)(), state.Manifest.of([s for s in manifest() if s.group != factors.RESIDUAL])
    with pytest.raises(errors.EmptyCohort):
        rule.finish(rule.init(rows))
    plain = state.AdapterState({spec.name: started()[spec.name] for spec in rows})
    with pytest.raises(errors.ProtocolError, match=r"set recipe\.adapter\.options\.residual"):
        rule.finish(rule.fold(rule.init(rows), base.Contribution(1.0, plain, rows)))


def recipe(rule: str, rank: int, **more: Any) -> schema.Recipe:
    tables: dict[str, Any] = {
        "backbone": {"name": "dinov2-small"},
        "adapter": {"options": {"residual": rank} if rank else {}},
        "aggregation": {"rule": rule},
        "data": {"class_names": ["a", "b"]},
    }
    for table, values in more.items():
        tables[table] = {**tables.get(table, {}), **values}
    return schema.parse(schema.Recipe, tables, "recipe")


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (recipe("residual", 0), "the adapter has no residual for what the rule finds"),
        (recipe("stack", 0), "the adapter has no residual for what the rule finds"),
        (recipe("mean", 8), "recipe.adapter.options.residual = 8: rule 'mean' puts nothing there"),
        (recipe("residual", 8, adapter={"options": {"residual": 8}, "factors": "freeze-A"}), "none stays as it is"),
        (recipe("stack", 8, aggregation={"server_momentum": 0.5}), "a difference between rounds means nothing"),
        (recipe("residual", 8, personal={"kind": "share-A"}), "joins the products of both factors"),
        (
            recipe(
                "residual", 8, privacy={"mechanism": "site-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
            ),
            "a sum of",
        ),
    ],
)
def test_what_such_a_recipe_cannot_be(asked: schema.Recipe, text: str) -> None:
    assert any(text in fault for fault in rules.faults(asked)), rules.faults(asked)


@both
def test_no_site_trains_or_sends_a_residual_and_it_moves_all_the_same(name: str) -> None:
    asked = recipe(name, 6)
    assert not rules.faults(asked)
    leaving, moving = groups.leaving(manifest(), asked, 1), groups.moving(manifest(), asked, 1)
    assert set(moving) - set(leaving) == {name for pair in PAIRS for name in factors.residual_names(pair)}
    assert set(moving) == {spec.name for spec in manifest()}
