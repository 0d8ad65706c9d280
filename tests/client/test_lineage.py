"""Which adapters a site takes: the recipe's first one, then bounded steps; whatever else comes is never worked on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.client.gate import held_adapters, lineage
from fedvfm.config import schema
from fedvfm.protocol import protocol
from fedvfm.state import control_variates, state
from fedvfm.trust import locked_recipe
from tests.client.two_numbers import SHA, make_recipe

PAIR = state.Manifest.of(
    [
        state.ArraySpec("q.A", (2, 3), "lora", "A", "q"),
        state.ArraySpec("q.B", (4, 2), "lora", "B", "q"),
        state.ArraySpec("head.bias", (2,), "head"),
    ]
)
FIRST = state.AdapterState(
    {
        "q.A": np.full((2, 3), 0.5, np.float32),
        "q.B": np.zeros((4, 2), np.float32),
        "head.bias": np.zeros(2, np.float32),
    }
)


def moved(base: state.AdapterState = FIRST, name: str = "head.bias", by: float = 1.0) -> state.AdapterState:
    arrays = dict(base)
    arrays[name] = arrays[name] + np.float32(by / np.sqrt(arrays[name].size))
    return state.AdapterState(arrays)


class Site:
    """A site's view of one recipe; ``entries`` is what its audit log says of it."""

    def __init__(self, manifest: state.Manifest = PAIR, **values: Any) -> None:
        self.recipe: schema.Recipe = make_recipe(rounds=9, **values)
        self.locked = locked_recipe.LockedRecipe.of(self.recipe, PAIR, FIRST, SHA, 1000)
        self.manifest, self.held = manifest, held_adapters.Adapters()
        self.entries: list[dict[str, Any]] = []
        self.trains = True

    @property
    def own(self) -> lineage.Lineage:
        taken = lineage.Taken()
        for entry in self.entries:
            taken.add(entry)
        return lineage.Lineage(self.locked, self.manifest, taken, self.held, lambda: self.trains)

    def trained(self, number: int, base: state.AdapterState, norm: float) -> None:
        self.held.keep(self.recipe.hash, base)
        self.entries.append({"event": "trained", "round": number, "base": base.fingerprint, "norm": norm})

    def scored(self, number: int, adapter: state.AdapterState) -> None:
        self.held.keep(self.recipe.hash, adapter)
        self.entries.append({"event": "evaluated", "round": number, "fingerprint": adapter.fingerprint})

    def word(self, kind: str, number: int, adapter: state.AdapterState, max_step: float = 100.0) -> str:
        split = "val" if kind == protocol.EVALUATE else ""
        try:
            self.own.require(kind, protocol.Task(self.recipe, number, adapter, split), max_step)
        except errors.PolicyRefused as refusal:
            return refusal.reason
        return ""


SLACK = lineage.SLACK
TRAIN, EVALUATE = protocol.TRAIN, protocol.EVALUATE


def test_round_one_starts_from_what_the_seed_makes_here_and_nothing_else() -> None:
    site = Site()
    assert site.word(TRAIN, 1, FIRST) == site.word(EVALUATE, 0, FIRST) == ""
    assert site.word(TRAIN, 1, moved(by=1e-7)) == "", "another machine draws it with other last bits"
    assert site.word(TRAIN, 1, moved(by=1e-3)) == "policy-base"
    assert site.word(EVALUATE, 0, moved()) == "policy-base"
    assert site.word(TRAIN, 1, FIRST.select(["q.A", "q.B"])) == "adapter"


def test_under_secure_aggregation_no_adapter_is_trained_from_in_two_rounds() -> None:
    """Two sums from one start, with a site in one of them alone, would differ by its update."""
    site, plain = Site(min_sites=3, secure_aggregation={}), Site(min_sites=3)
    for own in (site, plain):
        own.trained(1, FIRST, 0.5)
    assert site.word(TRAIN, 1, FIRST) == "", "the same round, asked for anew"
    assert site.word(EVALUATE, 0, FIRST) == ""
    assert (site.word(TRAIN, 2, FIRST), plain.word(TRAIN, 2, FIRST)) == ("secure-base", "")
    second = moved(by=0.2)
    assert site.word(TRAIN, 2, second) == ""
    site.trained(2, second, 0.5)
    assert site.word(TRAIN, 2, second) == ""
    assert site.word(EVALUATE, 1, second) == ""
    assert {site.word(TRAIN, 3, base) for base in (FIRST, second)} == {"secure-base"}
    assert site.word(TRAIN, 1, second) == "secure-base"


def test_an_extension_starts_from_the_adapter_that_its_recipe_names() -> None:
    start = moved(by=7.0)
    site = Site(start=start.fingerprint)
    assert site.word(TRAIN, 1, start) == ""
    assert site.word(TRAIN, 1, FIRST) == "policy-base"
    assert site.word(TRAIN, 2, start) == "policy-base", "nothing is at hand to hold it to"
    site.trained(1, start, 0.1)
    assert site.word(TRAIN, 2, moved(start, by=0.2)) == ""


def test_a_rerun_starts_in_its_middle_from_the_adapter_that_its_recipe_names() -> None:
    start = moved(by=7.0)
    site = Site(start=start.fingerprint, rerun={"of": SHA, "after": 4})
    assert site.word(TRAIN, 5, start) == ""
    assert {site.word(TRAIN, 5, FIRST), site.word(TRAIN, 1, FIRST), site.word(TRAIN, 1, start)} == {"policy-base"}
    assert site.word(TRAIN, 6, start) == "policy-base", "nothing is at hand to hold it to"
    site.trained(5, start, 0.1)
    assert site.word(TRAIN, 6, moved(start, by=0.2)) == ""
    whole = Site(rerun={"of": SHA, "after": 0})
    assert whole.word(TRAIN, 1, FIRST) == ""
    assert whole.word(TRAIN, 1, start) == "policy-base"


def test_a_site_at_a_rank_of_its_own_starts_from_the_first_adapter_cut_to_it() -> None:
    narrow = state.Manifest.of(
        [
            state.ArraySpec("q.A", (1, 3), "lora", "A", "q", 2.0),
            state.ArraySpec("q.B", (4, 1), "lora", "B", "q", 2.0),
            state.ArraySpec("head.bias", (2,), "head"),
        ]
    )
    site = Site(narrow, aggregation={"rule": "svd"})
    cut = site.own.first()
    assert cut is not None
    assert narrow.fits(cut)
    assert site.word(TRAIN, 1, cut) == ""
    assert site.word(TRAIN, 1, moved(cut)) == "policy-base"
    extended = Site(narrow, aggregation={"rule": "svd"}, start=SHA)
    assert extended.word(TRAIN, 1, moved(cut)) == "", "cut from an adapter that is not made here: any of the shape"
    assert extended.word(TRAIN, 1, FIRST) == "policy-base"


def test_a_later_adapter_lies_within_what_sites_may_send() -> None:
    site = Site(admission={"max_update_norm": 5.0})
    assert site.word(TRAIN, 2, moved(by=5.0)) == "", "it trained nothing yet: the recipe's bound alone"
    assert site.word(TRAIN, 2, moved(by=6.0)) == "policy-base"
    assert site.word(TRAIN, 4, moved(by=15.0)) == "", "three rounds that it took no part in"
    site.trained(1, FIRST, 0.01)
    assert site.word(TRAIN, 2, moved(by=1.0)) == ""
    assert site.word(TRAIN, 2, moved(by=1.2)) == "policy-base"
    assert site.word(TRAIN, 2, moved(by=1.2), max_step=200.0) == ""
    site.trained(2, moved(by=1.0), 0.01)
    assert site.word(TRAIN, 3, moved(by=2.0)) == "", "each step counts from the one before"
    assert site.word(TRAIN, 3, moved(by=2.2)) == "policy-base"
    assert site.word(TRAIN, 2, moved(by=1.0)) == "", "asked again"
    for bad in (np.nan, np.inf):
        assert site.word(TRAIN, 3, moved(by=bad)) == "policy-base"


@pytest.mark.parametrize(
    ("values", "most"),
    [({"server_learning_rate": 2.0}, 2.0), ({"server_momentum": 0.5}, 2.0), ({}, 1.0)],
)
def test_the_server_s_own_step_is_allowed_for(values: dict[str, float], most: float) -> None:
    site = Site(aggregation=values)
    site.trained(1, FIRST, 0.01)
    assert site.word(TRAIN, 2, moved(by=most)) == ""
    assert site.word(TRAIN, 2, moved(by=1.2 * most)) == "policy-base"


def test_a_server_that_steps_by_adam_goes_no_further_than_it_can() -> None:
    site = Site(aggregation={"server_optimiser": "adam", "server_learning_rate": 0.01})
    site.trained(1, FIRST, 0.0001)
    assert site.word(TRAIN, 2, moved(by=0.1)) == "", "a hundred times the update, over the floor"
    assert site.word(TRAIN, 2, moved(by=0.12)) == "policy-base"
    site.trained(1, FIRST, 100.0)
    assert site.word(TRAIN, 2, moved(by=0.4)) == "", "sixteen numbers, each by ten rates at most"
    assert site.word(TRAIN, 2, moved(by=0.5)) == "policy-base"


def test_a_correction_of_steps_moves_weights_no_farther_than_an_adapter_may() -> None:
    """Ten steps of rate 0.1 reach as far as the correction is long; the largest update so far was 2."""
    optimiser = {"name": "sgd", "learning_rate": 0.1, "batch_size": 1, "schedule": "constant", "warmup": 0.0}
    site = Site(optimiser={**optimiser, "control_variates": True}, aggregation={"weighting": "uniform"})
    site.trained(1, FIRST, norm=2.0)
    zero = control_variates.nothing(PAIR, site.recipe, 1)

    def word(number: int, correction: state.AdapterState | None, max_step: float = 10.0) -> str:
        task = protocol.Task(site.recipe, number, FIRST, correction=correction)
        try:
            site.own.require_correction(task, 10, max_step)
        except (errors.PolicyRefused, errors.ProtocolError) as refusal:
            return refusal.reason if isinstance(refusal, errors.PolicyRefused) else "form"
        return ""

    far = SLACK * 20.0
    assert [word(1, zero), word(1, moved(zero, by=1e-6)), word(1, None)] == ["", "policy-base", "form"]
    assert [word(2, moved(zero, by=0.99 * far)), word(2, moved(zero, by=1.01 * far))] == ["", "policy-base"]
    assert word(2, moved(zero, by=1.01 * far), max_step=20.0) == ""
    site.entries.clear()
    assert word(2, moved(zero, by=1.01 * SLACK * 1000.0)) == "policy-base", "the recipe's bound stands alone"
    assert Site().own.require_correction(protocol.Task(Site().recipe, 2, FIRST), 10, 1.0) is None


def test_only_adapters_of_rounds_that_this_site_has_a_part_in_are_scored() -> None:
    site = Site()
    assert site.word(EVALUATE, 1, moved(by=0.01)) == "policy-base", "it trained nothing"
    assert site.word(EVALUATE, 3, FIRST) == "", "the recipe's own first adapter was made by nobody"
    site.trained(1, FIRST, 0.01)
    assert site.word(EVALUATE, 1, moved(by=0.01)) == ""
    site.trained(2, moved(by=0.01), 0.01)
    assert site.word(EVALUATE, 1, moved(by=0.01)) == ""
    assert site.word(EVALUATE, 1, moved(by=0.02)) == "policy-base", "another was the base of round 2"
    site.scored(2, moved(by=0.03))
    assert site.word(EVALUATE, 2, moved(by=0.03)) == ""
    assert site.word(EVALUATE, 2, moved(by=0.04)) == "policy-base", "another was scored for round 2"
    assert site.word(EVALUATE, 3, moved(by=900.0)) == "policy-base"


@pytest.mark.parametrize(
    ("way", "number", "name", "word"),
    [
        ("freeze-A", 2, "q.A", "policy-base"),
        ("freeze-A", 2, "q.B", ""),
        ("alternate", 2, "q.A", "policy-base"),
        ("alternate", 2, "q.B", ""),
        ("alternate", 3, "q.A", ""),
        ("both", 2, "q.A", ""),
    ],
)
def test_what_does_not_train_does_not_move(way: str, number: int, name: str, word: str) -> None:
    """The adapter of the round before ``number`` came after ``number`` - 1 rounds of training."""
    site = Site(adapter={"factors": way})
    site.trained(1, FIRST, 0.01)
    assert site.word(TRAIN, number, moved(name=name, by=0.01)) == word


def test_a_rule_that_makes_factors_anew_is_held_to_their_products() -> None:
    site = Site(aggregation={"rule": "svd"})
    base = moved(name="q.B", by=0.1)
    site.trained(2, base, 0.01)
    turned = state.AdapterState({**base, "q.A": -base["q.A"], "q.B": -base["q.B"]})
    assert site.own.moved(base, turned) == pytest.approx(0.0, abs=1e-9)
    product = base["q.B"].astype(float) @ base["q.A"], FIRST["q.B"].astype(float) @ FIRST["q.A"]
    assert site.own.moved(FIRST, base) == pytest.approx(np.linalg.norm(product[0] - product[1]))
    assert site.word(TRAIN, 3, turned) == ""
    trap = state.AdapterState({**base, "q.A": base["q.A"] * np.float32(1e4), "q.B": base["q.B"] * np.float32(1e-4)})
    assert site.own.moved(base, trap) < 1e-6
    assert site.word(TRAIN, 3, trap) == "policy-base", "the same product with gradients of any size"


def test_it_goes_by_what_is_on_disk_after_a_restart(tmp_path: Path) -> None:
    site = Site()
    site.held = held_adapters.Adapters(tmp_path)
    site.trained(2, moved(by=0.5), 0.01)
    site.held = held_adapters.Adapters(tmp_path)
    assert site.word(TRAIN, 3, moved(by=1.5)) == ""
    assert site.word(TRAIN, 3, moved(by=1.8)) == "policy-base"
    site.held = held_adapters.Adapters(tmp_path / "purged")
    assert site.word(TRAIN, 3, moved(by=1.8)) == "", "two steps from the first adapter, which it makes again"
    assert site.word(TRAIN, 3, moved(by=2.3)) == "policy-base"


def test_at_site_level_the_noise_is_the_coordinator_s() -> None:
    about = {"mechanism": "site-level", "clip": 1.0, "epsilon": 8.0, "delta": 1e-5}
    site = Site(privacy=about, aggregation={"weighting": "uniform"}, admission={"max_update_norm": 50.0})
    site.trained(1, FIRST, 0.01)
    assert site.word(TRAIN, 2, moved(by=50.0)) == ""
    assert site.word(TRAIN, 2, moved(by=60.0)) == "policy-base"


def test_a_site_that_only_tests_scores_within_the_recipes_bound() -> None:
    """It has no image to train on, so no update of its own bounds a step."""
    site = Site(admission={"max_update_norm": 2.0})
    assert site.word(EVALUATE, 1, moved(by=1.0)) == "policy-base", "one that could train and did not"
    site.trains = False
    assert site.word(EVALUATE, 1, moved(by=1.0)) == ""
    assert site.word(EVALUATE, 1, moved(by=5.0)) == "policy-base"
    assert site.word(EVALUATE, 3, moved(by=5.0)) == "", "three rounds lead so far"
    site.scored(1, moved(by=1.0))
    assert site.word(EVALUATE, 1, moved(by=1.1)) == "policy-base", "another one for the same round"


def with_residual(rule: str) -> tuple[Site, state.AdapterState]:
    """A site of a recipe whose rule fills a residual of one direction, and the first adapter."""
    names = {"q.residual.A": (1, 3), "q.residual.B": (4, 1)}
    manifest = state.Manifest.of([*PAIR, *(state.ArraySpec(name, shape, "residual") for name, shape in names.items())])
    first = state.AdapterState({**FIRST, **{name: np.zeros(shape, np.float32) for name, shape in names.items()}})
    site = Site(manifest, adapter={"options": {"residual": 1}}, aggregation={"rule": rule})
    site.locked = locked_recipe.LockedRecipe.of(site.recipe, manifest, first, SHA, 1000)
    return site, first


def test_a_residual_moves_by_bounded_steps_though_no_site_sends_it() -> None:
    site, first = with_residual("residual")

    def filled(by: float) -> state.AdapterState:
        """B A of the residual is a matrix of norm ``by``."""
        sizes = {"q.residual.A": np.sqrt(by / 3), "q.residual.B": np.sqrt(by) / 2}
        return state.AdapterState({**first, **{n: np.full_like(first[n], v) for n, v in sizes.items()}})

    site.trained(1, first, 0.5)
    assert site.own.moved(first, filled(4.0)) == pytest.approx(4.0, rel=1e-5)
    assert site.word(TRAIN, 2, filled(4.0), 10.0) == ""
    assert site.word(TRAIN, 2, filled(6.0), 10.0) == "policy-base"


def test_averaged_factors_beside_a_residual_are_of_any_length_and_move_as_far_as_updates() -> None:
    """B of ten rounds is long and A is as short as it was drawn; that is no trap, and ten thousand times as long is."""
    site, first = with_residual("residual")
    site.trained(1, first, 2.5)
    long = moved(first, "q.B", by=6.0)
    assert np.linalg.norm(long["q.B"], axis=0).min() > 2 * max(1.0, np.linalg.norm(long["q.A"], axis=1).max())
    assert site.word(TRAIN, 2, long) == ""
    fresh, other = with_residual("stack")
    fresh.trained(1, other, 2.5)
    assert fresh.word(TRAIN, 2, long) == "policy-base", "factors that are drawn anew are short"
    site.trained(2, long, 2.5)
    trap = state.AdapterState({**long, "q.A": long["q.A"] * np.float32(1e4), "q.B": long["q.B"] * np.float32(1e-4)})
    assert site.own.moved(long, trap) < 1e-4
    assert site.word(TRAIN, 3, trap) == "policy-base", "the same product with gradients of any size"
    uneven = state.AdapterState({**long, "q.residual.A": np.full((1, 3), 1e4, np.float32)})
    assert site.own.moved(long, uneven) < 1e-4
    assert site.word(TRAIN, 3, uneven) == "policy-base", "a residual is made anew"
