"""Whole slides through the real simulation: trained, scored, predicted as scored, and checked at a hospital."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.client.readiness import check
from fedvfm.inference import predict
from fedvfm.model import adapted_model
from fedvfm.simulation import run
from tests.client.test_cases_at_a_site import SITE, _toml
from tests.simulation import drawn_cases
from tests.simulation.test_cases import _recipe, _rows
from tests.support import slides as drawn


@pytest.fixture(scope="module")
def values(tiny_dino: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = drawn.folder(tmp_path_factory.mktemp("slides") / "data", ("east", "west"))
    recipe = drawn_cases.recipe(tiny_dino)
    recipe["data"] = {"class_names": ["plain", "spot"], "input_size": [28, 28], "slides": {"tile": 28, "mpp": 2.0}}
    return {
        "name": "slides",
        "baselines": [],
        "data": {"source": "folder", "path": str(path)},
        "recipe": {**recipe, "rounds": 3},
    }


@pytest.fixture(scope="module")
def finished(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> run.Result:
    return run.simulate(values, output=tmp_path_factory.mktemp("runs") / "slides")


def test_slides_are_predicted_as_they_were_scored(finished: run.Result, values: dict[str, Any], tmp_path: Path) -> None:
    rows = [row for row in _rows(finished.path / "samples.csv") if row["arm"] == "federated"]
    scored = sorted(float(row["value"]) for row in rows if row["metric"] == "probability_1")
    assert len(scored) == 4
    folder = Path(values["data"]["path"])
    with (folder / "index.csv").open(encoding="utf-8") as file:
        tested = [row["id"] for row in csv.DictReader(file) if row["split"] == "test"]
    for name in tested:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.tif").symlink_to(folder / "slides" / f"{name}.tif")
    told = predict.predict(finished.path / "adapter", tmp_path / "in", tmp_path / "out", overlays=True)
    assert sorted(row["probabilities"]["spot"] for row in told["inputs"]) == pytest.approx(scored, abs=1e-5)
    parts = [row for row in _rows(tmp_path / "out" / "parts.csv") if row["id"] == tested[0]]
    assert len(parts) > 10
    assert all(part["part"].startswith(f"{tested[0]}/x") for part in parts)
    with Image.open(tmp_path / "out" / "overlays" / f"{tested[0]}.png") as heat:
        assert max(heat.size) > 200


def test_slides_that_do_not_say_their_scale_are_predicted_with_it(finished: run.Result, tmp_path: Path) -> None:
    drawn.write(tmp_path / "a.tif", mpp=None)
    with pytest.raises(errors.DataError, match="does not say how large"):
        predict.predict(finished.path / "adapter", tmp_path / "a.tif", tmp_path / "none")
    told = predict.predict(finished.path / "adapter", tmp_path / "a.tif", tmp_path / "out", mpp=0.5)
    assert [row["id"] for row in told["inputs"]] == ["a"]
    with pytest.raises(errors.ConfigError, match="--mpp"):
        predict.predict(finished.path / "adapter", tmp_path / "a.tif", tmp_path / "far", mpp=500.0)
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")
    with pytest.raises(errors.DataError, match="takes whole slides"):
        predict.predict(finished.path / "adapter", tmp_path / "b.png", tmp_path / "picture")


@pytest.mark.parametrize("changes", [{"task": {"kind": "classification"}}, {"task": {"kind": "segmentation"}}])
def test_other_tasks_take_no_slides(values: dict[str, Any], changes: dict[str, Any]) -> None:
    _, faults = adapted_model.examine(_recipe(values, **changes))
    assert any("recipe.data.slides" in fault for fault in faults), faults


def test_a_hospital_checks_its_slides(values: dict[str, Any], tmp_path: Path) -> None:
    path = drawn.folder(tmp_path / "data", ("east",))
    (tmp_path / "recipe.toml").write_text(_toml(values["recipe"]))
    (tmp_path / "site.toml").write_text(SITE)
    made = check.check(tmp_path / "site.toml")
    assert not [one for one in made.findings if one.severity == "blocker"], made.told
    assert made.seen is not None
    assert len(made.seen.samples) == 8
    drawn.write(path / "slides" / "east-1.tif", mpp=None)
    (path / "slides" / "east-2.tif").write_bytes((path / "slides" / "east-2.tif").read_bytes()[:5000])
    drawn.write(path / "slides" / "east-3.tif", np.full((1024, 1024, 3), 240, dtype=np.uint8))
    drawn.write(path / "slides" / "stray.tif")
    made = check.check(tmp_path / "site.toml")
    blocking = {one.code for one in made.findings if one.severity == "blocker"}
    assert {"slide-scale", "unreadable", "no-tissue", "table"} <= blocking, (
        sorted(blocking),
        [text for _, _, text in made.told],
    )
