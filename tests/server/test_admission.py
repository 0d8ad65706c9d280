"""Every reason an update can be refused for, and that nothing else is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.server.rounds import admission
from fedvfm.state import state

ROWS = state.Manifest.of([state.ArraySpec("a", (2, 3), "head"), state.ArraySpec("b", (4,), "head")])
BASE = state.AdapterState({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)})
TERMS = admission.Terms("north", 5, BASE, ROWS, schema.AdmissionConfig(max_examples=100, max_update_norm=2.0))


def update(**changes: Any) -> state.SiteUpdate:
    good = state.SiteUpdate(
        "north",
        BASE + state.AdapterState({"a": np.zeros((2, 3), np.float32), "b": np.full(4, 1.0, np.float32)}),
        10,
        4,
        BASE.fingerprint,
    )
    return dataclasses.replace(good, **changes)


def arrays(**changes: Any) -> state.AdapterState:
    return state.AdapterState({**BASE, **changes})


def test_a_good_update_comes_back_as_it_is() -> None:
    for good in (update(), update(num_examples=1), update(num_examples=100), update(state=BASE)):
        assert admission.admit(good, TERMS) is good


def test_the_bound_of_the_norm_itself_is_allowed() -> None:
    """The good update moves b by 1 in four places: its norm is exactly 2."""
    over = arrays(b=np.array([1, 1, 1, 1.01], np.float32))
    with pytest.raises(errors.Refused, match="norm"):
        admission.admit(update(state=over), TERMS)


BAD: list[tuple[str, Callable[[], state.SiteUpdate], str]] = [
    ("site-name", lambda: update(site="south"), "site 'north' answered under another name"),
    ("stale", lambda: update(base_round=3), "answers round 4, round 5 was asked for"),
    ("stale", lambda: update(base_round=5), "answers round 6"),
    ("base", lambda: update(base_fingerprint="0" * 64), "another adapter than the one sent"),
    ("examples", lambda: update(num_examples=0), "claims 0 examples; allowed: 1 to 100"),
    ("examples", lambda: update(num_examples=-3), "claims -3"),
    ("examples", lambda: update(num_examples=101), "claims 101"),
    ("manifest", lambda: update(state=BASE.select(["a"])), "1 arrays missing, 0 not in the manifest"),
    ("manifest", lambda: update(state=arrays(c=np.zeros(1, np.float32))), "0 arrays missing, 1 not in the manifest"),
    (
        "manifest",
        lambda: update(state=arrays(b=np.zeros((4, 1), np.float32))),
        r"array 'b' has shape \(4, 1\), the manifest says \(4,\)",
    ),
    ("manifest", lambda: update(state=arrays(b=np.zeros((1,), np.float32))), "array 'b'"),
    ("not-finite", lambda: update(state=arrays(b=np.array([0, 0, 0, np.nan], np.float32))), "NaN or infinity"),
    ("not-finite", lambda: update(state=arrays(b=np.array([0, 0, 0, np.inf], np.float32))), "NaN or infinity"),
    ("norm", lambda: update(state=arrays(b=np.full(4, 1.5, np.float32))), "update norm 3 is over the bound 2"),
    ("norm", lambda: update(state=arrays(b=np.full(4, 3e38, np.float32))), "is over the bound 2"),
]


@pytest.mark.parametrize(("reason", "bad", "detail"), BAD)
def test_every_reason(reason: str, bad: Callable[[], state.SiteUpdate], detail: str) -> None:
    with pytest.raises(errors.Refused, match=detail) as refused:
        admission.admit(bad(), TERMS)
    assert refused.value.reason == reason


def test_a_difference_that_overflows_float32_is_refused_quietly() -> None:
    far = state.AdapterState({"a": np.ones((2, 3), np.float32), "b": np.full(4, -3e38, np.float32)})
    terms = dataclasses.replace(TERMS, base=far)
    with pytest.raises(errors.Refused) as refused:
        admission.admit(update(base_fingerprint=far.fingerprint, state=arrays(b=np.full(4, 3e38, np.float32))), terms)
    assert refused.value.reason == "norm"


@pytest.mark.parametrize("loss", [None, 0.0, -1.0, 1e30, float("nan")])
def test_a_loss_that_is_a_weight_has_bounds(loss: float | None) -> None:
    metrics = {} if loss is None else {"loss": loss}
    weighted = dataclasses.replace(TERMS, weighting="loss")
    assert admission.admit(update(metrics=metrics), TERMS)
    assert admission.admit(update(metrics={"loss": 0.5}), weighted)
    with pytest.raises(errors.Refused, match="as a weight it must lie in") as refused:
        admission.admit(update(metrics=metrics), weighted)
    assert refused.value.reason == "loss"


# -- one factor at a time ----------------------------------------------------------------------------------------------

PAIR = state.Manifest.of(
    [
        state.ArraySpec("q.A", (2, 3), "lora", "A", "q"),
        state.ArraySpec("q.B", (4, 2), "lora", "B", "q"),
        state.ArraySpec("w", (2,), "head"),
    ]
)
START = state.AdapterState({spec.name: np.full(spec.shape, 0.25, np.float32) for spec in PAIR})


def one_factor(number: int, names: list[str], way: str = "alternate", value: float = 0.5) -> state.SiteUpdate:
    left = state.AdapterState({name: np.full(START[name].shape, value, np.float32) for name in names})
    terms = admission.Terms("north", number, START, PAIR, schema.AdmissionConfig(max_update_norm=1.0), way=way)
    return admission.admit(state.SiteUpdate("north", left, 10, number - 1, START.fingerprint), terms)


@pytest.mark.parametrize(("number", "trained", "idle"), [(1, "q.B", "q.A"), (2, "q.A", "q.B"), (3, "q.B", "q.A")])
def test_only_what_trained_may_come_and_the_rest_is_what_was_sent(number: int, trained: str, idle: str) -> None:
    found = one_factor(number, [trained, "w"])
    assert set(found.state) == set(START)
    assert found.state[idle].tobytes() == START[idle].tobytes()
    assert (found.state[trained] == 0.5).all()
    for names, detail in (
        ([idle, "w"], "1 arrays missing, 0 not in the manifest, 1 that must not leave in this round"),
        ([trained, idle, "w"], "0 arrays missing, 0 not in the manifest, 1 that must not leave in this round"),
        ([trained], "1 arrays missing, 0 not in the manifest"),
    ):
        with pytest.raises(errors.Refused, match=f"{detail}$") as refused:
            one_factor(number, names)
        assert refused.value.reason == "manifest"


def test_the_norm_of_one_factor_has_the_same_bound() -> None:
    """B has 8 numbers and w has 2: with each moved by 0.31 the norm is 0.98, by 0.32 it is 1.01."""
    assert one_factor(1, ["q.B", "w"], value=0.25 + 0.31)
    with pytest.raises(errors.Refused, match=r"update norm 1\.01"):
        one_factor(1, ["q.B", "w"], value=0.25 + 0.32)


def test_freeze_a_takes_no_a_in_any_round() -> None:
    assert one_factor(2, ["q.B", "w"], "freeze-A").state["q.A"].tobytes() == START["q.A"].tobytes()
    with pytest.raises(errors.Refused, match="must not leave in this round"):
        one_factor(2, ["q.A", "w"], "freeze-A")
    with pytest.raises(errors.Refused, match="1 arrays missing"):
        one_factor(2, ["q.A", "w"], "both")


def test_all_documented_reasons_are_tested() -> None:
    documented = {word.strip("`. \n") for word in (admission.admit.__doc__ or "").split("reason:")[1].split(",")}
    assert documented == {"loss", *(reason for reason, _, _ in BAD)}


def test_no_update_claims_more_than_the_site_greeted_with() -> None:
    """A site that told of a hundred images and claims a million would weigh all."""
    terms = dataclasses.replace(TERMS, greeted=10)
    for number in (1, 10):
        assert admission.admit(update(num_examples=number), terms).num_examples == number
    with pytest.raises(errors.Refused, match="claims 11 examples and greeted with 10") as refused:
        admission.admit(update(num_examples=11), terms)
    assert refused.value.reason == "examples"


def test_the_bound_follows_what_was_admitted_before() -> None:
    lines = [{"norms": {"north": 0.001, "south": 0.002}}, {"norms": {"north": 0.003}}, {"round": 3}]
    assert admission.usual(lines) == 0.002
    assert admission.usual([]) == 0.0, "in round 1 there is the recipe's own bound alone"
    terms = dataclasses.replace(TERMS, usual=0.002)
    assert terms.most == pytest.approx(0.2)
    assert dataclasses.replace(TERMS, usual=1.0).most == 2.0, "never over the recipe's own"
    near = arrays(b=np.full(4, 0.09, np.float32))
    assert admission.admit(update(state=near), terms).state == near
    with pytest.raises(errors.Refused, match=r"update norm 0.22 is over the bound 0.2") as refused:
        admission.admit(update(state=arrays(b=np.full(4, 0.11, np.float32))), terms)
    assert refused.value.reason == "norm"
