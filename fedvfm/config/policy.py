"""What a hospital accepts and how much of its machine it gives: ``[policy]`` and ``[limits]`` of the site's file."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from fedvfm.config import base, licence, schedule


class Part(pydantic.BaseModel):
    """Base of the tables below."""

    model_config = base.SETTINGS


class PrivacyPolicy(Part):
    """The least privacy a site asks for.

    ``mechanisms`` are the accepted ones; a recipe without any is accepted only where ``"none"`` is among them.
    ``max_epsilon`` caps the whole run of a mechanism that has an epsilon; 0 accepts none.
    """

    mechanisms: Annotated[tuple[base.Name, ...], base.names()] = ()
    """Accepted: record-level, patient-level, site-level; with -shared behind the name, where other sites' noise counts
    too; "none": recipes without privacy. Change: to what your data-protection officer asks for."""
    max_epsilon: base.NonNegative = 0.0
    """Of one recipe's whole run on this site's data, for mechanisms that have an epsilon. Change: to the most that one
    recipe may spend of your budget."""


class FinalPolicy(Part):
    """What becomes of the final adapter, which the site scores on its own test split.

    ``accept``: "never" keeps none, "always" keeps any, "ask" keeps it until a person decides, "score" decides by the
    primary metric: at least ``min_score``, and at most ``max_drop`` below what the adapter scores that this site sent
    last. Whoever asks for neither with "score" would accept anything, so one of the two must be given.
    """

    accept: Literal["never", "always", "ask", "score"] = "never"
    """never (keep none), always, ask (a person decides) or score (min_score and max_drop decide). Change: to ask where
    a person shall decide, to score where a number may."""
    min_score: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """(0 to 1) With score: the least of the task's primary metric (Dice, balanced accuracy). Change: to the least that
    would be of use here."""
    max_drop: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """(0 to 1) With score: at most so much below this site's own last update. Change: to 0.02 or so, where the shared
    adapter may be a little worse here than your own."""

    @pydantic.model_validator(mode="after")
    def _agree(self) -> FinalPolicy:
        bounded = self.min_score is not None or self.max_drop is not None
        if bounded != (self.accept == "score"):
            raise ValueError('accept = "score" goes with min_score, max_drop or both, and they with no other')
        return self


STATISTICS = {
    "patients": "how many patients there are",
    "images": "how many images a patient has, as a histogram over patients",
    "sizes": "rows and columns of the images, as histograms over patients",
    "spacings": "size of a pixel and distance of slices in millimetres, as histograms over patients",
    "intensities": "intensities of all pixels that are no padding, as a histogram of each channel",
    "foreground": "intensities of the pixels of structures alone, as a histogram of each channel",
    "classes": "how many patients have each class",
    "class-shares": "which share of a patient's pixels (in classification: of a patient's images) each class has",
    "columns": "how many patients have a value in each column of a table that the survey names, the sum of these and "
    "of their squares (mean and standard deviation)",
}
"""Name of a statistic -> what it tells. Each is a sum over patients; none holds a value of a single one."""


class PolicyConfig(Part):
    """What a site accepts. Whatever is not named here is refused: an empty policy accepts nothing.

    ``backbones``: name -> accepted sha256 of the weights (``"scratch"`` for one that is trained from nothing).
    ``metrics``: names that may leave the site; a name that ends in ``*`` stands for all that begin so. None leaves if
    it was computed from fewer than ``min_units`` patients, or says something of a class that fewer have. An image
    without a patient counts as one.

    ``licences``: both what the recipe states of the weights and what this machine knows of them must be listed.

    Nothing is trained on fewer than ``min_train_units`` patients. Without a mechanism that noises each update here,
    neither in steps of fewer than ``min_batch`` images, nor in fewer than ``min_steps`` of them a round, nor by other
    ``optimisers``: one plain gradient step gives images back. ``min_sites``: the recipe must promise that no adapter is
    made of fewer sites.

    ``metrics_epsilon``: scores of validation and test leave with noise and are charged to the ledger, in place of being
    rounded alone; only those that are means of bounded values (:mod:`fedvfm.client.gate.private_scores`).

    ``require_secure``: only recipes with secure aggregation, so that the coordinator never sees this site's update.

    ``max_evaluations``: adapters of one recipe that are scored; left out, one more than ``max_rounds``: each round's,
    and the test. ``max_step``: an adapter that comes lies at most so many times as far from the one before as the
    largest update that this site sent (:mod:`fedvfm.client.gate.lineage`).

    ``hours`` on the clock of ``time_zone`` are those in which the site computes (see :mod:`fedvfm.config.schedule`):
    left out any, an empty list none.
    """

    backbones: dict[base.Name, Annotated[tuple[base.Sha256 | Literal["scratch"], ...], Field(strict=False)]] = {}
    """Accepted backbones: name = sha256 of the weights, or "scratch" for one without. Change: for each recipe; 'fedvfm
    client review --print-policy' writes it."""
    licences: Annotated[tuple[licence.Name, ...], Field(strict=False, max_length=100)] | None = None
    """Licences of a backbone's weights that this site takes, as SPDX calls them; then weights of no known licence are
    refused; left out: any. Change: to those that your lawyers accept."""
    tasks: Annotated[tuple[base.Name, ...], base.names()] = ()
    """Kinds of task: segmentation, detection, classification, case-classification. Change: to the kind that you want to
    take part in."""
    adapters: Annotated[tuple[base.Name, ...], base.names()] = ()
    """Kinds of adapter. Change: to the kinds that you accept."""
    max_rounds: Annotated[int, Field(ge=0)] = 0
    """(rounds) Of one recipe, counted by its hash in the audit log, whatever the run. Change: to the recipe's rounds,
    or more where the coordinator may extend."""
    max_hours: base.NonNegative = 0.0
    """(hours) Computing time of one recipe; a round under way ends when it is used up. Change: to what the machine can
    spare."""
    max_trainable_parameters: Annotated[int, Field(ge=0)] = 0
    """(parameters) As this site counts them itself. Change: to the recipe's number; fewer tell less of the images."""
    metrics: Annotated[tuple[base.Name, ...], base.names()] = ()
    """What may leave besides the adapter; "dice_*" for all that begin so. Change: to the fewest that the coordinator
    needs."""
    min_units: Annotated[int, Field(ge=1)] = 10
    """(patients) No metric leaves that fewer have a part in, nor one of a class that fewer have. Change: up where even
    groups of ten are too small to speak of."""
    min_train_units: Annotated[int, Field(ge=1)] = 10
    """(patients) Nothing is trained on fewer. Change: up where your rules ask for more."""
    min_batch: Annotated[int, Field(ge=1)] = 2
    """(images) Of one step, without a mechanism that noises each update here. Change: up; 1 gives images away."""
    min_steps: Annotated[int, Field(ge=1)] = 2
    """(steps) Of one round, without such a mechanism: of a single step the images can be computed. Change: up; 1 gives
    images away."""
    optimisers: Annotated[tuple[base.Name, ...], base.names()] = ("adamw",)
    """Accepted ones, without such a mechanism; what sgd sends is closer to the images. Change: add sgd only where you
    accept that."""
    min_sites: Annotated[int, Field(ge=1)] = 1
    """(sites) How many the recipe must promise to join; the coordinator keeps to it, or not. Change: up; with two sites
    each can work out the other's update."""
    require_secure: bool = False
    """Only recipes with secure aggregation: the coordinator sees no update of this site's alone. Change: to true where
    it must not."""
    max_evaluations: Annotated[int, Field(ge=0)] | None = None
    """(adapters) Of one recipe that are scored; left out: one more than max_rounds. Change: down where each score is
    one too many."""
    metrics_epsilon: base.Positive | None = None
    """(epsilon) Of the scores of one adapter on one split: they leave with noise, charged to the budget of [privacy];
    left out: rounded, without noise. Change: give it where no number may leave that a patient's own result shows in."""
    surveys: Annotated[tuple[base.Name, ...], base.names()] = ()
    """Statistics that a survey may ask for: patients, images, sizes, spacings, intensities, foreground, classes,
    class-shares, columns; none leaves of fewer patients than min_units. Change: to those that an approved survey asks
    for."""
    max_surveys: Annotated[int, Field(ge=0)] = 1
    """(surveys) That are answered here in all, each once; two answers differ by the patients that came or went. Change:
    up where another one is worth that."""
    max_step: base.Positive = 100.0
    """(times) How much further an adapter may move in a round than this site's own largest update. Change: down where
    no bad coordinator shall move the adapter far."""
    hours: Annotated[tuple[str, ...], Field(strict=False, max_length=100)] | None = None
    """When the site computes; left out: always; []: never. Change: to nights and weekends where the machine is needed
    by day."""
    time_zone: Annotated[str, Field(max_length=60)] = ""
    """On whose clock the hours are. Change: with hours."""
    privacy: PrivacyPolicy = PrivacyPolicy()
    """The least privacy that this site asks for."""
    final: FinalPolicy = FinalPolicy()
    """What becomes of the final adapter, scored on this site's own test split first."""

    @pydantic.field_validator("surveys")
    @classmethod
    def _known_statistics(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in STATISTICS]:
            raise ValueError(f"no statistic '{unknown[0]}'; known: {', '.join(STATISTICS)}")
        return names

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
    """How much of the machine the site's executor may take; read when the client starts."""

    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads; 0 takes the recipe's, else all cores. Change: down where others work on the machine too."""
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    """(0 to 19) How far it stands back behind other programs: 0 not at all, 19 the most. Change: up where others work
    on the machine too."""
    gpu_memory: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """(share of the GPU's memory) The most it may take, over 0 to 1. Change: down where others use the GPU too."""
