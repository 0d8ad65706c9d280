"""An update as whole numbers of Z/2^64: what a site masks, and what the sum of all is read back from.

A site sends ``weight x (state - start)`` in fixed point, shortened to the recipe's norm first, and behind it three
numbers more: its weight, 1 if it tells its loss and 0 if not, and ``weight x loss``. A mean loss is made only where all
tell theirs: of one that tells it would be its own. Sums of whole numbers are exact, so neither the order of the sites
nor the masks change a bit: the mean is ``start + sum(weight x change) / sum(weight)``.

Under a shared mechanism each site adds its part of the noise (:mod:`shared_noise`) to the numbers of the change. Its
weight is 1 then and it tells no loss, so that the three behind say only how many sites there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.secure_aggregation import discrete_gaussian, masks, shared_noise
from fedvfm.secure_aggregation import session as sessions
from fedvfm.state import state

TAIL = 3
LOSS_PLACES = 20
MOST_LOSS = 1024.0


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """How an update becomes whole numbers; both ends compute it from the recipe alone.

    Attributes:
        clip_norm: the largest norm of an update; a larger one is shortened to it.
        most: the largest weight of a site.
        noise: what each site adds to its numbers; None where nothing is.
    """

    clip_norm: float
    most: int
    noise: shared_noise.SharedNoise | None = None

    @property
    def places(self) -> int:
        """Binary places after the point: as many as leave room for :data:`session.MOST_SITES` terms of any size."""
        largest = self.clip_norm if self.noise is None else self.clip_norm + shared_noise.TAIL * self.noise.part
        return 62 - sum(math.ceil(math.log2(limit)) for limit in (sessions.MOST_SITES, largest, self.most))

    def encode(
        self,
        after: state.AdapterState,
        start: state.AdapterState,
        names: Sequence[str],
        weight: int,
        loss: float | None,
    ) -> masks.Numbers:
        """The numbers of one update.

        Args:
            after: what was trained.
            start: the adapter that training started from.
            names: arrays that train in this round.
            weight: of the site, from 1.
            loss: its training loss; None where it is not told. Where noise is shared it never is: it has none on it.

        Shapes: returns (numbers of these arrays + 3,).

        Raises:
            SecureAggregationError: ``secure-numbers`` if a number is not finite, or the weight out of bounds.
        """
        if not 1 <= weight <= self.most:
            raise errors.SecureAggregationError("secure-numbers", f"weight {weight}; allowed: 1 to {self.most}")
        with np.errstate(over="ignore", invalid="ignore"):
            change = [(after[name].astype(np.float64) - start[name]).reshape(-1) for name in names]
            moved = np.concatenate(change) if change else np.zeros(0)
            norm = float(np.sqrt(np.square(moved).sum()))
        if not math.isfinite(norm):
            raise errors.SecureAggregationError("secure-numbers", "a number of the update is not finite")
        moved *= min(1.0, self.clip_norm / norm) if norm else 1.0
        scaled = np.rint(moved * math.ldexp(float(weight), self.places))
        tells = self.noise is None and loss is not None and math.isfinite(loss)
        lost = min(max(loss if loss is not None and tells else 0.0, 0.0), MOST_LOSS)
        tail = [weight, int(tells), round(weight * lost * 2**LOSS_PLACES)]
        return np.concatenate([scaled.astype(np.int64), np.array(tail, dtype=np.int64)]).view(np.uint64)

    def noised(
        self, plain: masks.Numbers, start: state.AdapterState, names: Sequence[str], key: bytes
    ) -> masks.Numbers:
        """The numbers of an update with this site's part of the noise on them; as they are where there is none.

        Args:
            plain: of :meth:`encode`.
            start: the adapter that training started from.
            names: arrays that train in this round.
            key: of :func:`shared_noise.key`; the same one gives the same noise.
        """
        if self.noise is None:
            return plain
        after = plain.copy()
        sigma = self.noise.sigma(self.places, start, names)
        after[:-TAIL] += discrete_gaussian.drawn(key, sigma, len(plain) - TAIL).view(np.uint64)
        return after

    def decode(self, total: masks.Numbers, start: state.AdapterState, names: Sequence[str], sites: int) -> Mean:
        """What the sum of so many sites' numbers says.

        Raises:
            SecureAggregationError: ``secure-sum`` if no such sites could have sent it: a mask was left in it, or a site
                sent what it must not.
        """
        whole = total.view(np.int64)
        size = sum(start[name].size for name in names)
        weight, tellers, lost = (int(number) for number in whole[size:])
        if len(whole) != size + TAIL or not sites <= weight <= sites * self.most or not 0 <= tellers <= sites:
            raise _impossible(f"a weight of {weight} for {sites} sites, each of 1 to {self.most}")
        scale, sigma = math.ldexp(float(weight), self.places), 0
        moved = whole[:size].astype(np.float64) / scale
        norm, off = float(np.sqrt(np.square(moved).sum())), math.sqrt(size) * math.ldexp(1.0, -self.places)
        if self.noise is not None:
            sigma = self.noise.sigma(self.places, start, names)
            off += self.noise.longest(sigma, size, sites) / scale
        if not norm <= self.clip_norm * (1 + 1e-6) + off:
            beside = "" if self.noise is None else f", beside noise of {off:.4g} at most"
            raise _impossible(f"a mean of norm {norm:.4g}, and no update may be over {self.clip_norm:g}{beside}")
        if not 0 <= lost <= (weight if tellers else 0) * MOST_LOSS * 2**LOSS_PLACES:
            raise _impossible("a loss that nobody may tell")
        loss = lost / (weight * 2**LOSS_PLACES) if tellers == sites else None
        return Mean(_joined(moved, start, names), weight, loss, norm, sigma * math.sqrt(sites) / scale)


def of(recipe: schema.Recipe) -> FixedPoint:
    """The fixed point of a recipe that has secure aggregation; both ends compute it.

    Raises:
        ConfigError: if it has none.
    """
    secure = recipe.secure_aggregation
    if secure is None:
        raise errors.ConfigError("recipe", ["recipe.secure_aggregation: there is none, so there is no fixed point"])
    most = recipe.admission.max_examples if recipe.aggregation.weighting == "examples" else 1
    noise = shared_noise.of(recipe)
    return FixedPoint(secure.clip_norm if noise is None else noise.clip_norm, most, noise)


@dataclass(frozen=True, slots=True)
class Mean:
    """What the survivors' updates came to.

    Attributes:
        state: the whole adapter: the start, moved by the weighted mean of the changes.
        weight: of all of them together.
        loss: weighted mean; None where a site did not tell its own.
        norm: of the mean change.
        noise: standard deviation of what noise is in it, roundings included; 0 where none is shared.
    """

    state: state.AdapterState
    weight: int
    loss: float | None
    norm: float
    noise: float = 0.0


def _joined(moved: NDArray[np.float64], start: state.AdapterState, names: Sequence[str]) -> state.AdapterState:
    after: dict[str, state.Array] = dict(start)
    place = 0
    for name in names:
        part = moved[place : place + start[name].size].reshape(start[name].shape)
        after[name] = np.asarray(start[name].astype(np.float64) + part, dtype=np.float32)
        place += part.size
    return state.AdapterState(after)


def _impossible(what: str) -> errors.SecureAggregationError:
    return errors.SecureAggregationError(
        "secure-sum",
        f"the opened sum says {what}. A site sent what it must not, or masks do not cancel; nothing was aggregated",
    )
