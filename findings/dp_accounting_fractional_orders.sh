#!/usr/bin/env bash
# dp-accounting's RDP is above the divergence at every order that is no whole number, and misses the best low orders.
#
# For the Poisson-subsampled Gaussian at a fractional order the series of Mironov et al. (arXiv 1908.10530, section 3.3)
# alternates in sign: the binomial coefficients do. dp-accounting adds their absolute values, so what it gives is an upper
# bound and not the divergence; the series then ends later, and at the lowest orders not within 1,000 terms, where the
# order is left out with a warning. Epsilon is valid, but up to 2 % larger than of accountants that keep the sign.
#
# Guess before the run: the divergence to 1e-6, as at whole orders (and as Opacus gives it).
# Seen with dp-accounting 0.6.0, rate 0.5, noise multiplier 2, 100 steps: 7.414 at order 2.1 against 7.250 by numerical
# integration; equal at order 2; infinite at order 1.5 against 4.982. Epsilon at delta 1e-3: 12.372, by the true
# divergences 12.139.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install dp-accounting==0.6.0 "numpy<3"
cat > "$work/compare.py" <<'PYTHON'
import logging
import math
import sys

import dp_accounting
import numpy as np
from dp_accounting.rdp import RdpAccountant

logging.disable(logging.WARNING)
RATE, NOISE, STEPS, DELTA = 0.5, 2.0, 100, 1e-3
ORDERS = [1.5, 2.0, 2.1, 2.2, 3.0]


def google(orders):
    accountant = RdpAccountant(orders=orders)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(RATE, dp_accounting.GaussianDpEvent(NOISE)), STEPS)
    return accountant


def divergence(order):
    """log E over N(0, s^2) of (1 - q + q exp((2x - 1) / 2s^2))^order, over (order - 1), by the trapezoid rule."""
    x = np.linspace(-40, 60, 400_001)
    density = np.exp(-(x**2) / (2 * NOISE**2)) / (NOISE * math.sqrt(2 * math.pi))
    ratio = 1 - RATE + RATE * np.exp((2 * x - 1) / (2 * NOISE**2))
    return STEPS * math.log(np.trapezoid(density * ratio**order, x)) / (order - 1)


def epsilon(order):
    return divergence(order) - (math.log(DELTA) + math.log(order)) / (order - 1) + math.log1p(-1 / order)


theirs = {order: float(google([order])._rdp[0]) for order in ORDERS}
for order in ORDERS:
    print(f"order {order:g}: dp-accounting {theirs[order]:.3f}, by integration {divergence(order):.3f}")
steps = [1 + tenth / 10 for tenth in range(1, 100)]
wide, tight = google(steps).get_epsilon(DELTA), min(map(epsilon, steps))
print(f"epsilon {wide:.3f}, by the integrated divergences {tight:.3f}")
whole = all(abs(theirs[order] / divergence(order) - 1) < 1e-5 for order in (2.0, 3.0))
above = theirs[2.1] > 1.02 * divergence(2.1) and theirs[2.2] > 1.02 * divergence(2.2) and math.isinf(theirs[1.5])
sys.exit(0 if whole and above and wide > 1.01 * tight else 1)
PYTHON
"$work/env/bin/python" "$work/compare.py"
