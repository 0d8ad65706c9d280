"""``[recipe.secure_aggregation]``: what it cannot be joined with, and that recipes without it keep their names."""

from __future__ import annotations

from typing import Any

import pytest

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.config import schema


def recipe(**values: Any) -> schema.Recipe:
    base = {"backbone": {"name": "none"}, "data": {"class_names": ["rest", "cell"]}}
    return schema.parse(schema.Recipe, {**base, **values}, "recipe")


def secure(own: dict[str, Any] | None = None, **values: Any) -> schema.Recipe:
    return recipe(**{"min_sites": 3, "secure_aggregation": own or {}, **values})


def test_a_recipe_without_it_keeps_its_name_and_bytes() -> None:
    plain = recipe()
    assert "secure_aggregation" not in plain.model_dump(mode="json")
    assert secure().hash != secure({"clip_norm": 2.0}).hash != recipe(min_sites=3).hash
    assert schema.Recipe.model_validate_json(secure().model_dump_json()).hash == secure().hash


@pytest.mark.parametrize(
    ("own", "values", "word"),
    [
        ({}, {"aggregation": {"rule": "svd"}}, "'svd'"),
        ({}, {"aggregation": {"rule": "hetlora"}}, "'hetlora'"),
        ({}, {"aggregation": {"rule": "fair"}}, "'fair'"),
        ({}, {"aggregation": {"rule": "median", "weighting": "uniform"}}, "'median'"),
        ({}, {"aggregation": {"rule": "krum", "weighting": "uniform"}}, "'krum'"),
        ({}, {"aggregation": {"rule": "trimmed-mean", "weighting": "uniform"}}, "'trimmed-mean'"),
        ({}, {"aggregation": {"rule": "geometric-median", "weighting": "uniform"}}, "'geometric-median'"),
        (
            {},
            {"aggregation": {"rule": "clipped-mean", "weighting": "uniform", "options": {"bound": 1.0}}},
            "'clipped-mean'",
        ),
        ({}, {"aggregation": {"weighting": "loss"}}, "'loss'"),
        ({}, {"codec": "int8"}, "'int8'"),
        ({}, {"codec": "fp16"}, "'fp16'"),
        (
            {},
            {"privacy": {"mechanism": "site-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}},
            "'site-level'",
        ),
        ({}, {"min_sites": 2}, "min_sites = 2"),
        ({}, {"min_sites": 1}, "min_sites = 1"),
        ({"colluders": 2}, {"min_sites": 3}, "min_sites = 3"),
        ({}, {"min_sites": 65}, "min_sites = 65"),
        ({"threshold": 2}, {"min_sites": 4}, "threshold = 2"),
    ],
)
def test_what_cannot_be_joined_under_masks_is_refused_with_the_reason(
    own: dict[str, Any], values: dict[str, Any], word: str
) -> None:
    (fault,) = rules.faults(secure(own, **values))
    assert word in fault


def test_all_reasons_are_told_at_once() -> None:
    wrong = secure(min_sites=1, codec="int4", aggregation={"rule": "svd", "weighting": "loss"})
    assert len(rules.faults(wrong)) == 4


@pytest.mark.parametrize("way", ["both", "freeze-A", "alternate"])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_plain_mean_is_taken_by_every_way_of_factors(way: str, weighting: str) -> None:
    assert rules.faults(secure(adapter={"factors": way}, aggregation={"weighting": weighting})) == []


def test_a_round_that_may_go_on_with_too_few_is_refused_before_it_begins() -> None:
    assert rules.site_faults(secure(min_sites=4), 4) == []
    assert len(rules.site_faults(secure(min_sites=4), 3)) == 1


@pytest.mark.parametrize("own", [{"clip_norm": 0.0}, {"clip_norm": 1e9}, {"colluders": -1}, {"unknown": 1}])
def test_values_that_are_none_are_refused(own: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError):
        secure(own)
