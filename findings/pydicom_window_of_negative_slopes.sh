#!/usr/bin/env bash
# pydicom's windowing turns an image with a negative Rescale Slope into its negative.
#
# Computed radiography stores images whose Rescale Slope is below 0. The window of PS3.3, C.11.2 is applied to the rescaled
# values, and what is larger there comes out brighter. pydicom's apply_windowing takes the output's range by rescaling the
# smallest and the largest stored value, in that order; with a negative slope its "smallest" is above its "largest", and
# the output falls where the values rise: black and white are exchanged, for all three functions, without an error.
#
# Guess before the run: apply_windowing(apply_modality_lut(stored, image), image) rises with the rescaled values, whatever
# the slope's sign, as highdicom's apply_voi_window of the same values does.
# Seen with pydicom 3.0.2 and highdicom 0.28.2: stored 0, 2000 and 4095 of slope -1 and intercept 4095 are 4095, 2095 and
# 0 rescaled; pydicom's window gives 0, 2000 and 4095, highdicom's 4095, 2095 and 0.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install pydicom==3.0.2 highdicom==0.28.2 "numpy<3"
cat > "$work/window.py" <<'PYTHON'
import sys

import highdicom
import numpy as np
import pydicom
from highdicom.pixels import apply_voi_window
from pydicom.pixels import apply_modality_lut, apply_windowing

stored = np.array([0, 2000, 4095], np.uint16)
print(f"pydicom {pydicom.__version__}, highdicom {highdicom.__version__}: stored {stored.tolist()}, window 2048 and 4096")
rises = {}
for slope, intercept in ((1, 0), (-1, 4095)):
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        image = pydicom.Dataset()
        image.PhotometricInterpretation = "MONOCHROME2"
        image.BitsStored, image.PixelRepresentation = 12, 0
        image.RescaleSlope, image.RescaleIntercept = slope, intercept
        image.WindowCenter, image.WindowWidth, image.VOILUTFunction = 2048, 4096, function
        rescaled = apply_modality_lut(stored, image)
        windowed = apply_windowing(rescaled, image)
        other = apply_voi_window(rescaled, 2048, 4096, voi_lut_function=function, output_range=(0, 4095))
        order = np.argsort(rescaled)
        rises[slope, function] = bool(np.all(np.diff(windowed[order]) > 0)), bool(np.all(np.diff(other[order]) > 0))
        shown = [values.round().astype(int).tolist() for values in (rescaled, windowed, other)]
        print(f"slope {slope:2d}, {function}: rescaled {shown[0]}, pydicom's window {shown[1]}, highdicom's {shown[2]}")
sys.exit(0 if all(seen == (slope > 0, True) for (slope, _), seen in rises.items()) else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/window.py"
