#!/usr/bin/env bash
# dosemetrics multiplies distances along the slices by the pixels' spacing, and those across the image by the slices'.
#
# Its readers return arrays in the order z, y, x and spacings in the order x, y, z, and it stores both as they are. The
# Hausdorff distance, the mean surface distance and the centroid pair the first axis with the first spacing. Where slices are
# thicker than pixels are wide, a difference of whole slices counts too little, and one to the left or right too much.
#
# Guess before the run: a structure moved by two slices of 5 mm is 10 mm away; one moved by two pixels of 1 mm is 2 mm away.
# Seen with dosemetrics 0.4.1 on two NIfTI masks that it read itself, spacing 1 x 1 x 5 mm: 2 mm for two slices, 10 mm for two
# pixels along x, 2 mm along y. By SciPy's distance transform, with the spacing of each axis, 10, 2 and 2.
# Consulted: the docstrings of compute_hausdorff_distance ("in mm") and Structure (spacing "in (x, y, z) mm").
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install numpy==1.26.4 scipy==1.15.3 pandas==2.3.3 numba==0.62.1 \
  SimpleITK==2.5.7 pydicom==3.0.2 scikit-image==0.25.2 matplotlib==3.8.4 pillow==10.4.0 pyyaml
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-deps dosemetrics==0.4.1
cat > "$work/moved.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import SimpleITK as sitk
from dosemetrics.io.data_io import load_structure
from dosemetrics.metrics.geometric import compute_hausdorff_distance
from scipy.ndimage import binary_erosion, distance_transform_edt

folder, spacing = sys.argv[1], (1, 1, 5)


def written(voxels, name):
    image = sitk.GetImageFromArray(voxels.astype(np.uint8))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, f"{folder}/{name}.nii.gz")
    return load_structure(f"{folder}/{name}.nii.gz")


def hausdorff(one, other):
    surfaces = [mask & ~binary_erosion(mask) for mask in (one, other)]
    away = [distance_transform_edt(~surface, sampling=spacing[::-1]) for surface in surfaces]
    return max(away[1][surfaces[0]].max(), away[0][surfaces[1]].max())


mask = np.zeros((20, 40, 40), bool)
mask[5:10, 10:20, 10:20] = True
print(f"dosemetrics {version('dosemetrics')}, SimpleITK {version('SimpleITK')}: spacing {spacing}, moved by two voxels")
seen = {}
for axis, name in enumerate("zyx"):
    moved = np.roll(mask, 2, axis)
    seen[name] = compute_hausdorff_distance(written(mask, "one"), written(moved, "other"))
    print(f"along {name}: {seen[name]:.1f} mm, by the distance transform {hausdorff(mask, moved):.1f} mm")
sys.exit(0 if seen == {"z": 2, "y": 2, "x": 10} else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/moved.py" "$work"
