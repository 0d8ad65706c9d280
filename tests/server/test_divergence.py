"""Cosine, drift and effective rank: by hand, by law, bounded with many sites, and absent where nothing may stay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm.server.rounds import divergence
from fedvfm.state.state import AdapterState, ArraySpec, Manifest


def manifest(rank: int = 2, out: int = 3, into: int = 4) -> Manifest:
    return Manifest.of(
        [
            ArraySpec("block.00.q.A", (rank, into), "adapter", "A", "block.00.q", 1.0),
            ArraySpec("block.00.q.B", (out, rank), "adapter", "B", "block.00.q", 1.0),
            ArraySpec("head.bias", (2,), "head"),
        ]
    )


def adapter(spec: Manifest, **arrays: np.ndarray) -> AdapterState:
    zeros = {row.name: np.zeros(row.shape, np.float32) for row in spec}
    return AdapterState(zeros | {name: np.asarray(value, np.float32) for name, value in arrays.items()})


def moved(spec: Manifest, change: np.ndarray) -> AdapterState:
    """The zero adapter with these numbers, array by array in the order of names."""
    arrays, at = {}, 0
    for row in sorted(spec, key=lambda row: row.name):
        arrays[row.name] = change[at : at + row.size].reshape(row.shape).astype(np.float32)
        at += row.size
    return AdapterState(arrays)


def record(changes: dict[str, np.ndarray], spec: Manifest | None = None) -> dict:
    spec = spec or manifest()
    found = divergence.Divergence(list(changes), spec, adapter(spec))
    for site, change in changes.items():
        found.add(site, moved(spec, change), spec)
    made = found.record()
    assert made is not None
    return made


def test_three_sites_by_hand() -> None:
    size = sum(row.size for row in manifest())
    one, two = np.eye(size)[0] * 3, np.eye(size)[1] * 4
    made = record({"a": one, "b": two, "c": one + two})
    assert made["cosine"] == {"mean": pytest.approx((0 + 0.6 + 0.8) / 3, rel=1e-5), "least": 0.0, "between": ["a", "b"]}
    assert made["norm"] == pytest.approx((3 + 4 + 5) / 3)
    mean = np.array([2, 8 / 3])
    drift = [np.linalg.norm(row - mean) for row in ([3, 0], [0, 4], [3, 4])]
    assert made["drift"] == pytest.approx(np.mean(drift), rel=1e-5)
    assert made["alignment"]["c"] == pytest.approx(1.0)
    assert made["alignment"]["a"] == pytest.approx(3 / np.hypot(3, 8), rel=1e-5)
    assert (made["sites"], made["numbers"]) == (3, size)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(0, 999))
def test_the_order_of_sites_changes_no_bit_and_bounds_hold(sites: int, seed: int) -> None:
    size = sum(row.size for row in manifest())
    rng = np.random.default_rng(seed)
    changes = {f"site-{at}": rng.normal(size=size) for at in range(sites)}
    made = record(changes)
    assert made == record(dict(reversed(changes.items())))
    assert -1 <= made["cosine"]["least"] <= made["cosine"]["mean"] <= 1
    assert made["drift"] <= 2 * made["norm"]
    same = record(dict.fromkeys(changes, np.ones(size)))
    assert (same["cosine"]["least"], same["drift"]) == (1.0, 0.0)


def test_of_many_sites_and_numbers_a_sample_is_measured() -> None:
    spec = Manifest.of([ArraySpec("head.weight", (400, 1000), "head"), ArraySpec("head.bias", (1000,), "head")])
    start = adapter(spec)
    rng = np.random.default_rng(0)
    common = rng.normal(size=401_000)
    names = [f"site-{at:04d}" for at in range(300)]
    found = divergence.Divergence(names, spec, start)
    for site in names:
        found.add(site, moved(spec, common + rng.normal(size=401_000)), spec)
    made = found.record()
    assert made is not None
    assert made["sites"] == divergence.SITES == len(found._changes)
    assert made["numbers"] == pytest.approx(divergence.NUMBERS, abs=2)
    assert made["cosine"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert made["norm"] == pytest.approx(np.sqrt(2 * 401_000), rel=0.02)
    assert made["drift"] == pytest.approx(np.sqrt(401_000), rel=0.02)


def test_what_cannot_be_compared_is_left_out() -> None:
    spec, other = manifest(2), manifest(1)
    found = divergence.Divergence(["a", "b", "c"], spec, adapter(spec))
    found.add("a", moved(spec, np.ones(16)), spec)
    found.add("b", moved(other, np.ones(9)), other)
    found.add("c", adapter(spec), spec)
    assert found.record() is None, "one of another rank, one that did not move"
    nothing = divergence.Divergence(["a", "b"], spec, None)
    nothing.add("a", moved(spec, np.ones(16)), spec)
    assert nothing.record() is None


@pytest.mark.parametrize(("values", "rank"), [([1.0, 1.0], 2.0), ([1.0, 0.0], 1.0), ([3.0, 1.0], None)])
def test_effective_rank_of_known_singular_values(values: list[float], rank: float | None) -> None:
    spec = manifest()
    a, b = np.zeros((2, 4)), np.zeros((3, 2))
    for at, value in enumerate(values):
        a[at, at], b[at, at] = 2.0, value / 2
    found = divergence.effective_rank(adapter(spec, **{"block.00.q.A": a, "block.00.q.B": b}), spec)
    shares = np.array(values) / sum(values)
    expected = rank or float(np.exp(-(shares * np.log(shares)).sum()))
    assert found == {"mean": pytest.approx(expected, rel=1e-5), "least": pytest.approx(expected, rel=1e-5)}
    assert divergence.effective_rank(adapter(spec), spec) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(0, 999))
def test_effective_rank_is_that_of_the_dense_product(rank: int, seed: int) -> None:
    spec, rng = manifest(rank, 7, 9), np.random.default_rng(seed)
    a, b = rng.normal(size=(rank, 9)).astype(np.float32), rng.normal(size=(7, rank)).astype(np.float32)
    found = divergence.effective_rank(adapter(spec, **{"block.00.q.A": a, "block.00.q.B": b}), spec)
    singular = np.linalg.svd(b.astype(float) @ a.astype(float), compute_uv=False)[: min(rank, 7)]
    shares = singular / singular.sum()
    assert found is not None
    assert found["mean"] == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-4)


def test_the_chosen_sites_hang_on_names_alone() -> None:
    spec = manifest()
    names = [f"site-{at}" for at in range(200)]
    chosen = [divergence.Divergence(order, spec, adapter(spec))._followed for order in (names, names[::-1])]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == divergence.SITES
