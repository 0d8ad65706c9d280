"""A site trains the factor that is due and sends no other: in the model, the policy's numbers, and what people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm import errors
from fedvfm.client import privacy_planning, recipe_review
from fedvfm.client.gate import policy
from fedvfm.client.training import site as sites
from fedvfm.client.training import trainer
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.model import adapted_model
from fedvfm.state import factors, state
from fedvfm.trust import locked_recipe

SIDE = {"dino": 56, "sam": 64}
ROUNDS = {"both": ("AB", "AB"), "freeze-A": ("B", "B"), "alternate": ("B", "A")}
ways = pytest.mark.parametrize("way", sorted(ROUNDS))


class Drawn:
    """A hospital of four drawn discs."""

    name = "here"

    def __init__(self, side: int) -> None:
        self.train = tuple(samples.Sample(f"s{number}") for number in range(4))
        self.val: tuple[samples.Sample, ...] = ()
        self.test, self.side = self.train, side

    def read(self, sample: samples.Sample) -> samples.Pixels:
        rng = np.random.default_rng(int(sample.id[1:]))
        rows, columns = np.mgrid[: self.side, : self.side]
        y, x = rng.uniform(20, self.side - 20, 2)
        mask = ((rows - y) ** 2 + (columns - x) ** 2 < 150).astype(np.int64)
        return samples.Pixels((0.6 * mask + 0.3 * rng.random(mask.shape)).astype(np.float32)[None], mask)


@pytest.fixture(params=["dino", "sam"])
def folder(request: pytest.FixtureRequest, tiny_dino: Path, sam_folders: dict[str, Path]) -> tuple[str, Path]:
    return request.param, {"dino": tiny_dino, "sam": sam_folders["sam"]}[request.param]


def recipe(folder: tuple[str, Path], way: str, **more: Any) -> schema.Recipe:
    side = SIDE[folder[0]]
    values = {
        "rounds": 4,
        "threads": 1,
        "backbone": {"name": str(folder[1])},
        "adapter": {"rank": 2, "factors": way, **more.pop("adapter", {})},
        "data": {"class_names": ["rest", "disc"], "input_size": [side, side]},
        "optimiser": {"learning_rate": 1e-2, "batch_size": 2},
        **more,
    }
    return schema.parse(schema.Recipe, values, "recipe")


def roles(names: Any, manifest: state.Manifest) -> str:
    found = {spec.role for spec in manifest if spec.name in names}
    return "".join(sorted(found - {"dense"}))


@ways
def test_a_round_trains_its_factor_and_sends_nothing_else(folder: tuple[str, Path], way: str) -> None:
    """The same warm model round after round, as a site has it."""
    model = adapted_model.AdaptedModel(recipe(folder, way))
    site, adapter = sites.Site("here", Drawn(SIDE[folder[0]])), model.initial()
    dense = {spec.name for spec in model.manifest if spec.role == "dense"}
    for number, expected in ((1, ROUNDS[way][0]), (2, ROUNDS[way][1]), (3, ROUNDS[way][0])):
        update = trainer.train(model, site, adapter, number)
        assert update.base_fingerprint == adapter.fingerprint
        assert tuple(update.state) == model.trained(number)
        assert roles(update.state, model.manifest) == expected
        assert dense < set(update.state)
        asked = {name for name, parameter in model._parameters_by_name.items() if parameter.requires_grad}
        assert asked == set(update.state)
        assert [p for group in model.trainable(number).values() for p in group] == [
            p for group in model.trainable().values() for p in group if p.requires_grad
        ], "in the order they always had"
        after = model.read()
        for name in adapter:
            assert (after[name].tobytes() == adapter[name].tobytes()) or name in update.state, name
        moved = {name for name in update.state if not np.array_equal(update.state[name], adapter[name])}
        assert roles(moved, model.manifest) == expected
        adapter = factors.completed(update.state, adapter)
        assert adapter == after


def test_a_model_that_trained_one_factor_trains_both_again(tiny_dino: Path) -> None:
    """What ``select`` set for one round is not left for the next."""
    model = adapted_model.AdaptedModel(recipe(("dino", tiny_dino), "alternate"))
    for number, role in ((1, "A"), (2, "B"), (1, "A")):
        model.select(number)
        still = {spec.name for spec in model.manifest if spec.role == role}
        assert {name for name, p in model._parameters_by_name.items() if not p.requires_grad} == still
    assert all(parameter.grad is None for parameter in model.parameters())


def test_as_long_as_both_train_nothing_is_different(tiny_dino: Path) -> None:
    chosen = recipe(("dino", tiny_dino), "both")
    model = adapted_model.AdaptedModel(chosen)
    assert model.trained(1) == model.trained(2) == tuple(spec.name for spec in model.manifest)
    assert model.trainable(7) == model.trainable()


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["norm", "bias", "head-only", "adaptformer", "prompt-tokens", "full"])
def test_a_kind_without_pairs_has_no_factor_to_choose(tiny_dino: Path, kind: str) -> None:
    wanted = recipe(("dino", tiny_dino), "freeze-A", adapter={"kind": kind})
    (fault,) = adapted_model.examine(wanted)[1]
    assert fault == (
        f"recipe.adapter.factors = 'freeze-A': adapter kind '{kind}' has no pairs of factors; use kind 'lora', or "
        "leave factors out"
    )
    assert adapted_model.examine(recipe(("dino", tiny_dino), "both", adapter={"kind": kind}))[1] == []
    assert adapted_model.examine(recipe(("dino", tiny_dino), "freeze-A"))[1] == []


def test_locking_refuses_a_rule_that_makes_new_factors(tiny_dino: Path) -> None:
    from fedvfm.model import locking

    with pytest.raises(errors.ConfigError, match="factors = 'alternate': rule 'svd' makes both factors"):
        locking.make(recipe(("dino", tiny_dino), "alternate", aggregation={"rule": "svd"}))


# -- what people and policies are told ---------------------------------------------------------------------------------


def test_a_review_says_that_a_residual_comes_from_the_coordinator(tiny_dino: Path) -> None:
    asked = recipe(("dino", tiny_dino), "both", adapter={"options": {"residual": 4}}, aggregation={"rule": "stack"})
    locked = adapted_model.AdaptedModel(asked, with_weights=False).locked()
    told = dict(recipe_review.words(locked))
    assert "2,048 in residual" in told["what trains"]
    assert told["what trains"].endswith("; what is in residual the coordinator fills, it trains nowhere")
    trained = locked.manifest.parameters - 2048
    assert told["leaves each round"].startswith(f"{trained:,} trained numbers")
    assert policy.Facts.of(locked).trainable == trained


@pytest.fixture(scope="module")
def locks(tiny_dino: Path) -> dict[str, locked_recipe.LockedRecipe]:
    return {
        way: adapted_model.AdaptedModel(recipe(("dino", tiny_dino), way), with_weights=False).locked() for way in ROUNDS
    }


def test_a_policy_judges_what_leaves_in_a_round(locks: dict[str, locked_recipe.LockedRecipe]) -> None:
    facts = {way: policy.Facts.of(one) for way, one in locks.items()}
    rows = locks["both"].manifest
    pairs = 4 * 2 * 2 * 32  # four blocks, q and v, rank 2, width 32: so much in A, and so much in B
    assert facts["both"].trainable == rows.parameters
    assert facts["freeze-A"].trainable == facts["alternate"].trainable == rows.parameters - pairs
    assert f"max_trainable_parameters = {rows.parameters - pairs}" in policy.accepting(facts["alternate"])


def test_a_review_says_what_leaves_and_what_does_not_train(locks: dict[str, locked_recipe.LockedRecipe]) -> None:
    told = {way: dict(recipe_review.words(one)) for way, one in locks.items()}
    rows, pairs = locks["both"].manifest, 512
    assert told["both"]["leaves each round"].startswith(f"{rows.parameters:,} trained numbers")
    for way in ("freeze-A", "alternate"):
        assert told[way]["leaves each round"].startswith(f"{rows.parameters - pairs:,} trained numbers")
        assert told[way]["what trains"].startswith(told["both"]["what trains"] + "; ")
    assert told["freeze-A"]["what trains"].endswith("A of every pair stays as it is in the first adapter, B trains")
    assert told["alternate"]["what trains"].endswith("B of every pair trains in odd rounds and A in even ones")


@ways
def test_a_plan_judges_the_recipe_s_own_way_first(tiny_dino: Path, tmp_path: Path, way: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'rounds = 10\n[backbone]\nname = "{tiny_dino}"\n[adapter]\nrank = 2\nfactors = "{way}"\n'
        '[data]\nclass_names = ["rest", "disc"]\ninput_size = [56, 56]\n'
    )
    asked = {"units": 300, "batch": 8, "epsilon": 8.0, "delta": 1e-5}
    made = privacy_planning.build(path, None, asked, ("rdp",))
    numbers = {one.way: one.numbers for one in made.signals}
    assert made.signals[0].way == factors.WAYS[way]
    assert set(numbers) == set(factors.WAYS.values())
    assert numbers["freeze-A"] == numbers["alternate"] == numbers["both factors"] - 512
    assert made.verdict == made.signals[0].verdict


def test_both_factors_train_with_a_gradient_only_where_it_is_due(tiny_dino: Path) -> None:
    model = adapted_model.AdaptedModel(recipe(("dino", tiny_dino), "alternate"))
    model.write(model.initial())
    model.train()
    model.select(1)
    model(torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    for spec in model.manifest:
        gradient = model._parameters_by_name[spec.name].grad
        assert (gradient is None) == (spec.role == "A"), spec.name
