"""Rounds by time at a site: what fits is trained, told and weighed; a virtual hospital has a pace and no clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedvfm.client.training import site as sites
from fedvfm.client.training import trainer
from fedvfm.config import schema
from fedvfm.model import adapted_model
from fedvfm.privacy import table as mechanisms
from fedvfm.state import state
from tests.client import test_factors as drawn


def round_of(
    tiny_dino: Path, minutes: float, epochs: int = 1, number: int = 1, **site: Any
) -> tuple[state.SiteUpdate, int]:
    """A round's update, and how many images the site has; steps are of one image."""
    settings = {"batch_size": 1, "local_epochs": epochs, **({"round_minutes": minutes} if minutes else {})}
    model = adapted_model.AdaptedModel(drawn.recipe(("dino", tiny_dino), "both", optimiser=settings))
    here = sites.Site("here", drawn.Drawn(56), **site)
    return trainer.train(model, here, model.initial(), number), len(here.split("train"))


def test_a_pace_gives_the_same_part_of_a_round_every_time(tiny_dino: Path) -> None:
    whole, images = round_of(tiny_dino, 0.0)
    assert (whole.num_examples, whole.metrics["steps"]) == (images, images)
    again, _ = round_of(tiny_dino, 2.0, simulated=True, pace=100.0)
    assert again.state == whole.state, "what fits is all there is: the very same round"
    two, _ = round_of(tiny_dino, 0.5, simulated=True, pace=4.0)
    assert (two.num_examples, two.metrics["steps"]) == (2, 2)
    assert two.state == round_of(tiny_dino, 1.0, simulated=True, pace=2.0)[0].state != whole.state
    assert round_of(tiny_dino, 0.01, simulated=True, pace=1.0)[0].num_examples == 1, "no round is empty"
    assert round_of(tiny_dino, 0.01, simulated=True)[0].state == whole.state, "without a pace nobody is slow"


def test_a_real_site_looks_at_the_clock_and_keeps_its_least_number_of_steps(
    tiny_dino: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(trainer.time, "monotonic", clock)
    short, images = round_of(tiny_dino, 1e-9)
    assert short.num_examples == short.metrics["steps"] == 1 < images
    assert round_of(tiny_dino, 1e-9, least_steps=2)[0].num_examples == 2
    assert round_of(tiny_dino, 100.0)[0].num_examples == images


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(1, 1, 4), (1, 2, 8), (1, 3, 10), (2, 1, 2), (2, 3, 5), (2, 4, 7), (2, 6, 10), (5, 1, 1)],
)
def test_what_a_round_saw_is_told_as_of_one_epoch(epochs: int, steps: int, expected: int) -> None:
    settings = schema.OptimiserConfig(batch_size=4, local_epochs=epochs)
    assert trainer.seen(settings, 10, steps) == expected


def test_not_under_a_mechanism_at_the_site_and_old_recipes_keep_their_hash(tiny_dino: Path) -> None:
    plain = drawn.recipe(("dino", tiny_dino), "both")
    private = {"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    timed = plain.model_copy(update={"optimiser": plain.optimiser.model_copy(update={"round_minutes": 5.0})})
    assert "round_minutes" not in plain.model_dump_json()
    assert timed.hash != plain.hash
    for mechanism, number in (("record-level", 1), ("patient-level-shared", 1), ("site-level", 0)):
        told = schema.parse(schema.Recipe, {**timed.model_dump(), "privacy": {"mechanism": mechanism, **private}}, "r")
        faults = [fault for fault in mechanisms.faults(told) if "round_minutes" in fault]
        assert len(faults) == number, mechanism
