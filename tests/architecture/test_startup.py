"""What a process that trains, and one that predicts, load: none of the libraries that take seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SLOW = ["accelerate", "monai", "opacus", "pandas", "peft", "sklearn", "transformers"]
"""Also not loaded: scipy, but by HD95, ASSD and NSD."""

COMPILER = ["sympy", "torch._dynamo"]
"""The first step of any of torch's own optimisers loads them: not asked of a process that trains."""

TRAIN = """
import json, sys
from pathlib import Path

from fedvfm.protocol import protocol
from fedvfm.client.training import evaluator, trainer
from fedvfm.model import adapted_model as models
from fedvfm.client.training import site as sites
from fedvfm.inference import export
from fedvfm.simulation import experiment

def loaded():
    return sorted({*json.loads(sys.argv[3]), "scipy"} & sys.modules.keys())

what = experiment.load(sys.argv[1])
hospital = experiment.hospitals(what)[0]
model = models.AdaptedModel(what.recipe)
site = sites.Site(hospital.name, hospital)
update = trainer.train(model, site, model.initial(), 1)
assert update.num_examples >= 1
trained = loaded()
task = protocol.Task(what.recipe, 1, model.read(), "test", surface=what.recipe.task.kind == "segmentation")
found = evaluator.evaluate(model, site, model.read(), task)
assert found.num_examples >= 1
print(json.dumps([trained, loaded(), sorted(found.metrics)]))
export.save(model, Path(sys.argv[2]), {})
"""
PREDICT = """
import json, sys
from fedvfm.cli import main as cli

names, sys.argv = json.loads(sys.argv[1]), ["fedvfm", "predict", *sys.argv[2:]]
try:
    cli.main()
except SystemExit as leave:
    assert not leave.code
print(json.dumps(sorted({*names, "scipy", "flwr"} & sys.modules.keys())))
"""
PLAN = """
import json, sys
from fedvfm.cli import main as cli

names, sys.argv = json.loads(sys.argv[1]), ["fedvfm", "simulate", sys.argv[2], "--dry-run"]
try:
    cli.main()
except SystemExit as leave:
    assert not leave.code
print(json.dumps(sorted({*names, "fastapi", "scipy"} & sys.modules.keys())))
"""
EXPERIMENT = """
name = "startup"
title = "discs"
baselines = []
[data]
source = "folder"
path = "{data}"
[partition]
kind = "iid"
sites = 1
val_share = 0.25
test_share = 0.25
[recipe]
rounds = 1
[recipe.backbone]
name = "{backbone}"
[recipe.task]
kind = "{kind}"
[recipe.data]
class_names = ["background", "disc"]
input_size = [28, 28]
[recipe.optimiser]
batch_size = 2
"""


def write_data(folder: Path, kind: str) -> Path:
    """Four images with a disc each, larger than the training size, so that windows are needed."""
    for number in range(4):
        y, x = np.mgrid[:60, :60] - 20 - 5 * number
        mask = (y**2 + x**2 < 100).astype(np.uint8)
        one_class = "disc" if number % 2 else "background"
        parts = {"images": 200 * mask, "masks": mask} if kind == "segmentation" else {one_class: 200 * mask}
        for part, array in parts.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / part / f"{number}.png")
    return folder


def run(*arguments: str | Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_slow_libraries_are_not_loaded(tiny_dino: Path, tmp_path: Path, kind: str) -> None:
    data, experiment = write_data(tmp_path / "data", kind), tmp_path / "startup.toml"
    experiment.write_text(EXPERIMENT.format(data=data, backbone=tiny_dino, kind=kind))
    trained, evaluated, metrics = json.loads(run(TRAIN, experiment, tmp_path / "adapter", json.dumps(SLOW))[0])
    assert trained == []
    assert evaluated == (["scipy"] if kind == "segmentation" else [])
    assert ("hd95" if kind == "segmentation" else "balanced_accuracy") in metrics
    image, output = next(data.rglob("3.png")), tmp_path / "predicted"
    assert (
        json.loads(run(PREDICT, json.dumps(SLOW + COMPILER), tmp_path / "adapter", image, "--output", output)[-1]) == []
    )
    assert (output / "summary.json").exists()


def test_a_plan_loads_no_compiler(tiny_dino: Path, tmp_path: Path) -> None:
    data, experiment = write_data(tmp_path / "data", "segmentation"), tmp_path / "startup.toml"
    experiment.write_text(EXPERIMENT.format(data=data, backbone=tiny_dino, kind="segmentation"))
    assert json.loads(run(PLAN, json.dumps(SLOW + COMPILER), experiment)[-1]) == []
