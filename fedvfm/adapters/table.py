"""The table of adapter kinds."""

from __future__ import annotations

from fedvfm import registry

TABLE = registry.Table(
    "adapter kind",
    {
        "lora": "fedvfm.adapters.lora:Lora",
        "core": "fedvfm.adapters.lora:Core",
        "head-only": "fedvfm.adapters.dense:HeadOnly",
        "adaptformer": "fedvfm.adapters.bottleneck:AdaptFormer",
        "medical-sam-adapter": "fedvfm.adapters.bottleneck:MedicalSamAdapter",
        "prompt-tokens": "fedvfm.adapters.prompt_tokens:PromptTokens",
        "norm": "fedvfm.adapters.dense:norm",
        "bias": "fedvfm.adapters.dense:bias",
        "full": "fedvfm.adapters.dense:full",
    },
)
