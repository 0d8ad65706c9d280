"""A site's round where noise is shared: one step of clipped gradients, whose noise comes with the masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm.client.training import site as sites
from fedvfm.client.training import trainer
from fedvfm.config import schema
from fedvfm.model import adapted_model
from fedvfm.privacy import dpsgd
from fedvfm.secure_aggregation import fixed_point
from fedvfm.state import state
from tests.privacy import test_private_training as private

UNITS = 6
PLAIN = {"name": "sgd", "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0}


def recipe(
    folder: Path, *, unit: str = "record", clip: float = 1e-2, clip_norm: float = 5.0, **step: Any
) -> schema.Recipe:
    return private.recipe(
        folder,
        {"mechanism": f"{unit}-level-shared", "clip": clip, "noise_multiplier": 1.0, "delta": 1e-5},
        optimiser={**PLAIN, "batch_size": UNITS, "learning_rate": 0.5, **step},
        min_sites=3,
        secure_aggregation={"clip_norm": clip_norm},
    )


def trained(asked: schema.Recipe, **drawn: Any) -> tuple[state.AdapterState, state.SiteUpdate]:
    """Where round 1 starts, and what a real site sends, every unit being in the step."""
    model = adapted_model.AdaptedModel(asked)
    start = model.initial()
    return start, trainer.train(model, sites.Site("north", private.Drawn(**drawn)), start, 1)


def whole(asked: schema.Recipe, start: state.AdapterState, update: state.SiteUpdate) -> np.ndarray[Any, Any]:
    numbers = fixed_point.of(asked).encode(update.state, start, sorted(update.state), 1, None)
    return numbers.view(np.int64)[: -fixed_point.TAIL].astype(float)


@pytest.mark.parametrize(("unit", "each"), [("record", 1), ("patient", 2)])
def test_one_unit_moves_the_whole_numbers_by_at_most_what_the_noise_is_made_for(
    tiny_dino: Path, unit: str, each: int
) -> None:
    asked = recipe(tiny_dino, unit=unit)
    start, update = trained(asked, count=UNITS * each, each=each)
    _, without = trained(asked, count=(UNITS - 1) * each, each=each)
    point = fixed_point.of(asked)
    assert point.noise is not None
    apart = float(np.linalg.norm(whole(asked, start, update) - whole(asked, start, without)))
    bound = point.noise.bound * 2.0**point.places
    names = sorted(update.state)
    allowed = point.noise.sigma(point.places, start, names) * np.sqrt(point.noise.honest) / point.noise.multiplier
    assert 0.98 * bound < apart <= allowed, "gradients are longer than the clip here, so it is nearly all of the bound"
    assert allowed < 1.02 * bound, "roundings are a small part of it"
    assert (update.num_examples, update.metrics) == (1, {})


def test_training_itself_adds_no_noise(tiny_dino: Path) -> None:
    first, second = (trained(recipe(tiny_dino), count=UNITS)[1] for _ in range(2))
    assert first.state.fingerprint == second.state.fingerprint


def test_that_nobody_was_drawn_ends_no_round_and_is_told_by_nothing(
    tiny_dino: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpsgd.PrivateSteps, "draw", lambda self, units: [])
    start, update = trained(recipe(tiny_dino), count=UNITS)
    assert all(np.array_equal(update.state[name], start[name]) for name in update.state)
    assert (update.num_examples, update.metrics) == (1, {})


def test_a_long_sum_is_shortened_before_it_is_rounded(tiny_dino: Path) -> None:
    asked = recipe(tiny_dino, clip=1.0, clip_norm=0.01)
    start, update = trained(asked, count=UNITS)
    moved = np.concatenate([(update.state[name].astype(float) - start[name]).reshape(-1) for name in update.state])
    assert np.linalg.norm(moved) == pytest.approx(0.01, rel=1e-3)
