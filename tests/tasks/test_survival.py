"""Prognosis: metrics equal to scikit-survival's, the discrete-time loss by hand, and what cannot be scored."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedvfm import errors
from fedvfm.report import result_findings
from fedvfm.simulation.results import prognosis
from fedvfm.tasks import survival_metrics, targets
from tests.tasks import survival_golden, test_targets

GOLDEN = {
    (0, False): (0.8030887295235641, 0.6565778853914447, 0.6688939552131169, -0.07674152055389011),
    (1, True): (0.8041094402513156, 0.6688167259786477, 0.6690335071135026, -0.039386819506360804),
    (2, True): (0.8261162248760796, 0.709910676307954, 0.6968377997486845, 0.060807243997732546),
}
NAMES = ("one_minus_ibs", "c_index", "c_index_uno", "calibration_error")


def scored(seed: int, whole: bool, order: int = 1) -> survival_metrics.SurvivalScores:
    time, event, survival = survival_golden.drawn(seed, whole)
    scores = survival_metrics.SurvivalScores(["time", "event"], survival_golden.BINS)
    for at in range(len(time))[::order]:
        scores.add(f"{at:03d}", survival[at], (float(time[at]), float(event[at])), None)
    return scores


@pytest.mark.parametrize(("seed", "whole"), sorted(GOLDEN))
def test_metrics_are_those_of_scikit_survival(seed: int, whole: bool) -> None:
    value = scored(seed, whole).value()
    assert [value[name] for name in NAMES] == pytest.approx(GOLDEN[seed, whole], abs=1e-12)
    assert scored(seed, whole, order=-1).value() == value
    assert np.mean(scored(seed, whole).per_sample()["one_minus_ibs"]) == pytest.approx(value["one_minus_ibs"])


def survival(bins: tuple[float, ...] = (6.0, 12.0, 24.0)) -> Any:
    task = test_targets.task("survival", bins=list(bins))
    assert task.faults() == []
    return task


def test_the_loss_is_that_of_going_through_each_interval() -> None:
    task, hazards = survival(), (0.1, 0.3, 0.2)
    numbers = torch.tensor([[math.log((1 - h) / h) for h in hazards]])
    logs = targets.Ladder(nn.Identity())(numbers)
    s1, s2, s3 = 0.9, 0.9 * 0.7, 0.9 * 0.7 * 0.8
    assert task.answers(logs[0]).tolist() == pytest.approx([s1, s2, s3], rel=1e-5)
    by_hand = {
        (3.0, 1.0): 0.1,
        (6.0, 1.0): 0.1,  # an end belongs to the interval before it
        (6.1, 1.0): s1 * 0.3,
        (24.0, 1.0): s2 * 0.2,
        (30.0, 1.0): s3,  # an event after the last end is none up to there
        (2.0, 0.0): 1.0,
        (3.0, 0.0): s1,  # from the middle of an interval on
        (8.0, 0.0): s1,
        (9.0, 0.0): s2,
        (99.0, 0.0): s3,
    }
    target = torch.as_tensor(np.stack([task.target(None, truth) for truth in by_hand]))
    losses = task.losses(logs.expand(len(by_hand), -1), target)
    assert losses.exp().tolist() == pytest.approx([1 / chance for chance in by_hand.values()], rel=1e-4)
    # A sum over cases: each is what it is alone.
    assert float(task.loss(logs.expand(len(by_hand), -1), target)) == pytest.approx(float(losses.mean()))


def test_a_higher_risk_is_an_earlier_event_in_every_metric() -> None:
    """Right order scores above wrong order in what ranks models, and in both C-indices."""
    values = []
    for chances in ((0.9, 0.6, 0.2), (0.2, 0.6, 0.9)):
        scores = survival_metrics.SurvivalScores(["time", "event"], (6.0, 12.0, 24.0))
        for at, (time, chance) in enumerate(zip((40.0, 20.0, 3.0), chances, strict=True)):
            scores.add(str(at), np.array([chance, chance**2, chance**3]), (time, 1.0), None)
        values.append(scores.value())
    assert values[0]["c_index"] == values[0]["c_index_uno"] == 1.0
    assert values[1]["c_index"] == values[1]["c_index_uno"] == 0.0
    assert values[0]["one_minus_ibs"] > values[1]["one_minus_ibs"]


def test_what_cannot_be_scored_is_told() -> None:
    scores = survival_metrics.SurvivalScores(["time", "event"], (6.0, 12.0))
    with pytest.raises(errors.DataError, match="time and event must be known"):
        scores.add("x", np.array([0.9, 0.8]), (3.0, None), None)
    with pytest.raises(errors.DataError, match="no survival at 2 points"):
        scores.add("x", np.array([0.9, 1.8]), (3.0, 1.0), None)
    scores.add("a", np.array([0.9, 0.8]), (3.0, 0.0), None)
    with pytest.raises(errors.DataError, match="followed up beyond 6"):
        scores.value()
    scores.add("b", np.array([0.9, 0.8]), (9.0, 0.0), None)
    assert "c_index" not in scores.value(), "no event: nobody can be compared"


@pytest.mark.parametrize(
    ("names", "target"), [(3, {"bins": [1.0, 2.0]}), (2, {}), (2, {"bins": [2.0, 1.0]}), (2, {"bins": [1.0]})]
)
def test_a_recipe_that_does_not_fit_is_told(names: int, target: dict[str, Any]) -> None:
    faults = test_targets.task("survival", names, **target).faults()
    assert any("two columns" in fault and "at least two bins" in fault for fault in faults)
    assert any("bins" in fault for fault in test_targets.task("multi-label", bins=[1.0, 2.0]).faults())
    (alike,) = test_targets.task("survival", bins=[1234567.0, 1234568.0]).faults()
    assert "alike in six digits" in alike


def test_the_report_shows_groups_by_risk_and_says_who_is_censored() -> None:
    table = scored(0, whole=False).per_sample()
    section = prognosis.section({"east": table}, survival_golden.BINS, "months")
    events = int(sum(table["event"]))
    assert f"80 test cases of all sites, {events} with an event and {80 - events} censored" in section
    assert "<svg" in section
    assert "high risk" in section
    assert prognosis.section({"east": {"dice": [0.1]}}, survival_golden.BINS, "") == ""


def test_one_prognosis_for_all_and_few_events_are_findings() -> None:
    table = {name: list(column) for name, column in scored(0, whole=False).per_sample().items()}
    units = {"east": list(range(80))}
    own = {**table, **{name: [0.5] * 80 for name in table if name.startswith("survival_")}}
    codes = {row.code for row in result_findings.of_samples("federated", {"east": own}, ["time", "event"], units)}
    assert result_findings.CONSTANT in codes
    few = {**table, "event": [1.0] + [0.0] * 79}
    codes = {row.code for row in result_findings.of_samples("federated", {"east": few}, ["time", "event"], units)}
    assert result_findings.FEW_OF_CLASS in codes
