"""The server's own step, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedvfm.aggregators import table as rules
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


# -- adam and yogi ----------------------------------------------------------------------------------------------------


def adaptive(kind: str, rate: float = 0.1, beta1: float = 0.5, **more: float) -> schema.AggregationConfig:
    values = {"server_optimiser": kind, "server_learning_rate": rate, "server_momentum": beta1, **more}
    return schema.AggregationConfig.model_validate(values)


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_two_rounds_of_adam_and_yogi_by_hand(kind: str) -> None:
    """tau 1, so v begins at 1; d is 2, then 3."""
    chosen = adaptive(kind, server_beta2=0.75, server_floor=1.0)
    first, kept = server_optimiser.step(one(0.0), one(2.0), {}, chosen)
    square = {"adam": 0.75 * 1.0 + 0.25 * 4.0, "yogi": 1.0 + 0.25 * 4.0}[kind]
    assert kept["moment.w"].tolist() == [1.0, -1.0]
    assert kept["square.w"].tolist() == pytest.approx([square, square])
    assert first["w"].tolist() == pytest.approx([0.1 / (square**0.5 + 1), -0.1 / (square**0.5 + 1)])
    value = float(first["w"][0])
    after, kept = server_optimiser.step(first, one(value + 3.0), kept, chosen)
    square = {"adam": 0.75 * square + 0.25 * 9.0, "yogi": square + 0.25 * 9.0}[kind]
    assert kept["square.w"].tolist() == pytest.approx([square, square])
    assert after["w"].tolist()[0] == pytest.approx(value + 0.1 * (0.5 * 1.0 + 0.5 * 3.0) / (square**0.5 + 1))


def test_yogi_forgets_by_what_comes_and_adam_by_a_share() -> None:
    large, small = one(10.0), one(0.1)
    left = {}
    for kind in ("adam", "yogi"):
        first, kept = server_optimiser.step(one(0.0), large, {}, adaptive(kind, beta1=0.0, server_beta2=0.9))
        _, after = server_optimiser.step(first, first + small, kept, adaptive(kind, beta1=0.0, server_beta2=0.9))
        left[kind] = float(after["square.w"][0] / kept["square.w"][0])
    assert left["adam"] == pytest.approx(0.9, abs=1e-3)
    assert left["yogi"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_directions_of_very_unlike_curvature_come_down_together(kind: str) -> None:
    """A site's step on ``(100 x^2 + 0.01 y^2) / 2`` at a rate that x bears moves y by 1e-4 of its way: not so here."""
    curvature = np.array([100.0, 0.01], np.float32)

    def run(settings: schema.AggregationConfig) -> np.ndarray:
        adapter, kept = state.AdapterState({"w": np.array([1.0, 1.0], np.float32)}), dict[str, state.Array]()
        for _ in range(200):
            sites = [adapter["w"] - np.float32(rate) * curvature * adapter["w"] for rate in (0.008, 0.012)]
            mean = state.AdapterState({"w": np.mean(sites, axis=0, dtype=np.float32)})
            adapter, kept = server_optimiser.step(adapter, mean, kept, settings)
        return np.abs(adapter["w"])

    plain = run(schema.AggregationConfig())
    found = run(adaptive(kind, rate=0.02, beta1=0.0, server_beta2=0.9, server_floor=1e-5))
    assert plain[0] < 1e-6
    assert plain[1] > 0.97
    assert found.max() < 0.1


@pytest.mark.parametrize("kind", ["adam", "yogi"])
def test_what_did_not_train_waits_under_adam_and_yogi_too(kind: str) -> None:
    first, kept = server_optimiser.step(two(0.0, 0.0), two(1.0, 5.0), {}, adaptive(kind), ["A"])
    assert (first["B"].tolist(), set(kept)) == ([0.0], {"moment.A", "square.A"})
    rest, later = server_optimiser.step(first, two(9.0, 1.0), kept, adaptive(kind), ["B"])
    assert rest["A"].tobytes() == first["A"].tobytes()
    assert all(later[name].tobytes() == kept[name].tobytes() for name in kept)
    assert all(array.dtype == np.float32 for array in (*rest.values(), *later.values()))


def recipe(**aggregation: object) -> schema.Recipe:
    values = {"backbone": {"name": "x"}, "data": {"class_names": ["a", "b"]}, "aggregation": aggregation}
    return schema.parse(schema.Recipe, values, "recipe")


def test_a_rate_of_one_is_no_rate_for_adam_and_new_factors_bear_no_step() -> None:
    assert rules.faults(recipe(server_optimiser="adam", server_learning_rate=0.01)) == []
    (told,) = rules.faults(recipe(server_optimiser="yogi"))
    assert told.startswith("recipe.aggregation.server_learning_rate = 1")
    assert len(rules.faults(recipe(server_optimiser="adam", server_learning_rate=0.01, rule="svd"))) == 1


def test_keys_that_came_later_change_nothing_where_they_are_not_used() -> None:
    """The bytes, and so the hash, of a recipe that does not name them."""
    plain, text = recipe(), recipe().model_dump_json()
    later = ("server_optimiser", "server_beta2", "server_floor", "proximal", "control_variates")
    assert not any(key in text for key in later)
    named = recipe(server_optimiser="momentum", server_beta2=0.99)
    assert (named.hash, named.model_dump_json()) == (plain.hash, text)
    used = recipe(server_optimiser="adam", server_learning_rate=0.01)
    assert used.hash != recipe(server_learning_rate=0.01).hash
    assert schema.parse(schema.Recipe, used.model_dump(mode="json"), "recipe") == used
