"""Whole simulations whose server keeps what averaged factors miss in a second pair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm.simulation import experiment, plan, run
from fedvfm.state import checkpoint, factors
from fedvfm.storage import hash_chain

pytestmark = pytest.mark.slow


def what(tiny: Any, rule: str, rank: int = 32, **more: Any) -> dict[str, Any]:
    recipe = {**tiny.values["recipe"], "rounds": 3, "evaluation": {"every": 3, "surface": False}, **more}
    recipe["aggregation"] = {"rule": rule}
    if rank:
        recipe["adapter"] = {**tiny.values["recipe"]["adapter"], "options": {"residual": rank}}
    return {**tiny.values, "baselines": [], "recipe": recipe}


@pytest.mark.parametrize("rule", ["residual", "stack"])
def test_nothing_is_lost_and_a_stopped_run_ends_as_one_that_was_not(tiny: Any, tmp_path: Path, rule: str) -> None:
    asked = {**what(tiny, rule), "baselines": ["head-only", "unet"]}
    made = run.simulate(asked, output=tmp_path / "whole")
    lines = hash_chain.read(made.path / "journal.jsonl")
    assert all(line["aggregate_error"] < 1e-5 for line in lines), [line["aggregate_error"] for line in lines]
    # The first step from B = 0 moves no A, and each of these rounds has one.
    assert (lines[-1]["factor_error"] > 0) == (rule == "residual")
    adapter = checkpoint.read(checkpoint.path_of(made.path / "checkpoints", 3))[0]
    kept = [array for name, array in adapter.items() if name.endswith(factors.residual_names("")[1])]
    assert len(kept) == 4
    assert all(np.abs(array).max() > 0 for array in kept)
    parsed = experiment.parse({**asked, "baselines": []}, "experiment")
    planned = plan.plan(parsed, experiment.hospitals(parsed))
    summary = json.loads((made.path / "summary.json").read_text())
    assert planned["trainable_parameters"] == summary["trainable_parameters"]
    for direction in ("up", "down"):
        assert planned["bytes"][direction] == pytest.approx(summary["bytes"][direction], rel=0.02)
    assert planned["bytes"]["per_round"]["up"] < planned["bytes"]["per_round"]["down"]

    def stop(event: str, /, **fields: Any) -> None:
        if event == "round-end" and fields["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.simulate(what(tiny, rule), output=tmp_path / "stopped", observer=stop)
    assert run.resume(tmp_path / "stopped").summary["fingerprint"] == made.summary["fingerprint"]


def test_it_goes_with_a_codec_and_a_small_residual_says_what_it_lost(tiny: Any, tmp_path: Path) -> None:
    made = run.simulate(what(tiny, "residual", 1, codec="int8"), output=tmp_path / "run")
    lines = hash_chain.read(made.path / "journal.jsonl")
    assert 0 < lines[-1]["aggregate_error"] < lines[-1]["factor_error"]
