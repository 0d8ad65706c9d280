"""What one round of a recipe spends at a site, said in one place: training and the ledger both ask here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from fedvfm import errors
from fedvfm.config import privacy, schema
from fedvfm.data import sample as samples
from fedvfm.privacy import accountant, base, planner, records, table
from fedvfm.secure_aggregation import shared_noise


def event_of(recipe: schema.Recipe, units: int) -> base.PrivacyEvent | None:
    """What a round spends where there are so many units; None without a mechanism.

    Args:
        recipe: the recipe. Where it gives epsilon, the noise is that with which all its rounds come to it.
        units: records, patients or sites that can be drawn, or the public number in their place: see :func:`counted`.

    Raises:
        ConfigError: if no noise reaches the recipe's epsilon.
        DataError: if there is nothing to draw.
        UnknownName: if there is no such mechanism.
    """
    mechanism = table.get(recipe.privacy)
    if recipe.privacy.mechanism == privacy.NO_MECHANISM:
        return None
    if units < 1:
        raise errors.DataError(f"mechanism '{recipe.privacy.mechanism}': there is no {mechanism.unit} to draw")
    batch = planner.question(recipe, units).batch
    event = mechanism.event(recipe.privacy, _noise(recipe, units), units, batch, recipe.optimiser.local_epochs)
    secure = recipe.secure_aggregation
    if event is None or secure is None or not event.shared:
        return event
    return dataclasses.replace(event, honest=shared_noise.honest(recipe.min_sites, secure))


def counted(found: int, unit: str, budget: privacy.Budget | None) -> int:
    """How many units rate, steps and noise are made from: the budget's public number, else as many as there are.

    Each unit is drawn by itself with the stated rate, so that what a round spends holds for any number there really is.
    """
    if not found or budget is None or budget.units is None or budget.unit != unit:
        return found
    return budget.units


def members(unit: str, train: Sequence[samples.Sample], source: object = None) -> dict[str, tuple[samples.Sample, ...]]:
    """Name of each unit -> its samples; the names are those of :func:`records.ids`, in its order."""
    found: dict[str, list[samples.Sample]] = {name: [] for name in records.ids(unit, train, source)}
    for one in train:
        found[records.ids(unit, [one], source)[0]].append(one)
    return {name: tuple(own) for name, own in found.items()}


def _noise(recipe: schema.Recipe, units: int) -> float:
    own = recipe.privacy
    if own.noise_multiplier is not None:
        return own.noise_multiplier
    if own.epsilon is None or own.delta is None:
        raise errors.ConfigError("recipe", ["recipe.privacy: give noise_multiplier, or epsilon and delta"])
    asked = planner.question(recipe, units)
    found = _found(own.epsilon, own.delta, asked.rate, asked.steps)
    if found is None:
        raise errors.ConfigError(
            "recipe",
            [
                f"recipe.privacy.epsilon = {own.epsilon:g}: no noise reaches it at delta {own.delta:g} over "
                f"{asked.steps} steps here. Raise epsilon or delta, or train fewer rounds"
            ],
        )
    return found


@functools.lru_cache(maxsize=1000)
def _found(epsilon: float, delta: float, rate: float, steps: int) -> float | None:
    """RDP, whatever a site's own budget counts with: coordinator and sites find one noise for one number of units."""
    return accountant.noise(epsilon, delta, rate, steps)
