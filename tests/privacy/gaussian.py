"""The Gaussian mechanism, exactly."""

from __future__ import annotations

import math

from scipy import optimize, stats


def epsilon(sigma: float, delta: float) -> float:
    """Of one release of sensitivity 1 and noise ``sigma``.

    Source: Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018, theorem 8.
    """

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return float(stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b)) - delta

    return float(optimize.brentq(excess, 0.0, 200.0))
