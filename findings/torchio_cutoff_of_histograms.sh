#!/usr/bin/env bash
# TorchIO's HistogramStandardization maps images by other percentiles than its landmarks were trained with.
#
# HistogramStandardization.train(cutoff=...) takes "minimum and maximum quantile values that are used to select a range of
# intensity of interest" and returns landmarks: where the percentiles of an image are to go. The transform itself always
# measures an image at the default cutoff, 0.01 and 0.99. With any other cutoff of a training the ends of the scale are
# given to other percentiles than they were meant for, and the two ends are stretched by another factor than the rest.
#
# Guess before the run: an image trained with a cutoff of 0.05 and 0.95, alone, has its 5th percentile at 0 and its 95th
# at 100 afterwards, as with the default its 1st and 99th are.
# Seen with torchio 1.2.1: 2.3 and 86.6; the 1st and the 99th percentile are at 0 and 100.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torchio==1.2.1
cat > "$work/standardise.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchio

path = Path(sys.argv[1]) / "image.nii"
voxels = np.random.default_rng(0).gamma(2.0, 100.0, (1, 24, 24, 24))
torchio.ScalarImage(tensor=torch.tensor(voxels, dtype=torch.float32)).save(path)
ends = {}
for cutoff in ((0.01, 0.99), (0.05, 0.95)):
    landmarks = torchio.HistogramStandardization.train([path], cutoff=cutoff, progress=False)
    transform = torchio.HistogramStandardization({"image": landmarks})
    image = transform(torchio.Subject(image=torchio.ScalarImage(path)))["image"].data.numpy()
    ends[cutoff] = np.quantile(image, cutoff), np.quantile(image, (0.01, 0.99))
print(f"torchio {version('torchio')}: landmarks of one image, applied to it; 0 and 100 are the ends of the scale")
for cutoff, (own, default) in ends.items():
    print(f"cutoff {cutoff}: its quantiles are at {own.round(1)}, those of 0.01 and 0.99 at {default.round(1)}")
right, wrong = ends[0.01, 0.99][0], ends[0.05, 0.95][0]
sys.exit(0 if np.allclose(right, (0, 100), atol=0.01) and not np.allclose(wrong, (0, 100), atol=1) else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/standardise.py" "$work" 2>/dev/null
