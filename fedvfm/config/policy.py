"""What a hospital accepts and how much of its machine it gives: ``[policy]`` and ``[limits]`` of the site's file."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from fedvfm.config import base, schedule


class Part(pydantic.BaseModel):
    """Base of the tables below."""

    model_config = base.SETTINGS


class PrivacyPolicy(Part):
    """The least privacy a site asks for.

    ``mechanisms`` are the accepted ones; a recipe without any is accepted only where ``"none"`` is among them.
    ``max_epsilon`` caps the whole run of a mechanism that has an epsilon; 0 accepts none.
    """

    mechanisms: Annotated[tuple[base.Name, ...], base.names()] = ()
    max_epsilon: base.NonNegative = 0.0


class FinalPolicy(Part):
    """What becomes of the final adapter, which the site scores on its own test split.

    ``accept``: "never" keeps none, "always" keeps any, "ask" keeps it until a person decides, "score" decides by the
    primary metric: at least ``min_score``, and at most ``max_drop`` below what the adapter scores that this site sent
    last. Whoever asks for neither with "score" would accept anything, so one of the two must be given.
    """

    accept: Literal["never", "always", "ask", "score"] = "never"
    min_score: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    max_drop: Annotated[float, Field(ge=0.0, le=1.0)] | None = None

    @pydantic.model_validator(mode="after")
    def _agree(self) -> FinalPolicy:
        bounded = self.min_score is not None or self.max_drop is not None
        if bounded != (self.accept == "score"):
            raise ValueError('accept = "score" goes with min_score, max_drop or both, and they with no other')
        return self


class PolicyConfig(Part):
    """What a site accepts. Whatever is not named here is refused: an empty policy accepts nothing.

    ``backbones``: name -> accepted sha256 of the weights (``"scratch"`` for one that is trained from nothing).
    ``metrics``: names that may leave the site; a name that ends in ``*`` stands for all that begin so. None leaves if
    it was computed from fewer than ``min_units`` patients, or says something of a class that fewer have. An image
    without a patient counts as one.

    Nothing is trained on fewer than ``min_train_units`` patients. Without a mechanism that noises each update here,
    neither in steps of fewer than ``min_batch`` images, nor in fewer than ``min_steps`` of them a round, nor by other
    ``optimisers``: one plain gradient step gives images back. ``min_sites``: the recipe must promise that no adapter is
    made of fewer sites.

    ``max_evaluations``: adapters of one recipe that are scored; left out, one more than ``max_rounds``: each round's,
    and the test. ``max_step``: an adapter that comes lies at most so many times as far from the one before as the
    largest update that this site sent (:mod:`fedvfm.client.gate.lineage`).

    ``hours`` on the clock of ``time_zone`` are those in which the site computes (see :mod:`fedvfm.config.schedule`):
    left out any, an empty list none.
    """

    backbones: dict[base.Name, Annotated[tuple[base.Sha256 | Literal["scratch"], ...], Field(strict=False)]] = {}
    tasks: Annotated[tuple[base.Name, ...], base.names()] = ()
    adapters: Annotated[tuple[base.Name, ...], base.names()] = ()
    max_rounds: Annotated[int, Field(ge=0)] = 0
    max_hours: base.NonNegative = 0.0
    max_trainable_parameters: Annotated[int, Field(ge=0)] = 0
    metrics: Annotated[tuple[base.Name, ...], base.names()] = ()
    min_units: Annotated[int, Field(ge=1)] = 10
    min_train_units: Annotated[int, Field(ge=1)] = 10
    min_batch: Annotated[int, Field(ge=1)] = 2
    min_steps: Annotated[int, Field(ge=1)] = 2
    optimisers: Annotated[tuple[base.Name, ...], base.names()] = ("adamw",)
    min_sites: Annotated[int, Field(ge=1)] = 1
    max_evaluations: Annotated[int, Field(ge=0)] | None = None
    max_step: base.Positive = 100.0
    hours: Annotated[tuple[str, ...], Field(strict=False, max_length=100)] | None = None
    time_zone: Annotated[str, Field(max_length=60)] = ""
    privacy: PrivacyPolicy = PrivacyPolicy()
    final: FinalPolicy = FinalPolicy()

    @pydantic.model_validator(mode="after")
    def _tell_time(self) -> PolicyConfig:
        if self.hours is None and self.time_zone:
            raise ValueError("time_zone is that of hours, which are not given; left out, any hour is allowed")
        if self.hours is not None:
            schedule.parse(self.hours, self.time_zone)
        return self

    @property
    def most_evaluations(self) -> int:
        """How many adapters of one recipe are scored."""
        return self.max_rounds + 1 if self.max_evaluations is None else self.max_evaluations

    @property
    def when(self) -> schedule.Hours | None:
        """The hours in which the site computes; None for any."""
        return None if self.hours is None else schedule.parse(self.hours, self.time_zone)


class LimitsConfig(Part):
    """How much of the machine the site's executor may take; read when the client starts.

    Attributes:
        threads: CPU threads that compute, whatever the recipe says; 0 takes the recipe's, or all cores where it names
            none. Another number than the other sites' changes the last bits of a result and nothing else.
        nice: how far it stands back behind other programs, 19 the most.
        gpu_memory: the share of a GPU's memory it may take.
    """

    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    gpu_memory: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
