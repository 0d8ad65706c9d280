"""What an adapter kind provides: which parameters train, how they are called, how they begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from fedvfm import config as configs
from fedvfm import seeding, state
from fedvfm.backbones import base as backbones


@dataclass(frozen=True)
class Injected:
    """The trainable parameters an adapter kind put into a backbone.

    Attributes:
        specs: one row an array, by wire name.
        parameters: wire name -> parameter.
        reference: wire name -> frozen value, for arrays that travel as differences from the pretrained weights.
    """

    specs: tuple[state.ArraySpec, ...] = ()
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    reference: Mapping[str, Tensor] = field(default_factory=dict)


class Adapter:
    """Base of all kinds. A kind is stateless; ``inject`` changes the backbone it is given."""

    def faults(self, settings: configs.AdapterConfig, backbone: backbones.Backbone) -> list[str]:
        """What is wrong with the settings for this backbone, one sentence a fault."""
        wrong = [layer for layer in settings.layers if layer >= backbone.depth]
        if wrong:
            return [f"recipe.adapter.layers = {wrong}: backbone '{backbone.name}' has blocks 0 to {backbone.depth - 1}"]
        return []

    def inject(self, settings: configs.AdapterConfig, backbone: backbones.Backbone) -> Injected:
        """Put the trainable parameters in. At the start the model computes what the backbone computes."""
        raise NotImplementedError


def initial(spec: state.ArraySpec, seed: int) -> state.Array:
    """The first value of an adapter array, seeded by its wire name: A uniform as in PEFT, B and differences zero.

    Source: Hu et al., "LoRA", ICLR 2022, section 4.1 (B zero); the bound 1/sqrt(d_in) is that of PEFT's Kaiming init.
    """
    if spec.role != "A":
        return np.zeros(spec.shape, np.float32)
    bound = 1.0 / np.sqrt(spec.shape[1])
    return seeding.stream(seed, "initial", spec.name).uniform(-bound, bound, spec.shape).astype(np.float32)


def blocks_of(settings: configs.AdapterConfig, backbone: backbones.Backbone) -> list[int]:
    """The block numbers the settings choose: all, or ``layers``."""
    return sorted(set(settings.layers)) if settings.layers else list(range(backbone.depth))
