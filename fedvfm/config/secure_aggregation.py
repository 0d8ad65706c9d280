"""``[secure_aggregation]`` of a recipe: the coordinator learns the sum of the updates and none of them."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

from fedvfm.config import base

LEAST_SITES = 3
"""A sum of two tells each of them the other's."""


class SecureAggregation(pydantic.BaseModel):
    """How updates are masked; the table's presence turns it on. See docs/security/secure-aggregation.md."""

    model_config = base.SETTINGS

    colluders: Annotated[int, Field(ge=0, le=62)] = 1
    """(sites) So many may work together with the coordinator and learn nothing of a single other one. Change: up where
    hospitals of one owner take part."""
    threshold: Annotated[int, Field(ge=0, le=64)] = 0
    """(sites) Must be left for a sum to be opened; the others may drop out. 0: the least that is safe, more than half
    of sites and colluders together. Change: up where more must be left."""
    clip_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = 10.0
    """An update of a larger norm is shortened to it, at its site: nobody else sees one. Change: to a few times the norm
    of an honest update, as a simulation shows it."""
