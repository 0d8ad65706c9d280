"""LoRA with a trained core: fixed factors that are the same bits everywhere, and an exact mean."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm.adapters import lora
from fedvfm.aggregators import base, mean
from fedvfm.config import schema
from fedvfm.model import adapted_model
from fedvfm.state import state


def recipe(folder: Path, **adapter: Any) -> schema.Recipe:
    values = {
        "backbone": {"name": str(folder)},
        "adapter": {"kind": "core", "rank": 4, "alpha": 6.0, **adapter},
        "data": {"class_names": ["rest", "cell"], "input_size": [56, 56]},
    }
    return schema.parse(schema.Recipe, values, "recipe")


def test_the_fixed_factors_are_the_same_bits_on_every_machine_and_release() -> None:
    """They never travel: were they others at one site, its core would mean something else and nothing would say so."""
    factor = lora.drawn(0, "block.00.q.A", (64, 768))
    assert (
        hashlib.sha256(factor.tobytes()).hexdigest()
        == "7e84f3339f9808f250abae1241da6585f95f6802dcd0e6f40b849dd0a5bcffc5"
    )
    np.testing.assert_allclose(np.square(factor).sum(axis=1).mean(), 1.0, rtol=0.01)
    assert np.abs(factor @ factor.T - np.eye(64)).max() < 0.2
    assert not np.array_equal(factor, lora.drawn(1, "block.00.q.A", (64, 768)))
    assert not np.array_equal(factor, lora.drawn(0, "block.00.v.A", (64, 768)))


def delta(model: adapted_model.AdaptedModel, adapter: state.AdapterState) -> list[torch.Tensor]:
    """What the adapter changes of every layer's weights."""
    model.write(adapter)
    layers = [layer for layer in model.backbone.model.modules() if isinstance(layer, lora.Layer)]
    return [layer.folded().weight.double() - layer.base.weight.double() for layer in layers]


def test_the_mean_of_the_cores_is_the_mean_of_the_products(tiny_dino: Path) -> None:
    model, rng, rule = adapted_model.AdaptedModel(recipe(tiny_dino)), np.random.default_rng(0), mean.Mean()
    acc, expected = rule.init(model.manifest), None
    for weight in (1.0, 3.0, 5.0):
        site = state.AdapterState(
            {name: rng.normal(0, 1, array.shape).astype(np.float32) for name, array in model.initial().items()}
        )
        share = [weight / 9.0 * one for one in delta(model, site)]
        expected = share if expected is None else [a + b for a, b in zip(expected, share, strict=True)]
        acc = rule.fold(acc, base.Contribution(weight, site, model.manifest))
    found = delta(model, rule.finish(acc)[0])
    assert expected is not None
    assert len(found) == 8
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-6)


def test_fewer_numbers_travel_than_of_lora_and_another_basis_is_another_recipe(tiny_dino: Path) -> None:
    numbers = {
        kind: sum(
            spec.size
            for spec in adapted_model.AdaptedModel(recipe(tiny_dino, kind=kind), with_weights=False).manifest
            if spec.group == "lora"
        )
        for kind in ("core", "lora")
    }
    assert numbers == {"core": 8 * 4 * 4, "lora": 8 * 2 * 4 * 32}
    plain, other = recipe(tiny_dino), recipe(tiny_dino, options={"basis": 1})
    assert plain.hash != other.hash
    core = state.AdapterState(
        {name: np.ones_like(array) for name, array in adapted_model.AdaptedModel(plain).initial().items()}
    )
    changes = [delta(adapted_model.AdaptedModel(one), core)[0] for one in (plain, other)]
    assert not torch.allclose(*changes)


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ({"options": {"basis": -1}}, "recipe.adapter.options.basis = -1: give a whole number from 0 to 2147483647"),
        ({"options": {"bases": 1}}, "recipe.adapter.options.bases: unknown option of 'core'; known: basis"),
        ({"factors": "freeze-A"}, "adapter kind 'core' has no pairs of factors"),
    ],
)
def test_faults(tiny_dino: Path, adapter: dict[str, Any], text: str) -> None:
    (fault,) = adapted_model.examine(recipe(tiny_dino, **adapter))[1]
    assert text in fault
