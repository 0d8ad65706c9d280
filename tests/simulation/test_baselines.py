"""What every arm of an experiment trains."""

from __future__ import annotations

from typing import Any

import pytest

from fedvfm import config
from fedvfm.simulation import baselines, experiment, run

SITES = ["east", "north", "west"]


@pytest.fixture
def moving() -> config.Experiment:
    """The bundled demo with every baseline, and a server that takes steps of its own."""
    names = '["local-only", "pooled", "pooled-2x", "head-only", "leave-one-out", "unet", "classical"]'
    sets = [f"baselines={names}", "recipe.aggregation.server_momentum=0.5"]
    return experiment.load("brain-mri", sets)


def arms(what: config.Experiment) -> dict[str, Any]:
    return {arm.name: arm for arm in run.arms(what, SITES)}


def test_equal_gradient_steps_per_sample_in_all_trained_arms(moving: config.Experiment) -> None:
    own = moving.recipe
    for name, arm in arms(moving).items():
        if arm.recipe is None:
            continue
        assert arm.recipe.rounds == own.rounds, name
        assert arm.recipe.optimiser.batch_size == own.optimiser.batch_size, name
        epochs = own.optimiser.local_epochs * (2 if name == "pooled-2x" else 1)
        assert arm.recipe.optimiser.local_epochs == epochs, name


def test_arms_of_one_site_take_no_server_step(moving: config.Experiment) -> None:
    for name, arm in arms(moving).items():
        if arm.recipe is not None:
            alone = len(arm.train_sites) == 1
            momentum = arm.recipe.aggregation.server_momentum
            assert momentum == (0.0 if alone else 0.5), name


def test_who_trains_and_who_tests(moving: config.Experiment) -> None:
    found = arms(moving)
    assert next(iter(found)) == "federated"
    assert found["local-only/north"].train_sites == ("north",)
    assert found["local-only/north"].test_sites == tuple(SITES)
    assert found["pooled"].train_sites == (baselines.POOLED,)
    assert found["leave-one-out/west"].train_sites == ("east", "north")
    assert found["leave-one-out/west"].test_sites == ("west",)
    assert found["classical"].recipe is None
    assert found["unet"].recipe.backbone.name == "unet"
    assert found["head-only"].recipe.adapter.kind == "head-only"
