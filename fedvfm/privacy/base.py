"""PrivacyEvent and the protocol that every privacy mechanism fulfils.

A mechanism has a part at the site, which makes an update private, and a part at the server. Either may do nothing.
State goes in and comes out, so that a mechanism is a value and a run can be resumed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedvfm.config import privacy, schema
from fedvfm.privacy import randomness
from fedvfm.state import state

SCORES = "metrics"
"""The mechanism of a release that is scores with noise, not an update."""
SURVEY = "survey"
"""The mechanism of a release that is statistics of the data with noise; see :mod:`fedvfm.survey.noise`."""
Settings = privacy.RecipePrivacy
Losses = Callable[[Sequence[Any]], Any]
"""Samples -> a tensor of one loss each. A loss depends on its own sample and on no other one of the batch."""
Memory = Mapping[str, Any]
"""What a mechanism keeps from round to round: plain JSON values."""
Change = Mapping[str, NDArray[np.float64]]
"""Differences of named arrays."""


@dataclass(frozen=True)
class PrivacyEvent:
    """One release: the Poisson-subsampled Gaussian mechanism, ``steps`` times. What an accountant composes.

    Neighbours differ by what one unit adds to the sums, or zero in its place; where rate, steps and noise are made from
    a public number, also by one unit that is there or not. What identifies the release (recipe, round, base) and whose
    records it was made from belongs to the ledger's claim.

    Attributes:
        mechanism: its name in the table.
        unit: "record", "patient" or "site": whose presence it protects.
        noise_multiplier: standard deviation of the noise in clips, at least 0.01.
        sample_rate: chance of a unit to be in a step's batch.
        steps: gradient steps (record and patient level), or rounds (site level).
        clip: most that one unit adds to a sum, in L2 norm; 1e-6 to 1e6.
        honest: sites that are assumed to be honest, whose parts of discrete Gaussian noise come to that multiplier; 0
            where the whole noise is of one hand, and continuous.
    """

    mechanism: str
    unit: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    clip: float
    honest: int = 0

    def __post_init__(self) -> None:
        if self.unit not in privacy.UNITS.values():
            raise ValueError(f"unit '{self.unit}' is none of {', '.join(privacy.UNITS.values())}")
        least, clips = privacy.LEAST_NOISE, (privacy.LEAST_CLIP, privacy.MOST_CLIP)
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= least):
            raise ValueError(f"noise multiplier {self.noise_multiplier} is below {least}: nothing would be private")
        if self.honest < 0 or (self.honest and not self.shared):
            raise ValueError(f"{self.honest} honest sites of mechanism '{self.mechanism}', whose noise is not shared")
        if not 0 < self.sample_rate <= 1 or self.steps < 1 or not clips[0] <= self.clip <= clips[1]:
            raise ValueError(f"no release: rate {self.sample_rate}, {self.steps} steps, clip {self.clip}")

    @property
    def shared(self) -> bool:
        """Whether the noise is a sum of discrete Gaussian parts: the sites', or of a survey one site's own."""
        return self.mechanism in privacy.SHARED or self.mechanism == SURVEY


def sample_rate(units: int, batch: int) -> float:
    """Chance of a unit to be in a step's batch so that ``batch`` are expected; at most 1."""
    return min(1.0, batch / units)


def steps(units: int, batch: int, epochs: int = 1) -> int:
    """Steps of ``epochs`` expected passes over ``units``; as many as the same passes without privacy take."""
    return math.ceil(units / batch) * epochs


def bare(update: state.SiteUpdate) -> state.SiteUpdate:
    """Of all that training computed, the adapter alone: one example is claimed whatever there are."""
    return dataclasses.replace(update, num_examples=1, metrics={}, extra={})


@dataclass(frozen=True)
class Work:
    """What a round trains. Torch objects are named Any, so that the server wing can read this module.

    Attributes:
        model: the module, on its device and in training mode.
        groups: the parameters that train in this round, by what they are of: adapter, head. Nothing else may require a
            gradient.
        where: site and round, for what is said of faults.
        examples: for a first look at the model. They are made up: what comes of the look may be told.
        losses: examples -> one loss each, each of that example alone.
    """

    model: Any
    groups: Sequence[Sequence[Any]]
    where: str
    examples: Sequence[Any]
    losses: Losses

    @property
    def parameters(self) -> list[Any]:
        """All of them, in the order of the groups."""
        return [one for group in self.groups for one in group]


class Steps(Protocol):
    """The private steps of one round."""

    def draw(self, units: int) -> list[int]:
        """Which of so many units are in the next batch."""
        ...

    def choose(self, images: int) -> list[int]:
        """Which of a unit's images stand for it in this step."""
        ...

    def gradient(self, units: Sequence[Sequence[Any]], losses: Losses) -> None:
        """The private gradient of these units' samples, as the ``.grad`` of every trained parameter.

        Whatever the samples are, it is made: that a round ended would tell of them what no noise covers.
        """
        ...


class SitePart(Protocol):
    """What a mechanism does at a site.

    Attributes:
        noised: whether what training leaves has its noise on it. Where it has none yet, nothing may depend on whether
            the adapter moved: that nobody was drawn would be told.
    """

    noised: bool

    def prepare(
        self, work: Work, recipe: schema.Recipe, event: PrivacyEvent, draws: randomness.Draws
    ) -> AbstractContextManager[Steps]:
        """What takes the place of the plain gradient while the context is open; nothing of it stays in the model.

        Raises:
            ConfigError: if this model cannot be trained so.
            TrainingError: if no gradient reaches what trains.
        """
        ...

    def on_update(self, update: state.SiteUpdate) -> state.SiteUpdate:
        """The update as it may leave: nothing computed from training records but the adapter is left in."""
        ...


class ServerPart(Protocol):
    """What a mechanism does at the server: NumPy alone.

    A change is the difference that one update makes to its base, in float64, of the arrays that train in the round.
    ``memory`` is what the journal states of a round. It goes into the next one, and between ``on_aggregate`` and
    ``finish``, where it never leaves the process, it may hold what is not private yet.
    """

    def configure(self, recipe: schema.Recipe, sites: int, memory: Memory) -> Memory:
        """Before a round, and before any update of it is seen: clip and noise among it.

        Args:
            recipe: what is trained.
            sites: that are asked in this round, whether they answer or not.
            memory: of the round before; empty before the first.
        """
        ...

    def on_aggregate(self, change: Change, memory: Memory) -> tuple[Change, Memory]:
        """One admitted update's change as it goes into the sum. Updates come in any order, which must not matter."""
        ...

    def finish(self, total: Change, memory: Memory, draws: randomness.Draws) -> tuple[Change, Memory]:
        """The private mean change of the sites that were asked, from the sum, and what may be told of the round."""
        ...


class Mechanism(Protocol):
    """One entry of the table.

    Attributes:
        unit: whose presence it protects.
        needs_plain_updates: whether the server must see single updates; not so where they are only summed.
    """

    unit: str
    needs_plain_updates: bool

    def faults(self, recipe: schema.Recipe) -> list[str]:
        """What of the recipe would break what the mechanism promises, one sentence a fault."""
        ...

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

    def faults(self, recipe: schema.Recipe) -> list[str]:
        """None."""
        return []

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
