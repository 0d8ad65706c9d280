"""FedProx: the pull towards where a round began, on a problem whose solution is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedvfm.client.training import proximal, trainer
from fedvfm.client.training import site as sites
from fedvfm.model import adapted_model
from tests.client import test_factors as drawn


@pytest.mark.parametrize(("mu", "towards"), [(0.0, None), (1.0, None), (3.0, None), (1.0, 4.0), (3.0, -8.0)])
def test_the_minimum_lies_where_the_pull_puts_it(mu: float, towards: float | None) -> None:
    """Of ``(w - 8)^2 / 2 + mu / 2 (w - t)^2`` it is (8 + mu t) / (1 + mu); t: where it began, or as stated (Ditto)."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.SGD([weight], lr=0.1)
    near = proximal.Proximal(optimiser, mu, None if towards is None else {weight: torch.full((2,), towards)})
    for _ in range(200):
        optimiser.zero_grad()
        (0.5 * (weight - 8.0).square().sum()).backward()  # type: ignore[no-untyped-call]
        near.pull()
        optimiser.step()
    assert weight.detach().tolist() == pytest.approx([(8.0 + mu * (towards or 0.0)) / (1.0 + mu)] * 2, abs=1e-3)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    proximal.Proximal(torch.optim.SGD([weight], lr=0.1), 1.0).pull()
    assert weight.grad is None


def test_a_round_ends_nearer_to_where_it_began(tiny_dino: Path) -> None:
    def drift(mu: float) -> float:
        settings = {"learning_rate": 1e-2, "batch_size": 2, "local_epochs": 4, "proximal": mu}
        model = adapted_model.AdaptedModel(drawn.recipe(("dino", tiny_dino), "both", optimiser=settings))
        start = model.initial()
        return (trainer.train(model, sites.Site("here", drawn.Drawn(56)), start, 1).state - start).norm()

    assert drift(10.0) < 0.8 * drift(0.0)
