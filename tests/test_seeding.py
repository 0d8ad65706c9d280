"""Random streams: one a purpose, the same in every process, independent of what was drawn before."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import seeding

words = st.lists(st.one_of(st.integers(-(10**9), 10**9), st.text("abc01-", max_size=4)), max_size=4)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), one=words, other=words)
def test_other_words_are_another_stream(seed: int, one: list[str | int], other: list[str | int]) -> None:
    same = [(type(word), word) for word in one] == [(type(word), word) for word in other]
    assert (seeding.key(seed, *one) == seeding.key(seed, *other)) == same


def test_a_word_and_its_number_differ() -> None:
    assert seeding.key(1, "2") != seeding.key(1, 2)
    assert seeding.key(12) != seeding.key(1, 2)
    assert seeding.key(1, "a", "b") != seeding.key(1, "b", "a") != seeding.key(2, "b", "a")


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    first = seeding.stream(7, "augment", "north", 3).random(4)
    seeding.stream(7, "order").random(1000)
    np.random.default_rng(0).random(10)
    np.testing.assert_array_equal(first, seeding.stream(7, "augment", "north", 3).random(4))


def test_streams_are_not_correlated() -> None:
    draws = np.stack([seeding.stream(0, "site", number).standard_normal(2000) for number in range(20)])
    off = np.asarray(np.corrcoef(draws))[~np.eye(20, dtype=bool)]
    assert np.abs(off).max() < 0.12  # 380 values of standard deviation 1 / sqrt(2000) = 0.022


def test_torch_seeds_fit_torch() -> None:
    seeds = [seeding.torch_seed(5, "train", number) for number in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(seeds)) == 200


def test_the_numbers_are_a_promise_in_every_process() -> None:
    """Golden: a resume on a newer Python or NumPy must draw the same."""
    script = (
        "from fedvfm import seeding; print(seeding.key(3, 'north', 1), seeding.stream(3, 'north', 1).integers(10**6))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1596454253252903966", "143227"]
