"""Unequal classes: balanced sampling by count and by property, its limits, and that it lifts balanced accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedvfm.simulation import experiment, imbalance, run
from fedvfm.tasks import classification


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 99))
def test_every_class_fills_an_equal_share_and_no_sample_comes_twice_too_soon(labels: list[int], seed: int) -> None:
    own = np.array(labels)
    drawn = classification.balanced(own, np.random.default_rng(seed))
    assert len(drawn) == len(own)
    counts = np.bincount(own[drawn], minlength=5)[np.unique(own)]
    assert counts.max() - counts.min() <= 1
    for label in np.unique(own):
        times = np.bincount(drawn[own[drawn] == label], minlength=len(own))[own == label]
        assert times.max() - times.min() <= 1
    assert drawn.tolist() == classification.balanced(own, np.random.default_rng(seed)).tolist()


def test_proposed_weights_are_inverse_to_counts() -> None:
    assert imbalance.weights([90, 10]) == [0.556, 5.0]
    assert imbalance.weights([30, 0, 10]) == [0.667, 0.0, 2.0]


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory, tiny_dino: Path) -> dict[str, Any]:
    """Nine common images for one rare in training, one for one in the test, hardly told apart by their brightness."""
    folder, rng, rows = tmp_path_factory.mktemp("unequal"), np.random.default_rng(5), []
    for kind, counts, light in (("common", (36, 12), 100), ("rare", (4, 12), 130)):
        (folder / kind).mkdir()
        for split, count in zip(("train", "test"), counts, strict=True):
            for at in range(count):
                grey = np.clip(rng.normal(light, 25, (56, 56)), 0, 255).astype(np.uint8)
                Image.fromarray(grey).save(folder / kind / f"{split}-{at}.png")
                rows.append(f"{kind}/{split}-{at},home,{split}")
    (folder / "index.csv").write_text("\n".join(["id,site,split", *rows]) + "\n")
    return {
        "name": "unequal",
        "baselines": [],
        "data": {"source": "folder", "path": str(folder)},
        "partition": {"val_share": 0.0},
        "recipe": {
            "rounds": 2,
            "threads": 1,
            "backbone": {"name": str(tiny_dino)},
            "adapter": {"kind": "head-only"},
            "optimiser": {"learning_rate": 2e-2, "batch_size": 8, "local_epochs": 2},
            "task": {"kind": "classification"},
            "data": {"class_names": ["common", "rare"], "input_size": [56, 56], "intensity": "none"},
        },
    }


def with_task(values: dict[str, Any], **task: Any) -> dict[str, Any]:
    return {**values, "recipe": {**values["recipe"], "task": {"kind": "classification", **task}}}


def test_balanced_sampling_lifts_balanced_accuracy(unequal: dict[str, Any], tmp_path: Path) -> None:
    reached = {}
    for name, task in (("plain", {}), ("balanced", {"options": {"sampling": "balanced"}})):
        made = run.simulate(with_task(unequal, **task), output=tmp_path / name)
        reached[name] = made.summary["arms"]["federated"]["macro"]
    assert reached["plain"] == 0.5, "one answer for all"
    assert reached["balanced"] > 0.9
    summary = json.loads((tmp_path / "plain" / "summary.json").read_text())
    assert summary["findings"][0]["code"] == "constant-answer"


def test_unequal_classes_are_said_before_training(unequal: dict[str, Any]) -> None:
    for task, said in (({}, True), ({"options": {"sampling": "balanced"}}, False), ({"class_weights": [1, 9]}, False)):
        what = experiment.parse(with_task(unequal, **task), "test")
        text = imbalance.note(what, experiment.hospitals(what))
        assert bool(text) == said
        assert "class_weights = [0.556, 5.0]" in text or not said


@pytest.mark.parametrize(
    ("task", "privacy", "fault"),
    [
        ({"options": {"sampling": "even"}}, None, "known: uniform, balanced"),
        (
            {"options": {"sampling": "balanced"}},
            {"mechanism": "record-level", "clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-5},
            "class_weights with public weights",
        ),
    ],
)
def test_wrong_or_private_sampling_is_refused(
    unequal: dict[str, Any], task: dict[str, Any], privacy: dict[str, Any] | None, fault: str
) -> None:
    values = with_task(unequal, **task)
    if privacy is not None:
        values["recipe"]["privacy"] = privacy
    with pytest.raises(Exception, match=fault) as refused:
        run.prepare(values)
    assert getattr(refused.value, "code", "") == "config"
