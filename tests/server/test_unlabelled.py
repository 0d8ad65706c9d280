"""Sites without labels at the server: who is asked when, what they weigh, and what the norms of others are held to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fedvfm import errors
from fedvfm.aggregators import table as rules
from fedvfm.config import schema
from fedvfm.config import unlabelled as unlabelled_config
from fedvfm.protocol import protocol
from fedvfm.server.rounds import admission, aggregation, cohort, handshake
from fedvfm.state import state
from tests.server import numpy_sites

OWN = unlabelled_config.UnlabelledConfig(weight=0.3, warmup_rounds=2)


def update(examples: int) -> state.SiteUpdate:
    return state.SiteUpdate("north", state.AdapterState({}), examples, 0, "")


@pytest.mark.parametrize(("examples", "whole"), [(10, 3), (1, 1), (2, 1), (5, 2)])
def test_an_image_without_a_label_counts_a_share(examples: int, whole: int) -> None:
    assert aggregation.weight(update(examples), "examples", OWN, without_labels=True) == whole
    assert aggregation.weight(update(examples), "examples", OWN) == examples
    assert aggregation.weight(update(examples), "uniform", OWN, without_labels=True) / aggregation.weight(
        update(examples), "uniform", OWN
    ) == pytest.approx(0.3)
    assert aggregation.weight(update(examples), "uniform") == 1.0


def test_norms_of_sites_without_labels_are_no_measure_for_others() -> None:
    line = {"norms": {"east": 2.0, "north": 0.0, "west": 0.0}, "without_labels": ["north", "west"]}
    assert admission.usual([line]) == 2.0
    assert admission.usual([{"norms": {"north": 0.0}, "without_labels": ["north"]}]) == 0.0


def test_no_cohort_is_of_sites_without_labels_alone() -> None:
    sites, server = [f"site-{at}" for at in range(12)], schema.ServerConfig(cohort=2)
    without = sites[1:]
    for number in range(1, 30):
        drawn = cohort.choose(sites, server, 0, number, without)
        assert len(set(drawn)) == 2
        assert "site-0" in drawn
        if set(cohort.choose(sites, server, 0, number)) - set(without):
            assert drawn == cohort.choose(sites, server, 0, number)
    assert cohort.choose(["a"], server, 0, 1) == ["a"], "in the warm-up fewer may be there than a cohort has"
    with pytest.raises(errors.QuorumMissed, match="all without labels"):
        cohort.require_labels(["site-1", "site-2"], without, 3)
    cohort.require_labels(["site-0", "site-2"], without, 3)
    cohort.require_labels(["site-0"], [], 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"class_names": ["a", "b"]}}, "recipe.data.augment is empty"),
        ({"unlabelled": {"warmup_rounds": 0}}, "has learned nothing that could be taught"),
        ({"unlabelled": {"warmup_rounds": 10}}, "no such site would ever be asked"),
        ({"task": {"prompt": "box"}}, "drawn from the truth"),
        ({"personal": {"kind": "head-local"}}, "would never meet a label"),
        ({"aggregation": {"weighting": "loss"}}, "no loss against labels"),
        (
            {"aggregation": {"rule": "median", "weighting": "uniform"}, "unlabelled": {"weight": 1.0}},
            "it goes by what most updates are like",
        ),
        ({"optimiser": {"control_variates": True}}, "its gradient is of another loss"),
        (
            {"privacy": {"mechanism": "site-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}},
            "every site counts the same in every round",
        ),
        (
            {
                "secure_aggregation": {"clip_norm": 1.0},
                "min_sites": 3,
                "aggregation": {"weighting": "uniform"},
            },
            "weights are whole numbers",
        ),
    ],
)
def test_what_cannot_be_with_them_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    values = {"backbone": {"name": "unet"}, "data": {"class_names": ["a", "b"], "augment": ["flip"]}, "unlabelled": {}}
    assert not rules.unlabelled_faults(schema.parse(schema.Recipe, values, "recipe"))
    asked = schema.parse(schema.Recipe, {**values, **changes}, "recipe")
    (fault,) = rules.unlabelled_faults(asked)
    assert said in fault
    assert fault in rules.faults(asked)
    assert not rules.unlabelled_faults(asked.model_copy(update={"unlabelled": None}))


def test_a_greeting_without_labels_needs_a_recipe_that_takes_it() -> None:
    locked = numpy_sites.lock(numpy_sites.make_recipe())
    hello = numpy_sites.NumpySite("north", sha256=locked.backbone_sha256).hello(protocol.Task(locked.recipe))
    hello = dataclasses.replace(protocol.decode_hello(hello), without_labels=True)
    with pytest.raises(errors.HandshakeRefused, match="takes no such site"):
        handshake.member(locked, rules.make(locked.recipe.aggregation), 1, hello)
