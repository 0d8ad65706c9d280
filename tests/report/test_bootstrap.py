"""Resampling one site: hand arithmetic, textbook widths, strata that lose no class, and intervals that are withheld."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from fedvfm import errors
from fedvfm.report import bootstrap
from fedvfm.report.bootstrap import SiteScores


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def plain(values: list[float], patients: list[str] | None = None) -> SiteScores:
    names = [f"{at:03d}" for at in range(len(values))]
    owners = None if patients is None else dict(zip(names, patients, strict=True))
    return SiteScores(dict(zip(names, values, strict=True)), patients=owners)


def answered(labels: list[int], answers: list[int], patients: list[str] | None = None) -> SiteScores:
    classes = max(labels + answers) + 1
    rows = np.eye(classes)[answers]
    table = {"label": [float(label) for label in labels]}
    table |= {f"probability_{k}": rows[:, k].tolist() for k in range(classes)}
    names = [f"{at:03d}" for at in range(len(labels))]
    owners = None if patients is None else dict(zip(names, patients, strict=True))
    return SiteScores.from_table(names, table, patients=owners)


def test_a_constant_answer_has_one_value_in_every_draw() -> None:
    """Drawn without regard to class, draws that miss a class would score this answer higher than it is."""
    labels = [0] * 3 + [1] * 124 + [2] * 3
    drawn = bootstrap.resample([answered(labels, [1] * 130)], generator())
    assert drawn.point[0] == pytest.approx(1 / 3)
    assert drawn.table == pytest.approx(1 / 3)
    assert bootstrap.withheld(130, float(drawn.table.min()), float(drawn.table.max())).startswith("no spread")


def test_the_variance_is_that_of_the_recalls_of_the_classes() -> None:
    """Var(balanced accuracy) = sum over classes of s^2 / n, over K^2, with s^2 the unbiased variance."""
    labels, answers = [0] * 6 + [1] * 40, [0] * 4 + [1] * 2 + [1] * 30 + [0] * 10
    drawn = bootstrap.resample([answered(labels, answers)], generator(), 40_000)
    parts = [np.var([1.0] * 4 + [0.0] * 2, ddof=1) / 6, np.var([1.0] * 30 + [0.0] * 10, ddof=1) / 40]
    assert drawn.point[0] == pytest.approx(sklearn.balanced_accuracy_score(labels, answers))
    assert drawn.table.mean() == pytest.approx(drawn.point[0], abs=0.002)
    assert drawn.table.std() == pytest.approx(math.sqrt(sum(parts)) / 2, rel=0.02)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_few_samples_are_not_drawn_too_close_to_their_mean(n: int) -> None:
    values = generator(1).standard_normal(n).tolist()
    drawn = bootstrap.resample([plain(values)], generator(2), 40_000)
    assert drawn.table.std() == pytest.approx(np.std(values, ddof=1) / math.sqrt(n), rel=0.02)


def test_a_patient_is_drawn_with_its_rarest_class() -> None:
    labels = [0, 1, 0, 0, 1, 0]
    scores = answered(labels, labels, ["p", "p", "q", "r", "s", "s"])
    _, counts = bootstrap.totals([scores])
    assert bootstrap.strata(counts).tolist() == [1, 0, 0, 1]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=25),
    st.integers(0, 99),
)
def test_draws_lie_between_0_and_1_around_the_measured_value(rows: list[tuple[int, int, int]], seed: int) -> None:
    labels, answers, owners = ([row[at] for row in rows] for at in range(3))
    scores = answered(labels, answers, [str(owner) for owner in owners])
    drawn = bootstrap.resample([scores], generator(seed), 200)
    recalls = [np.mean([a == k for a, b in zip(answers, labels, strict=True) if b == k]) for k in set(labels)]
    assert drawn.point[0] == pytest.approx(np.mean(recalls))
    assert drawn.units == len(set(owners))
    assert (drawn.table >= -1e-12).all()
    assert (drawn.table <= 1 + 1e-12).all()


def test_a_difference_by_hand() -> None:
    second = [0.1 * at for at in range(10)]
    changes = [0.2, 0.0] * 5
    first = [x + change for x, change in zip(second, changes, strict=True)]
    found = bootstrap.difference([plain(first)], [plain(second)], rng=generator(), draws=20_000)
    assert (found.first, found.second, found.mean) == pytest.approx((0.55, 0.45, 0.1))
    assert found.low is not None
    assert found.high is not None
    # Nine draws of 0 or .2, each with chance one half: the 2.5 % quantile of B(9, 1/2) is 2.
    assert (found.low, found.high) == pytest.approx((2 * 0.2 / 9, 7 * 0.2 / 9))
    assert (found.units, found.word, found.reason) == (10, bootstrap.GAINS, "")


def test_seeds_are_drawn_as_samples_are() -> None:
    zero = [plain([0.0] * 20)] * 2
    found = bootstrap.difference([plain([0.0] * 20), plain([1.0] * 20)], zero, rng=generator())
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.0, 1.0))
    assert found.word == bootstrap.UNKNOWN


def test_under_ten_units_nothing_can_be_told() -> None:
    better = bootstrap.difference([plain([1.0] * 4 + [0.8] * 5)], [plain([0.0] * 9)], rng=generator())
    assert (better.low, better.high, better.word, better.units) == (None, None, bootstrap.UNKNOWN, 9)
    owners = [str(at % 9) for at in range(90)]
    values = generator(3).standard_normal(90)
    grouped = bootstrap.difference(
        [plain((values + 1).tolist(), owners)], [plain((values * 0.9).tolist(), owners)], rng=generator()
    )
    assert (grouped.units, grouped.low) == (9, None)
    assert "9 independent test units" in grouped.reason


def test_equal_models_have_no_interval_of_width_zero() -> None:
    values = generator(4).standard_normal(30).tolist()
    found = bootstrap.difference([plain(values)], [plain(values)], rng=generator())
    assert (found.mean, found.low, found.word) == (0.0, None, bootstrap.UNKNOWN)
    assert found.reason == "no spread among the test samples"


def test_models_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(errors.DataError, match="different samples"):
        bootstrap.difference([plain([0.1] * 3)], [plain([0.1] * 4)], rng=generator())
    with pytest.raises(errors.DataError, match="1 runs of one model and 0"):
        bootstrap.difference([plain([0.1])], [], rng=generator())
