"""A round of Cox's target at a site: what compares cases trains, and what has none to compare has no gradient."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedvfm.client.training import site as sites
from fedvfm.client.training import trainer
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.model import adapted_model
from tests.privacy import test_private_cases
from tests.simulation import drawn_cases


@dataclass(frozen=True)
class Followed(test_private_cases.Cases):
    """Cases with a time each; every other one had the event where ``events``."""

    events: bool = True

    @property
    def train(self) -> tuple[samples.Sample, ...]:
        cases = enumerate(super().train)
        return tuple(
            dataclasses.replace(case, label=None, values=(float(at), float(self.events and at % 2 == 0)))
            for at, case in cases
        )


@pytest.mark.parametrize(("events", "batch_size"), [(True, 4), (True, 3), (False, 4)])
def test_a_round_moves_where_cases_can_be_compared(tiny_dino: Path, batch_size: int, *, events: bool) -> None:
    target = {"kind": "cox", "bins": [2.0]}
    values: dict[str, Any] = drawn_cases.recipe(tiny_dino, target=target, rounds=1)
    values["data"] = {"class_names": ["months", "died"], "input_size": [28, 28]}
    values["optimiser"] = {"learning_rate": 1e-2, "batch_size": batch_size, "weight_decay": 0.0}
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, values, "recipe"))
    hospital = Followed(side=28, events=events)
    site = sites.Site(hospital.name, hospital, simulated=True)  # type: ignore[arg-type]
    base = model.initial()
    update = trainer.train(model, site, base, 1)
    assert (update.state.fingerprint != base.fingerprint) == events
    assert (update.metrics["loss"] > 0) == events
