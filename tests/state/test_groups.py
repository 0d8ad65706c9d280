"""Which arrays are shared and which are a site's own, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.config import schema
from fedvfm.state import groups, state

ROWS = state.Manifest.of(
    [
        state.ArraySpec("block.00.q.A", (2, 4), "lora", "A", "block.00.q"),
        state.ArraySpec("block.00.q.B", (4, 2), "lora", "B", "block.00.q"),
        state.ArraySpec("decoder.q.A", (2, 4), "lora", "A", "decoder.q"),
        state.ArraySpec("decoder.q.B", (4, 2), "lora", "B", "decoder.q"),
        state.ArraySpec("decoder.up.weight", (3, 3), "decoder"),
        state.ArraySpec("head.0.1.weight", (5,), "head"),
        state.ArraySpec("head.0.1.bias", (5,), "head"),
        state.ArraySpec("head.out.weight", (2, 5), "head"),
        state.ArraySpec("head.out.bias", (2,), "head"),
        state.ArraySpec("act.weight", (1,), "full"),
    ]
)
NAMES = {spec.name for spec in ROWS}
PERSONAL = {
    "none": set(),
    "head-local": {name for name in NAMES if name.startswith("head.")} | {"decoder.up.weight"},
    "norm-local": {"head.0.1.weight", "head.0.1.bias"},
    "share-A": {"block.00.q.B", "decoder.q.B"},
    "by-part": {"block.00.q.A", "decoder.q.B"},
    "ditto": set(),
    "dual": {"block.00.q.own.A", "block.00.q.own.B"},
}
OWN = [state.ArraySpec(name, (2, 2), "own") for name in sorted(PERSONAL["dual"])]


def recipe(kind: str = "none", factors: str = "both", **more: object) -> schema.Recipe:
    values = {
        "backbone": {"name": "none"},
        "data": {"class_names": ["a", "b"]},
        "adapter": {"factors": factors},
        "personal": {"kind": kind},
        **more,
    }
    return schema.parse(schema.Recipe, values, "recipe")


@pytest.mark.parametrize("kind", groups.KINDS)
def test_what_stays_and_what_leaves(kind: str) -> None:
    rows = state.Manifest.of([*ROWS, *OWN]) if kind == "dual" else ROWS
    assert groups.personal(rows, kind) == PERSONAL[kind]
    for number in (1, 2):
        assert groups.leaving(rows, recipe(kind), number) == tuple(sorted(NAMES - PERSONAL[kind]))
    assert groups.kept(rows, kind) == (NAMES if kind == "ditto" else PERSONAL[kind])
    assert groups.faults(rows, recipe(kind)) == []


def test_second_pairs_and_their_kind_need_each_other() -> None:
    (fault,) = groups.faults(ROWS, recipe("dual"))
    assert "no second pairs; use adapter kind 'lora' and set recipe.adapter.options.personal" in fault
    for kind in ("none", "ditto", "share-A"):
        (fault,) = groups.faults(state.Manifest.of([*ROWS, *OWN]), recipe(kind))
        assert "nothing would train the second pairs" in fault


def test_people_read_what_stays_and_that_it_has_no_noise() -> None:
    words = "personal (ditto): a whole adapter beside the global one stays at each site and never leaves it"
    assert groups.describe(recipe("ditto")) == words
    private = recipe("ditto").privacy.model_copy(update={"mechanism": "record-level"})
    assert groups.describe(recipe("ditto").model_copy(update={"privacy": private})) == f"{words}, trained without noise"
    assert groups.told(ROWS, recipe("ditto")).endswith("64 more train and never leave this site")
    assert "noise" not in groups.describe(recipe("share-A").model_copy(update={"privacy": private}))


def test_only_ditto_has_a_pull_and_it_needs_factors_that_stay_comparable() -> None:
    with pytest.raises(errors.ConfigError, match="proximal = 1: only kind = 'ditto' reads it"):
        recipe(personal={"kind": "dual", "proximal": 1.0})
    assert recipe(personal={"kind": "ditto", "proximal": 0.1}).hash == recipe("ditto").hash
    for rule in ("svd", "fair", "stack"):
        options = {"adapter": {"options": {"residual": 4}}} if rule == "stack" else {}
        said = rules.faults(recipe("ditto", aggregation={"rule": rule}, **options))
        assert any("a pull to them means nothing" in fault for fault in said) == (rule != "fair")
        assert not any("recipe.personal" in fault for fault in rules.faults(recipe("dual", aggregation={"rule": rule})))


def test_a_factor_that_does_not_train_does_not_leave_either() -> None:
    asked = recipe("head-local", "alternate")
    assert groups.leaving(ROWS, asked, 1) == ("act.weight", "block.00.q.B", "decoder.q.B")
    assert groups.leaving(ROWS, asked, 2) == ("act.weight", "block.00.q.A", "decoder.q.A")
    assert groups.told(ROWS, asked) == "17 trained numbers (0.00 MB); 31 more train and never leave this site"
    assert groups.told(ROWS, recipe("none", "alternate")).startswith("48 trained numbers (")


@pytest.mark.parametrize(
    ("kind", "factors", "rows", "word"),
    [
        ("share-A", "freeze-A", ROWS.arrays, "use factors"),
        ("by-part", "alternate", ROWS.arrays, "use factors"),
        ("share-A", "both", ROWS.arrays[-4:], "no such array"),
        ("head-local", "both", ROWS.arrays[-4:], "nothing that trains would be shared"),
    ],
)
def test_what_has_no_meaning_is_said(kind: str, factors: str, rows: tuple[state.ArraySpec, ...], word: str) -> None:
    (fault,) = groups.faults(state.Manifest.of(rows), recipe(kind, factors))
    assert word in fault


@pytest.mark.parametrize("rule", ["svd", "hetlora", "fair"])
def test_a_rule_that_needs_both_factors_is_refused_with_half_a_pair(rule: str) -> None:
    halves = [rules.faults(recipe(kind, aggregation={"rule": rule})) for kind in groups.SPLITS_PAIRS]
    assert all(f"rule '{rule}' joins the products of both factors" in "".join(faults) for faults in halves)
    assert rules.faults(recipe("head-local", aggregation={"rule": rule})) == []


@pytest.mark.parametrize(("mechanism", "refused"), [
    ("record-level", False), ("patient-level", False), ("site-level-shared", False),
    ("record-level-shared", True), ("patient-level-shared", True),
])  # fmt: skip
def test_noise_on_what_leaves_alone_bounds_nothing_of_what_stays(mechanism: str, refused: bool) -> None:
    """One record would move the un-noised personal arrays, and these every record's gradient of the next round."""
    plain = recipe("head-local")
    own = plain.privacy.model_copy(update={"mechanism": mechanism})
    said = " ".join(rules.faults(plain.model_copy(update={"privacy": own})))
    assert ("noise is added to what leaves alone" in said) == refused
    for kind in groups.BESIDE:  # they have no part in what leaves
        assert "personal" not in " ".join(rules.faults(recipe(kind).model_copy(update={"privacy": own})))


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    assert set(schema.RecipePersonal.model_fields["kind"].annotation.__args__) == set(groups.KINDS)  # type: ignore[union-attr]
    with pytest.raises(
        errors.ConfigError, match=r"'none', 'head-local', 'norm-local', 'share-[Aa]', 'by-part', 'ditto' or 'dual'"
    ):
        recipe("apfl")
    with pytest.raises(ValueError, match="personal kind 'apfl': known: none, head-local"):
        groups.personal(ROWS, "apfl")


def test_recipes_from_before_keep_their_bytes() -> None:
    plain = recipe()
    assert "personal" not in plain.model_dump(mode="json")
    assert plain.hash == schema.parse(schema.Recipe, plain.model_dump(mode="json"), "recipe").hash
    assert recipe("share-A").hash != plain.hash


def test_other_arrays_than_the_personal_ones_are_no_adapter_of_this_site() -> None:
    came = state.AdapterState({spec.name: np.zeros(spec.shape, np.float32) for spec in ROWS})
    own = {name: np.ones(came[name].shape, np.float32) for name in PERSONAL["share-A"]}
    used = groups.joined(came, own, ROWS, "share-A")
    assert {name for name in used if used[name].any()} == PERSONAL["share-A"]
    assert groups.joined(came, {}, ROWS, "share-A") is came
    for wrong in ({}, {"block.00.q.A": own["decoder.q.B"]}, {**own, "decoder.q.B": np.ones((4, 3), np.float32)}):
        if wrong:
            with pytest.raises(ValueError, match="are personal, or their shapes differ"):
                groups.joined(came, wrong, ROWS, "share-A")


@pytest.mark.parametrize(
    ("mechanism", "bare"),
    [("none", set()), ("record-level", {"ditto", "dual"}), ("site-level", {"head-local", "ditto", "dual"})],
)
def test_which_kinds_keep_what_no_noise_was_added_to(mechanism: str, bare: set[str]) -> None:
    noise = {"mechanism": mechanism, "clip": 1.0, "epsilon": 8.0, "delta": 1e-5}
    chosen = recipe(privacy={"mechanism": "none"} if mechanism == "none" else noise).privacy
    kinds = ("none", "head-local", "ditto", "dual")
    assert {kind for kind in kinds if groups.bare(recipe(kind).model_copy(update={"privacy": chosen}))} == bare
