"""The server's own step: how far the global adapter goes towards what the rule made of the updates."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from fedvfm.config import schema
from fedvfm.state import state

_VELOCITY = "velocity."


def step(
    before: state.AdapterState,
    aggregate: state.AdapterState,
    kept: Mapping[str, state.Array],
    settings: schema.AggregationConfig,
    trained: Collection[str] | None = None,
) -> tuple[state.AdapterState, dict[str, state.Array]]:
    """``v <- momentum v + (aggregate - before)``; ``after = before + learning_rate v``.

    With momentum 0 and learning rate 1 the aggregate itself, bit for bit, and nothing kept. An array that did not train
    in the round stays as it was, and so does its velocity: neither kept momentum nor rounding moves it.

    Args:
        before: the global adapter the sites started from.
        aggregate: what the rule made of their updates.
        kept: the velocity of the round before, as this function returned it; empty in the first round.
        settings: ``server_momentum`` and ``server_learning_rate``.
        trained: names of the arrays that trained in the round; None for all.

    Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
        2019 (FedAvgM), section 4.
    """
    chosen = set(before if trained is None else trained)
    still = {name: start for name, start in before.items() if name not in chosen}
    if settings.server_momentum == 0.0 and settings.server_learning_rate == 1.0:
        return (state.AdapterState({**aggregate, **still}) if still else aggregate), {}
    after: dict[str, state.Array] = {**still}
    velocity: dict[str, state.Array] = {}
    for name, start in before.items():
        earlier = kept.get(_VELOCITY + name)
        if name in still:
            velocity |= {} if earlier is None else {_VELOCITY + name: earlier}
            continue
        moved = aggregate[name] - start
        speed = moved if earlier is None else np.float32(settings.server_momentum) * earlier + moved
        velocity[_VELOCITY + name] = speed
        after[name] = start + np.float32(settings.server_learning_rate) * speed
    return state.AdapterState(after), velocity
