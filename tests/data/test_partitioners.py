"""Laws of the partitioners: disjoint, complete, reproducible, groups not split; and that each skews what it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data.partition import partitioners

KINDS = ("appearance", "dirichlet", "iid", "k-shot", "quantity")


@st.composite
def rows(draw: st.DrawFn) -> partitioners.Rows:
    size = draw(st.integers(1, 80))
    groups = draw(st.lists(st.integers(0, 25), min_size=size, max_size=size))
    labels = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    sites = draw(st.lists(st.sampled_from("abc"), min_size=size, max_size=size))
    names = np.array([f"patient {number}" for number in groups])
    return partitioners.Rows(names, np.array(labels, dtype=np.int64), np.array(sites))


def divide(kind: str, table: partitioners.Rows, sites: int, seed: int = 0, alpha: float = 0.5) -> list[np.ndarray]:
    partition = schema.PartitionConfig(kind=kind, sites=sites, alpha=alpha)
    return partitioners.TABLE.get(kind)(table, sites, np.random.default_rng(seed), partition)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(table=rows(), sites=st.integers(1, 9), seed=st.integers(0, 2**32 - 1), alpha=st.sampled_from([0.05, 0.5, 10.0]))
def test_laws(kind: str, table: partitioners.Rows, sites: int, seed: int, alpha: float) -> None:
    number_of_groups = len(np.unique(table.groups))
    if sites > number_of_groups:
        with pytest.raises(errors.PartitionError, match=f"only {len(table)} samples in {number_of_groups} groups"):
            divide(kind, table, sites, seed, alpha)
        return
    parts = divide(kind, table, sites, seed, alpha)
    assert len(parts) == sites
    assert all(len(part) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(table)))
    homes = [set(table.groups[part]) for part in parts]
    assert sum(map(len, homes)) == len(set().union(*homes)) == number_of_groups
    again = divide(kind, table, sites, seed, alpha)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@settings(max_examples=40, deadline=None)
@given(table=rows())
def test_natural_is_disjoint_and_complete(table: partitioners.Rows) -> None:
    parts = divide("natural", table, 0)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(table)))
    assert [str(table.sites[part[0]]) for part in parts] == sorted(set(table.sites.tolist()))
    assert all(len(set(table.sites[part].tolist())) == 1 for part in parts)


def many(samples: int = 1000, classes: int = 4) -> partitioners.Rows:
    groups = np.array([f"sample {number:04d}" for number in range(samples)])
    return partitioners.Rows(groups, np.arange(samples, dtype=np.int64) % classes)


def class_shares(table: partitioners.Rows, parts: list[np.ndarray]) -> np.ndarray:
    counts = np.array([np.bincount(table.labels[part], minlength=4) for part in parts], dtype=float)
    return counts / counts.sum(axis=0)


def test_another_seed_divides_otherwise() -> None:
    table = many()
    assert any(
        not np.array_equal(one, other)
        for one, other in zip(divide("iid", table, 4, 0), divide("iid", table, 4, 1), strict=True)
    )


def test_iid_sites_are_of_equal_size_and_mixed() -> None:
    table = many()
    parts = divide("iid", table, 7)
    assert {len(part) for part in parts} <= {142, 143}
    assert np.abs(class_shares(table, parts) - 1 / 7).max() < 0.08


def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    table = many()
    spread = {
        alpha: np.mean([class_shares(table, divide("dirichlet", table, 5, seed, alpha)).std() for seed in range(10)])
        for alpha in (0.1, 1.0, 100.0)
    }
    assert spread[0.1] > 1.5 * spread[1.0] > 3 * spread[100.0]


def test_dirichlet_meets_its_drawn_shares_where_groups_are_single_samples() -> None:
    table = many()
    shares = np.random.default_rng(3).dirichlet(np.full(5, 0.5), size=4)
    found = class_shares(table, divide("dirichlet", table, 5, seed=3)).T
    # 250 samples a class: rounding moves at most one sample a site, the least of three groups another three.
    assert np.abs(found - shares).max() <= 4 / 250


def test_quantity_skews_sizes() -> None:
    table = partitioners.Rows(many().groups)
    sizes = [len(part) for part in divide("quantity", table, 6, seed=1, alpha=0.3)]
    assert sum(sizes) == 1000
    assert max(sizes) > 4 * min(sizes)


def test_natural_takes_the_largest_sites() -> None:
    sites = np.array(["b"] * 5 + ["c"] * 2 + ["a"] * 9)
    table = partitioners.Rows(many(16).groups, None, sites)
    assert [len(part) for part in divide("natural", table, 2)] == [9, 5]
    with pytest.raises(
        errors.PartitionError, match=r"partition.sites = 4, but the source has 3 natural sites \(a, b, c\)"
    ):
        divide("natural", table, 4)


def test_kinds_that_do_not_fit_the_samples() -> None:
    unlabelled = partitioners.Rows(many(10).groups)
    with pytest.raises(errors.PartitionError, match=r"skews labels, and these samples have none .* 'quantity'"):
        divide("dirichlet", unlabelled, 2)
    with pytest.raises(errors.PartitionError, match="does not say where its samples come from"):
        divide("natural", unlabelled, 0)
    with pytest.raises(errors.PartitionError, match=r"set partition\.sites"):
        divide("iid", unlabelled, 0)
    with pytest.raises(errors.UnknownName, match=r"unknown partitioner 'dirichlett'.*nearest: 'dirichlet'"):
        partitioners.TABLE.get("dirichlett")
