"""The table of adapter kinds."""

from __future__ import annotations

from fedvfm import registry

TABLE = registry.Table(
    "adapter kind",
    {
        "lora": "fedvfm.adapters.lora:Lora",
        "head-only": "fedvfm.adapters.dense:HeadOnly",
        "norm": "fedvfm.adapters.dense:norm",
        "bias": "fedvfm.adapters.dense:bias",
        "full": "fedvfm.adapters.dense:full",
    },
)
