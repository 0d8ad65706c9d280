#!/usr/bin/env bash
# MLstatkit's DeLong test gives p = 0 for two models that are equally good on every patient.
#
# Where the variance of the difference is 0, Delong_test takes a bootstrap instead, with p = 2 min(share of differences
# <= 0, share > 0). Where every resampled difference is 0, the second share is 0, and so is p. That happens to a model
# before and after calibration (the order of the patients is the same), to a model and its copy, and to two models that
# both separate all patients: a study reads "the models differ, p < 0.001" beside z = 0 and two equal areas.
#
# Guess before the run: z = 0 and p = 1, or NaN, where no patient is ranked otherwise.
# Seen with MLstatkit 0.1.91, 200 patients: for a model and its temperature-scaled self, for a model and its copy, and
# for two perfect models the areas are equal, z is 0.0 and p is 0.0, from 5,000 resamples. With the score of one patient
# moved by 0.02, the usual path gives p = 0.48.
#
# Source: docstring of Delong_test ("automatic fallback to bootstrap when degeneracy is detected", "a two-sided p-value
# is reported"). A two-sided p of a statistic at the centre of its distribution is 1.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-compile MLstatkit==0.1.91 "numpy<3"
cat > "$work/equal.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from MLstatkit import Delong_test
from sklearn.metrics import roc_auc_score

random = np.random.default_rng(0)
ill = random.permutation(np.repeat((0, 1), 100))
logits = random.normal(1.0 * ill, 1.0)
model, calibrated = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(-logits / 2.5))
nearly = calibrated.copy()
patient = np.flatnonzero(ill == 1)[np.argmin(calibrated[ill == 1])]
nearly[patient] += 0.02
perfect, other = (0.5 * ill + random.uniform(0, 0.4, 200) for _ in range(2))
assert np.array_equal(np.argsort(model), np.argsort(calibrated))

pairs = {
    "a model and its calibrated self": (model, calibrated),
    "a model and its copy": (model, model.copy()),
    "two perfect models": (perfect, other),
    "one patient moved": (model, nearly),
}
print(f"MLstatkit {version('MLstatkit')}: {len(ill)} patients")
seen = {}
for name, (first, second) in pairs.items():
    z, p, _, _, area, same, info = Delong_test(ill, first, second, random_state=0)
    assert np.isclose(area, roc_auc_score(ill, first)) and np.isclose(same, roc_auc_score(ill, second))
    seen[name] = z, p, same - area
    print(f"{name}: areas {area:.4f} and {same:.4f}, z {z:.2f}, p {p:.3f} ({info['method']})")
*equal, moved = seen.values()
sys.exit(0 if all(each == (0, 0, 0) for each in equal) and moved[1] > 0.05 else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/equal.py"
