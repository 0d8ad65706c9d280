"""Noise that the sites share: each adds a part to its whole numbers before it masks them; the sum has all of it.

How much a part is follows from the recipe alone, so that no coordinator can tell a site another number: the sum is
opened of ``max(threshold, min_sites)`` sites or more, ``colluders`` of which may leave their part out or tell it. The
parts of the others, the honest ones, are what the stated noise multiplier is made of.

What one unit moves a site's numbers by:

- a site (``site-level-shared``): its whole update is there, or zero in its place. It is at most ``clip`` long.
- a patient or an image: a round is one step, and the numbers are ``-rate / batch`` times the sum of clipped gradients,
  so that one of them moves it by at most ``rate clip / batch``. Shortening the sum to ``clip_norm`` moves two sums no
  farther apart (a projection onto a ball), and the rounding of the adapter to float32 is added.

Rounding to whole numbers moves each of ``d`` numbers by at most a half, two of them by ``sqrt(d)`` at most.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedvfm.config import privacy, schema
from fedvfm.config import secure_aggregation as secure_config
from fedvfm.secure_aggregation import discrete_gaussian
from fedvfm.state import state

FLOAT32 = 2.0**-21
"""Of each number: what rounding gradient, step and adapter to float32, at two neighbours, comes to at most."""
TAIL = 12.0
"""Parts that are larger than so many standard deviations do not come up: less than once in 10^32."""


@dataclass(frozen=True, slots=True)
class SharedNoise:
    """What the sites of a recipe add.

    Attributes:
        multiplier: noise multiplier of the sum of the honest sites' parts.
        honest: sites whose parts are certain to be in a sum.
        bound: most that one unit changes a site's update by, in L2 norm, before it is rounded.
        clip_norm: most that the whole update of a site is long.
        rounded: whether two neighbours differ by roundings to float32 too.
    """

    multiplier: float
    honest: int
    bound: float
    clip_norm: float
    rounded: bool

    @property
    def part(self) -> float:
        """Standard deviation of one site's part, about: roundings come on top."""
        return self.multiplier * self.bound / math.sqrt(self.honest)

    def sigma(self, places: int, start: state.AdapterState, names: Sequence[str]) -> int:
        """The parameter of one site's part, in whole numbers; the same at all sites.

        Args:
            places: binary places of the whole numbers.
            start: the adapter that training started from.
            names: arrays that train.
        """
        numbers = sum(start[name].size for name in names)
        moved = self.bound
        if self.rounded:
            length = math.sqrt(sum(float(np.square(start[name].astype(np.float64)).sum()) for name in names))
            moved += FLOAT32 * (length + self.clip_norm)
        sensitivity = math.ldexp(moved, places) + math.sqrt(numbers)
        return discrete_gaussian.least_sigma(self.multiplier, sensitivity, self.honest, numbers)

    def longest(self, sigma: int, numbers: int, sites: int) -> float:
        """What the noise in the sum of so many sites is longer than once in 10^27 times, in whole numbers.

        Source: Hsu, Kakade, Zhang, "A tail inequality for quadratic forms of subgaussian random vectors", 2012,
            theorem 1, with t = 64; a discrete Gaussian is subgaussian (Canonne, Kamath, Steinke 2020, section 2).
        """
        return sigma * math.sqrt(sites * (numbers + 2 * math.sqrt(64 * numbers) + 128))


def of(recipe: schema.Recipe) -> SharedNoise | None:
    """What the sites of a recipe add; None where they share no noise."""
    own, secure = recipe.privacy, recipe.secure_aggregation
    if own.mechanism not in privacy.SHARED or secure is None or own.clip is None or own.noise_multiplier is None:
        return None
    whole = privacy.UNITS[own.mechanism] == "site"
    clip_norm = min(own.clip, secure.clip_norm) if whole else secure.clip_norm
    bound = own.clip if whole else own.clip * rate(recipe) / recipe.optimiser.batch_size
    return SharedNoise(own.noise_multiplier, honest(recipe.min_sites, secure), bound, clip_norm, not whole)


def rate(recipe: schema.Recipe) -> float:
    """The largest learning rate of what trains."""
    own = recipe.optimiser
    return max(own.learning_rate, own.head_learning_rate or 0.0)


def honest(min_sites: int, secure: secure_config.SecureAggregation) -> int:
    """Honest sites in the smallest sum that is opened: every site holds a coordinator to it."""
    return max(secure.threshold, min_sites) - secure.colluders


def key(seed: bytes, plain: bytes) -> bytes:
    """The key of one site's part: of one seed and one vector. Two vectors never have the same noise on them.

    Args:
        seed: 32 bytes of the operating system's entropy, for one round of one recipe.
        plain: the whole numbers before noise and masks.
    """
    return hashlib.sha256(b"fedvfm shared noise\n" + seed + hashlib.sha256(plain).digest()).digest()
