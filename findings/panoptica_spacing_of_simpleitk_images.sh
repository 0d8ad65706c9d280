#!/usr/bin/env bash
# panoptica measures SimpleITK images with the voxel sizes of the wrong axes.
#
# SimpleITK gives sizes in the order x, y, z and arrays in the order z, y, x. panoptica takes the array as it comes and
# the spacing as it comes: steps from slice to slice count with the pixels' width, steps along x with the slices'
# distance. The same file read by nibabel has other distances, and so has the array with its spacing given by hand.
#
# Guess before the run: one file, one Hausdorff distance, however it was read.
# Seen with panoptica 2.1.7: voxels of 0.5 x 0.5 x 5 mm; a mask moved by one slice is 5 mm away by nibabel and 0.5 mm
# by SimpleITK, one moved by four pixels along x 2 mm and 20 mm; volumes agree. No word is said.
#
# Source: panoptica's docstrings ("physical spacing per axis"); the distances follow from the construction.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install panoptica==2.1.7 nibabel==5.4.2 SimpleITK==2.5.7 "numpy<2.3"
cat > "$work/spacing.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK
from panoptica import InputType, Panoptica_Evaluator
from panoptica.metrics import Metric

FOLDER = Path(sys.argv[1])
REFERENCE = np.zeros((40, 40, 20), np.uint8)
REFERENCE[10:20, 10:20, 5:12] = 1


def file(name, mask):
    path = FOLDER / f"{name}.nii.gz"
    nibabel.save(nibabel.Nifti1Image(mask, np.diag([0.5, 0.5, 5.0, 1.0])), path)
    return path


def distance(prediction, reference, read):
    evaluator = Panoptica_Evaluator(InputType.MATCHED_INSTANCE, instance_metrics=[Metric.HD], global_metrics=[])
    (answer,) = evaluator.evaluate(read(prediction), read(reference), verbose=False).values()
    return round(float(answer.sq_hd), 3)


print(f"panoptica {version('panoptica')}: voxels of 0.5 x 0.5 x 5 mm")
reference = file("reference", REFERENCE)
seen = {}
for name, mask in (("one slice", np.roll(REFERENCE, 1, 2)), ("four pixels along x", np.roll(REFERENCE, 4, 0))):
    moved = file(name.replace(" ", "-"), mask)
    seen[name] = [distance(moved, reference, read) for read in (nibabel.load, SimpleITK.ReadImage)]
    print(f"moved by {name}: Hausdorff distance {seen[name][0]} mm by nibabel, {seen[name][1]} mm by SimpleITK")
sys.exit(0 if seen == {"one slice": [5.0, 0.5], "four pixels along x": [2.0, 20.0]} else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/spacing.py" "$work"
