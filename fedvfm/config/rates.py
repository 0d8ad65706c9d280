"""The learning rate over all rounds of a recipe."""

from __future__ import annotations

import math

from fedvfm.config import schema


def factor(settings: schema.OptimiserConfig, share: float) -> float:
    """Factor on the learning rate at ``share`` in [0, 1) of the whole run: linear warm-up, then the schedule."""
    if share < settings.warmup:
        return (share + 1e-3) / (settings.warmup + 1e-3)
    done = (share - settings.warmup) / (1.0 - settings.warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return float((1.0 - done) ** 0.9) if settings.schedule == "poly" else 1.0


def share(rounds: int, round_number: int, steps: int, step: int) -> float:
    """What of the whole run is over at a step of a round; rounds count from 1, steps from 0."""
    return ((round_number - 1) * steps + step) / (steps * rounds)


def total(settings: schema.OptimiserConfig, rounds: int, round_number: int, steps: int) -> float:
    """The sum of the factors of a round's steps."""
    return math.fsum(factor(settings, share(rounds, round_number, steps, step)) for step in range(steps))
