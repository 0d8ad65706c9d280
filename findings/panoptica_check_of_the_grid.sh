#!/usr/bin/env bash
# The check of panoptica that prediction and reference lie on one grid passes half of all pairs that do not.
#
# panoptica compares images of nibabel, SimpleITK and NRRD before it scores them: affine, or origin, spacing and
# direction, must be similar to 1e-5. It adds up the differences with their signs, and asks whether the sum is above the
# threshold: a prediction that lies 6 mm to the one side is refused, and one that lies 6 mm to the other is scored as if
# it lay where the reference does. Differences that cancel pass in both directions.
#
# Guess before the run: another grid is refused, whichever way it is off.
# Seen with panoptica 2.1.7: of the same mask moved by 6 mm along one axis, three moves of six are refused; the other
# three are scored, and have a Dice of 1.0 where the masks overlap by 0.4 in space; so does a move by 6 mm to the right
# and 6 mm to the front. So it is with nibabel and with SimpleITK. Other voxel sizes are refused, by another check.
#
# Source: README of panoptica ("sanity check" of its inputs); the true overlap is computed here in space.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install panoptica==2.1.7 nibabel==5.4.2 SimpleITK==2.5.7 "numpy<2.3"
cat > "$work/grid.py" <<'PYTHON'
import os
import sys
from importlib.metadata import version

os.environ["PANOPTICA_CITATION_REMINDER"] = "false"
import nibabel
import numpy as np
import SimpleITK
from panoptica import InputType, Panoptica_Evaluator
from panoptica.metrics import Metric

MASK = np.zeros((40, 40, 40), np.uint8)
MASK[10:20, 10:20, 10:20] = 1
GRID = np.eye(4)


def nifti(affine):
    return nibabel.Nifti1Image(MASK, affine)


def itk(affine):
    image = SimpleITK.GetImageFromArray(MASK)
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def dice(prediction, reference):
    """None where the check refuses the pair."""
    evaluator = Panoptica_Evaluator(InputType.MATCHED_INSTANCE, instance_metrics=[Metric.DSC], global_metrics=[])
    try:
        (answer,) = evaluator.evaluate(prediction, reference, verbose=False).values()
    except ValueError as error:
        if "Mismatch" in str(error):
            return None
        raise
    return round(float(answer.sq_dsc), 3)


def moved(axis, by):
    affine = GRID.copy()
    affine[axis, 3] = by
    return affine


print(f"panoptica {version('panoptica')}: a mask of 10 x 10 x 10 mm, moved by 6 mm: true Dice 0.4")
odd = True
for name, image in (("nibabel", nifti), ("SimpleITK", itk)):
    there = [dice(image(moved(axis, 6.0)), image(GRID)) for axis in range(3)]
    back = [dice(image(moved(axis, -6.0)), image(GRID)) for axis in range(3)]
    cancel = GRID.copy()
    cancel[:3, 3] = 6.0, -6.0, 0.0
    both = dice(image(cancel), image(GRID))
    print(f"{name}: +6 mm {there}, -6 mm {back}, +6 and -6 mm {both}")
    odd &= there == [None] * 3 and back == [1.0] * 3 and both == 1.0
sys.exit(0 if odd else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/grid.py"
