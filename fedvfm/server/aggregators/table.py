"""The table of aggregation rules."""

from __future__ import annotations

from fedvfm import config, factors, privacy_config, registry

TABLE = registry.Table(
    "aggregation rule",
    {
        "mean": "fedvfm.server.aggregators.mean:Mean",
        "svd": "fedvfm.server.aggregators.svd:Svd",
    },
)


def faults(recipe: config.Recipe) -> list[str]:
    """What of a recipe its rule cannot serve, one sentence a fault; names are checked elsewhere."""
    name, way, mechanism = recipe.aggregation.rule, recipe.adapter.factors, recipe.privacy.mechanism
    if name not in TABLE or TABLE.get(name).sum_only:
        return []
    found = []
    if mechanism == privacy_config.SITE_LEVEL:
        found.append(
            f"recipe.privacy.mechanism = '{mechanism}': rule '{name}' needs more than a sum of the updates, and the "
            'noise is on their sum; use recipe.aggregation.rule = "mean"'
        )
    if way != factors.BOTH:
        found.append(
            f"recipe.adapter.factors = '{way}': rule '{name}' makes both factors of every pair anew, so that none "
            'stays as it is; use recipe.aggregation.rule = "mean"'
        )
    return found
