"""SCAFFOLD in whole runs: stopped and resumed, in workers and over a real deployment the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedvfm.simulation import experiment, plan, run

pytestmark = pytest.mark.slow


@pytest.fixture
def corrected(tiny: Any) -> dict[str, Any]:
    optimiser = {"name": "sgd", "learning_rate": 1e-2, "batch_size": 1, "control_variates": True}
    recipe = {**tiny.values["recipe"], "rounds": 3, "optimiser": optimiser, "aggregation": {"weighting": "uniform"}}
    recipe["evaluation"] = {"every": 0, "surface": False}
    return {**tiny.values, "baselines": [], "recipe": recipe}


def test_every_way_to_run_it_ends_with_the_same_bits(corrected: dict[str, Any], tmp_path: Path) -> None:
    made = run.simulate(corrected, output=tmp_path / "whole")
    plain = {**corrected["recipe"]["optimiser"], "control_variates": False}
    other = run.simulate({**corrected, "recipe": {**corrected["recipe"], "optimiser": plain}}, output=tmp_path / "not")
    assert other.summary["fingerprint"] != made.summary["fingerprint"]
    parsed = experiment.parse(corrected, "experiment")
    planned, summary = (
        plan.plan(parsed, experiment.hospitals(parsed)),
        json.loads((made.path / "summary.json").read_text()),
    )
    for direction in ("up", "down"):
        assert planned["bytes"][direction] == pytest.approx(summary["bytes"][direction], rel=0.02)
    assert planned["bytes"]["per_round"]["down"] > 1.5 * planned["bytes"]["per_round"]["up"]

    def stop(event: str, /, **fields: Any) -> None:
        if event == "round-end" and fields["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.simulate({**corrected, "workers": 2}, output=tmp_path / "stopped", observer=stop)
    assert run.resume(tmp_path / "stopped").summary["fingerprint"] == made.summary["fingerprint"]
    real = run.simulate({**corrected, "engine": "deployment"}, output=tmp_path / "deployed")
    assert real.summary["fingerprint"] == made.summary["fingerprint"]
