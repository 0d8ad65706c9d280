#!/usr/bin/env bash
# MISeval's Hausdorff distance compares rows of pixels, and its average Hausdorff distance is the maximum.
#
# "HD" gives the two label images to a function for sets of points, which takes each row of pixels as one point: a mask
# that lies too low is at distance 0, one that lies too far right at the root of the number of pixels that differ in a row.
# "AHD", in the literature and by the package's own table an average, is the largest distance: the ordinary Hausdorff
# distance.
#
# Guess before the run: HD of a square moved by 10 pixels is 10, whatever the direction; AHD is below it.
# Seen with miseval 1.3.0, hausdorff 0.2.6 and SciPy 1.17.1: moved down HD 0, moved right HD 4.47, SciPy 10 for both; AHD
# is 10 for both, the average of the distances between the two sets 2.75 (mean of both ways, SciPy).
# Consulted: the package's table of metrics, and Taha and Hanbury 2015, doi 10.1186/s12880-015-0068-x, for the two.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install \
  scipy==1.17.1 scikit-learn==1.9.1 scikit-image==0.26.0 numba==0.68.1 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-deps miseval==1.3.0 hausdorff==0.2.6
touch "$work/dictances.py" # distances of histograms, which miseval imports and this does not use: an empty module stands in
cat > "$work/moved.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from miseval import evaluate
from scipy.spatial import cKDTree
from scipy.spatial.distance import directed_hausdorff

print(f"miseval {version('miseval')}, hausdorff {version('hausdorff')}, scipy {version('scipy')}")
seen = {}
truth = np.zeros((64, 64), np.uint8)
truth[20:40, 20:40] = 1
for name, axis in (("down", 0), ("right", 1)):
    mask = np.roll(truth, 10, axis)
    points, others = np.argwhere(truth), np.argwhere(mask)
    largest = max(directed_hausdorff(points, others)[0], directed_hausdorff(others, points)[0])
    average = (cKDTree(others).query(points)[0].mean() + cKDTree(points).query(others)[0].mean()) / 2
    hd, ahd = (float(evaluate(truth, mask, metric=metric)) for metric in ("HD", "AHD"))
    print(f"moved {name}: HD {hd:.2f}, AHD {ahd:.2f}; by SciPy the largest distance {largest:.2f}, average {average:.2f}")
    seen[name] = round(hd, 2), round(ahd, 2), largest, round(float(average), 2)
sys.exit(0 if seen == {"down": (0.0, 10.0, 10.0, 2.75), "right": (4.47, 10.0, 10.0, 2.75)} else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/moved.py"
