"""``server.toml``: how a coordinator runs rounds, and how long it waits for whom."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

from fedvfm.config import base

WEEK_S = 7 * 24 * 3600.0


class ServerConfig(pydantic.BaseModel):
    """How the server runs rounds.

    Attributes:
        quorum: least sites that must answer a round; 0 means all of them, those that were invited at first too.
        cohort: sites asked in a round; 0 means all.
        without: sites that the first round does not wait for; one that comes takes part all the same.
        round_timeout_s: how long a round waits for its answers.
        join_timeout_s: how long absent sites are waited for, before rounds begin with a quorum, or it gives up.
        approval_timeout_s: how long people are waited for where the quorum needs them: at a site that is connected and
            has not approved the recipe, or is outside its hours; at one that was invited and not approved yet.
        away_timeout_s: how long a round waits for the answer of a site that is not connected; and, where rounds were
            done already, a server that starts again for all sites before it goes on with a quorum.
    """

    model_config = base.SETTINGS

    quorum: Annotated[int, Field(ge=0)] = 0
    cohort: Annotated[int, Field(ge=0)] = 0
    without: Annotated[tuple[base.Name, ...], base.names()] = ()
    round_timeout_s: base.Positive = 3600.0
    join_timeout_s: base.Positive = 3600.0
    approval_timeout_s: base.Positive = WEEK_S
    away_timeout_s: base.Positive = 600.0

    @pydantic.field_validator("without", mode="before")
    @classmethod
    def _several(cls, given: object) -> object:
        """One name alone is a slip that deserves a sentence."""
        if isinstance(given, str):
            raise ValueError('give a list of names, as without = ["north"]')
        return given

    @pydantic.field_validator("cohort")
    @classmethod
    def _enough(cls, cohort: int, info: pydantic.ValidationInfo) -> int:
        """Else every round would miss the quorum."""
        quorum = info.data.get("quorum", 0)
        if 0 < cohort < quorum:
            raise ValueError(f"no round could reach quorum = {quorum}; give at least {quorum}, or 0 for all sites")
        return cohort
