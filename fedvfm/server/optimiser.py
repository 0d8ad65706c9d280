"""The server's own step: how far the global adapter goes towards what the rule made of the updates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedvfm import config, state

_VELOCITY = "velocity."


def step(
    before: state.AdapterState,
    aggregate: state.AdapterState,
    kept: Mapping[str, state.Array],
    settings: config.AggregationConfig,
) -> tuple[state.AdapterState, dict[str, state.Array]]:
    """``v <- momentum v + (aggregate - before)``; ``after = before + learning_rate v``.

    With momentum 0 and learning rate 1 the aggregate itself, bit for bit, and nothing kept.

    Args:
        before: the global adapter the sites started from.
        aggregate: what the rule made of their updates.
        kept: the velocity of the round before, as this function returned it; empty in the first round.
        settings: ``server_momentum`` and ``server_learning_rate``.

    Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
        2019 (FedAvgM), section 4.
    """
    if settings.server_momentum == 0.0 and settings.server_learning_rate == 1.0:
        return aggregate, {}
    after: dict[str, state.Array] = {}
    velocity: dict[str, state.Array] = {}
    for name, start in before.items():
        moved = aggregate[name] - start
        earlier = kept.get(_VELOCITY + name)
        speed = moved if earlier is None else np.float32(settings.server_momentum) * earlier + moved
        velocity[_VELOCITY + name] = speed
        after[name] = start + np.float32(settings.server_learning_rate) * speed
    return state.AdapterState(after), velocity
