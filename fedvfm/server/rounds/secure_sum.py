"""A round under secure aggregation: what the coordinator makes of the sum of the sites' whole numbers.

In a simulation the sites and the coordinator are one machine, and a mask would hide nothing from anybody: the numbers
are summed as they are. Sums of whole numbers are exact, so the adapter is the same one, to the bit, that comes of
masked numbers (:mod:`fedvfm.secure_aggregation`). Noise that sites share is drawn from the run's seed: it protects
nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fedvfm import errors, seeding
from fedvfm.config import schema
from fedvfm.secure_aggregation import discrete_gaussian, fixed_point, masks, shared_noise
from fedvfm.server.rounds import aggregation
from fedvfm.state import groups, state

ENTRY = "secure_aggregation"
"""Key of a journal line."""


class PlainSum:
    """The intake of a simulation: each update becomes the numbers that its site would mask, and is let go.

    Args:
        recipe: with secure aggregation.
        start: the global adapter that the round begins with.
        manifest: of the global adapter.
        number: of the round.
        without_labels: names of the sites that have none.
    """

    def __init__(
        self,
        recipe: schema.Recipe,
        start: state.AdapterState,
        manifest: state.Manifest,
        number: int,
        without_labels: Collection[str] = (),
    ) -> None:
        self._without_labels = frozenset(without_labels)
        self._recipe, self._start, self._point, self._number = recipe, start, fixed_point.of(recipe), number
        self._names = groups.leaving(manifest, recipe, number)
        self._total: masks.Numbers | None = None
        self._sites: list[str] = []

    @property
    def sites(self) -> Collection[str]:
        """See :class:`fedvfm.server.rounds.aggregation.Intake`."""
        return sorted(self._sites)

    def take(self, update: state.SiteUpdate) -> None:
        """See :class:`fedvfm.server.rounds.aggregation.Intake`."""
        weighting, without = self._recipe.aggregation.weighting, update.site in self._without_labels
        weight = int(aggregation.weight(update, weighting, self._recipe.unlabelled, without_labels=without))
        loss = None if without else update.metrics.get("loss")
        plain = self._point.encode(update.state, self._start, self._names, weight, loss)
        key = simulated_key(self._recipe.seed, self._number, update.site)
        numbers = self._point.noised(plain, self._start, self._names, key)
        self._total = numbers if self._total is None else np.add(self._total, numbers)
        self._sites.append(update.site)

    def go_without(self, site: str) -> None:
        """See :class:`fedvfm.server.rounds.aggregation.Intake`."""

    def finish(self, record: Mapping[str, Any]) -> aggregation.Joined:
        """See :class:`fedvfm.server.rounds.aggregation.Intake`.

        Raises:
            QuorumMissed: if the sum is of fewer sites than the recipe promises.
            SecureAggregationError: if no such sites could have sent it.
        """
        require_enough(self._recipe, self._sites, int(record.get("round", 0)))
        if self._total is None:
            raise errors.EmptyCohort("no update was admitted, so there is nothing to aggregate")
        mean = self._point.decode(self._total, self._start, self._names, len(self._sites))
        return joined(mean, self.sites, record, self._recipe)


def simulated_key(seed: int, number: int, site: str) -> bytes:
    """Of a virtual hospital's part of the noise: the same in every engine."""
    return seeding.stream(seed, "shared noise", number, site).bytes(discrete_gaussian.KEY_SIZE)


def require_enough(recipe: schema.Recipe, sites: Collection[str], number: int) -> None:
    """Check that a sum is of as many sites as was promised; of fewer nothing is opened.

    Raises:
        QuorumMissed: with both numbers.
    """
    if len(sites) < recipe.min_sites:
        raise errors.QuorumMissed(
            f"round {number}: {len(sites)} sites are left and recipe.min_sites = {recipe.min_sites}: no sum of so few "
            "is opened. Mend the sites; the round is asked for again"
        )


def joined(
    mean: fixed_point.Mean, sites: Collection[str], record: Mapping[str, Any], recipe: schema.Recipe
) -> aggregation.Joined:
    """What the journal states: nothing of a single site but that it is in the sum."""
    about = {"sites": len(sites), "weight": mean.weight, "loss": mean.loss, "norm": round(mean.norm, 9)}
    about |= _noise(recipe, mean)
    line = {
        "examples": dict.fromkeys(sorted(sites)),
        "weights": {},
        "train": {},
        "factor_error": None,
        "aggregate_error": None,
        ENTRY: about,
    }
    return aggregation.Joined(mean.state, {}, {**record, **line})


def _noise(recipe: schema.Recipe, mean: fixed_point.Mean) -> dict[str, Any]:
    """What noise is in the mean; empty where none is shared."""
    noise = shared_noise.of(recipe)
    if noise is None:
        return {}
    return {"noise_multiplier": noise.multiplier, "honest": noise.honest, "noise_on_mean": round(mean.noise, 12)}
