"""Laws every aggregation rule keeps, and each rule against dense arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.aggregators import averaging_error, base, exact_sum, products, svd
from fedvfm.aggregators import table as rules
from fedvfm.server.rounds import handshake
from fedvfm.state import state

NAMES = [name for name in rules.TABLE.names() if name not in ("residual", "stack")]
OUT, IN, RANK = 6, 9, 4
few = settings(max_examples=25, deadline=None)
weights = st.floats(0.1, 1000.0)
seeds = st.integers(0, 2**32 - 1)


def manifest(rank: int = RANK, alpha: float = 8.0) -> state.Manifest:
    rows = [state.ArraySpec("head.weight", (3, 4), "head"), state.ArraySpec("head.bias", (3,), "head")]
    for pair in ("block.00.q", "block.01.v"):
        rows.append(state.ArraySpec(f"{pair}.A", (rank, IN), "lora", "A", pair, alpha / rank))
        rows.append(state.ArraySpec(f"{pair}.B", (OUT, rank), "lora", "B", pair, alpha / rank))
    return state.Manifest.of(rows)


START = state.AdapterState({spec.name: np.full(spec.shape, 0.25, np.float32) for spec in manifest()})


def contribution(seed: int, weight: float, rank: int = RANK, alpha: float = 8.0) -> base.Contribution:
    rng, rows = np.random.default_rng(seed), manifest(rank, alpha)
    arrays = {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in rows}
    return base.Contribution(weight, state.AdapterState(arrays), rows, START if rank == RANK else None)


def aggregate(
    name: str, updates: Sequence[base.Contribution], rows: state.Manifest | None = None
) -> state.AdapterState:
    rule: base.Aggregator = rules.TABLE.get(name)()
    acc = rule.init(rows or manifest())
    for update in updates:
        acc = rule.fold(acc, update)
    return rule.finish(acc)[0]


def effective(adapter: state.AdapterState, rows: state.Manifest) -> dict[str, NDArray[np.float64]]:
    """What the adapter does to the backbone: dense arrays, and scale B A of every pair."""
    found = {spec.name: adapter[spec.name].astype(np.float64) for spec in rows if spec.role == "dense"}
    for pair, (a, b) in rows.pairs().items():
        found[pair] = a.scale * adapter[b.name].astype(np.float64) @ adapter[a.name].astype(np.float64)
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(
            value, other[name], rtol=tolerance, atol=tolerance * max(1.0, np.abs(value).max()), err_msg=name
        )


groups = st.lists(st.tuples(seeds, weights), min_size=1, max_size=5)


@pytest.mark.parametrize("name", NAMES)
@few
@given(group=groups, order=st.randoms(use_true_random=False))
def test_order_of_sites_does_not_matter(name: str, group: list[tuple[int, float]], order: Any) -> None:
    updates = [contribution(seed, weight) for seed, weight in group]
    shuffled = list(updates)
    order.shuffle(shuffled)
    one, other = aggregate(name, updates), aggregate(name, shuffled)
    assert_same(effective(one, manifest()), effective(other, manifest()))
    if rules.TABLE.get(name).any_order:
        assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("name", NAMES)
@few
@given(seed=seeds, weight=weights)
def test_one_site_is_the_identity(name: str, seed: int, weight: float) -> None:
    one = contribution(seed, weight)
    assert_same(effective(aggregate(name, [one]), manifest()), effective(one.state, manifest()))
    if rules.TABLE.get(name).any_order:
        assert aggregate(name, [one]) == one.state


@pytest.mark.parametrize("name", NAMES)
@few
@given(seed=seeds, many=st.lists(weights, min_size=2, max_size=5))
def test_equal_updates_are_that_update(name: str, seed: int, many: list[float]) -> None:
    updates = [contribution(seed, weight) for weight in many]
    assert_same(effective(aggregate(name, updates), manifest()), effective(updates[0].state, manifest()))
    if rules.TABLE.get(name).any_order:
        assert aggregate(name, updates) == updates[0].state


@pytest.mark.parametrize("name", NAMES)
@few
@given(group=groups)
def test_a_fold_leaves_the_accumulator_before_it_alone(name: str, group: list[tuple[int, float]]) -> None:
    """State in, state out: a rule can be checkpointed between folds and folded on twice."""
    rule: base.Aggregator = rules.TABLE.get(name)()
    updates = [contribution(seed, weight) for seed, weight in group]
    early = rule.init(manifest())
    for update in updates:
        early = rule.fold(early, update)
    before = rule.finish(early)[0].fingerprint
    for extra in (1, 2):
        rule.fold(early, contribution(extra, 3.0))
    assert rule.finish(early)[0].fingerprint == before
    assert aggregate(name, updates).fingerprint == before
    for update, row in zip(updates, group, strict=True):
        assert update.state == contribution(*row).state


@pytest.mark.parametrize("name", NAMES)
@few
@given(group=groups, factor=st.floats(0.01, 100.0))
def test_only_the_ratio_of_weights_counts(name: str, group: list[tuple[int, float]], factor: float) -> None:
    one = aggregate(name, [contribution(seed, weight) for seed, weight in group])
    other = aggregate(name, [contribution(seed, weight * factor) for seed, weight in group])
    assert_same(effective(one, manifest()), effective(other, manifest()))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_admitted_is_an_empty_cohort(name: str) -> None:
    with pytest.raises(errors.EmptyCohort, match="nothing to aggregate"):
        aggregate(name, [])


@pytest.mark.parametrize("name", NAMES)
def test_equal_input_gives_equal_bytes_and_the_global_manifest(name: str) -> None:
    updates = [contribution(seed, 1.0 + seed) for seed in range(4)]
    one = aggregate(name, updates)
    assert one.fingerprint == aggregate(name, updates).fingerprint
    assert {key: value.shape for key, value in one.items()} == {spec.name: spec.shape for spec in manifest()}


@pytest.mark.parametrize("name", NAMES)
def test_a_site_at_the_recipes_rank_gets_the_adapter_as_it_is(name: str) -> None:
    adapter = aggregate(name, [contribution(seed, 1.0) for seed in range(3)])
    assert rules.TABLE.get(name)().for_site(adapter, manifest()).fingerprint == adapter.fingerprint


# -- mean ------------------------------------------------------------------------------------------------------------


@few
@given(group=groups)
def test_mean_is_numpys_average_of_every_array(group: list[tuple[int, float]]) -> None:
    updates = [contribution(seed, weight) for seed, weight in group]
    found = aggregate("mean", updates)
    for name, array in found.items():
        whole = np.average(
            [u.state[name].astype(np.float64) for u in updates], axis=0, weights=[u.weight for u in updates]
        )
        np.testing.assert_allclose(array, whole, rtol=1e-6, atol=1e-7)


def test_mean_refuses_a_site_of_another_rank() -> None:
    rule = rules.TABLE.get("mean")()
    with pytest.raises(errors.HandshakeRefused, match="Use rule 'svd' for mixed ranks"):
        rule.for_site(contribution(0, 1.0).state, handshake.at_rank(manifest(), 2))


# -- svd -------------------------------------------------------------------------------------------------------------

mixed = st.lists(st.tuples(seeds, weights, st.integers(1, 5), st.floats(0.5, 32.0)), min_size=1, max_size=5)


def dense_mean(updates: Sequence[base.Contribution], pair: str) -> NDArray[np.float64]:
    products = [effective(update.state, update.manifest)[pair] for update in updates]
    found: NDArray[np.float64] = np.average(products, axis=0, weights=[update.weight for update in updates])
    return found


def truncated(matrix: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    found: NDArray[np.float64] = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return found


@few
@given(group=mixed, rank=st.integers(1, 6), alpha=st.floats(0.5, 32.0))
def test_svd_is_the_dense_truncated_svd_of_the_mean_product(group: list[Any], rank: int, alpha: float) -> None:
    updates = [contribution(*row) for row in group]
    rows = manifest(rank, alpha)
    adapter = aggregate("svd", updates, rows)
    assert {key: value.shape for key, value in adapter.items()} == {spec.name: spec.shape for spec in rows}
    for pair in rows.pairs():
        whole = dense_mean(updates, pair)
        # Near a tie of singular values the truncation is not unique, but how well it fits is.
        ours = effective(adapter, rows)[pair]
        best = np.linalg.norm(whole - truncated(whole, rank))
        size = np.linalg.norm(whole)
        assert abs(np.linalg.norm(whole - ours) - best) <= 1e-6 * size
        s = np.linalg.svd(whole, compute_uv=False)
        if rank >= len(s) or s[rank - 1] - s[rank] > 1e-2 * s[0]:
            np.testing.assert_allclose(ours, truncated(whole, rank), rtol=0, atol=2e-6 * float(size))


@pytest.mark.parametrize("formed", [False, True], ids=["stacks", "matrix"])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_singular_vectors_of_a_sum_of_products_are_those_of_the_dense_matrix(
    shape: tuple[int, int], formed: bool
) -> None:
    rng = np.random.default_rng(3)
    factors = [
        (rng.standard_normal((shape[0], r)).astype(np.float32), rng.standard_normal((r, shape[1])).astype(np.float32))
        for r in (1, 2, 4)
    ]
    product = products.Product()
    for b, a in factors[: 3 if formed else 2]:
        product = product.add(0.5, b, a)
    assert (product.whole is not None) == formed, "7 columns and 7 rows hold more than the matrix, 3 hold less"
    whole = sum((0.5 * b.astype(np.float64) @ a for b, a in factors[: 3 if formed else 2]), np.zeros(shape))
    np.testing.assert_allclose(product.matrix(), whole, atol=1e-12)
    for rank in range(1, 8):
        u, s, vt = product.decomposed(rank)
        assert len(s) == min(rank, 6 if formed else 3)
        np.testing.assert_allclose((u * s) @ vt, truncated(whole, rank), atol=1e-7 * float(np.linalg.norm(whole)))
        np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-10)


@few
@given(group=mixed, site_rank=st.integers(1, RANK), alpha=st.floats(0.5, 32.0))
def test_a_site_of_lower_rank_gets_the_best_approximation_at_its_own_scale(
    group: list[Any], site_rank: int, alpha: float
) -> None:
    rows = manifest(RANK, alpha)
    adapter = aggregate("svd", [contribution(*row) for row in group], rows)
    site_rows = handshake.at_rank(rows, site_rank)
    own = rules.TABLE.get("svd")().for_site(adapter, site_rows)
    assert {key: value.shape for key, value in own.items()} == {spec.name: spec.shape for spec in site_rows}
    for pair, product in effective(adapter, rows).items():
        found = effective(own, site_rows)[pair]
        if pair not in rows.pairs():
            np.testing.assert_array_equal(found, product)
            continue
        size = max(float(np.linalg.norm(product)), 1e-30)
        best = np.linalg.norm(product - truncated(product, site_rank))
        assert abs(np.linalg.norm(product - found) - best) <= 3e-6 * size


def test_the_first_adapter_reaches_every_rank_alive() -> None:
    """B is zero at the start, so a site's A must not be: else its pair could never learn."""
    rows = manifest()
    start = {key: np.zeros_like(v) if key.endswith(".B") else v for key, v in contribution(0, 1.0).state.items()}
    own = rules.TABLE.get("svd")().for_site(state.AdapterState(start), handshake.at_rank(rows, 2))
    assert np.abs(own["block.00.q.A"]).min() > 0
    assert not own["block.00.q.B"].any()


def test_svd_of_all_zero_products_stays_alive() -> None:
    zero = {key: np.zeros_like(v) if key.endswith(".B") else v for key, v in contribution(0, 1.0).state.items()}
    found = aggregate("svd", [base.Contribution(1.0, state.AdapterState(zero), manifest())])
    assert found.finite()
    assert not found["block.00.q.B"].any()
    assert np.abs(found["block.00.q.A"]).min(axis=1).all()


def test_directions_that_no_site_uses_can_still_learn() -> None:
    """Both factors zero where the sites span less than the global rank: no gradient would ever wake them."""
    rows = manifest(RANK)
    adapter = aggregate("svd", [contribution(0, 1.0, rank=2)], rows)
    alive = np.abs(adapter["block.00.q.A"]).sum(axis=1) + np.abs(adapter["block.00.q.B"]).sum(axis=0) > 0
    assert alive.all()
    assert_same(effective(adapter, rows), effective(contribution(0, 1.0, rank=2).state, manifest(2)))


def spanning(count: int, directions: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factors B of ``count`` sites, and the A of them all: few directions, the rest of the rank is zero."""
    rng = np.random.default_rng(count + directions)
    # Small whole numbers are exact in float32 however they are mixed: the sum has this rank and no more.
    mixes = np.triu(rng.integers(-3, 4, (count, RANK, directions)), 1) + np.eye(RANK, directions)
    b, a = rng.integers(-9, 10, (24, RANK)) @ mixes, rng.integers(-9, 10, (directions, 40))
    padded = np.pad(b, [(0, 0), (0, 0), (0, RANK - directions)]), np.pad(a, [(0, RANK - directions), (0, 0)])
    return padded[0].astype(np.float32), padded[1].astype(np.float32)


@pytest.mark.parametrize("sizes", [(1.0,), (2.0**-40,), (2.0**40,), (2.0**-20, 1.0, 2.0**10)], ids=str)
@pytest.mark.parametrize("directions", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 33, 100, 300])
def test_a_sum_of_too_few_directions_has_no_others(count: int, directions: int, sizes: tuple[float, ...]) -> None:
    """As stacks, as a matrix, and where the sum of ranks fills a batch: no rounding becomes a direction."""
    tall, wide = spanning(count, directions)
    product, whole = products.Product(), np.zeros((24, 40))
    for number in range(count):
        size = np.float32(sizes[number % len(sizes)])
        product = product.add(1.0 + number, size * tall[number], size * wide)
        whole += (1.0 + number) * size**2 * (tall[number].astype(np.float64) @ wide)
    b, a = svd.split(product, RANK, 2.0)
    expected = np.linalg.matrix_rank(whole)
    assert np.count_nonzero(np.linalg.norm(b, axis=0)) == np.count_nonzero(np.linalg.norm(a, axis=1)) == expected
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-6)
    largest = float(np.abs(whole).max())
    np.testing.assert_allclose(2.0 * b.astype(np.float64) @ a, truncated(whole, RANK), rtol=0, atol=3e-7 * largest)
    assert expected == directions


# -- fair and hetlora ------------------------------------------------------------------------------------------------


def test_fair_is_the_ridge_solution_and_nearer_to_the_mean_product_than_the_mean() -> None:
    updates, rows = [contribution(seed, 1.0 + seed) for seed in range(3)], manifest()
    found, mean = aggregate("fair", updates), aggregate("mean", updates)
    for pair, (a, b) in rows.pairs().items():
        whole, mean_a, mean_b = dense_mean(updates, pair) / a.scale, *(mean[spec.name] for spec in (a, b))
        gram = mean_a.astype(np.float64) @ mean_a.T
        level = 0.01 * np.trace(gram) / RANK
        correction = (
            (whole - mean_b.astype(np.float64) @ mean_a) @ mean_a.T @ np.linalg.inv(gram + level * np.eye(RANK))
        )
        np.testing.assert_array_equal(found[a.name], mean_a)
        np.testing.assert_allclose(found[b.name], mean_b + correction, rtol=1e-5, atol=1e-6)
        off, before = (np.linalg.norm(effective(one, rows)[pair] / a.scale - whole) for one in (found, mean))
        assert off < before
    np.testing.assert_array_equal(found["head.weight"], mean["head.weight"])


def test_fair_of_one_common_factor_is_the_mean() -> None:
    """The mean is exact then, whichever factor it is."""
    first = contribution(0, 1.0)
    for role in "AB":
        arrays = {
            key: first.state[key] if key.endswith("." + role) else v for key, v in contribution(1, 1.0).state.items()
        }
        updates = [first, base.Contribution(3.0, state.AdapterState(arrays), manifest())]
        assert_same(dict(aggregate("fair", updates)), dict(aggregate("mean", updates)))


def test_hetlora_weighs_padded_factors_by_the_size_of_their_product() -> None:
    updates, rows = [contribution(1, 1.0, rank=2), contribution(2, 3.0, rank=RANK)], manifest()
    found = aggregate("hetlora", updates, rows)
    for pair, (a, b) in rows.pairs().items():
        sizes = [u.weight * np.linalg.norm(effective(u.state, u.manifest)[pair]) for u in updates]
        small, large = (u.manifest.pairs()[pair][0].scale for u in updates)
        padded = np.sqrt(small / large) * np.pad(updates[0].state[a.name], ((0, RANK - 2), (0, 0)))
        np.testing.assert_allclose(
            found[a.name], np.average([padded, updates[1].state[a.name]], axis=0, weights=sizes), rtol=1e-5, atol=1e-6
        )
        assert found[b.name].shape == b.shape


def test_hetlora_of_zero_products_is_the_mean() -> None:
    """So it is before the first step: B is zero, and no site is larger than another."""
    start = [
        {k: np.zeros_like(v) if k.endswith(".B") else v for k, v in contribution(s, 1.0).state.items()} for s in (1, 2)
    ]
    updates = [base.Contribution(1.0, state.AdapterState(one), manifest()) for one in start]
    assert_same(dict(aggregate("hetlora", updates)), dict(aggregate("mean", updates)))


# -- the error of averaging factors apart ----------------------------------------------------------------------------


def measured(
    updates: Sequence[base.Contribution], rows: state.Manifest | None = None
) -> averaging_error.AveragingError:
    found = averaging_error.AveragingError(rows or manifest())
    for update in updates:
        found.add(update)
    return found


def dense_errors(
    updates: Sequence[base.Contribution], aggregate: state.AdapterState, rows: state.Manifest, pairs: Sequence[str]
) -> float:
    found = effective(aggregate, rows)
    difference = sum(np.sum((found[pair] - dense_mean(updates, pair)) ** 2) for pair in pairs)
    return float(np.sqrt(difference / sum(np.sum(dense_mean(updates, pair) ** 2) for pair in pairs)))


@few
@given(group=groups, alpha=st.floats(0.5, 32.0))
def test_factor_error_is_the_dense_formula(group: list[tuple[int, float]], alpha: float) -> None:
    updates = [contribution(seed, weight, RANK, alpha) for seed, weight in group]
    rows = manifest(RANK, alpha)
    expected = dense_errors(updates, aggregate("mean", updates, rows), rows, list(rows.pairs()))
    assert measured(updates, rows).factor() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_factor_error_is_zero_where_one_factor_is_common() -> None:
    one, other = contribution(0, 1.0), contribution(1, 2.0)
    shared = {key: one.state[key] if key.endswith(".A") else value for key, value in other.state.items()}
    assert measured([one, base.Contribution(2.0, state.AdapterState(shared), manifest())]).factor() == 0.0


@pytest.mark.parametrize("rule", ["mean", "svd"])
def test_aggregate_error_is_the_dense_formula(rule: str) -> None:
    ranks = (RANK, RANK, RANK) if rule == "mean" else (1, 2, RANK)
    updates = [contribution(seed, 1.0 + seed, rank) for seed, rank in enumerate(ranks)]
    rows = manifest(RANK)
    made = aggregate(rule, updates, rows)
    found = measured(updates, rows)
    assert found.mixed == (rule == "svd")
    error = found.aggregate(made)
    assert error == pytest.approx(dense_errors(updates, made, rows, list(rows.pairs())), rel=1e-5)
    assert error > 0.01, "three random products do not fit into the global rank, nor into a mean of factors"
    if rule == "mean":
        assert error == pytest.approx(found.factor(), rel=1e-5)
    one = measured(updates[-1:], updates[-1].manifest).aggregate(updates[-1].state)
    assert one == pytest.approx(0.0, abs=1e-6)


def test_factor_error_where_it_has_no_meaning() -> None:
    assert measured([]).factor() is None
    assert measured([contribution(0, 1.0), contribution(1, 1.0, rank=2)]).factor() is None
    rows = state.Manifest.of([state.ArraySpec("head.bias", (3,), "head")])
    bias = base.Contribution(1.0, state.AdapterState({"head.bias": np.ones(3, np.float32)}), rows)
    assert measured([bias], rows).factor() is None


def test_many_large_pairs_are_measured_at_a_sample_that_the_names_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [contribution(seed, 1.0 + seed) for seed in range(3)]
    assert measured(updates).sample() == {}
    monkeypatch.setattr(averaging_error, "ALL_BELOW", 2 * OUT * IN - 1)
    monkeypatch.setattr(averaging_error, "SAMPLE", OUT * IN)
    found = measured(updates)
    (pair,) = found.sample()["error_measured_at"]
    assert measured(updates[::-1]).sample() == {"error_measured_at": [pair]}
    mean = aggregate("mean", updates)
    expected = dense_errors(updates, mean, manifest(), [pair])
    assert found.factor() == pytest.approx(expected, rel=1e-5)
    # A pair that is larger than the sample: every third row of B.
    monkeypatch.setattr(averaging_error, "SAMPLE", OUT * IN // 3)
    products, own = dense_mean(updates, pair)[::3], effective(mean, manifest())[pair][::3]
    third = float(np.linalg.norm(own - products) / np.linalg.norm(products))
    assert measured(updates).factor() == pytest.approx(third, rel=1e-5)
    assert measured(updates).factor() != found.factor()


# -- exact sums ------------------------------------------------------------------------------------------------------


def fractions_of(sums: exact_sum.ExactSum) -> list[Fraction]:
    whole = [Fraction(0)] * len(next(iter(sums.totals().values())))
    for unit in sums.emptied().chunks[0].values():
        whole = [total + Fraction(float(value)) for total, value in zip(whole, unit, strict=True)]
    return whole


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=3, max_size=3),
            st.floats(2.0**-20, 2.0**24, width=32),
        ),
        min_size=1,
        max_size=6,
    ),
    most=st.integers(1, 4),
)
def test_a_sum_is_that_of_its_terms_rounded_to_the_last_place(rows: list[Any], most: int) -> None:
    """Any float32 numbers, huge, tiny and cancelling, against rational arithmetic."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_sum, "BUFFER_TERMS", most)
        patch.setattr(exact_sum, "MOST", 2)
        sums = exact_sum.ExactSum()
        expected = [Fraction(0)] * 3
        for values, weight in rows:
            sums = sums.add(weight, {"x": np.float32(values)})
            terms = [Fraction(weight) * Fraction(value) for value in values]
            expected = [
                total + Fraction(round(term * 2**64), 2**64) for total, term in zip(expected, terms, strict=True)
            ]
        assert fractions_of(sums) == expected
        assert sums.weight == sum(Fraction(weight) for _, weight in rows)
        for total, exact in zip(sums.totals()["x"], expected, strict=True):
            assert abs(Fraction(float(total)) - exact) <= abs(exact) * Fraction(1, 2**48)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (5,)])
def test_arrays_without_a_side_or_a_number(shape: tuple[int, ...]) -> None:
    sums = exact_sum.ExactSum().add(2.0, {"x": np.full(shape, 3.0, np.float32)})
    mean = sums.add(1.0, {"x": np.full(shape, 6.0, np.float32)}).mean()["x"]
    assert mean.shape == shape
    assert (mean == 4.0).all()


def test_what_is_not_finite_is_not_summed() -> None:
    for wrong in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            exact_sum.ExactSum().add(1.0, {"x": np.float32([0.0, wrong, 1.0])}).totals()


def test_sums_of_more_terms_than_a_bin_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_sum, "MOST", 64)
    value = np.float32([2.0**15 - 2**-9, -(2.0**15 - 2**-9), 2.0**-40])
    sums = exact_sum.ExactSum()
    for _ in range(1000):
        sums = sums.add(1.0, {"x": value})
    np.testing.assert_array_equal(sums.totals()["x"], 1000 * value.astype(np.float64))
