#!/usr/bin/env bash
# Sensitivity and specificity of statkit at one threshold are those of two different tests.
#
# `sensitivity` takes a patient whose score equals the threshold as positive, `specificity`, `false_positive_rate` and
# `false_negative_rate` take the same patient as negative. Of a score in points, a vote of a few models or a rounded
# probability that is many patients; and `youden_j_threshold` always gives a value that patients have. The pair is above
# the ROC curve: no test with that score has it. The docstrings say nothing of a rule that differs between the rates.
#
# Guess before the run: the pair is a point of the ROC curve, and sensitivity and false negative rate add up to 1.
# Seen with statkit 1.1.0, a score of 0 to 10 points, 400 patients, at Youden's threshold of 4 points: sensitivity 88 %
# and specificity 83 %; true are 88 and 61 % (4 points are positive) or 63 and 83 % (they are not). The false negative
# rate is 37 %, so that the two add up to 1.25; Youden's J is 0.70, the largest on the curve 0.48.
#
# The reference is scikit-learn's recall of both classes; definitions are those of the package's docstrings.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-compile statkit==1.1.0 "numpy<3"
cat > "$work/points.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from sklearn.metrics import recall_score, roc_curve
from statkit.metrics import false_negative_rate, sensitivity, specificity, youden_j_threshold

random = np.random.default_rng(0)
ill = (random.random(400) < 0.3).astype(int)
points = np.clip(np.round(random.normal(3 + 2 * ill, 1.5)), 0, 10)
at = youden_j_threshold(ill, points)
found, spared, missed = (rate(ill, points, at) for rate in (sensitivity, specificity, false_negative_rate))
print(f"statkit {version('statkit')}, threshold of {at:g} points, which {np.mean(points == at):.0%} of patients have")
print(f"statkit: sensitivity {found:.3f}, specificity {spared:.3f}, false negative rate {missed:.3f}")
tests = {}
for name, positive in (("or more", points >= at), ("more", points > at)):
    tests[name] = tuple(recall_score(ill, positive, pos_label=label) for label in (1, 0))
    print(f"positive with {at:g} points {name}: sensitivity {{:.3f}}, specificity {{:.3f}}".format(*tests[name]))
false_alarms, hits, _ = roc_curve(ill, points)
best = max(hits - false_alarms)
print(f"Youden's J: {found + spared - 1:.3f}; the largest on the ROC curve: {best:.3f}")
mixed = np.isclose(found, tests["or more"][0]) and np.isclose(spared, tests["more"][1])
sys.exit(0 if mixed and found + missed > 1.2 and found + spared - 1 > best + 0.15 else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/points.py"
