"""Targets beside one class: losses by hand, metrics against scikit-learn, and what of a recipe does not fit."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torch import nn

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.tasks import base, metrics, table, target_metrics, targets

RANGES = {"ranges": [[0.0, 100.0], [-5.0, 5.0]], "centres": [40.0, 0.0], "scales": [10.0, 2.0]}
KINDS: dict[str, dict[str, Any]] = {
    "ordinal": {},
    "multi-label": {"prevalence": [0.1, 0.4]},
    "regression": RANGES,
}


def task(kind: str, names: int = 2, task_kind: str = "case-classification", **target: Any) -> base.Task:
    values = {
        "backbone": {"name": "unet"},
        "task": {"kind": task_kind},
        "target": {"kind": kind, **target},
        "data": {"class_names": [f"n{at}" for at in range(names)]},
    }
    recipe = schema.parse(schema.Recipe, values, "recipe")
    chosen: base.Task = table.TABLE.get(task_kind)(recipe)
    return chosen


def test_grades_are_made_of_the_chances_of_going_on() -> None:
    numbers = torch.tensor([[0.3, -1.2, 2.0]])
    logs = targets.Ladder(nn.Identity())(numbers)[0]
    on = [1 / (1 + math.exp(-z)) for z in (0.3, -1.2, 2.0)]
    expected = [1 - on[0], on[0] * (1 - on[1]), on[0] * on[1] * (1 - on[2]), on[0] * on[1] * on[2]]
    assert logs.exp().tolist() == pytest.approx(expected, rel=1e-5)
    own = task("ordinal", 4)
    assert float(own.loss(logs[None], torch.tensor([2]))) == pytest.approx(-math.log(expected[2]), rel=1e-5)
    assert own.answers(logs).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stated", [0.02, 0.5, 0.8])
def test_a_stated_prevalence_weighs_and_leaves_probabilities_as_they_are(stated: float) -> None:
    """Whatever is stated, the loss is least where the probability is the share of the cases."""
    own, share = task("multi-label", prevalence=[stated, 0.5]), 0.3
    numbers = torch.full((10, 2), math.log(share / (1 - share)), requires_grad=True)
    labels = torch.tensor([[1.0, 1.0, float(at < 3), float(at < 3)] for at in range(10)])
    own.loss(numbers, labels).backward()
    assert numbers.grad is not None
    assert numbers.grad.sum(dim=0).abs().max() < 1e-6
    # At the stated share yes and no weigh alike.
    at_stated = torch.full((2, 2), math.log(stated / (1 - stated)))
    yes, no = own.losses(at_stated, torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    assert float(yes / no) == pytest.approx((1 - stated) / stated, rel=1e-4)


def test_a_regression_answers_in_units_and_learns_in_scales() -> None:
    own = task("regression", **RANGES)
    head = targets.Affine(nn.Identity(), [10.0, 2.0], [40.0, 0.0])
    answers = head(torch.tensor([[1.0, -0.5]]))
    assert answers.tolist() == [[50.0, -1.0]]
    target = torch.as_tensor(own.target(None, (45.0, 3.0)))[None]  # type: ignore[arg-type]
    assert float(own.loss(answers, target)) == pytest.approx((0.5**2 + 2.0**2) / 2)
    assert own.row(own.answers(answers[0])) == {"values": {"n0": 50.0, "n1": -1.0}}


@pytest.mark.parametrize("kind", ["multi-label", "regression"])
def test_a_missing_value_teaches_nothing(kind: str) -> None:
    own = task(kind, **KINDS[kind])
    target = torch.as_tensor(own.target(None, (None, 1.0)))[None]  # type: ignore[arg-type]
    numbers = torch.zeros(1, 2, requires_grad=True)
    own.losses(numbers, target).sum().backward()
    assert numbers.grad is not None
    assert numbers.grad[0, 0] == 0
    assert numbers.grad[0, 1] != 0
    with pytest.raises(errors.DataError, match="without values of the columns"):
        own.target(None, None)  # type: ignore[arg-type]


def test_grades_are_scored_as_scikit_learn_does() -> None:
    rng = np.random.default_rng(0)
    truth, chances = rng.integers(0, 4, 60), rng.dirichlet(np.ones(4), 60)
    scores = target_metrics.OrdinalScores(["a", "b", "c", "d"])
    for at, (label, row) in enumerate(zip(truth, chances, strict=True)):
        scores.add(f"{at:02d}", row, int(label))
    answered, value = chances.argmax(axis=1), scores.value()
    kappa = reference.cohen_kappa_score(truth, answered, weights="quadratic")
    assert value["quadratic_kappa"] == pytest.approx(kappa, abs=1e-12)
    assert value["mae"] == pytest.approx(np.abs(truth - answered).mean())
    assert value["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(truth, answered))
    alike = target_metrics.OrdinalScores(["a", "b"])
    alike.add("x", np.array([0.9, 0.1]), 0)
    assert "quadratic_kappa" not in alike.value()


def test_grades_of_many_images_fit_into_memory() -> None:
    """Public test sets of grades have 50,000 images; all pairs of them would take 20 GB."""
    rng, scores = np.random.default_rng(0), target_metrics.OrdinalScores(["a", "b", "c"])
    truth, chances = rng.integers(0, 3, 3000), rng.dirichlet(np.ones(3), 3000)
    for at, (label, row) in enumerate(zip(truth, chances, strict=True)):
        scores.add(f"{at:04d}", row, int(label))
    tracemalloc.start()
    value = scores.value()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3000 * 1000
    kappa = reference.cohen_kappa_score(truth, chances.argmax(axis=1), weights="quadratic")
    assert value["quadratic_kappa"] == pytest.approx(kappa, abs=1e-12)


def test_labels_are_scored_as_scikit_learn_does_without_those_that_are_missing() -> None:
    rng = np.random.default_rng(1)
    truth, chances = rng.integers(0, 2, (50, 3)).astype(float), rng.random((50, 3))
    truth[:, 2] = 1.0  # of which nothing can be ranked
    known = rng.random((50, 3)) < 0.8
    known[:, 0] = True
    scores = target_metrics.MultiLabelScores(["a", "b", "c"], [0.3, 0.5, 0.5])
    for at in range(50):
        values = [float(t) if k else None for t, k in zip(truth[at], known[at], strict=True)]
        scores.add(f"{at:02d}", chances[at], values, None)
    value = scores.value()
    areas, precisions, recalls = [], [], []
    for k, name in enumerate("ab"):
        own, said = truth[known[:, k], k], chances[known[:, k], k]
        areas.append(reference.roc_auc_score(own, said))
        precisions.append(reference.average_precision_score(own, said))
        recalls.append(reference.balanced_accuracy_score(own, said >= (0.3, 0.5)[k]))
        assert value[f"auroc_{name}"] == pytest.approx(areas[-1])
        assert value[f"auprc_{name}"] == pytest.approx(precisions[-1])
    assert value["auroc"] == pytest.approx(np.mean(areas))
    assert value["auprc"] == pytest.approx(np.mean(precisions))
    assert value["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert "auroc_c" not in value
    squares = np.where(known, np.square(truth - chances), 0).sum(axis=1) / known.sum(axis=1)
    assert value["one_minus_brier"] == pytest.approx(1 - squares.mean())


def test_numbers_are_scored_as_scikit_learn_does() -> None:
    rng = np.random.default_rng(2)
    truth = rng.uniform(20, 80, 40)
    answered = truth + rng.normal(0, 5, 40)
    scores = target_metrics.RegressionScores(["age"], [(0.0, 100.0)])
    for at in range(40):
        scores.add(f"{at:02d}", answered[at : at + 1], [float(truth[at])], None)
    value = scores.value()
    assert value["mae_age"] == pytest.approx(reference.mean_absolute_error(truth, answered))
    assert value["r2_age"] == pytest.approx(reference.r2_score(truth, answered))
    assert value["one_minus_nmae"] == pytest.approx(1 - np.abs(truth - answered).mean() / 100)
    halves = [target_metrics.RegressionScores(["age"], [(0.0, 100.0)]) for _ in range(2)]
    for at in range(40):
        halves[at % 2].add(f"{at:02d}", answered[at : at + 1], [float(truth[at])], None)
    assert halves[1].combine(halves[0]).value() == value
    with pytest.raises(errors.DataError, match="no finite number"):
        scores.add("x", np.array([np.nan]), [1.0], None)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_ranks_models_is_better_where_it_is_higher(kind: str) -> None:
    """A perfect answer has 1, and a worse one less: nothing that reads the primary metric can turn it round."""
    own = task(kind, **KINDS[kind])
    truth: Any = 1 if kind == "ordinal" else (1.0, 1.0)
    best = torch.tensor({"ordinal": [-9.0, 0.0], "multi-label": [30.0, 30.0], "regression": [1.0, 1.0]}[kind])
    values = []
    for numbers in (best, -best):
        scores = own.scores(surface=False)
        own.score(scores, "x", numbers, type("Prepared", (), {"part": None})(), truth)
        values.append(scores.value()[own.primary])
    assert values[0] == pytest.approx(1.0)
    assert 0 <= values[1] < values[0]
    assert own.primary == metrics.primary("case-classification", kind)


@pytest.mark.parametrize(
    ("kind", "target", "words"),
    [
        ("class", {"prevalence": [0.1, 0.2]}, "kind 'class' does not read it"),
        ("ordinal", {"units": ["a", "b"]}, "kind 'ordinal' does not read it"),
        ("multi-label", {"prevalence": [0.1]}, "1 given for 2"),
        ("regression", {"ranges": [[0, 1], [0, 1]], "centres": [0.5, 0.5]}, "recipe.target.scales: 0 given for 2"),
        ("regression", {**RANGES, "centres": [400.0, 0.0]}, "the centre 400"),
        ("regression", {**RANGES, "ranges": [[1.0, 0.0], [0.0, 1.0]]}, "the least must lie below"),
    ],
)
def test_what_does_not_fit_is_told(kind: str, target: dict[str, Any], words: str) -> None:
    assert any(words in fault for fault in task(kind, **target).faults())


def test_of_columns_nothing_is_weighed_or_balanced_by_class() -> None:
    own = task("multi-label")
    changed = own.recipe.task.model_copy(update={"class_weights": (1.0, 2.0), "options": {"sampling": "balanced"}})
    faults = type(own)(own.recipe.model_copy(update={"task": changed})).faults()
    assert any("recipe.target.prevalence" in fault and "class_weights" in fault for fault in faults)
    assert any("sampling" in fault for fault in faults)
    assert "is for classification" in " ".join(task("multi-label", task_kind="segmentation").faults())


def test_one_class_name_is_for_a_regression_alone() -> None:
    assert task("regression", 1, ranges=[[0, 9]], centres=[3.0], scales=[1.0]).faults() == []
    with pytest.raises(errors.ConfigError, match="at least two are needed"):
        task("multi-label", 1)


def test_a_recipe_of_one_class_has_no_new_bytes() -> None:
    assert "target" not in task("class").recipe.model_dump(mode="json")
    assert "target" in task("ordinal").recipe.model_dump(mode="json")
