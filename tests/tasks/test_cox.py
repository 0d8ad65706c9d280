"""Cox's partial likelihood and regression: equal to scikit-survival's, and what they cannot be used for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm import errors
from fedvfm.report import result_findings
from fedvfm.simulation import cox_regression
from fedvfm.simulation.results import prognosis
from fedvfm.tasks import survival_metrics, targets
from tests.tasks import survival_golden, test_targets

# (seed, whole months) -> weights without and with the penalty, then Harrell's and Uno's C-index of the first, and
# survival of the first case of the second.
GOLDEN: dict[tuple[int, bool], tuple[list[float], list[float], tuple[float, float], list[float]]] = {
    (0, False): (
        [1.6389783842077426, 0.06549053890516164, -0.1425522284424674],
        [1.5631891486285607, 0.05288639532656115, -0.1386426191933745],
        (0.817998385794996, 0.8111916579622723),
        [0.719779641138707, 0.5890221740775357, 0.30574053151749464, 0.16698050115244084],
    ),
    (1, True): (
        [1.096474617058032, -0.20414908001128956, -0.007829572907720723],
        [1.0553189122040256, -0.18899836033648715, -0.003243899908739044],
        (0.75355871886121, 0.7472136105685722),
        [0.8173619684364849, 0.6554713687124246, 0.3714141463502056, 0.26578829959924805],
    ),
    (2, True): (
        [1.494012918439755, -0.1885779907740342, 0.3876991736162681],
        [1.4322898202101817, -0.17888341069009817, 0.37433534287986964],
        (0.8290089323692046, 0.8109956071769858),
        [0.565885895485526, 0.29694156764725915, 0.015821312653603932, 0.0002718501711853104],
    ),
}
TRUTHS = [(5.0, 1.0), (5.0, 1.0), (7.5, 0.0), (3.0, 1.0), (5.0, 0.0), (9.0, 1.0)]


def cox(names: int = 2, **target: Any) -> Any:
    return test_targets.task("cox", names, **{"bins": [6.0, 24.0], **target})


def batch(own: Any, truths: list[tuple[float, float]]) -> torch.Tensor:
    return torch.as_tensor(np.stack([own.target(None, truth) for truth in truths]))


@pytest.mark.parametrize(("seed", "whole"), sorted(GOLDEN))
def test_the_loss_of_one_site_has_its_least_where_scikit_survival_has(seed: int, whole: bool) -> None:
    features, time, event = survival_golden.described(seed, whole)
    own, inputs = cox(), torch.tensor((features - features.mean(0)) / features.std(0), dtype=torch.float32)
    target = batch(own, list(zip(time.tolist(), event.astype(float).tolist(), strict=True)))
    weight = torch.zeros(3, 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss: torch.Tensor = own.loss(inputs @ weight, target)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    plain, _, indices, _ = GOLDEN[seed, whole]
    assert weight.detach()[:, 0].tolist() == pytest.approx(plain, abs=1e-3)
    scores = survival_metrics.CoxScores(["time", "event"], survival_golden.BINS[-1])
    for at, number in enumerate(inputs.detach() @ weight.detach()):
        scores.add(f"{at:03d}", own.answers(number).numpy(), (float(time[at]), float(event[at])), None)
    value = scores.value()
    assert (value["c_index"], value["c_index_uno"]) == pytest.approx(indices, abs=1e-3)
    assert np.mean(scores.per_sample()["c_index"]) == pytest.approx(value["c_index"], abs=1e-12)


@pytest.mark.parametrize(("seed", "whole"), sorted(GOLDEN))
def test_the_regression_is_that_of_scikit_survival(seed: int, whole: bool) -> None:
    features, time, event = survival_golden.described(seed, whole)
    fitted = cox_regression.fit(features, time, event)
    _, penalised, _, survival = GOLDEN[seed, whole]
    assert fitted.weight.tolist() == pytest.approx(penalised, abs=1e-6)
    points = np.asarray(survival_golden.BINS)
    assert fitted.survival(features[0], points).tolist() == pytest.approx(survival, abs=1e-6)
    again = cox_regression.fit(features[::-1], time[::-1], event[::-1])
    assert again.weight.tolist() == pytest.approx(fitted.weight.tolist(), abs=1e-6)
    assert "Efron" in fitted.describe()


def test_a_step_compares_each_event_with_who_was_still_at_risk() -> None:
    own, risks = cox(), [0.3, -0.7, 1.1, 0.2, -0.4, 0.9]
    ratio = [math.exp(risk) for risk in risks]
    # 3: all; 5: the second of the two events without half of both; 9: itself alone.
    at_five = ratio[0] + ratio[1] + ratio[2] + ratio[4] + ratio[5]
    chances = [
        ratio[3] / sum(ratio),
        ratio[0] * ratio[1] / (at_five * (at_five - 0.5 * (ratio[0] + ratio[1]))),
        1.0,
    ]
    expected = -sum(map(math.log, chances)) / 4
    numbers, target = torch.tensor(risks)[:, None], batch(own, TRUTHS)
    assert float(own.loss(numbers, target)) == pytest.approx(expected, rel=1e-5)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        assert float(own.loss(numbers[list(order)], target[list(order)])) == pytest.approx(expected, rel=1e-5)
    # What all risks have in common is no risk.
    assert float(own.loss(numbers + 5.0, target)) == pytest.approx(expected, rel=1e-4)


def test_times_that_a_float32_would_round_to_one_are_two() -> None:
    own, numbers = cox(), torch.tensor([[0.4], [-0.3]])
    early, late = 36500.0001, 36500.0002
    assert np.float32(early) == np.float32(late)
    loss = float(own.loss(numbers, batch(own, [(early, 1.0), (late, 1.0)])))
    assert loss == pytest.approx((math.log(math.exp(0.4) + math.exp(-0.3)) - 0.4) / 2, rel=1e-5)
    zeros = own.target(None, (0.0, 1.0)), own.target(None, (-0.0, 1.0))
    assert np.array_equal(*zeros)


@pytest.mark.parametrize("truths", [[(3.0, 0.0), (5.0, 0.0)], [(3.0, 1.0)], [(3.0, 0.0), (5.0, 1.0)]])
def test_a_step_with_nobody_to_compare_moves_nothing(truths: list[tuple[float, float]]) -> None:
    own = cox()
    numbers = torch.tensor([[0.37], [-1.21]])[: len(truths)].requires_grad_()
    loss = own.loss(numbers, batch(own, truths))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert numbers.grad is not None
    assert not numbers.grad.any()


def test_a_recipe_that_cannot_work_is_told() -> None:
    assert cox().faults() == []
    assert any("two columns" in fault for fault in cox(3).faults())
    assert any("at least one bin" in fault for fault in cox(bins=[]).faults())
    own = cox()
    single = own.recipe.optimiser.model_copy(update={"batch_size": 1})
    recipe = own.recipe.model_copy(update={"optimiser": single})
    (fault,) = targets.Cox(recipe).faults()
    assert "batch_size = 1" in fault
    (fault,) = own.private_faults()
    assert "no sum over" in fault
    assert test_targets.task("survival", bins=[1.0, 2.0]).private_faults() == []


def test_the_parts_of_the_index_have_its_spread() -> None:
    """The standard error by the parts is that of drawing cases anew, within the error of so many draws."""
    features, time, event = survival_golden.described(0, whole=False)
    risk, rng = features[:, 0], np.random.default_rng(0)
    parts = survival_metrics.concordance_parts(time, event, risk)
    assert parts.mean() == pytest.approx(survival_metrics.concordance(time, event, risk))
    drawn = []
    for _ in range(300):
        chosen = rng.integers(0, len(time), len(time))
        drawn.append(survival_metrics.concordance(time[chosen], event[chosen], risk[chosen]) or 0.0)
    assert parts.std() / math.sqrt(len(time)) == pytest.approx(np.std(drawn), rel=0.15)


def test_what_cannot_be_scored_is_told() -> None:
    scores = survival_metrics.CoxScores(["time", "event"], 12.0)
    with pytest.raises(errors.DataError, match="no logarithm of a risk"):
        scores.add("x", np.array([math.inf]), (3.0, 1.0), None)
    scores.add("a", np.array([0.9]), (3.0, 0.0), None)
    scores.add("b", np.array([0.1]), (9.0, 1.0), None)
    with pytest.raises(errors.DataError, match="no two of 2 cases can be compared"):
        scores.value()
    scores.add("c", np.array([0.4]), (2.0, 1.0), None)
    assert scores.value() == {"c_index": 0.5, "c_index_uno": 0.5, "event_share": pytest.approx(2 / 3)}


def test_the_report_has_curves_of_groups_and_says_what_is_missing() -> None:
    features, time, event = survival_golden.described(0, whole=False)
    table = {"time": time.tolist(), "event": event.astype(float).tolist(), "log_risk": features[:, 0].tolist()}
    # Whatever a site's own head adds to all of its risks, the groups are the same.
    apart = {**table, "log_risk": [risk + 100.0 for risk in table["log_risk"]]}
    both = prognosis.section({"east": table, "west": apart}, survival_golden.BINS, "months")
    assert both == prognosis.section({"east": table, "west": table}, survival_golden.BINS, "months")
    assert "no integrated Brier score and no calibration" in both
    assert "among the cases of each site" in both
    assert "<svg" in both
    assert ">predicted<" not in both
    units = {"east": list(range(80))}
    alike = {"east": {**table, "log_risk": [0.5] * 80}}
    codes = {row.code for row in result_findings.of_samples("federated", alike, ["time", "event"], units)}
    assert result_findings.CONSTANT in codes
