"""What people are told of a run's privacy: never an epsilon without its unit, delta, noise and steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedvfm.config import privacy

SIMULATED = "simulated epsilon: noise and draws come from the seed, protect nobody, and nothing was charged to a ledger"
OUTSIDE = "Scores come from validation and test images, which are not trained on, and are outside epsilon"


def sentence(recipe: privacy.RecipePrivacy, found: Mapping[str, Any] | None) -> str:
    """One line on a finished run.

    Args:
        recipe: the recipe's.
        found: ``privacy`` of a simulation's summary; None where it was no simulation.
    """
    if recipe.mechanism == privacy.NO_MECHANISM:
        return "none"
    if found is None:
        where = "the coordinator's journal" if recipe.mechanism == privacy.SITE_LEVEL else "each site's ledger"
        return f"{recipe.mechanism}, delta {recipe.delta:g}; epsilon stands in {where}"
    return f"{bound(found)}; {SIMULATED}"


def bound(found: Mapping[str, Any]) -> str:
    """The epsilon of a simulation with all that belongs to it."""
    return (
        f"simulated epsilon {_value(found)} ({found['unit']} level, delta {found['delta']:g}, noise multiplier "
        f"{found['noise_multiplier']:g}, {found['steps']} steps)"
    )


def so_far(entry: Mapping[str, Any]) -> str:
    """The epsilon of a journal's line: of all rounds up to it."""
    kind = "simulated epsilon" if entry["simulated"] else "epsilon"
    return f"{kind} {_value(entry)} ({entry['unit']} level, delta {entry['delta']:g})"


def _value(found: Mapping[str, Any]) -> str:
    return "not bounded" if found["epsilon"] is None else f"{found['epsilon']:.3g}"
