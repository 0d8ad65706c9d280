"""Whole simulations in which one factor trains at a time: exact, half the bytes up, resumed between two factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.simulation import experiment, plan, run
from fedvfm.state import checkpoint
from fedvfm.storage import hash_chain


def what(tiny: Any, way: str, **more: Any) -> dict[str, Any]:
    recipe = {**tiny.values["recipe"], "rounds": 3, "evaluation": {"every": 3, "surface": False}, **more}
    recipe["adapter"] = {**tiny.values["recipe"]["adapter"], "factors": way}
    return {**tiny.values, "baselines": ["head-only", "unet"], "recipe": recipe}


@pytest.fixture(scope="module")
def finished(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("factors")
    return {
        way: run.simulate({**what(tiny, way), "baselines": []}, output=root / way).path
        for way in ("both", "freeze-A", "alternate")
    }


def journal(path: Path) -> list[dict[str, Any]]:
    return hash_chain.read(path / "journal.jsonl")


def summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "summary.json").read_text())
    return found


def test_the_mean_of_one_factor_is_exact(finished: dict[str, Path]) -> None:
    # B begins as zeros, so that the first step is B's alone.
    assert all(line["factor_error"] > 0 for line in journal(finished["both"])[1:])
    for way in ("freeze-A", "alternate"):
        assert [line["factor_error"] for line in journal(finished[way])] == [0.0] * 3
    assert len({summary(path)["fingerprint"] for path in finished.values()}) == 3


@pytest.mark.parametrize("way", ["both", "freeze-A", "alternate"])
def test_the_plan_says_what_truly_leaves(finished: dict[str, Path], tiny: Any, way: str) -> None:
    parsed = experiment.parse({**what(tiny, way), "baselines": []}, "experiment")
    planned, made = plan.plan(parsed, experiment.hospitals(parsed)), summary(finished[way])
    assert planned["trainable_parameters"] == made["trainable_parameters"]
    for direction in ("up", "down"):
        assert planned["bytes"][direction] == pytest.approx(made["bytes"][direction], rel=0.02)
    assert planned["bytes"]["per_round"]["up"] < planned["bytes"]["per_round"]["down"]


def test_half_of_the_pairs_goes_up(finished: dict[str, Path]) -> None:
    made = {way: summary(path) for way, path in finished.items()}
    pairs = 2 * 2 * 2 * 32  # two blocks, q and v, rank 2, width 32
    assert made["both"]["trainable_parameters"] - made["freeze-A"]["trainable_parameters"] == pairs
    assert made["alternate"]["trainable_parameters"] == made["both"]["trainable_parameters"]
    for way in ("freeze-A", "alternate"):
        saved = made["both"]["bytes"]["up"] - made[way]["bytes"]["up"]
        assert saved >= 3 * 3 * 4 * pairs, "three sites, three rounds"


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_stopped_between_two_factors_ends_as_one_that_was_not(
    finished: dict[str, Path], tiny: Any, tmp_path: Path, after: int
) -> None:
    def stop(event: str, /, **fields: Any) -> None:
        if event == "round-end" and fields["round"] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.simulate({**what(tiny, "alternate"), "baselines": []}, output=tmp_path / "run", observer=stop)
    assert run.resume(tmp_path / "run").summary["fingerprint"] == summary(finished["alternate"])["fingerprint"]


@pytest.mark.parametrize("mechanism", ["record-level", "site-level"])
def test_noise_falls_on_the_factor_that_trains_and_on_no_other(tiny: Any, tmp_path: Path, mechanism: str) -> None:
    """Round 1 is of B and round 2 of A: what round 1 left of B is what a run of two rounds ends with, noise or not."""
    privacy = {"mechanism": mechanism, "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-4}
    made, sent = {}, {}
    for rounds in (1, 2):
        values = what(
            tiny, "alternate", rounds=rounds, privacy=privacy, aggregation={"weighting": "uniform"},
            optimiser={"learning_rate": 1e-2, "schedule": "constant", "warmup": 0.0},
        )  # fmt: skip
        made[rounds] = run.simulate({**values, "baselines": []}, output=tmp_path / str(rounds)).path
        parsed = experiment.parse({**values, "baselines": []}, "experiment")
        sent[rounds] = plan.plan(parsed, experiment.hospitals(parsed))["bytes"]["up"]
    first, second = (checkpoint.read(made[rounds] / "adapter.safetensors")[0] for rounds in (1, 2))
    assert {name[-1] for name in first if first[name].tobytes() == second[name].tobytes()} == {"B"}
    assert not any(np.array_equal(first[name], second[name]) for name in first if not name.endswith(".B"))
    assert sent[2] == pytest.approx(summary(made[2])["bytes"]["up"], rel=0.02)


def test_arms_without_pairs_train_as_they_always_did(tiny: Any) -> None:
    parsed = experiment.parse(what(tiny, "alternate"), "experiment")
    ways = {arm.name: arm.recipe.adapter.factors for arm in run.arms(parsed, ["east", "north"]) if arm.recipe}
    assert ways == {"federated": "alternate", "head-only": "both", "unet": "both"}


def test_a_rule_that_makes_new_factors_is_a_fault_of_the_experiment(tiny: Any) -> None:
    with pytest.raises(errors.ConfigError, match="factors = 'alternate': rule 'svd' makes both factors of every pair"):
        experiment.examine(experiment.parse(what(tiny, "alternate", aggregation={"rule": "svd"}), "experiment"))


def test_card_and_report_say_what_did_not_train(finished: dict[str, Path]) -> None:
    card = (finished["freeze-A"] / "adapter" / "README.md").read_text()
    assert "- factors: `freeze-A`: A of every pair stays as it is in the first adapter, B trains" in card
    assert "- factors" not in (finished["both"] / "adapter" / "README.md").read_text()
