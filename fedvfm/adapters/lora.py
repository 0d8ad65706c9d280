"""LoRA through PEFT on projections chosen by our names, resolved per backbone."""

from __future__ import annotations

from typing import Any

import peft
from torch import nn

from fedvfm import config as configs
from fedvfm import state
from fedvfm.adapters import base
from fedvfm.backbones import base as backbones


def peft_config(settings: configs.AdapterConfig, backbone: backbones.Backbone) -> peft.LoraConfig:
    """The PEFT configuration of the same adapter in the stock model; it is also what an export carries."""
    modules = [path for path in _paths(settings, backbone).values() if path]
    alpha = settings.scale * settings.rank
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=settings.dropout,
        target_modules=modules,
        bias="none",
    )


def _paths(settings: configs.AdapterConfig, backbone: backbones.Backbone) -> dict[str, str | None]:
    chosen = base.blocks_of(settings, backbone)
    return {
        f"block.{block:02d}.{part}": backbone.projection(block, part) for block in chosen for part in settings.targets
    }


class Lora(base.Adapter):
    """W + (alpha / rank) B A on the chosen projections.

    Shapes: A (rank, d_in), B (d_out, rank).
    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, eq. (3).
    """

    def faults(self, settings: configs.AdapterConfig, backbone: backbones.Backbone) -> list[str]:
        """See base."""
        found = super().faults(settings, backbone)
        if backbone.depth == 0:
            return [
                f"recipe.adapter.kind = 'lora': backbone '{backbone.name}' has no projections to adapt; use kind 'full'"
            ]
        unknown = [part for part in settings.targets if backbone.projection(0, part) is None]
        if unknown or not settings.targets:
            found.append(f"recipe.adapter.targets = {list(settings.targets)}: known: q, k, v, o, fc1, fc2")
        return found

    def inject(self, settings: configs.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
        """See base."""
        peft.inject_adapter_in_model(peft_config(settings, backbone), backbone.model)
        specs: list[state.ArraySpec] = []
        parameters: dict[str, nn.Parameter] = {}
        for pair, path in _paths(settings, backbone).items():
            layer: Any = backbone.model.get_submodule(str(path))
            for role, weight in (("A", layer.lora_A["default"].weight), ("B", layer.lora_B["default"].weight)):
                name = f"{pair}.{role}"
                specs.append(state.ArraySpec(name, tuple(weight.shape), "lora", role, pair, settings.scale))
                parameters[name] = weight
        return base.Injected(tuple(specs), parameters)
