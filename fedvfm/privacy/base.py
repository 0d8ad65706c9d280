"""PrivacyEvent and the protocol that every privacy mechanism fulfils.

A mechanism has a part at the site, which makes an update private, and a part at the server. Either may do nothing.
State goes in and comes out, so that a mechanism is a value and a run can be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fedvfm import privacy_config, state

Settings = privacy_config.RecipePrivacy
Memory = Mapping[str, Any]
"""What a mechanism keeps from round to round: plain JSON values."""


@dataclass(frozen=True)
class PrivacyEvent:
    """One release: the Poisson-subsampled Gaussian mechanism, ``steps`` times. What an accountant composes.

    Neighbours differ by one unit that is there or not. What identifies the release (recipe, round, base) and whose
    records it was made from belongs to the ledger's claim.

    Attributes:
        mechanism: its name in the table.
        unit: "record", "patient" or "site": whose presence it protects.
        noise_multiplier: standard deviation of the noise in clips.
        sample_rate: chance of a unit to be in a step's batch.
        steps: gradient steps (record and patient level), or rounds (site level).
        clip: most that one unit adds to a sum, in L2 norm.
    """

    mechanism: str
    unit: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    clip: float

    def __post_init__(self) -> None:
        if self.unit not in privacy_config.UNITS.values():
            raise ValueError(f"unit '{self.unit}' is none of {', '.join(privacy_config.UNITS.values())}")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ValueError(f"noise multiplier {self.noise_multiplier} is not above 0: nothing would be private")
        if not 0 < self.sample_rate <= 1 or self.steps < 1 or not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"no release: rate {self.sample_rate}, {self.steps} steps, clip {self.clip}")


def sample_rate(units: int, batch: int) -> float:
    """Chance of a unit to be in a step's batch so that ``batch`` are expected; at most 1."""
    return min(1.0, batch / units)


def steps(units: int, batch: int, epochs: int = 1) -> int:
    """Steps of ``epochs`` expected passes over ``units``; as many as the same passes without privacy take."""
    return math.ceil(units / batch) * epochs


class SitePart(Protocol):
    """What a mechanism does at a site. Torch objects are named Any, so that the server wing can read this module."""

    def prepare(self, model: Any, settings: Settings, units: int, memory: Memory) -> Memory:
        """Check model and settings before the first step and say what the round needs.

        Raises:
            ConfigError: if this model cannot be trained so.
        """
        ...

    def wrap_training(self, model: Any, memory: Memory) -> Any:
        """What takes the place of the plain step: clips each unit, adds noise of the operating system's entropy."""
        ...

    def on_update(self, update: state.SiteUpdate, memory: Memory) -> tuple[state.SiteUpdate, Memory]:
        """The update as it may leave, and the new state. Nothing computed from training records but it is left in."""
        ...


class ServerPart(Protocol):
    """What a mechanism does at the server: NumPy alone."""

    def configure(self, settings: Settings, sites: int, memory: Memory) -> Memory:
        """Before a round: the state of this round, an adaptive clip among it."""
        ...

    def on_aggregate(self, update: state.SiteUpdate, memory: Memory) -> tuple[state.SiteUpdate, Memory]:
        """One admitted update as it goes into the sum."""
        ...

    def finish(self, adapter: state.AdapterState, memory: Memory) -> tuple[state.AdapterState, Memory]:
        """The aggregate as it may be used, and the new state."""
        ...


class Mechanism(Protocol):
    """One entry of the table.

    Attributes:
        unit: whose presence it protects.
        needs_plain_updates: whether the server must see single updates; not so where they are only summed.
    """

    unit: str
    needs_plain_updates: bool

    def event(
        self, settings: Settings, noise_multiplier: float, units: int, batch: int, epochs: int
    ) -> PrivacyEvent | None:
        """What one round spends; None where there is no privacy to spend.

        Args:
            settings: the recipe's.
            noise_multiplier: the recipe's, or what was found for its epsilon.
            units: records, patients or sites that can be drawn.
            batch: units that a step is expected to draw.
            epochs: passes over the units in a round.
        """
        ...

    def site(self) -> SitePart | None:
        """The part at the site; None where it does nothing."""
        ...

    def server(self) -> ServerPart | None:
        """The part at the server; None where it does nothing."""
        ...


class NoMechanism:
    """Updates leave as they are."""

    unit = ""
    needs_plain_updates = False

    def event(
        self, settings: Settings, noise_multiplier: float, units: int, batch: int, epochs: int
    ) -> PrivacyEvent | None:
        """None: there is no epsilon."""
        return None

    def site(self) -> SitePart | None:
        """Nothing."""
        return None

    def server(self) -> ServerPart | None:
        """Nothing."""
        return None
