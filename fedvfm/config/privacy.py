"""``[privacy]`` of a recipe: the mechanism that makes an update private. ``[privacy]`` of a site's file: its budget."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from fedvfm.config import base

NO_MECHANISM = "none"
UNITS = {"record-level": "record", "patient-level": "patient", "site-level": "site"}
"""Mechanism -> what it protects the presence of."""
SITE_LEVEL = "site-level"
_ADAPTIVE = ("adaptive_quantile", "adaptive_rate", "adaptive_noise")

IMAGES_PER_PATIENT = 4

LEAST_NOISE = 0.01
"""Noise multipliers below promise nothing that has a use, and further down floating point loses them."""
LEAST_CLIP, MOST_CLIP = 1e-6, 1e6

Delta = Annotated[float, Field(gt=0.0, lt=1.0)]
Noise = Annotated[float, Field(ge=LEAST_NOISE)]
Clip = Annotated[float, Field(ge=LEAST_CLIP, le=MOST_CLIP)]


class RecipePrivacy(pydantic.BaseModel):
    """How updates are made private; without a mechanism nothing else may be given.

    Attributes:
        mechanism: a name of the table of privacy mechanisms.
        clip: most that one unit (record, patient or site) adds to a step's sum of gradients, in L2 norm; 1e-6 to 1e6.
        noise_multiplier: standard deviation of the noise in clips, at least 0.01. Give it or ``epsilon``.
        epsilon: of the whole run, from which every site finds the noise for its own number of units.
        delta: that goes with epsilon, whichever of both is given.
        sampling: how a step's batch is drawn; what the accountants assume.
        microbatch: units whose gradients are held at a time; 0 lets the site choose. Only memory depends on it.
        images_per_patient: most images that stand for a patient in a step, drawn afresh for each; "patient-level" only.
        adaptive_quantile: of site level: ``clip`` is the first round's, then follows this quantile of updates' norms.
        adaptive_rate: how fast it follows: by at most a factor of e to this power a round.
        adaptive_noise: standard deviation of the noise, in sites, on the count of norms within the clip. Left out, a
            twentieth of the sites asked, or ``noise_multiplier`` where that is more. The noise on the sum is raised so
            that both together are the noise that ``noise_multiplier`` or ``epsilon`` states.
    """

    model_config = base.SETTINGS

    mechanism: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")] = NO_MECHANISM
    clip: Clip | None = None
    noise_multiplier: Noise | None = None
    epsilon: base.Positive | None = None
    delta: Delta | None = None
    sampling: Literal["poisson"] = "poisson"
    microbatch: Annotated[int, Field(ge=0, le=4096)] = 0
    images_per_patient: Annotated[int, Field(ge=1, le=1024)] = IMAGES_PER_PATIENT
    adaptive_quantile: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    adaptive_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    adaptive_noise: base.Positive | None = None

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
    """What a hospital lets be learned of its data, over all rounds, runs and federations.

    Attributes:
        data_set: what its records are called together; sets that share a record share what it has spent.
        epsilon: most that may be spent at ``delta``.
        unit: whose presence is protected. "patient" where a patient has several images.
        accountant: "rdp" is quick; "pld" is tighter and takes seconds. Both are upper bounds.
        ledger: folder of the ledger, beside this file unless absolute. Every file with the same records names the same.
        units: a public number in place of how many records or patients there are to train on: rate, steps and noise are
            made from it, and so do not tell how many there are. About as many as there are; it is valid for any number.
    """

    model_config = base.SETTINGS

    data_set: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    epsilon: base.Positive
    delta: Delta
    unit: Literal["record", "patient", "site"]
    accountant: Literal["rdp", "pld"] = "rdp"
    ledger: Annotated[str, Field(min_length=1, max_length=500)] = "fedvfm-ledger"
    units: Annotated[int, Field(ge=1, le=10**9)] | None = None

    @pydantic.model_validator(mode="after")
    def _countable(self) -> Budget:
        if self.units is not None and self.unit == "site":
            raise ValueError("units: only with unit = 'record' or 'patient'; a site is one")
        return self
