#!/usr/bin/env bash
# picai_eval's FROC curve loses its last point, and a model that finds every lesion has a sensitivity too low, down to 0.
#
# The curve goes through the confidences from the highest to the lowest. The point of the lowest one is replaced by a point at
# infinitely many false positives with the sensitivity of the point before. A missed lesion has confidence 0 and takes that
# last place; where no lesion was missed, the lowest confidence is that of a real candidate, and its lesions count as not
# found. With a single confidence, as of a binary segmentation, the curve is set to 0. AUROC and AP are not affected.
#
# Guess before the run: a model that finds all lesions and marks nothing else has a sensitivity of 1 at every rate of false
# positives; a further lesion that it misses lowers it.
# Seen with picai_eval 1.4.13: confidences .9, .8, .7 on three lesions: .67 at one false positive per case, not 1; with a
# fourth, missed lesion it rises to .75. Two lesions, all confidences 1: 0; with a third, missed lesion .67. AP is 1 in both
# cases without a miss.
# Consulted: the docstrings of lesion_TPR (rate "at each threshold") and lesion_TPR_at_FPR, and the package's README. The
# reference is counting: candidates at or above a threshold that lie on a lesion, over all lesions.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install \
  scipy==1.17.1 scikit-learn==1.9.1 SimpleITK==2.5.7 tqdm packaging "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-deps picai_eval==1.4.13
cat > "$work/froc.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from picai_eval import evaluate


def volumes(confidence):
    """One case with one lesion, found at this confidence, or missed; without a lesion for None."""
    truth, found = np.zeros((4, 32, 32), np.int32), np.zeros((4, 32, 32), np.float32)
    if confidence is not None:
        truth[1:3, 8:16, 8:16] = 1
        found[truth == 1] = confidence
    return found, truth


def sensitivity(*confidences):
    found, truth = zip(*(volumes(confidence) for confidence in (*confidences, None)), strict=True)
    metrics = evaluate(found, truth, num_parallel_calls=1)
    counted = np.mean([confidence > 0 for confidence in confidences])
    at_one = float(metrics.lesion_TPR_at_FPR(1))
    print(f"confidences {confidences}: sensitivity {at_one:.2f}, counted {counted:.2f}, AP {metrics.AP:.2f}")
    return round(at_one, 2)


print(f"picai_eval {version('picai_eval')}: one false positive per case allowed, none is there; 0 is a missed lesion")
seen = [sensitivity(*given) for given in ((0.9, 0.8, 0.7), (0.9, 0.8, 0.7, 0), (1, 1), (1, 1, 0))]
sys.exit(0 if seen == [0.67, 0.75, 0, 0.67] else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/froc.py"
