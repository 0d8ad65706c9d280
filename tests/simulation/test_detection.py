"""Boxes through the real simulation: every arm, the report, and differential privacy for each record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.simulation import run
from tests.simulation.conftest import Tiny


@pytest.fixture
def values(tiny: Tiny) -> dict[str, Any]:
    recipe = {
        **tiny.values["recipe"],
        "task": {"kind": "detection", "options": {"threshold": 0.1}},
        "optimiser": {"learning_rate": 2e-2, "local_epochs": 12},
    }
    return {**tiny.values, "baselines": ["local-only", "pooled", "head-only"], "recipe": recipe}


@pytest.mark.slow
def test_boxes_in_every_arm(values: dict[str, Any], tmp_path: Path) -> None:
    result = run.simulate(values, output=tmp_path / "run")
    made = json.loads((result.path / "summary.json").read_text())
    assert made["primary"] == "f1"
    assert set(made["arms"]) >= {"federated", "local-only", "pooled", "head-only"}
    assert made["arms"]["pooled"]["sites"]["east"]["map10"] > 0.5
    report = (result.path / "report.html").read_text()
    assert "mAP at IoU 0.5" in report
    assert "F1 of the boxes" in report


@pytest.mark.slow
def test_boxes_under_record_level_privacy(values: dict[str, Any], tmp_path: Path) -> None:
    private = {"mechanism": "record-level", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-3}
    recipe = {**values["recipe"], "privacy": private, "aggregation": {"weighting": "uniform"}}
    result = run.simulate({**values, "baselines": [], "recipe": recipe}, output=tmp_path / "run")
    assert json.loads((result.path / "summary.json").read_text())["privacy"]["unit"] == "record"


@pytest.mark.parametrize("arm", ["classical", "majority"])
def test_arms_that_give_no_boxes_are_refused(values: dict[str, Any], tmp_path: Path, arm: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"'{arm}' is"):
        run.simulate({**values, "baselines": [arm]}, output=tmp_path / "run")
