"""What an aggregation rule is: pure functions over explicit state, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

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
    ``mixed_ranks`` that sites may have ranks of their own; ``any_order`` that the order of the folds changes no bit of
    the aggregate, so that updates are folded as they come. A rule without it is given them in the order of the sites'
    names.
    """

    sum_only: ClassVar[bool]
    mixed_ranks: ClassVar[bool]
    any_order: ClassVar[bool]

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
