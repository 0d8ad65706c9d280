"""Scores of a split under ``policy.metrics_epsilon``: noised, and charged to the site's ledger before they leave.

Mechanism: the Gaussian mechanism, once, on the vector of k means over n patients. Each patient counts once, with the
mean of what his images come to, and adds at most ``bound`` (1; of brier 2) to a sum; so one patient moves the vector of
sums, each over its bound, by at most sqrt(k) in the Euclidean norm, and the means by sqrt(k) / n. The noise multiplier
is the least with which one such release is (``metrics_epsilon``, delta of the budget)-private; the ledger adds releases
up, of training too, image by image. Only metrics that are such means leave: of AUROC, balanced accuracy or distances in
millimetres nothing is known that bounds what one patient adds.

What is told without noise: how many images were scored, and which metrics are there (a class that too few patients have
has none).

Source: Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014, appendix A; noise by
:mod:`fedvfm.privacy.randomness`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

from fedvfm import errors
from fedvfm.client.gate import policy
from fedvfm.config import privacy as privacy_config
from fedvfm.privacy import accountant, base, randomness
from fedvfm.tasks import metrics

LOG = logging.getLogger(__name__)


def event(epsilon: float, budget: privacy_config.Budget, count: int) -> base.PrivacyEvent:
    """What one release of so many metrics spends.

    Raises:
        ConfigError: if no noise comes to that epsilon.
    """
    noise = accountant.noise(epsilon, budget.delta, 1.0, 1)
    if noise is None:
        fault = f"policy.metrics_epsilon = {epsilon:g}: no noise reaches it at delta {budget.delta:g}. Raise it"
        raise errors.ConfigError("site", [fault])
    return base.PrivacyEvent(base.SCORES, budget.unit, noise, 1.0, 1, math.sqrt(count))


def names(free: Iterable[str], means: Mapping[str, float]) -> list[str]:
    """Of metrics that may leave those that are means of bounded values of patients."""
    return sorted(name for name in free if name in means and metrics.bound(name) is not None)


def noised(
    means: Mapping[str, float], units: int, spent: base.PrivacyEvent, draws: randomness.Draws
) -> dict[str, float]:
    """The means with noise, within their bounds, rounded as any score.

    Args:
        means: over patients.
        units: how many patients.
        spent: of a release of so many metrics.
        draws: where the noise comes from.
    """
    noise = draws.normal(len(means)) * spent.noise_multiplier * spent.clip / units
    drawn = {}
    for (name, mean), extra in zip(sorted(means.items()), noise, strict=True):
        most = metrics.bound(name) or 1.0
        drawn[name] = policy.rounded(min(max(mean + most * float(extra), 0.0), most), units)
    return drawn
