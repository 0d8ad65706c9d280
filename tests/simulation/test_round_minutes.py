"""Rounds by time in a whole simulation: a hospital nine times the others is in every round, and nobody waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.simulation import run
from fedvfm.storage import hash_chain
from tests.simulation import drawn_cases

SIZES = {"east": 2, "large": 18, "west": 2}
"""Training images of each hospital."""


@pytest.fixture
def unequal(tiny: Any, tmp_path: Path) -> dict[str, Any]:
    folder, rng, drawn = tmp_path / "images", np.random.default_rng(0), []
    for site, count in SIZES.items():
        for number in range(count + 2):
            mask = np.zeros((56, 56), np.uint8)
            mask[number : number + 18, 10:30] = 1
            name = f"{site}-{number}"
            grey = (60 * rng.random(mask.shape) + 150 * mask).astype(np.uint8)
            split = ("val", "test", "train")[min(number, 2)]
            drawn.append(({"id": name, "patient": name, "site": site, "split": split}, grey, mask))
    drawn_cases.pairs(folder, drawn)
    recipe = {**tiny.values["recipe"], "optimiser": {"batch_size": 1, "round_minutes": 1.0}}
    recipe["evaluation"] = {"every": 0, "surface": False}
    data = {"source": "folder", "path": str(folder)}
    return {**tiny.values, "baselines": [], "data": data, "recipe": recipe, "site_pace": dict.fromkeys(SIZES, 3.0)}


@pytest.mark.slow
def test_the_largest_hospital_is_admitted_in_every_round_with_what_it_saw(
    unequal: dict[str, Any], tmp_path: Path
) -> None:
    made = run.simulate(unequal, output=tmp_path / "timed")
    lines = hash_chain.read(made.path / "journal.jsonl")
    assert len(lines) == 2
    for line in lines:
        assert line["refused"] == {}
        assert line["examples"] == {"east": 2, "large": 3, "west": 2}
        assert line["weights"]["large"] == pytest.approx(3 / 7)
        assert line["train"]["large"]["steps"] == 3.0
    again = run.simulate({**unequal, "workers": 2}, output=tmp_path / "again")
    assert again.summary["fingerprint"] == made.summary["fingerprint"]


def test_a_pace_that_nothing_reads_or_of_nobody_is_refused(unequal: dict[str, Any], tmp_path: Path) -> None:
    unequal["site_pace"] = {"south": 3.0}
    with pytest.raises(errors.ConfigError, match="site_pace: no site south; sites: east, large, west"):
        run.simulate(unequal, output=tmp_path / "run")
    unequal["site_pace"], unequal["recipe"]["optimiser"] = {"east": 3.0}, {"batch_size": 1}
    with pytest.raises(errors.ConfigError, match=r"site_pace: only recipe\.optimiser\.round_minutes reads it"):
        run.simulate(unequal, output=tmp_path / "run")
    unequal["server"] = {"grace_s": 60.0, "patience": 2.0}
    with pytest.raises(errors.ConfigError, match=r"server\.grace_s = 60: a simulation looks at no clock") as caught:
        run.simulate(unequal, output=tmp_path / "run")
    assert "server.patience = 2: a simulation" in str(caught.value)
