"""Hospitals without a channel in whole runs: in one process, in workers and over a real deployment the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm.simulation import run
from fedvfm.storage import hash_chain
from tests.simulation import drawn_cases

pytestmark = pytest.mark.slow

SITES = ("east", "north", "west")


@pytest.fixture
def coloured(tiny: Any, tmp_path: Path) -> dict[str, Any]:
    """Pictures of three channels at three hospitals, of which two lack one."""
    folder, rng, drawn = tmp_path / "images", np.random.default_rng(0), []
    for name, split in (
        (f"{site}-{at}", "train" if at > 1 else ("val", "test")[at]) for site in SITES for at in range(5)
    ):
        mask = np.zeros((56, 56), np.uint8)
        mask[len(drawn) : len(drawn) + 18, 10:30] = 1
        shown = (60 * rng.random((56, 56, 3)) + 150 * mask[..., None]).astype(np.uint8)
        drawn.append(({"id": name, "patient": name, "site": name.partition("-")[0], "split": split}, shown, mask))
    drawn_cases.pairs(folder, drawn)
    contract = {"channels": ["FLAIR", "T1w", "T2w"], "optional_channels": ["T1w", "T2w"]}
    recipe = {**tiny.values["recipe"], "evaluation": {"every": 0, "surface": False}}
    recipe["data"] = {**recipe["data"], **contract, "augment": ["intensity", "channel-dropout"]}
    partition = {**tiny.values.get("partition", {}), "lacking": {"east": ["T1w"], "north": ["T2w"]}}
    data = {"source": "folder", "path": str(folder)}
    return {**tiny.values, "baselines": [], "data": data, "recipe": recipe, "partition": partition}


def test_every_way_to_run_it_ends_with_the_same_bits(coloured: dict[str, Any], tmp_path: Path) -> None:
    made = run.simulate(coloured, output=tmp_path / "here")
    lines = hash_chain.read(made.path / "journal.jsonl")
    assert [line["lacking"] for line in lines] == [{"east": ["T1w"], "north": ["T2w"]}] * len(lines)
    whole = run.simulate({**coloured, "partition": {**coloured["partition"], "lacking": {}}}, output=tmp_path / "whole")
    assert whole.summary["fingerprint"] != made.summary["fingerprint"]
    again = run.simulate({**coloured, "workers": 2}, output=tmp_path / "workers")
    real = run.simulate({**coloured, "engine": "deployment"}, output=tmp_path / "deployed")
    assert again.summary["fingerprint"] == real.summary["fingerprint"] == made.summary["fingerprint"]
