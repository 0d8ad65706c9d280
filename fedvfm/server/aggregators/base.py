"""What an aggregation rule is: pure functions over explicit state, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from fedvfm import errors
from fedvfm import state as states


@dataclass(frozen=True, slots=True)
class Contribution:
    """One admitted update as a rule sees it.

    Attributes:
        weight: unnormalised, positive.
        state: the site's adapter; its low-rank arrays may have the site's own rank.
        manifest: the manifest of that state (names, ranks, scales).
    """

    weight: float
    state: states.AdapterState
    manifest: states.Manifest


class Aggregator(Protocol):
    """A rule: ``init``, ``fold`` each contribution, ``finish``. A fold returns a new accumulator.

    ``sum_only`` says that the rule needs nothing but weighted sums (so secure aggregation can serve it);
    ``mixed_ranks`` that sites may have ranks of their own.
    """

    sum_only: ClassVar[bool]
    mixed_ranks: ClassVar[bool]

    def init(self, manifest: states.Manifest, kept: Mapping[str, states.Array] | None = None) -> Any:
        """An empty accumulator for a global adapter of this manifest; ``kept`` is what ``finish`` left last round."""
        ...

    def fold(self, acc: Any, contribution: Contribution) -> Any:
        """Take one contribution in."""
        ...

    def finish(self, acc: Any) -> tuple[states.AdapterState, dict[str, states.Array]]:
        """The new global adapter and the rule's own state for the next round.

        Raises:
            EmptyCohort: if nothing was folded in.
        """
        ...

    def for_site(self, adapter: states.AdapterState, manifest: states.Manifest) -> states.AdapterState:
        """The global adapter in the shapes of a site's manifest."""
        ...


@dataclass(frozen=True, slots=True)
class Sums:
    """Weighted sums in float64, the accumulator of the sum-only rules."""

    weight: float
    arrays: dict[str, np.ndarray[Any, np.dtype[np.float64]]]

    def add(self, contribution: Contribution, names: Sequence[str] | None = None) -> Sums:
        """A new accumulator with ``contribution`` added (all arrays, or these)."""
        arrays = dict(self.arrays)
        for name in contribution.state if names is None else names:
            term = contribution.weight * contribution.state[name].astype(np.float64)
            arrays[name] = term if name not in arrays else arrays[name] + term
        return Sums(self.weight + contribution.weight, arrays)

    def mean(self) -> dict[str, states.Array]:
        """The weighted mean as float32.

        Raises:
            EmptyCohort: if nothing was added.
        """
        if self.weight <= 0:
            raise errors.EmptyCohort("no update was admitted, so there is nothing to aggregate")
        return {name: (array / self.weight).astype(np.float32) for name, array in self.arrays.items()}
