#!/usr/bin/env bash
# PlatiPy draws the contours of an RT Structure Set that lie below the image onto the image's last slices.
#
# A structure set may reach farther than the image at hand: a planning CT that was cropped, a second series of the same frame
# of reference. Contours above the last slice are left out. Below the first slice their index is negative, and NumPy counts
# it from the end: the lower part of an organ appears at the other end of the patient, in the same mask, without an error.
#
# Guess before the run: contours outside of the image are left out at both ends.
# Seen with platipy 0.7.2 and SimpleITK 2.5.7: an image of ten slices, contours from two slices below it to its third:
# slices 0, 1, 2 hold the structure, and so do 8 and 9; contours above the image are left out.
# Consulted: the function's docstring, which says nothing of it, and issue 172 of platipy (2022, closed), of the IndexError
# that contours give that lie farther below the image than it is high. The wrong slices are not mentioned there.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install \
  SimpleITK==2.5.7 pydicom==2.4.5 scikit-image==0.26.0 requests "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-deps platipy==0.7.2
cat > "$work/mask.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import SimpleITK as sitk
from platipy.dicom.io.rtstruct_to_nifti import transform_point_set_from_dicom_struct
from pydicom.dataset import Dataset


def item(**elements):
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def slices_of(planes):
    contours = []
    for plane in planes:
        corners = [(-15, -15), (15, -15), (15, 15), (-15, 15)]
        points = [float(value) for x, y in corners for value in (x, y, 3 * plane)]
        contours.append(item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=4, ContourData=points))
    structures = item(
        StructureSetROISequence=[item(ROINumber=1, ROIName="organ")],
        ROIContourSequence=[item(ReferencedROINumber=1, ContourSequence=contours)],
    )
    (mask,), _ = transform_point_set_from_dicom_struct(image, structures)
    return np.flatnonzero(sitk.GetArrayFromImage(mask).any(axis=(1, 2))).tolist()


image = sitk.GetImageFromArray(np.zeros((10, 32, 32), np.int16))
image.SetSpacing((2, 2, 3))
image.SetOrigin((-31, -31, 0))
below, above = slices_of(range(-2, 3)), slices_of(range(7, 12))
print(f"platipy {version('platipy')}, SimpleITK {version('SimpleITK')}: an image of slices 0 to 9")
print("contours in slices -2 to 2 give a mask in slices", below)
print("contours in slices 7 to 11 give a mask in slices", above)
sys.exit(0 if below == [0, 1, 2, 8, 9] and above == [7, 8, 9] else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/mask.py"
