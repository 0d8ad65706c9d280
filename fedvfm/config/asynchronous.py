"""``[asynchronous]`` of a recipe: rounds that do not wait for slow sites, and take their late updates after all."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

from fedvfm.config import base


class Asynchronous(pydantic.BaseModel):
    """Buffered asynchronous rounds; the table's presence turns them on. See :mod:`fedvfm.server.rounds.buffer`."""

    model_config = base.SETTINGS

    buffer_size: Annotated[int, Field(ge=1, le=10_000)]
    """(sites) A round ends as soon as so many updates are there; the last round waits for all. Change: to how many
    hospitals are about equally fast; as many as there are sites is a round that waits for all."""
    staleness_limit: Annotated[int, Field(ge=1, le=100)] = 10
    """(rounds) An update may come so many rounds after the one that it was asked in; a later one is refused. The
    adapters of so many rounds are kept. Change: up where the slowest hospital takes longer than so many rounds."""
    staleness_power: Annotated[float, Field(ge=0.0, le=10.0)] = 0.5
    """An update that comes s rounds late counts (1 + s) to minus this power of a timely one. Change: to 0 where all
    count the same, up where late updates pull the adapter back."""

    def discount(self, staleness: int) -> float:
        """What an update that comes so many rounds late counts of a timely one.

        Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, section 5.1
            (``1 / sqrt(1 + staleness)``).
        """
        return float((1 + staleness) ** -self.staleness_power)

    @property
    def said(self) -> str:
        """What it means, for whoever approves it."""
        bare = "; with 1 every site can read another one's update off two adapters" if self.buffer_size == 1 else ""
        return (
            f"a round ends with the first {self.buffer_size} updates and asks no site that is still training; its "
            f"update counts up to {self.staleness_limit} rounds later, less the later it comes "
            f"((1 + rounds)^-{self.staleness_power:g}){bare}"
        )
