"""``[privacy]`` of a recipe: the mechanism that makes an update private. ``[privacy]`` of a site's file: its budget."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from fedvfm.config import base

NO_MECHANISM = "none"
SITE_LEVEL = "site-level"
SITE_LEVEL_SHARED = "site-level-shared"
SHARED = {"record-level-shared": "record-level", "patient-level-shared": "patient-level", SITE_LEVEL_SHARED: SITE_LEVEL}
"""Mechanisms whose noise is the sum of the sites' parts, and what each is called where the whole noise is one's own."""
UNITS = {"record-level": "record", "patient-level": "patient", SITE_LEVEL: "site"}
UNITS |= {shared: UNITS[own] for shared, own in SHARED.items()}
"""Mechanism -> what it protects the presence of."""
_ADAPTIVE = ("adaptive_quantile", "adaptive_rate", "adaptive_noise")

IMAGES_PER_PATIENT = 4

LEAST_NOISE = 0.01
"""Noise multipliers below promise nothing that has a use, and further down floating point loses them."""
LEAST_CLIP, MOST_CLIP = 1e-6, 1e6

Delta = Annotated[float, Field(gt=0.0, lt=1.0)]
Noise = Annotated[float, Field(ge=LEAST_NOISE)]
Clip = Annotated[float, Field(ge=LEAST_CLIP, le=MOST_CLIP)]


class RecipePrivacy(pydantic.BaseModel):
    """How updates are made private; without a mechanism nothing else may be given."""

    model_config = base.SETTINGS

    mechanism: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")] = NO_MECHANISM
    """none, record-level (an image), patient-level or site-level; each with -shared behind it, where all sites add a
    part of the noise under secure aggregation. Change: to what the sites' policies ask for; docs/privacy.md says what
    each protects."""
    clip: Clip | None = None
    """(L2 norm) Most that one image, patient or site adds. Change: to about the median norm of a gradient; 'fedvfm
    privacy plan' helps."""
    noise_multiplier: Noise | None = None
    """(clips) Standard deviation of the noise, in place of epsilon; at least 0.01. Change: up for more privacy and a
    worse adapter."""
    epsilon: base.Positive | None = None
    """Of the whole run; each site finds its noise. Or give noise_multiplier, which a shared mechanism needs. Change:
    down for more privacy and a worse adapter."""
    delta: Delta | None = None
    """(probability) That goes with epsilon: well below 1 / the number of patients. Change: with the size of the
    smallest site."""
    sampling: Literal["poisson"] = "poisson"
    """How a step's images are drawn; what epsilon is counted by. Change: never; there is one way."""
    microbatch: Annotated[int, Field(ge=0, le=4096)] = 0
    """(images) Gradients held at a time; 0 lets the site choose. Only memory depends on it. Change: down where memory
    is short."""
    images_per_patient: Annotated[int, Field(ge=1, le=1024)] = IMAGES_PER_PATIENT
    """(images) Most images that stand for a patient in a step, drawn afresh for each; patient-level only. Change: up
    where a patient's images are unlike one another."""
    adaptive_quantile: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """(0 to 1) Of site-level: the clip follows this quantile of the updates' norms. Change: to 0.5 where no good clip
    is known."""
    adaptive_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Of site-level: how fast the clip follows; by at most a factor of e to this power a round. Change: down where the
    clip swings from round to round."""
    adaptive_noise: base.Positive | None = None
    """(sites) Of site-level: noise on the count of norms within the clip. Left out, a twentieth of the sites asked, or
    noise_multiplier where that is more; the noise on the sum is raised, so that both together are what was stated.
    Change: seldom."""

    @pydantic.model_validator(mode="after")
    def _agree(self) -> RecipePrivacy:
        adaptive = [name for name in _ADAPTIVE if getattr(self, name) is not None]
        if adaptive and (self.mechanism != SITE_LEVEL or self.adaptive_quantile is None):
            raise ValueError(f"{', '.join(adaptive)}: only of mechanism '{SITE_LEVEL}' and with adaptive_quantile")
        given = {name for name in ("clip", "noise_multiplier", "epsilon", "delta") if getattr(self, name) is not None}
        if self.mechanism == NO_MECHANISM:
            given |= {"microbatch"} if self.microbatch else set()
            given |= {"images_per_patient"} if self.images_per_patient != IMAGES_PER_PATIENT else set()
            if given:
                raise ValueError(f"{', '.join(sorted(given))}: mechanism is 'none', nothing is private")
            return self
        if not {"clip", "delta"} <= given or len(given & {"noise_multiplier", "epsilon"}) != 1:
            raise ValueError("a mechanism needs clip, delta, and either noise_multiplier or epsilon")
        return self


NONE = RecipePrivacy()
"""A recipe without privacy."""


class Budget(pydantic.BaseModel):
    """What a hospital lets be learned of its data, over all rounds, runs and federations."""

    model_config = base.SETTINGS

    data_set: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    """What these images are called together; sets that share images share what they have spent. Change: never once
    something was spent: the ledger counts by this name."""
    epsilon: base.Positive
    """The most that may be spent, over all rounds, runs and federations. Change: only by decision of whoever answers
    for the data."""
    delta: Delta
    """(probability) At which epsilon is counted: well below 1 / the number of patients. Change: never once something
    was spent."""
    unit: Literal["record", "patient", "site"]
    """Whose presence is hidden: record (an image), patient or site. Change: to patient where a patient has several
    images."""
    accountant: Literal["rdp", "pld"] = "rdp"
    """rdp is quick; pld is tighter and takes seconds. Both are upper bounds. Change: to pld where rdp refuses what
    would still fit."""
    ledger: Annotated[str, Field(min_length=1, max_length=500)] = "fedvfm-ledger"
    """(path) The ledger's folder, beside this file; every file for the same images names the same one. Change: where
    several site files share the same images."""
    units: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """(images or patients) A public number, about as many as there are to train on: noise and steps follow from it and
    do not tell how many there really are. Left out, that is taken as public. Change: where the number of patients
    itself is confidential."""

    @pydantic.model_validator(mode="after")
    def _countable(self) -> Budget:
        if self.units is not None and self.unit == "site":
            raise ValueError("units: only with unit = 'record' or 'patient'; a site is one")
        return self
