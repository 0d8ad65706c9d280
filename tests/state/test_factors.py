"""Which factors train in which round, told the same way at both ends."""

from __future__ import annotations

import numpy as np
import pytest

from fedvfm.aggregators import table as rules
from fedvfm.config import schema
from fedvfm.state import factors, state

ROWS = state.Manifest.of(
    [
        state.ArraySpec("block.00.q.A", (2, 7), "lora", "A", "block.00.q"),
        state.ArraySpec("block.00.q.B", (5, 2), "lora", "B", "block.00.q"),
        state.ArraySpec("decoder.mask_tokens.weight", (4, 3), "decoder"),
        state.ArraySpec("head.bias", (2,), "head"),
    ]
)
A, B, DENSE = "block.00.q.A", "block.00.q.B", ("decoder.mask_tokens.weight", "head.bias")


@pytest.mark.parametrize(
    ("way", "odd", "even"),
    [
        ("both", (A, B, *DENSE), (A, B, *DENSE)),
        ("freeze-A", (B, *DENSE), (B, *DENSE)),
        ("alternate", (B, *DENSE), (A, *DENSE)),
    ],
)
def test_what_trains(way: str, odd: tuple[str, ...], even: tuple[str, ...]) -> None:
    for number in (1, 3, 101):
        assert factors.trained(ROWS, way, number) == odd
    for number in (2, 100):
        assert factors.trained(ROWS, way, number) == even


def test_every_way_of_the_recipe_is_known_and_no_other() -> None:
    field = schema.AdapterConfig.model_fields["factors"]
    assert set(factors.WAYS) == set(field.annotation.__args__)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="factors 'freeze-B': known: both, freeze-A, alternate"):
        factors.trained(ROWS, "freeze-B", 1)


def test_how_many_numbers() -> None:
    assert [factors.numbers(ROWS, way, 1) for way in factors.WAYS] == [38, 24, 24]
    assert [factors.numbers(ROWS, way, 2) for way in factors.WAYS] == [38, 24, 28]
    assert [factors.most(ROWS, way) for way in factors.WAYS] == [38, 24, 28]
    assert [factors.ever(ROWS, way) for way in factors.WAYS] == [38, 24, 38]
    assert factors.describe("both") == ""


def test_an_update_is_completed_with_what_did_not_train() -> None:
    base = state.AdapterState({spec.name: np.ones(spec.shape, np.float32) for spec in ROWS})
    update = (3.0 * base).select(factors.trained(ROWS, "freeze-A", 1))
    whole = factors.completed(update, base)
    assert whole == state.AdapterState({**update, A: base[A]})
    assert factors.completed(base, 2.0 * base) is base


def test_a_rule_that_makes_new_factors_cannot_leave_one_as_it_is() -> None:
    def faults(rule: str, way: str) -> list[str]:
        values = {"backbone": {"name": "x"}, "data": {"class_names": ["a", "b"]}, "aggregation": {"rule": rule}}
        return rules.faults(schema.parse(schema.Recipe, {**values, "adapter": {"factors": way}}, "recipe"))

    assert [faults("mean", way) for way in factors.WAYS] == [[], [], []]
    assert faults("svd", "both") == faults("no such rule", "alternate") == []
    (told,) = faults("svd", "alternate")
    assert told.startswith("recipe.adapter.factors = 'alternate': rule 'svd' makes both factors of every pair anew")
