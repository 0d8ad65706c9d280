"""A survey of virtual hospitals: the command, its files, and faults."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fedvfm import errors
from fedvfm.cli import main
from fedvfm.config import schema

RUNNER = CliRunner()


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """96 grey pictures of two sizes, at two hospitals by chance."""
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for number in range(96):
        side = 64 if number < 48 else 100
        mask = np.zeros((side, side), np.uint8)
        mask[: side // 4] = 1
        Image.fromarray(rng.integers(0, 255, (side, side), dtype=np.uint8)).save(
            tmp_path / f"data/images/{number:02d}.png"
        )
        Image.fromarray(mask).save(tmp_path / f"data/masks/{number:02d}.png")
    path = tmp_path / "e.toml"
    path.write_text(
        f'name = "e"\n[data]\nsource = "folder"\npath = "{tmp_path / "data"}"\n[partition]\nkind = "iid"\nsites = 2\n'
        '[recipe]\nrounds = 1\n[recipe.backbone]\nname = "unet"\n[recipe.adapter]\nkind = "full"\n'
        '[recipe.data]\nclass_names = ["background", "lesion"]\ninput_size = [32, 32]\n'
    )
    return path


def test_a_survey_writes_what_it_found_and_a_recipe_to_lock(experiment: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = RUNNER.invoke(main.app, ["survey", str(experiment), "-o", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    values = json.loads((folder / "survey.json").read_text())
    assert values["patients"] == sum(values["groups"]["rows"]["patients"][at] or 0 for at in range(20))
    assert values["proposed"]["values"]["task.class_weights"] == [0.667, 2.0]
    schema.parse(schema.Recipe, tomllib.loads((folder / "recipe.toml").read_text()), "recipe")
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert ".png" not in (folder / "survey.json").read_text()
    again = RUNNER.invoke(main.app, ["survey", str(experiment), "-o", str(folder)])
    assert isinstance(again.exception, errors.OutputInUse)


def test_a_survey_for_boxes_proposes_a_recipe_of_boxes(experiment: Path, tmp_path: Path) -> None:
    more = '"dinov2-small-imgfocus"\n[recipe.adapter]\nkind = "head-only"\n[recipe.task]\nkind = "detection"'
    experiment.write_text(experiment.read_text().replace('"unet"\n[recipe.adapter]\nkind = "full"', more))
    done = RUNNER.invoke(main.app, ["survey", str(experiment), "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    proposed = schema.parse(schema.Recipe, schema.read_toml(tmp_path / "out" / "recipe.toml"), "recipe")
    assert (proposed.task.kind, proposed.task.class_weights) == ("detection", ())
    assert "no weights of classes" in (tmp_path / "out" / "survey.md").read_text()


def test_a_survey_with_noise_says_that_it_protects_nobody_here(experiment: Path, tmp_path: Path) -> None:
    asked = tmp_path / "survey.toml"
    done = RUNNER.invoke(main.app, ["server", "init-survey", "--classes", "background,lesion", "-o", str(asked)])
    assert done.exit_code == 0, done.output
    asked.write_text(asked.read_text() + "[privacy]\nepsilon = 1.0\ndelta = 1e-4\n")
    done = RUNNER.invoke(
        main.app, ["survey", str(experiment), "--survey", str(asked), "-o", str(tmp_path / "out"), "-q"]
    )
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "survey.md").read_text()
    assert "protects nobody" in page
    assert "Noise:" in page


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (
            lambda text: text.replace("least_patients = 10", "least_patients = 100").replace("#least", "least"),
            errors.PolicyRefused,
        ),
        (lambda text: text.replace("lesion", "other"), errors.ConfigError),
        (lambda text: text.replace("#scale", "scale").replace('"unit"', '"file"'), errors.DataError),
    ],
)
def test_a_survey_that_does_not_fit_is_refused(
    experiment: Path, tmp_path: Path, change: Callable[[str], str], kind: type[errors.FedvfmError]
) -> None:
    asked = tmp_path / "survey.toml"
    RUNNER.invoke(main.app, ["server", "init-survey", "--classes", "background,lesion", "-o", str(asked)])
    asked.write_text(change(asked.read_text()))
    done = RUNNER.invoke(
        main.app, ["survey", str(experiment), "--survey", str(asked), "-o", str(tmp_path / "out"), "-q"]
    )
    assert isinstance(done.exception, kind), done.exception
    assert not (tmp_path / "out").exists()
