"""All updates of a round, held until the last one came: for rules that are more than a sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.aggregators import base
from fedvfm.state import state

Matrix = NDArray[np.float64]

CHUNK = 1 << 16
"""Numbers of an array that are looked at together, over all sites."""


@dataclass(frozen=True, slots=True)
class Held:
    """The contributions so far; adding makes another one.

    Memory: 4 bytes a number and site, and beside it :data:`CHUNK` numbers of each site in float64.
    """

    contributions: tuple[base.Contribution, ...] = ()

    def add(self, contribution: base.Contribution) -> Held:
        """With one contribution more."""
        return Held((*self.contributions, contribution))

    def ordered(self, rule: str, least: int = 1) -> list[base.Contribution]:
        """All of them in an order that their content alone decides, so that no bit depends on who came first.

        Args:
            rule: its name, for what is said.
            least: how many it needs.

        Raises:
            EmptyCohort: if there is none.
            QuorumMissed: if there are fewer than the rule's options need.
        """
        number = len(self.contributions)
        if not number:
            raise errors.EmptyCohort("no update was admitted, so there is nothing to aggregate")
        if number < least:
            raise errors.QuorumMissed(
                f"rule '{rule}' needs {least} updates to withstand as many bad ones as recipe.aggregation.options.bad "
                f"says, {number} came. Raise server.quorum to {least}, or lower bad in a new recipe"
            )
        return sorted(self.contributions, key=lambda one: (one.state.fingerprint, one.weight))


def norm(contribution: base.Contribution, rule: str) -> float:
    """Euclidean norm of the flat update: all arrays as they travel, factors A and B of a pair apart.

    Raises:
        ProtocolError: if it is not known what the update started from.
    """
    start, total = _start(contribution, rule), 0.0
    for name, array in contribution.state.items():
        total += float(np.square(array.astype(np.float64) - start[name]).sum())
    return float(np.sqrt(total))


def shortened(contribution: base.Contribution, rule: str, factor: float) -> dict[str, Matrix]:
    """The arrays of an update that is ``factor`` times as long.

    Raises:
        ProtocolError: if it is not known what the update started from.
    """
    start = _start(contribution, rule)
    return {
        name: start[name] + factor * (array.astype(np.float64) - start[name])
        for name, array in contribution.state.items()
    }


def _start(contribution: base.Contribution, rule: str) -> state.AdapterState:
    if contribution.start is None:
        raise errors.ProtocolError(f"rule '{rule}': an update without the adapter it started from has no norm")
    return contribution.start


class Rule:
    """What rules share that hold all updates of a round and withstand bad ones; each adds ``least`` and ``finish``.

    Attributes:
        name: in the table of rules.
    """

    name: ClassVar[str]

    sum_only: ClassVar[bool] = False
    mixed_ranks: ClassVar[bool] = False
    any_order: ClassVar[bool] = True
    refactors: ClassVar[bool] = False
    robust: ClassVar[bool] = True

    def init(self, manifest: state.Manifest, kept: Mapping[str, state.Array] | None = None) -> Held:
        """Nothing held."""
        return Held()

    def fold(self, acc: Held, contribution: base.Contribution) -> Held:
        """Hold the update."""
        return acc.add(contribution)

    def for_site(self, adapter: state.AdapterState, manifest: state.Manifest) -> state.AdapterState:
        """See :func:`base.in_one_rank`."""
        return base.in_one_rank(self.name, adapter, manifest)


def combined(states: Sequence[state.AdapterState], reduce: Callable[[Matrix], Matrix]) -> state.AdapterState:
    """One adapter out of several, number by number.

    Args:
        states: of one manifest.
        reduce: numbers of all sites (sites, n) -> (n,).
    """
    arrays = {name: np.empty(array.shape, np.float32) for name, array in states[0].items()}
    for name, place, rows in chunks(states):
        arrays[name].reshape(-1)[place] = reduce(rows)
    return state.AdapterState(arrays)


def chunks(states: Sequence[state.AdapterState]) -> Iterator[tuple[str, slice, Matrix]]:
    """Name of an array, a part of its numbers, and these numbers of all sites (sites, at most :data:`CHUNK`)."""
    for name, array in states[0].items():
        flat = [own[name].reshape(-1) for own in states]
        for start in range(0, array.size, CHUNK):
            place = slice(start, min(start + CHUNK, array.size))
            yield name, place, np.array([own[place] for own in flat], dtype=np.float64)


def squares(states: Sequence[state.AdapterState]) -> Matrix:
    """Squared Euclidean distances between the flat updates, all arrays one behind another (sites, sites).

    By Gram matrices of what is left when their mean is taken away: two updates that are equal are 0 apart.
    """
    gram = np.zeros((len(states), len(states)))
    for _, _, rows in chunks(states):
        rows -= rows.mean(axis=0)
        gram += rows @ rows.T
    own = np.diagonal(gram)
    found: Matrix = np.maximum(own[:, None] + own[None, :] - gram - gram.T, 0.0)
    np.fill_diagonal(found, 0.0)
    return found
