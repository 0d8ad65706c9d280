"""Control variates of the sites, kept by the coordinator beside the adapter; see :mod:`fedvfm.state.control_variates`.

They are in every checkpoint: 4 bytes a number that leaves, for each site that trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedvfm.config import schema
from fedvfm.state import control_variates, groups, state

_PLACE = "control/"


class Controls:
    """Those of one federation, round after round.

    Args:
        recipe: with ``control_variates``.
        manifest: of the global adapter.
        sites: all that train; the mean is over them, and a site that left is in it no more.
    """

    def __init__(self, recipe: schema.Recipe, manifest: state.Manifest, sites: Sequence[str]) -> None:
        self._recipe, self._manifest, self._sites = recipe, manifest, sorted(sites)
        self._own: dict[str, Mapping[str, state.Array]] = {}
        self._sent: dict[str, state.AdapterState] = {}
        self._mean: dict[str, state.Array] = {}
        self._round = 0

    def begin(self, round_number: int, kept: Mapping[str, state.Array]) -> None:
        """Begin a round with what was kept of the one before; a site of which nothing is kept begins at zero."""
        self._round, self._sent = round_number, {}
        names = groups.leaving(self._manifest, self._recipe, round_number)
        self._own = {site: self._kept(site, names, kept) for site in self._sites}
        self._mean = {
            name: np.mean([self._own[site][name] for site in self._sites], axis=0, dtype=np.float64) for name in names
        }

    def _kept(self, site: str, names: Sequence[str], kept: Mapping[str, state.Array]) -> dict[str, state.Array]:
        zero = control_variates.nothing(self._manifest, self._recipe, self._round)
        return {name: kept.get(f"{_PLACE}{site}/{name}", zero[name]) for name in names}

    def correction(self, site: str) -> state.AdapterState:
        """What a site is sent: the mean of all control variates less its own."""
        if site not in self._sent:
            own = self._own[site]
            self._sent[site] = state.AdapterState(
                {name: np.asarray(mean - own[name], dtype=np.float32) for name, mean in self._mean.items()}
            )
        return self._sent[site]

    def take(self, update: state.SiteUpdate, start: state.AdapterState) -> None:
        """The control variate of a site follows from its admitted update, and the adapter that this began with."""
        images = update.num_examples
        lengths = control_variates.lengths(self._manifest, self._recipe, self._round, images)
        mean = control_variates.gradient(start, update.state, self.correction(update.site), lengths)
        self._own[update.site] = control_variates.bounded(mean, start, update.state, self._recipe.optimiser)

    def kept(self) -> dict[str, state.Array]:
        """What is kept for the next round."""
        return {f"{_PLACE}{site}/{name}": array for site, own in self._own.items() for name, array in own.items()}
