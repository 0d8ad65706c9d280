"""What an adapter kind provides: which parameters train, how they are called, how they begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from fedvfm import errors, seeding
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.state import state


@dataclass(frozen=True)
class Injected:
    """The trainable parameters an adapter kind put into a backbone.

    Attributes:
        specs: one row an array, by wire name.
        parameters: wire name -> parameter.
        reference: wire name -> frozen value, for arrays that travel as differences from the pretrained weights.
        bounds: wire name -> bound of the uniform first values of a dense array; those not named begin as zeros.
    """

    specs: tuple[state.ArraySpec, ...] = ()
    parameters: Mapping[str, nn.Parameter] = field(default_factory=dict)
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)


class Adapter:
    """Base of all kinds. A kind is stateless; ``inject`` changes the backbone it is given.

    Attributes:
        known_options: keys of ``recipe.adapter.options`` that the kind reads; others are refused.
        numbers: options that are numbers -> (default, least, most); a whole default takes whole numbers alone.
        foldable: whether the trained model is a stock model with other weights.
        pairs: whether it trains pairs of low-rank factors, of which one may be left as it is.
    """

    known_options: ClassVar[tuple[str, ...]] = ()
    numbers: ClassVar[Mapping[str, tuple[float, float, float]]] = {}
    foldable: ClassVar[bool] = True
    pairs: ClassVar[bool] = False

    def faults(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> list[str]:
        """What is wrong with the settings for this backbone, one sentence a fault."""
        wrong = [layer for layer in settings.layers if layer >= backbone.depth]
        found = [fault for key in self.numbers if (fault := self._number_fault(settings, key))]
        if wrong:
            found.append(
                f"recipe.adapter.layers = {wrong}: backbone '{backbone.name}' has blocks 0 to {backbone.depth - 1}"
            )
        return found

    def number(self, settings: schema.AdapterConfig, key: str) -> float:
        """The value of one of ``numbers``.

        Raises:
            ConfigError: if it is no number, or out of bounds.
        """
        if fault := self._number_fault(settings, key):
            raise errors.ConfigError(f"adapter '{settings.kind}'", [fault])
        value: Any = settings.options.get(key, self.numbers[key][0])
        return value  # type: ignore[no-any-return]

    def _number_fault(self, settings: schema.AdapterConfig, key: str) -> str:
        default, least, most = self.numbers[key]
        value: Any = settings.options.get(key, default)
        whole = isinstance(default, int)
        if type(value) in ((int,) if whole else (int, float)) and least <= value <= most:
            return ""
        return f"recipe.adapter.options.{key} = {value!r}: give a {'whole ' * whole}number from {least} to {most}"

    def inject(self, settings: schema.AdapterConfig, backbone: backbones.Backbone) -> Injected:
        """Put the trainable parameters in. At the start the model computes what the backbone computes."""
        raise NotImplementedError


def joined(*several: Injected) -> Injected:
    """All of them as one."""
    return Injected(
        tuple(spec for one in several for spec in one.specs),
        {name: parameter for one in several for name, parameter in one.parameters.items()},
        {name: frozen for one in several for name, frozen in one.reference.items()},
        {name: bound for one in several for name, bound in one.bounds.items()},
    )


def initial(spec: state.ArraySpec, seed: int, bound: float = 0.0) -> state.Array:
    """The first value of an adapter array, seeded by its wire name: A uniform as in PEFT, B and differences zero.

    ``bound``, where a kind gives one, is that of a dense array that does not begin as zeros.

    Source: Hu et al., "LoRA", ICLR 2022, section 4.1 (B zero); the bound 1/sqrt(d_in) is that of PEFT's Kaiming init.
    """
    bound = 1.0 / np.sqrt(spec.shape[1]) if spec.role == "A" else bound
    if not bound:
        return np.zeros(spec.shape, np.float32)
    return seeding.stream(seed, "initial", spec.name).uniform(-bound, bound, spec.shape).astype(np.float32)


def blocks_of(settings: schema.AdapterConfig, backbone: backbones.Backbone) -> list[int]:
    """The block numbers the settings choose: all, or ``layers``."""
    return sorted(set(settings.layers)) if settings.layers else list(range(backbone.depth))
