"""SCAFFOLD at a site: the steps are corrected, and the coordinator reads the site's mean gradient from its update."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedvfm.client.training import site as sites
from fedvfm.client.training import trainer
from fedvfm.model import adapted_model
from fedvfm.state import control_variates, state
from tests.client import test_factors as drawn

SETTINGS = {"name": "sgd", "learning_rate": 1e-3, "head_learning_rate": 4e-3, "batch_size": 2, "weight_decay": 0.0}


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_correction_moves_a_round_and_not_the_gradient_that_is_read_from_it(tiny_dino: Path, epochs: int) -> None:
    optimiser = {**SETTINGS, "control_variates": True, "local_epochs": epochs}
    chosen = drawn.recipe(("dino", tiny_dino), "both", optimiser=optimiser, aggregation={"weighting": "uniform"})
    model = adapted_model.AdaptedModel(chosen)
    here, start = sites.Site("here", drawn.Drawn(56)), model.initial()
    rng = np.random.default_rng(0)
    correction = state.AdapterState(
        {name: (1e-2 * rng.standard_normal(start[name].shape)).astype(np.float32) for name in model.leaving(2)}
    )
    read = []
    for sent in (control_variates.nothing(model.manifest, chosen, 2), correction):
        update = trainer.train(model, here, start, 2, correction=sent)
        lengths = control_variates.lengths(model.manifest, chosen, 2, update.num_examples)
        read.append((update, control_variates.gradient(start, update.state, sent, lengths)))
    (plain, first), (moved, second) = read
    assert moved.metrics["steps"] == 2 * epochs
    largest = max(float(np.abs(array).max()) for array in first.values())
    for name, array in correction.items():
        expected = -np.float32(lengths[name]) * array
        assert moved.state[name] - plain.state[name] == pytest.approx(expected, abs=1e-5), name
        assert second[name] == pytest.approx(first[name], abs=0.02 * largest), "but for where the steps were taken"
    assert largest > 1e-3
