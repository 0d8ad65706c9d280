#!/usr/bin/env bash
# ngff-zarr gives the position of NIfTI images in the axes of the file and their directions in those of the patient.
#
# A NIfTI affine says where voxel (0, 0, 0) lies in millimetres to the right, front and top (RAS+). ngff-zarr keeps that
# point as the translation, makes every step along an axis positive, and notes the direction of the axes as words. The
# next step, to an ITK image, takes the translation as the origin in ITK's own axes (to the left, back and top) and the
# words as its direction. The image lies mirrored on the other side of the scanner's centre, and two files of the same
# patient that differ in the order of their columns alone lie apart.
#
# Guess before the run: a voxel is where nibabel's affine says, with the signs of ITK's axes; for both files alike.
# Seen with ngff-zarr 0.50.0: a voxel at 12 mm right, 24 mm front, 36 mm top should be at (-12, -24, 36) in ITK. From a
# file of columns from left to right it is at (8, 16, 36), from one of columns from right to left at (20, 16, 36). By
# scale and translation alone the second file has it at x = 20 where the first has 12. Nothing is said.
#
# Source: NIfTI-1 header, "method 3" (nifti1.h: +x right, +y front, +z up); ITK Software Guide (LPS).
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install ngff-zarr==0.50.0 nibabel==5.4.2 itkwasm==1.0b201
cat > "$work/position.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import nibabel
import numpy as np
from ngff_zarr import nibabel_image_to_ngff_image, ngff_image_to_itk_image

FOLDER = Path(sys.argv[1])
MARKED = np.zeros((4, 5, 6), np.uint8)
MARKED[1, 2, 3] = 1
RIGHTWARDS = np.array([[2, 0, 0, 10], [0, 2, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1.0]])
LEFTWARDS = np.array([[-2, 0, 0, 16], [0, 2, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1.0]])
LPS = np.array([-1, -1, 1])

print(f"ngff-zarr {version('ngff-zarr')}, nibabel {version('nibabel')}")
seen = {}
for name, data, affine in (("left to right", MARKED, RIGHTWARDS), ("right to left", MARKED[::-1], LEFTWARDS)):
    nibabel.save(nibabel.Nifti1Image(data.copy(), affine), FOLDER / "image.nii")
    image = nibabel.load(FOLDER / "image.nii")
    at = np.argwhere(np.asarray(image.dataobj))[0]
    true = nibabel.affines.apply_affine(image.affine, at)
    ngff = nibabel_image_to_ngff_image(image)
    plain = [ngff.scale[axis] * index + ngff.translation[axis] for axis, index in zip("xyz", at)]
    itk = ngff_image_to_itk_image(ngff)
    point = np.asarray(itk.origin) + np.asarray(itk.direction).reshape(3, 3) @ (np.asarray(itk.spacing) * at)
    words = [str(getattr(ngff.axes_orientations[axis], "value", ngff.axes_orientations[axis])) for axis in "xyz"]
    print(f"columns {name} ({words[0]}): scale and translation {np.round(plain, 3).tolist()}")
    print(f"  in ITK's axes {np.round(point, 3).tolist()}, by the header {np.round(true * LPS, 3).tolist()}")
    seen[name] = (np.round(plain, 3).tolist(), np.round(point, 3).tolist(), np.round(true * LPS, 3).tolist())
expected = {
    "left to right": ([12.0, 24.0, 36.0], [8.0, 16.0, 36.0], [-12.0, -24.0, 36.0]),
    "right to left": ([20.0, 24.0, 36.0], [20.0, 16.0, 36.0], [-12.0, -24.0, 36.0]),
}
sys.exit(0 if seen == expected else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/position.py" "$work"
