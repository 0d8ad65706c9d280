"""Kinds that train some of the backbone's own parameters: norms, biases, or all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedvfm.adapters import base
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.state import state


class Dense(base.Adapter):
    """Trains the parameters that ``chosen`` picks.

    They travel as differences from the frozen weights, so averaging is exact.

    A backbone that was not pretrained travels as it is.

    Args:
        group: the group of the manifest's rows.
        chosen: (module that owns the parameter, its last name) -> whether it trains.
    """

    def __init__(self, group: str, chosen: Callable[[nn.Module, str], bool]) -> None:
        self.group, self.chosen = group, chosen

    def faults(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> list[str]:
        """See base."""
        found = super().faults(settings, backbone)
        if settings.dropout:
            found.append(
                f"recipe.adapter.dropout = {settings.dropout}: kind '{settings.kind}' trains the backbone's own "
                "numbers, of which none is dropped; leave it 0"
            )
        if self.group != "full" and backbone.depth == 0:
            found.append(
                f"recipe.adapter.kind: backbone '{backbone.name}' has no pretrained norms or biases to tune; "
                f"use kind 'full'"
            )
        return found

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
        """See base. The parameters are copied first: the frozen weights may be shared by other models."""
        allowed = tuple(f"block.{block:02d}." for block in settings.layers)
        parameters: dict[str, nn.Parameter] = {}
        reference: dict[str, Tensor] = {}
        made: dict[int, nn.Parameter] = {}
        for path, module in list(backbone.model.named_modules()):
            for last, frozen in list(module.named_parameters(recurse=False)):
                name = backbone.wire_name(f"{path}.{last}" if path else last)
                if id(frozen) in made:  # two modules hold one parameter
                    setattr(module, last, made[id(frozen)])
                elif self._trains(module, last, name) and (not allowed or name.startswith(allowed)):
                    own = made[id(frozen)] = nn.Parameter(frozen.detach().clone())
                    setattr(module, last, own)
                    parameters[name] = own
                    reference[name] = frozen.detach() if backbone.pretrained else torch.zeros_like(frozen)
        specs = tuple(state.ArraySpec(name, tuple(p.shape), self.group) for name, p in parameters.items())
        return base.Injected(specs, parameters, reference)

    def _trains(self, module: nn.Module, last: str, name: str) -> bool:
        """Norms and biases are those of the encoder: ``parts`` chooses of a mask decoder, whole."""
        return self.chosen(module, last) and (self.group == "full" or not name.startswith(("decoder.", "prompt.")))


def norm() -> Dense:
    """Scale and shift of every layer norm.

    Source: Qi et al., "Parameter-Efficient Tuning on Layer Normalization", 2022; PEFT's LN tuning.
    """
    return Dense("norm", lambda module, last: isinstance(module, nn.LayerNorm))


def bias() -> Dense:
    """Every bias.

    Source: Ben Zaken et al., "BitFit", ACL 2022.
    """
    return Dense("bias", lambda module, last: last == "bias")


def full() -> Dense:
    """Everything: the full fine-tuning reference, and the U-Net from scratch."""
    return Dense("full", lambda module, last: True)


class HeadOnly(base.Adapter):
    """Nothing in the backbone trains; only the head travels."""

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> base.Injected:
        """See base."""
        return base.Injected()
