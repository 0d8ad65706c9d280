"""The server's own step: how far the global adapter goes towards what the rule made of the updates."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from fedvfm.config import schema
from fedvfm.state import state

_VELOCITY, _MOMENT, _SQUARE = "velocity.", "moment.", "square."
_KEPT = (_VELOCITY, _MOMENT, _SQUARE)

Kept = Mapping[str, state.Array]


def step(
    before: state.AdapterState,
    aggregate: state.AdapterState,
    kept: Kept,
    settings: schema.AggregationConfig,
    trained: Collection[str] | None = None,
) -> tuple[state.AdapterState, dict[str, state.Array]]:
    """The new global adapter, and what is kept for the next round.

    With momentum 0 and learning rate 1 the aggregate itself, bit for bit, and nothing kept. An array that did not train
    in the round stays as it was, and so does what is kept of it: neither kept momentum nor rounding moves it. All of it
    is made of the aggregate alone, so it costs no privacy.

    Args:
        before: the global adapter the sites started from.
        aggregate: what the rule made of their updates.
        kept: what this function returned in the round before; empty in the first round.
        settings: ``server_optimiser`` and its values.
        trained: names of the arrays that trained in the round; None for all.
    """
    chosen = set(before if trained is None else trained)
    still = {name: start for name, start in before.items() if name not in chosen}
    if not settings.moves:
        return (state.AdapterState({**aggregate, **still}) if still else aggregate), {}
    move = _momentum if settings.server_optimiser == "momentum" else _adaptive
    after: dict[str, state.Array] = {**still}
    left: dict[str, state.Array] = {}
    for name, start in before.items():
        own = {prefix: kept[prefix + name] for prefix in _KEPT if prefix + name in kept}
        if name not in still:
            towards, own = move(aggregate[name] - start, own, settings)
            after[name] = start + np.float32(settings.server_learning_rate) * towards
        left |= {prefix + name: array for prefix, array in own.items()}
    return state.AdapterState(after), left


def _momentum(
    moved: state.Array, kept: Kept, settings: schema.AggregationConfig
) -> tuple[state.Array, dict[str, state.Array]]:
    """``v <- momentum v + (aggregate - before)``; the step goes along v.

    Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
        2019 (FedAvgM), section 4.
    """
    speed = np.float32(settings.server_momentum) * kept[_VELOCITY] + moved if _VELOCITY in kept else moved
    return speed, {_VELOCITY: speed}


def _adaptive(
    moved: state.Array, kept: Kept, settings: schema.AggregationConfig
) -> tuple[state.Array, dict[str, state.Array]]:
    """``m <- b1 m + (1 - b1) d``; the step goes along ``m / (sqrt(v) + tau)`` with d = aggregate - before.

    Adam: ``v <- b2 v + (1 - b2) d^2``. Yogi: ``v <- v - (1 - b2) d^2 sign(v - d^2)``, so that v grows no faster than by
    what is added, and forgets slowly. v begins at tau^2, m at 0, and nothing corrects for that.

    Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, alg. 2.
    """
    tau, beta1, beta2 = (
        np.float32(value) for value in (settings.server_floor, settings.server_momentum, settings.server_beta2)
    )
    moment = kept.get(_MOMENT, np.zeros_like(moved))
    square = kept.get(_SQUARE, np.full_like(moved, tau * tau))
    moment = beta1 * moment + (1 - beta1) * moved
    fresh = moved * moved
    if settings.server_optimiser == "adam":
        square = beta2 * square + (1 - beta2) * fresh
    else:
        square = square - (1 - beta2) * fresh * np.sign(square - fresh)
    return np.asarray(moment / (np.sqrt(square) + tau), dtype=np.float32), {_MOMENT: moment, _SQUARE: square}
