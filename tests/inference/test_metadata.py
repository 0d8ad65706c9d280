"""What files beside an export, and a report of a student, say of columns of a table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm.config import schema
from fedvfm.inference import bundle, distillation
from fedvfm.tasks import classification


def fake(target: dict[str, Any], *names: str) -> Any:
    """A model as far as its recipe and its task go."""
    values = {
        "backbone": {"name": "dinov2"},
        "task": {"kind": "classification"},
        "target": target,
        "data": {"class_names": list(names), "input_size": [28, 28]},
        "optimiser": {"batch_size": 32},
    }
    recipe = schema.parse(schema.Recipe, values, "recipe")
    return SimpleNamespace(recipe=recipe, task=classification.Classification(recipe))


@pytest.mark.parametrize(
    ("target", "outputs"),
    [
        ({"kind": "cox", "bins": [6.0]}, ["logarithm of the hazard ratio"]),
        (
            {"kind": "survival", "bins": [6.0, 12.0, 24.0]},
            ["event from 0 to 6", "event from 6 to 12", "event from 12 to 24", "no event up to 24"],
        ),
        ({"kind": "class"}, ["months", "died"]),
    ],
)
def test_a_bundle_tells_the_numbers_of_a_prognosis(target: dict[str, Any], outputs: list[str]) -> None:
    """Its columns, time and event, are what it learned from, and no output."""
    model = fake(target, "months", "died")
    said = bundle._logits(model)
    assert said["num_channels"] == model.task.width
    assert list(said["channel_def"].values()) == outputs


def test_a_student_of_columns_is_scored_on_columns(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.fromarray(np.full((28, 28), 9, dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
    model = fake({"kind": "regression", "ranges": [[0.0, 100.0]], "centres": [50.0], "scales": [10.0]}, "age")
    (tmp_path / "labels.csv").write_text("id,age\na,51\nb,37.5\n")
    assert [sample.truth for sample in distillation._labelled(tmp_path, model).samples()] == [(51.0,), (37.5,)]
