#!/usr/bin/env bash
# seg-metrics gives a structure that was missed altogether the best surface distances.
#
# Where a mask is empty its distance map is set to 0 everywhere. An empty prediction of a structure that is there has
# therefore hd, hd95, msd and mdsd of 0, the same as a perfect one; so has a prediction of a structure that is not there. In
# the mean over patients each miss makes a model's distances better. A prediction of a single far voxel is punished.
#
# Guess before the run: NaN, infinity or an error for an empty prediction, as in MONAI and MedPy.
# Seen with seg_metrics 1.2.8: Dice 0 and hd95 0 for the empty prediction, hd95 22.05 for the one of a single voxel. The
# warning that is logged is about precision and recall alone. Consulted: the README's list of metrics, which says nothing of
# empty masks.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install \
  SimpleITK==2.5.7 scipy==1.17.1 pandas==3.1.1 matplotlib==3.11.2 tqdm "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-deps seg_metrics==1.2.8 medutils==0.1.21
touch "$work/pingouin.py" # statistics that medutils imports and that this does not use: an empty module stands in
cat > "$work/empty.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import seg_metrics.seg_metrics as sg

NAMES = ["dice", "hd", "hd95", "msd", "mdsd"]
truth = np.zeros((20, 20, 20), np.uint8)
truth[5:15, 5:15, 5:15] = 1
empty, speck = np.zeros_like(truth), np.zeros_like(truth)
speck[0, 0, 0] = 1
seen = {}
print(f"seg_metrics {version('seg_metrics')}")
for name, real, mask in (
    ("the truth itself", truth, truth),
    ("nothing", truth, empty),
    ("one far voxel", truth, speck),
    ("a structure that is not there", empty, truth),
):
    (row,) = sg.write_metrics(labels=[1], gdth_img=real, pred_img=mask, spacing=[1, 1, 1], metrics=list(NAMES))
    seen[name] = [round(float(row[metric][0]), 2) for metric in NAMES]
    print(f"predicted: {name}:", dict(zip(NAMES, seen[name])))
same = seen["the truth itself"] == [1, 0, 0, 0, 0] and seen["nothing"] == seen["a structure that is not there"] == [0] * 5
sys.exit(0 if same and seen["one far voxel"][2] > 20 else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/empty.py"
