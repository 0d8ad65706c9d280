"""``server.toml``: how a coordinator runs rounds, and how long it waits for whom."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

from fedvfm.config import base

WEEK_S = 7 * 24 * 3600.0


class ServerConfig(pydantic.BaseModel):
    """How the server runs rounds."""

    model_config = base.SETTINGS

    quorum: Annotated[int, Field(ge=0)] = 0
    """(sites) Least sites that must answer a round; 0: all (before the first round: all that were invited). With all of
    them one that stays away ends the run. Change: to fewer, so that it goes on without one that stays away."""
    cohort: Annotated[int, Field(ge=0)] = 0
    """(sites) Sites asked in a round; 0: all. Change: where there are more sites than a round needs."""
    without: Annotated[tuple[base.Name, ...], base.names()] = ()
    """Sites that the first round does not wait for, as of 'server start --without'. Change: where a site is known to
    come later."""
    round_timeout_s: base.Positive = 3600.0
    """(seconds) How long a round waits for its answers. Change: up where training takes longer than an hour at some
    site."""
    grace_s: base.NonNegative = 0.0
    """(seconds) How long a round goes on waiting once a quorum has answered; 0: until round_timeout_s. Not under secure
    aggregation, nor in a simulation, where nobody is late. Change: to a few minutes where one slow site keeps the
    others waiting."""
    patience: base.NonNegative = 0.0
    """(times) From round 2 on a round waits at most so many times as long as the slowest answer that was admitted so
    far took, a minute at least, and never longer than round_timeout_s; 0: round_timeout_s alone. Not under secure
    aggregation, nor in a simulation. Change: to 2 or 3, so that a site that is gone holds a round up no longer than its
    work would."""
    join_timeout_s: base.Positive = 3600.0
    """(seconds) How long absent sites are waited for before rounds begin with a quorum, or it gives up. Change: up
    where sites are started by hand."""
    approval_timeout_s: base.Positive = WEEK_S
    """(seconds) How long people are waited for: a recipe not approved yet, a site outside its hours, an invite that is
    open. A week. Change: up where committees decide."""
    away_timeout_s: base.Positive = 600.0
    """(seconds) How long a round waits for a site that is not connected; and a server that starts again, before it goes
    on with a quorum. Change: up where lines are unreliable."""

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
