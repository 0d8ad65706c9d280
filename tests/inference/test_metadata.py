"""What files beside an export say of columns of a table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fedvfm.config import schema
from fedvfm.inference import bundle
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
