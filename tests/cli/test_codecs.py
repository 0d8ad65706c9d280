"""Runs whose adapters travel as coded differences: the same bits whatever is killed, however many processes compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CODED = ["--set", 'recipe.codec="int4"', "--set", "baselines=[]"]


@pytest.fixture(scope="module")
def whole(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("coded") / "whole"
    answer = tiny.run("simulate", tiny.experiment, *CODED, "--workers", "1", "--output", folder)
    assert answer.code == 0, answer.err
    return folder


def test_two_workers_give_the_same_bits(tiny: Any, whole: Path, tmp_path: Path) -> None:
    answer = tiny.run("simulate", tiny.experiment, *CODED, "--workers", "2", "--output", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert tiny.results(tmp_path / "run") == tiny.results(whole)


@pytest.mark.parametrize(
    "point", ["residual-proposed:2", "residual-proposed:5", "between-checkpoint-and-journal:2", "file-renamed:9"]
)
def test_killed_and_resumed_a_run_ends_with_the_same_bits(tiny: Any, whole: Path, tmp_path: Path, point: str) -> None:
    run = tmp_path / "run"
    call = ["simulate", tiny.experiment, *CODED, "--workers", "1", "--output", run]
    assert tiny.run(*call, environment={"FEDVFM_FAULT_POINT": point}).code != 0
    assert not (run / "summary.json").exists()
    answer = tiny.run("simulate", "--resume", run)
    assert answer.code == 0, answer.err
    assert tiny.results(run) == tiny.results(whole)
    assert not (run / "residuals").exists()


def test_planned_bytes_are_those_of_the_run(tiny: Any, whole: Path) -> None:
    answer = tiny.run("simulate", tiny.experiment, *CODED, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    planned, made = json.loads(answer.out)["bytes"], json.loads((whole / "summary.json").read_text())["bytes"]
    last = tiny.lines(whole / "journal.jsonl")[-1]["bytes"]
    for way in ("up", "down"):
        assert planned["per_round"][way] == pytest.approx(last[way], rel=0.05)
        assert planned[way] == pytest.approx(made[way], rel=0.05)


def test_an_unknown_codec_is_named_with_the_nearest(tiny: Any) -> None:
    answer = tiny.run("simulate", tiny.experiment, "--set", 'recipe.codec="int9"', "--dry-run")
    assert answer.code != 0
    assert "unknown codec 'int9'" in answer.err
    assert "nearest: 'int" in answer.err
