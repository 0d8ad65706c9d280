"""Noise on a survey's answer: discrete Gaussian numbers on every bin, at the site, before anything leaves.

Neighbours: one patient that is there or not, with all its images. It changes a group by at most its sensitivity in L2
norm (:attr:`fedvfm.survey.layout.Group.sensitivity`); with k groups each gets sqrt(k) times the noise that it would
need alone, so the whole answer is ``1 / (2 m^2)``-concentrated differentially private for the noise multiplier m. The
noise is whole numbers drawn exactly (:mod:`fedvfm.secure_aggregation.discrete_gaussian`), as the numbers are whole:
no low bit of a floating point number tells what it was added to.

What is told without noise: that there are as many patients as the policy and the survey ask for.

Source: Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, theorem 4 (with
    sensitivity over sigma = 1 / m); composition over groups by its additivity (Bun, Steinke, TCC 2016, lemma 7).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence

from fedvfm import errors, seeding
from fedvfm.config import survey as surveys
from fedvfm.privacy import accountant, base
from fedvfm.secure_aggregation import discrete_gaussian
from fedvfm.survey import layout, statistics

UNIT = "patient"


def event(survey: surveys.Survey) -> base.PrivacyEvent | None:
    """What one answer spends; None without noise.

    Raises:
        ConfigError: if no noise reaches the survey's epsilon.
    """
    if survey.privacy is None:
        return None
    epsilon, delta = survey.privacy.epsilon, survey.privacy.delta
    multiplier = accountant.noise(epsilon, delta, 1.0, 1, shared=True)
    if multiplier is None:
        fault = f"privacy.epsilon = {epsilon:g}: no noise reaches it at delta {delta:g}. Raise it"
        raise errors.ConfigError("survey", [fault])
    return base.PrivacyEvent(base.SURVEY, UNIT, multiplier, 1.0, 1, 1.0, honest=1)


def sigmas(groups: Sequence[layout.Group], multiplier: float) -> dict[str, int]:
    """Standard deviation of the noise of each group, in its whole numbers.

    Args:
        groups: all of an answer.
        multiplier: of the whole answer.

    Raises:
        ConfigError: if that is more than can be drawn.
    """
    each = multiplier * math.sqrt(len(groups))
    try:
        return {
            group.name: discrete_gaussian.least_sigma(each, group.sensitivity, 1, len(group.labels)) for group in groups
        }
    except ValueError:
        raise errors.ConfigError("survey", ["privacy.epsilon: no such noise can be drawn; raise it"]) from None


def added(
    sums: Mapping[str, layout.Whole], sizes: Mapping[str, int], seed: int | None = None, *words: str
) -> dict[str, statistics.Shown]:
    """The sums with noise.

    Args:
        sums: of each group.
        sizes: as :func:`sigmas` gave them.
        seed: of a simulation; None takes the operating system's entropy, as a site with patients must.
        words: beside the seed.
    """
    noised: dict[str, statistics.Shown] = {}
    for name, numbers in sums.items():
        key = secrets.token_bytes(discrete_gaussian.KEY_SIZE)
        if seed is not None:
            key = seeding.stream(seed, "survey", *words, name).bytes(discrete_gaussian.KEY_SIZE)
        noise = discrete_gaussian.drawn(key, sizes[name], len(numbers))
        noised[name] = tuple(int(value) for value in numbers + noise)
    return noised
