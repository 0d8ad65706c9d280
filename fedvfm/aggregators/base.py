"""What an aggregation rule is: pure functions over explicit state, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from fedvfm import errors
from fedvfm.state import state as states


@dataclass(frozen=True, slots=True)
class Contribution:
    """One admitted update as a rule sees it.

    Attributes:
        weight: unnormalised, positive.
        state: the site's adapter; its low-rank arrays may have the site's own rank.
        manifest: the manifest of that state (names, ranks, scales).
        start: the global adapter that the round began with, in the recipe's rank.
    """

    weight: float
    state: states.AdapterState
    manifest: states.Manifest
    start: states.AdapterState | None = None


class Aggregator(Protocol):
    """A rule: ``init``, ``fold`` each contribution, ``finish``. A fold returns a new accumulator.

    ``sum_only`` says that the rule needs nothing but weighted sums (so secure aggregation can serve it);
    ``mixed_ranks`` that sites may have ranks of their own; ``any_order`` that the order of the folds changes no bit of
    the aggregate, so that updates are folded as they come. A rule without it is given them in the order of the sites'
    names. ``refactors`` says that it makes both factors of every pair anew, so that the difference between two global
    adapters means nothing; ``robust`` that a few bad sites cannot move the aggregate at will. ``least`` is how many
    updates it needs to keep what its options promise.
    """

    mixed_ranks: ClassVar[bool]
    any_order: ClassVar[bool]
    refactors: ClassVar[bool]
    robust: ClassVar[bool]

    @property
    def sum_only(self) -> bool:
        """See above."""
        ...

    @property
    def least(self) -> int:
        """See above; 1 for a rule that promises nothing of bad sites."""
        ...

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


def in_one_rank(name: str, adapter: states.AdapterState, manifest: states.Manifest) -> states.AdapterState:
    """The adapter as it is, under a rule that needs one rank at all sites.

    Raises:
        HandshakeRefused: if the site's ranks differ from the recipe's.
    """
    for spec in manifest:
        if adapter[spec.name].shape != spec.shape:
            raise errors.HandshakeRefused(
                f"rule '{name}' needs one rank at all sites; array '{spec.name}' is {adapter[spec.name].shape} here "
                f"and {spec.shape} at a site. Use rule 'svd' for mixed ranks"
            )
    return adapter


def check_whole(name: str, value: object, least: int) -> None:
    """Require a whole number.

    Raises:
        ValueError: with the option, its value and the limit.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} = {value!r}: a whole number from {least} is needed")


def check_bad(value: object) -> None:
    """Require a number of bad sites to withstand; None where it is left out.

    Raises:
        ValueError: if it is none.
    """
    if value is not None:
        check_whole("bad", value, 0)


def check_positive(name: str, value: object) -> None:
    """Require a positive number.

    Raises:
        ValueError: with the option and its value.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{name} = {value!r}: a positive number is needed")
