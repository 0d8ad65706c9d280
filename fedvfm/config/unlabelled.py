"""What a recipe asks of hospitals without labels: part of what a hospital approves."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

from fedvfm.config import base

ROLE = "unlabelled"
"""In a site's file: this hospital has images and no labels."""


class UnlabelledConfig(pydantic.BaseModel):
    """How a hospital without labels takes part; see :mod:`fedvfm.client.training.consistency`."""

    model_config = base.SETTINGS

    threshold: Annotated[float, Field(ge=0.5, lt=1.0)] = 0.9
    """(probability) What the round's adapter must give its answer on an image, or a pixel, for it to be trained on.
    Change: up where the adapter is often wrong and sure, down where hardly anything is trained on."""
    weight: Annotated[float, Field(ge=0.01, le=1.0)] = 0.1
    """(share) What an image without a label counts of one with a label in the average; with weighting = "uniform", what
    such a site counts of another. Change: to what a simulation shows; the more these images outnumber those with
    labels, the lower."""
    warmup_rounds: Annotated[int, Field(ge=0, le=100_000)] = 1
    """(rounds) The first rounds in which sites without labels are not asked. Change: up until the journal's validation
    says that the adapter is worth learning from."""

    def examples(self, count: int) -> int:
        """What so many images without labels count as in the average, in images with labels: a whole number, 1 or more.

        Whole, since under secure aggregation weights are, and the two ways of averaging have to agree.
        """
        return max(1, round(count * self.weight))

    @property
    def said(self) -> str:
        """What it means, for whoever approves it."""
        early = f" from round {self.warmup_rounds + 1} on" if self.warmup_rounds else ""
        return (
            f"hospitals without labels take part{early}: they train on what the round's adapter answers with a "
            f"probability of {self.threshold:g} or more, and an image counts {self.weight:g} of one with a label"
        )
