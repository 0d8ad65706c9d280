"""Noise and draws: from the operating system nobody can repeat them, from a seed anybody can."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import fedvfm
from fedvfm.privacy import randomness

SYSTEM = randomness.System()


def test_the_system_takes_every_number_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each normal number is made of four, and each of those of a pair of 8-byte words."""
    asked: list[int] = []
    real = os.urandom

    def counted(count: int) -> bytes:
        asked.append(count)
        return real(count)

    monkeypatch.setattr(os, "urandom", counted)
    assert SYSTEM.normal(1000).shape == (1000,)
    assert sum(asked) == 4 * 1000 * 8
    SYSTEM.uniform(10)
    assert sum(asked) == 4 * 1000 * 8 + 10 * 8


def test_no_seed_repeats_the_system() -> None:
    """Whatever anyone seeds, two draws share no number."""
    found = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        found.append(np.concatenate([SYSTEM.normal(500), SYSTEM.uniform(500)]))
    assert not set(found[0]) & set(found[1])


def test_seeded_draws_repeat_by_their_words() -> None:
    def draw(*words: Any) -> np.ndarray:
        stream = randomness.Seeded(7, *words)
        return np.concatenate([stream.normal((2, 3)).reshape(-1), stream.uniform(4)])

    assert np.array_equal(draw("privacy", 1, "north"), draw("privacy", 1, "north"))
    assert not np.array_equal(draw("privacy", 1, "north"), draw("privacy", 2, "north"))
    assert not np.array_equal(draw("privacy", 1, "north"), draw("privacy", 1, "south"))


@pytest.mark.parametrize("draws", [SYSTEM, randomness.Seeded(0, "noise")], ids=["system", "seeded"])
def test_numbers_are_normal_and_uniform_and_independent(draws: randomness.Draws) -> None:
    """Each bound is left by a good generator once in about ten million runs."""
    normal, uniform = draws.normal(200_000), draws.uniform(200_000)
    assert stats.kstest(normal, "norm").pvalue > 1e-7
    assert stats.kstest(uniform, "uniform").pvalue > 1e-7
    assert abs(normal.std() - 1) < 5.4 / np.sqrt(2 * len(normal))
    assert abs(stats.kurtosis(normal)) < 5.4 * np.sqrt(24 / len(normal))
    for lag in (1, 2, 100_000):  # the two halves come from one pair of uniform numbers each
        for numbers in (normal, uniform, normal**2):
            one, other = numbers[:-lag], numbers[lag:]
            assert abs(np.corrcoef(one, other)[0, 1]) < 5.4 / np.sqrt(len(one)), lag


def test_ranges_and_shapes() -> None:
    uniform = SYSTEM.uniform((300, 100))
    assert uniform.shape == (300, 100)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert SYSTEM.normal(0).shape == (0,)
    assert SYSTEM.normal((3, 5)).shape == (3, 5)
    assert SYSTEM.normal(7).dtype == np.float64


def test_extreme_words_give_finite_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest uniform number, whose logarithm would be that of nearly 0, and the smallest."""
    for word in (b"\xff", b"\x00"):
        monkeypatch.setattr(os, "urandom", lambda count, word=word: word * count)
        assert np.isfinite(SYSTEM.normal(8)).all()
        assert (SYSTEM.uniform(8) < 1).all()


def test_only_virtual_hospitals_are_seeded() -> None:
    """Sites are called simulated in one place, which is no part of the client; a site is real unless told."""
    from fedvfm.client.training import site as sites

    package = Path(fedvfm.__file__).parent
    told = [path for path in package.rglob("*.py") if "simulated=True" in path.read_text(encoding="utf-8")]
    assert {path.relative_to(package).parts[0] for path in told} == {"simulation"}
    assert sites.Site.simulated is False
