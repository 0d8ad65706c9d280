#!/usr/bin/env bash
# A decision curve of dcurves takes the probability of staying free of the event for the risk of it.
#
# `dca` turns a marker into a risk when it is named in models_to_prob ("columns that need to be converted to risk scores
# from 0 to 1"). With time_to_outcome_col it fits a Cox model for that, and keeps what the model predicts at the time
# asked for: the survival, not one minus it. Patients at low risk are then the ones above a threshold: of a good marker
# the curve says that it does harm. Of a yes-or-no outcome (logistic model) the conversion is right.
#
# Guess before the run: the curve of the marker is that of the same Cox model's risk, computed beforehand.
# Seen with dcurves 1.1.7 and lifelines 0.30.3, 500 patients of whom 41 % have the event by the time: at a threshold of
# 30 % the net benefit is 0.002 in place of 0.243, at 50 % it is -0.340 in place of 0.155; treating everyone has 0.151
# and -0.189. The model that does worse than everybody or nobody is the one that a hospital would drop.
#
# Sources: docstring of `dca`; net benefit with censoring as in doi:10.1186/1472-6947-8-53, here without dcurves.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export MPLCONFIGDIR="$work"
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install dcurves==1.1.7 lifelines==0.30.3 "numpy<3"
cat > "$work/curve.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd
from dcurves import dca
from lifelines import CoxPHFitter

TIME, THRESHOLDS, PATIENTS = 1.5, [0.1, 0.3, 0.5, 0.7], 500
random = np.random.default_rng(0)
marker = random.normal(size=PATIENTS)
event_at = random.exponential(1 / (0.3 * np.exp(1.2 * marker)))
censored_at = random.uniform(0.5, 6, PATIENTS)
patients = pd.DataFrame(
    {"marker": marker, "time": np.minimum(event_at, censored_at), "event": (event_at <= censored_at).astype(int)}
)
cox = CoxPHFitter().fit(patients, "time", "event")
survival = cox.predict_survival_function(patients, times=[TIME]).to_numpy()[0]


def curve(column, **options):
    data = patients.assign(risk=1 - survival)
    table = dca(data, "event", [column], THRESHOLDS, time=TIME, time_to_outcome_col="time", **options)
    return table[table["model"] == column]["net_benefit"].to_numpy()


def by_hand(score, threshold):
    """Kaplan-Meier's risk among those above the threshold; benefit less harm at the threshold's odds."""
    above = score >= threshold
    at, event = patients["time"].to_numpy()[above], patients["event"].to_numpy(bool)[above]
    free = 1.0
    for moment in np.unique(at[event & (at <= TIME)]):
        free *= 1 - (event & (at == moment)).sum() / (at >= moment).sum()
    return above.mean() * ((1 - free) - free * threshold / (1 - threshold))


converted, beforehand = curve("marker", models_to_prob=["marker"]), curve("risk")
risk, turned = (np.array([by_hand(score, at) for at in THRESHOLDS]) for score in (1 - survival, survival))
print(f"dcurves {version('dcurves')}, lifelines {version('lifelines')}: net benefit at the thresholds {THRESHOLDS}")
print("Cox model's risk, given as a risk:         ", np.round(beforehand, 3))
print("the same, by hand:                         ", np.round(risk, 3))
print("marker, converted by dcurves:              ", np.round(converted, 3))
print("survival taken for the risk, by hand:      ", np.round(turned, 3))
right = np.allclose(beforehand, risk, atol=1e-6)
sys.exit(0 if right and np.allclose(converted, turned, atol=1e-6) and (converted[1:] < risk[1:] - 0.1).all() else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/curve.py"
