"""The table of aggregation rules."""

from __future__ import annotations

from fedvfm import registry

TABLE = registry.Table(
    "aggregation rule",
    {
        "mean": "fedvfm.server.aggregators.mean:Mean",
        "svd": "fedvfm.server.aggregators.svd:Svd",
    },
)
