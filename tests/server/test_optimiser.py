"""The server's own step, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from fedvfm import config, state
from fedvfm.server import optimiser


def one(value: float) -> state.AdapterState:
    return state.AdapterState({"w": np.array([value, -value], dtype=np.float32)})


def settings(momentum: float, rate: float) -> config.AggregationConfig:
    return config.AggregationConfig(server_momentum=momentum, server_learning_rate=rate)


def test_no_momentum_and_rate_one_is_the_aggregate_itself() -> None:
    after, kept = optimiser.step(one(0.1), one(0.3), {}, settings(0.0, 1.0))
    assert after.fingerprint == one(0.3).fingerprint
    assert kept == {}


def test_first_round_with_momentum_is_the_aggregate() -> None:
    after, _ = optimiser.step(one(1.0), one(3.0), {}, settings(0.9, 1.0))
    assert after["w"].tolist() == [3.0, -3.0]


def test_two_rounds_by_hand() -> None:
    first, kept = optimiser.step(one(0.0), one(1.0), {}, settings(0.5, 2.0))
    assert first["w"].tolist() == [2.0, -2.0]
    # velocity 0.5 * 1 + (3 - 2) = 1.5; 2 + 2 * 1.5 = 5
    second, kept = optimiser.step(first, one(3.0), kept, settings(0.5, 2.0))
    assert second["w"].tolist() == [5.0, -5.0]
    assert kept["velocity.w"].tolist() == pytest.approx([1.5, -1.5])


def test_everything_stays_float32() -> None:
    after, kept = optimiser.step(one(0.0), one(1.0), {}, settings(0.9, 0.7))
    assert after["w"].dtype == np.float32
    assert kept["velocity.w"].dtype == np.float32
