"""The privacy that a simulation would have had. Its noise is seeded, so the epsilon is "simulated" and charges nothing.

Sites hold different units, so over sites the largest epsilon counts (parallel composition). What the federation spent
is said; an arm that is a baseline has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedvfm.config import privacy, schema
from fedvfm.data.partition import virtual_hospitals
from fedvfm.privacy import accountant, base, events, planner, records, statements, table
from fedvfm.report import page
from fedvfm.server.rounds import dp_aggregation
from fedvfm.simulation import baselines

Row = dict[str, Any]


def spent(
    recipe: schema.Recipe, journal: Sequence[Mapping[str, Any]], sites: Sequence[virtual_hospitals.Hospital]
) -> Row:
    """What the rounds of a journal come to; see ``privacy`` in ``simulations/README.md``.

    Args:
        recipe: with a mechanism.
        journal: the arm's rounds; a site spends in every round it was asked in, whether its update was admitted or not.
        sites: that train.
    """
    asked = {one.name: sum(one.name in line["cohort"] for line in journal) for one in sites}
    if table.get(recipe.privacy).server() is not None:
        return {**_common(recipe), **_at_server(journal)}
    return _at_sites(recipe, asked, sites)


def planned(recipe: schema.Recipe, asked: int, sites: Sequence[virtual_hospitals.Hospital]) -> Row | None:
    """What a run will come to at most: every site in every round. None without a mechanism.

    Args:
        recipe: what is trained.
        asked: sites in a round.
        sites: that train.
    """
    if not is_private(recipe):
        return None
    if table.get(recipe.privacy).server() is None:
        return _at_sites(recipe, {one.name: recipe.rounds for one in sites}, sites)
    return {**_common(recipe), **_bound(_event(recipe, asked), recipe.rounds, recipe.privacy), "sites": {}}


def of_arm(
    arm: baselines.Arm, journal: Sequence[Mapping[str, Any]], sites: Sequence[virtual_hospitals.Hospital]
) -> Row | None:
    """The privacy of one arm; None where it has none."""
    if arm.recipe is None or not is_private(arm.recipe):
        return None
    everyone = [*sites, virtual_hospitals.pooled(sites)] if virtual_hospitals.POOLED in arm.train_sites else list(sites)
    return spent(arm.recipe, journal, [one for one in everyone if one.name in arm.train_sites])


def is_private(recipe: schema.Recipe) -> bool:
    """Whether a recipe has a mechanism."""
    return recipe.privacy.mechanism != privacy.NO_MECHANISM


def notes(recipe: schema.Recipe, sites: int) -> list[str]:
    """What a reader of a private simulation must know before any number."""
    if not is_private(recipe):
        return []
    told = [statements.SIMULATED]
    if privacy.UNITS.get(recipe.privacy.mechanism) == "site":
        told.append("baselines that train at one site are without site-level privacy")
        sigma = _event(recipe, sites).noise_multiplier
        told += planner.plan(planner.question(recipe, sites, epsilon=None, noise_multiplier=sigma)).warnings
    return told


def section(found: Mapping[str, Any] | None) -> str:
    """The part of the report; empty without a mechanism."""
    if not found:
        return ""
    head = ("site", f"{found['unit']}s", "sample rate", "noise multiplier", "steps", "simulated epsilon")
    rows: list[list[page.Cell]] = [
        [site, row["units"], f"{row['sample_rate']:.4g}", f"{row['noise_multiplier']:g}", row["steps"], _shown(row)]
        for site, row in found["sites"].items()
    ]
    caption = f"By site, at delta {found['delta']:g}; sites share no {found['unit']}, so the largest one is the run's."
    made = page.table(head, rows, caption) if rows else ""
    return (
        page.paragraph(
            f"{statements.bound(found).capitalize()}, mechanism {found['mechanism']}, clip {found['clip']:g}."
        )
        + made
        + page.paragraph(f"{statements.SIMULATED.capitalize()}. {statements.OUTSIDE}.", "soft")
    )


def _shown(row: Mapping[str, Any]) -> page.Cell:
    return None if row["epsilon"] is None else f"{row['epsilon']:.3g}"


def _common(recipe: schema.Recipe) -> Row:
    own = recipe.privacy
    return {
        "simulated": True,
        "mechanism": own.mechanism,
        "unit": privacy.UNITS[own.mechanism],
        "delta": own.delta,
        "accountant": "rdp",
        "clip": own.clip,
    }


def _at_sites(recipe: schema.Recipe, asked: Mapping[str, int], sites: Sequence[virtual_hospitals.Hospital]) -> Row:
    made = {one.name: _site(recipe, one, asked[one.name]) for one in sites if asked[one.name] and one.train}
    worst = max(made.values(), key=lambda row: float("inf") if row["epsilon"] is None else row["epsilon"], default=None)
    if worst is None:
        return {**_common(recipe), "noise_multiplier": 0.0, "steps": 0, "epsilon": 0.0, "sites": {}}
    chosen = {key: worst[key] for key in ("noise_multiplier", "steps", "epsilon")}
    return {**_common(recipe), **chosen, "sites": made}


def _site(recipe: schema.Recipe, site: virtual_hospitals.Hospital, times: int) -> Row:
    unit = privacy.UNITS[recipe.privacy.mechanism]
    units = len(records.ids(unit, site.train, site.source))
    event = _event(recipe, units)
    return {"units": units, "sample_rate": event.sample_rate, **_bound(event, times, recipe.privacy)}


def _event(recipe: schema.Recipe, units: int) -> base.PrivacyEvent:
    event = events.event_of(recipe, units)
    if event is None:
        raise ValueError(f"mechanism '{recipe.privacy.mechanism}' spends nothing")
    return event


def _bound(event: base.PrivacyEvent, times: int, own: privacy.RecipePrivacy) -> Row:
    steps = event.steps * times
    curve = accountant.steps(event.sample_rate, event.noise_multiplier, steps, event.shared)
    found = accountant.epsilon(curve, float(own.delta or 0.0))
    return {"noise_multiplier": event.noise_multiplier, "steps": steps, "epsilon": planner.finite(found.value)}


def _at_server(journal: Sequence[Mapping[str, Any]]) -> Row:
    last = journal[-1][dp_aggregation.ENTRY]
    chosen = {key: last[key] for key in ("noise_multiplier", "steps", "epsilon")}
    return {**chosen, "last_clip": last["clip"], "sites": {}}
