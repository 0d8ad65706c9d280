"""Prompt-learning in a real simulation, beside the sentences as they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.data import transforms
from fedvfm.inference import predict
from fedvfm.simulation import experiment, run
from tests.support import two_towers

WORDS = {"mode": "prompt-learning", "templates": ["{}"], "context": 3}


def _values(tiny_classes: Path, folder: Path, words: dict[str, Any] | None, baselines: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((tiny_classes / "experiment.json").read_text())
    values["baselines"] = baselines
    data = {"class_names": ["box", "empty"], "input_size": [32, 32], "intensity": "none", **two_towers.NORM}
    values["recipe"] |= {
        "backbone": {"name": str(folder)},
        "adapter": {"kind": "head-only"},
        "data": data,
        "rounds": 2,
        "precision": "float32",
        "words": words,
    }
    return values


@pytest.fixture(scope="module")
def finished(tiny_classes: Path, tower_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = _values(tiny_classes, tower_folders["clip"], WORDS, ["zero-shot", "classical"])
    return run.simulate(values, output=tmp_path_factory.mktemp("words") / "run").path


def chances(path: Path, arm: str) -> dict[str, float]:
    """Sample -> its probability of the second class."""
    with (path / "samples.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["arm"], row["metric"]) == (arm, "probability_1")]
    return {row["sample"]: float(row["value"]) for row in rows}


def pictures(folder: Path) -> dict[str, Path]:
    """Sample -> its file."""
    return {f"image-{number:04d}": path for number, path in enumerate(sorted(folder.glob("*/*.png")), 1)}


@pytest.mark.slow
def test_zero_shot_scores_are_those_of_transformers(
    finished: Path, tiny_classes: Path, tower_folders: dict[str, Path]
) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["arms"]) == {"federated", "zero-shot", "classical"}
    assert "box; empty" in summary["arms"]["zero-shot"]["rule"]
    values = json.loads((finished / "experiment.json").read_text())
    contract = schema.parse(schema.Recipe, values["recipe"], "recipe").data
    mean, std = (torch.tensor(row).reshape(1, 3, 1, 1) for row in (contract.mean, contract.std))
    stock: Any = transformers.CLIPModel.from_pretrained(tower_folders["clip"])
    ids = two_towers.ids(tower_folders["clip"], "clip", ["box", "empty"])
    scored, files = chances(finished, "zero-shot"), pictures(Path(values["data"]["path"]))
    assert len(scored) == 12
    for name, chance in scored.items():
        grey = np.asarray(Image.open(files[name]), np.float32)[None] / np.float32(255)
        image = torch.from_numpy(transforms.prepare(samples.Pixels(grey), contract, 2).image)[None]
        with torch.no_grad():
            logits = stock.eval()(input_ids=ids, pixel_values=(image - mean) / std).logits_per_image
        assert chance == pytest.approx(float(logits.softmax(dim=1)[0, 1]), abs=1e-5)


@pytest.mark.slow
def test_the_adapter_is_context_alone_and_predicts(finished: Path, tiny_classes: Path, tmp_path: Path) -> None:
    about = json.loads((finished / "adapter" / "fedvfm.json").read_text())
    assert [row["name"] for row in about["manifest"]] == ["head.context"]
    folder = Path(json.loads((tiny_classes / "experiment.json").read_text())["data"]["path"])
    scored, files = chances(finished, "federated"), pictures(folder)
    for number, (name, chance) in enumerate(sorted(scored.items())[:3]):
        (row,) = predict.predict(finished / "adapter", files[name], tmp_path / f"out-{number}")["inputs"]
        assert row["probabilities"]["empty"] == pytest.approx(chance, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "baseline", "said"),
    [
        (None, "zero-shot", "'zero-shot' needs sentences"),
        ({"mode": "zero-shot"}, "head-only", "'head-only' has nothing to train"),
    ],
)
def test_baselines_that_have_no_meaning_are_refused(
    tiny_classes: Path, tower_folders: dict[str, Path], words: dict[str, Any] | None, baseline: str, said: str
) -> None:
    values = _values(tiny_classes, tower_folders["clip"], words, [baseline])
    values["recipe"]["adapter"] = {"kind": "lora"}
    with pytest.raises(errors.ConfigError) as refused:
        experiment.examine(experiment.parse(values, "words"))
    assert said in str(refused.value)
