"""The server's own step, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedvfm.config import schema
from fedvfm.server.rounds import server_optimiser
from fedvfm.state import state


def one(value: float) -> state.AdapterState:
    return state.AdapterState({"w": np.array([value, -value], dtype=np.float32)})


def settings(momentum: float, rate: float) -> schema.AggregationConfig:
    return schema.AggregationConfig(server_momentum=momentum, server_learning_rate=rate)


def test_no_momentum_and_rate_one_is_the_aggregate_itself() -> None:
    after, kept = server_optimiser.step(one(0.1), one(0.3), {}, settings(0.0, 1.0))
    assert after.fingerprint == one(0.3).fingerprint
    assert kept == {}


def test_first_round_with_momentum_is_the_aggregate() -> None:
    after, _ = server_optimiser.step(one(1.0), one(3.0), {}, settings(0.9, 1.0))
    assert after["w"].tolist() == [3.0, -3.0]


def test_two_rounds_by_hand() -> None:
    first, kept = server_optimiser.step(one(0.0), one(1.0), {}, settings(0.5, 2.0))
    assert first["w"].tolist() == [2.0, -2.0]
    # velocity 0.5 * 1 + (3 - 2) = 1.5; 2 + 2 * 1.5 = 5
    second, kept = server_optimiser.step(first, one(3.0), kept, settings(0.5, 2.0))
    assert second["w"].tolist() == [5.0, -5.0]
    assert kept["velocity.w"].tolist() == pytest.approx([1.5, -1.5])


def test_everything_stays_float32() -> None:
    after, kept = server_optimiser.step(one(0.0), one(1.0), {}, settings(0.9, 0.7))
    assert after["w"].dtype == np.float32
    assert kept["velocity.w"].dtype == np.float32


def two(first: float, second: float) -> state.AdapterState:
    return state.AdapterState({"A": np.array([first], np.float32), "B": np.array([second], np.float32)})


def test_what_did_not_train_stays_to_the_last_bit_whatever_the_rule_made_of_it() -> None:
    before = two(0.1, 0.2)
    after, kept = server_optimiser.step(before, two(0.7, 0.9), {}, settings(0.0, 1.0), ["B"])
    assert (after["A"].tobytes(), after["B"].tolist(), kept) == (before["A"].tobytes(), [np.float32(0.9)], {})
    after, kept = server_optimiser.step(before, two(0.7, 0.9), {}, settings(0.5, 0.5), ["B"])
    assert after["A"].tobytes() == before["A"].tobytes()
    assert set(kept) == {"velocity.B"}


def test_velocity_of_what_did_not_train_waits() -> None:
    """A moves by 1, rests, moves by 1 again: 0.5 x 1 + 1, as if the round between had not been."""
    first, kept = server_optimiser.step(two(0.0, 0.0), two(1.0, 0.0), {}, settings(0.5, 1.0), ["A"])
    rest, kept = server_optimiser.step(first, two(1.0, 4.0), kept, settings(0.5, 1.0), ["B"])
    assert (rest["A"].tolist(), rest["B"].tolist()) == ([1.0], [4.0])
    assert {name: value.tolist() for name, value in kept.items()} == {"velocity.A": [1.0], "velocity.B": [4.0]}
    last, kept = server_optimiser.step(rest, two(2.0, 4.0), kept, settings(0.5, 1.0), ["A"])
    assert (last["A"].tolist(), last["B"].tolist()) == ([2.5], [4.0])
    assert {name: value.tolist() for name, value in kept.items()} == {"velocity.A": [1.5], "velocity.B": [4.0]}


def test_naming_all_is_naming_none() -> None:
    for chosen in (settings(0.0, 1.0), settings(0.9, 0.3)):
        whole = server_optimiser.step(two(0.1, 0.2), two(0.3, 0.5), {"velocity.A": two(1.0, 0.0)["A"]}, chosen)
        named = server_optimiser.step(
            two(0.1, 0.2), two(0.3, 0.5), {"velocity.A": two(1.0, 0.0)["A"]}, chosen, ["A", "B"]
        )
        assert whole[0] == named[0]
        assert {k: v.tolist() for k, v in whole[1].items()} == {k: v.tolist() for k, v in named[1].items()}
