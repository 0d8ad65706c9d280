"""Configs: form is checked strictly, all faults come at once with their paths, and a recipe has one hash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.config import overrides, schema

RECIPE: dict[str, Any] = {"backbone": {"name": "unet"}, "data": {"class_names": ["rest", "cell"]}}
EXPERIMENT: dict[str, Any] = {"name": "tiny", "recipe": RECIPE, "data": {"source": "nuclei"}}


def merged(base: dict[str, Any], **tables: Any) -> dict[str, Any]:
    return {
        **base,
        **{key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in tables.items()},
    }


def recipe(**tables: Any) -> schema.Recipe:
    return schema.parse(schema.Recipe, merged(RECIPE, **tables), "recipe")


def faults(**tables: Any) -> tuple[str, ...]:
    with pytest.raises(errors.ConfigError) as caught:
        recipe(**tables)
    return caught.value.faults


def test_defaults() -> None:
    made = recipe()
    assert made.adapter.kind == "lora"
    assert made.adapter.scale == 1.0
    assert (made.task.ce_weight, made.task.dice_weight) == (0.2, 0.8)


@pytest.mark.parametrize(("rank", "alpha", "scale"), [(8, None, 1.0), (8, 16, 2.0), (4, 1.0, 0.25)])
def test_scale_is_alpha_over_rank(rank: int, alpha: float | None, scale: float) -> None:
    assert recipe(adapter={"rank": rank, **({} if alpha is None else {"alpha": alpha})}).adapter.scale == scale


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rounds", "3"),
        ("rounds", 3.0),
        ("rounds", True),
        ("rounds", 0),
        ("seed", -1),
        ("precision", "float16"),
        ("backbone.sha256", "abc"),
        ("backbone.name", ""),
        ("adapter.rank", 0),
        ("adapter.rank", 1025),
        ("adapter.rank", True),
        ("adapter.alpha", "6"),
        ("adapter.alpha", 0.0),
        ("adapter.dropout", False),
        ("adapter.dropout", 1.0),
        ("adapter.layers", [-1]),
        ("adapter.layers", ["1"]),
        ("adapter.targets", "qv"),
        ("adapter.factors", "A"),
        ("adapter.factors", None),
        ("task.ce_weight", "0.2"),
        ("task.ce_weight", -0.1),
        ("optimiser.learning_rate", "1e-3"),
        ("optimiser.learning_rate", True),
        ("optimiser.learning_rate", 0),
        ("optimiser.learning_rate", float("nan")),
        ("optimiser.learning_rate", float("inf")),
        ("optimiser.warmup", "0.1"),
        ("optimiser.name", "adam"),
        ("data.class_names", ["one"]),
        ("data.class_names", "ab"),
        ("data.input_size", [224]),
        ("data.input_size", [224, 0]),
        ("data.std", [0.2, 0.2, 0.0]),
        ("data.grey", 1),
        ("admission.max_update_norm", 0.0),
    ],
)
def test_wrong_values_are_named_by_their_path(path: str, value: Any) -> None:
    table, _, key = path.rpartition(".")
    found = faults(**({table: {key: value}} if table else {key: value}))
    assert any(fault.startswith(path) for fault in found), found


def test_whole_numbers_are_real_numbers_too() -> None:
    assert recipe(optimiser={"learning_rate": 1}).optimiser.learning_rate == 1.0
    assert recipe(optimiser={"learning_rate": 1}).hash == recipe(optimiser={"learning_rate": 1.0}).hash


def test_all_faults_come_at_once() -> None:
    found = faults(rounds="many", adapter={"rank": 0, "rnak": 8}, optimiser={"learning_rate": -1.0}, unknown=1)
    assert len(found) == 5
    assert (
        "adapter.rnak: unknown key; known here: kind, rank, alpha, dropout, layers, targets, parts, factors, options; "
        "nearest: 'rank'" in found
    )
    assert any(fault.startswith("unknown: unknown key; known here: schema_version, rounds") for fault in found)
    with pytest.raises(
        errors.ConfigError, match=r"recipe: 2 faults\n  - backbone: required, but not given\n  - data: required"
    ):
        schema.parse(schema.Recipe, {}, "recipe")


def test_unknown_keys_deep_inside_an_experiment() -> None:
    values = merged(EXPERIMENT, recipe={**RECIPE, "optimiser": {"learning_rat": 1.0}})
    with pytest.raises(
        errors.ConfigError, match=r"recipe\.optimiser\.learning_rat: unknown key; .*nearest: 'learning_rate'"
    ):
        schema.parse(schema.Experiment, values, "experiment")


def test_configs_are_immutable() -> None:
    made = recipe()
    with pytest.raises(pydantic.ValidationError):
        made.rounds = 5


def test_a_recipe_survives_json_and_its_hash_too() -> None:
    made = recipe(
        adapter={"layers": [1, 2], "alpha": 3},
        optimiser={"head_learning_rate": 0.5},
        backbone={"options": {"channels": [4, 8]}},
    )
    again = schema.parse(schema.Recipe, json.loads(made.model_dump_json()), "again")
    assert again == made
    assert again.hash == made.hash


@pytest.mark.parametrize(
    "tables",
    [
        {"seed": 1},
        {"rounds": 11},
        {"adapter": {"layers": [0]}},
        {"adapter": {"factors": "freeze-A"}},
        {"adapter": {"factors": "alternate"}},
        {"data": {"grey": True}},
        {"optimiser": {"clip_norm": 0.5}},
        {"threads": 1},
        {"threads": 2},
    ],
    ids=lambda tables: next(iter(tables)),
)
def test_every_value_is_in_the_hash(tables: dict[str, Any]) -> None:
    assert recipe(**tables).hash != recipe().hash


def test_with_seed_changes_the_seed_alone() -> None:
    made = schema.parse(schema.Experiment, EXPERIMENT, "experiment")
    other = made.with_seed(7)
    assert other.recipe.seed == 7
    assert other.with_seed(made.recipe.seed) == made


# -- TOML and --set --------------------------------------------------------------------------------------------------


def test_read_toml(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('name = "x"\n[recipe]\nrounds = 3\n')
    assert schema.read_toml(path) == {"name": "x", "recipe": {"rounds": 3}}
    for data in (b"name = ", b"\xff\xfe", b"a = 1\na = 2\n"):
        path.write_bytes(data)
        with pytest.raises(errors.ConfigError, match="is not TOML"):
            schema.read_toml(path)
    with pytest.raises(errors.ConfigError, match="cannot be read: No such file"):
        schema.read_toml(tmp_path / "none.toml")
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        schema.read_toml(tmp_path)


def test_sets() -> None:
    base = {"recipe": {"rounds": 3, "adapter": {"rank": 8}}}
    sets = [
        "recipe.rounds=5",
        "recipe.adapter.kind = 'norm'",
        "recipe.adapter.layers=[1, 2]",
        "recipe.data.mean=[0.5, 0.5, 0.5]",
        'note="a = b"',
        'site_ranks."St. Mary"=2',
    ]
    found = overrides.apply(base, sets)
    assert found == {
        "recipe": {
            "rounds": 5,
            "adapter": {"rank": 8, "kind": "norm", "layers": [1, 2]},
            "data": {"mean": [0.5, 0.5, 0.5]},
        },
        "note": "a = b",
        "site_ranks": {"St. Mary": 2},
    }
    assert base == {"recipe": {"rounds": 3, "adapter": {"rank": 8}}}, "the tables given are not changed"


def test_all_faults_of_sets_come_at_once() -> None:
    bad = ["rounds", "=5", "recipe..rounds=5", "recipe.kind=lora", "recipe.rounds.x=1", "a=1\nb=2", "recipe.ok=1"]
    with pytest.raises(errors.ConfigError) as caught:
        overrides.apply({"recipe": {"rounds": 3}}, bad)
    found = caught.value.faults
    assert len(found) == 6
    assert "--set recipe.rounds.x=1: 'rounds' is a value, not a table" in found
    assert any(
        "recipe.kind=lora: the value is not TOML; strings need quotes: --set 'recipe.kind=\"lora\"'" in fault
        for fault in found
    )


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=30))
def test_any_set_is_applied_or_one_clear_error(text: str) -> None:
    number = 0
    try:
        overrides.apply({"recipe": {"rounds": 3}}, [text])
    except errors.ConfigError as error:
        number = len(error.faults)
    assert number <= 1


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*schema.Recipe.model_fields, "rank", "name", "x"]), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(tables=st.dictionaries(st.sampled_from([*schema.Recipe.model_fields, "x"]), json_values, max_size=5))
def test_any_table_is_a_recipe_or_a_config_error(tables: dict[str, Any]) -> None:
    try:
        found = schema.parse(schema.Recipe, {**RECIPE, **tables}, "recipe")
    except errors.ConfigError:
        return
    assert len(found.hash) == 64
