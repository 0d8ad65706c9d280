#!/usr/bin/env bash
# autodp's Fourier accountant gives a negative epsilon with today's SciPy, and a right bound is replaced by it.
#
# To turn delta into epsilon, autodp looks for e^epsilon with SciPy's minimize_scalar, and hands it bounds of [0, 1]
# that are meant for the value, not for the place. SciPy's default was Brent's method, which has no use for them; today
# it is the bounded one where bounds are given, and e^epsilon stays below 1. Gaussian, Laplace and randomised response
# mechanisms made with phi_off=False, and what ComposeAFA, the package's Fourier accountant, makes of them, have an
# epsilon below 0. Where a mechanism knows its exact epsilon or its Renyi curve as well, the smaller of the two is
# taken: the wrong one.
#
# Guess before the run: the exact epsilon of the Gaussian mechanism, within a per cent.
# Seen with autodp 0.2.3.1, SciPy 1.17.1, delta 1e-5: a Gaussian mechanism of sigma 5 composed 20, 50 and 100 times has
# epsilon -0.0048 each time (exact 3.85, 6.57, 10.00); one of sigma 2 has 1.99 with phi_off=True and -0.0048 with
# phi_off=False. With the bounds taken away before SciPy sees them, the first three are 3.85, 6.57 and 10.00.
#
# Sources: docstrings of ComposeAFA (arXiv:2106.08567) and of scipy.optimize.minimize_scalar (parameter method). Exact:
# the analytic Gaussian mechanism, arXiv:1805.06530.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-compile autodp==0.2.3.1 scipy==1.17.1 "numpy<3"
cat > "$work/fourier.py" <<'PYTHON'
import contextlib
import io
import sys
from importlib.metadata import version

import numpy as np
from autodp import converter
from autodp.mechanism_zoo import GaussianMechanism
from autodp.transformer_zoo import ComposeAFA
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm

DELTA, SIGMA = 1e-5, 5.0


def exact(sigma):
    def excess(epsilon):
        part = norm.cdf(0.5 / sigma - epsilon * sigma)
        return part - np.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma) - DELTA

    return brentq(excess, 0, 60)


def epsilon(mechanism):
    with contextlib.redirect_stdout(io.StringIO()):  # it prints each step of its search
        return float(mechanism.get_approxDP(DELTA))


def composed(times):
    single = GaussianMechanism(SIGMA, phi_off=False, RDP_off=True, approxDP_off=True)
    return epsilon(ComposeAFA()([single], [times]))


print(f"autodp {version('autodp')}, SciPy {version('scipy')}: Gaussian mechanism, delta {DELTA}")
known, both = (epsilon(GaussianMechanism(2.0, phi_off=off)) for off in (True, False))
print(f"sigma 2, once: exact {exact(2.0):.4f}, phi_off=True {known:.4f}, phi_off=False {both:.4f}")
times = (20, 50, 100)
theirs = [composed(number) for number in times]
converter.minimize_scalar = lambda *places, bounds=None, **settings: minimize_scalar(*places, **settings)
without = [composed(number) for number in times]
right = [exact(SIGMA / np.sqrt(number)) for number in times]
for number, given, freed, true in zip(times, theirs, without, right, strict=True):
    print(f"sigma {SIGMA:g}, {number} times: exact {true:.4f}, ComposeAFA {given:.4f}, without the bounds {freed:.4f}")
negative = max(theirs) < 0 and both < 0 < known and np.ptp(theirs) < 1e-6
sys.exit(0 if negative and np.allclose(without, right, rtol=0.02) else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/fourier.py"
