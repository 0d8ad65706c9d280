#!/usr/bin/env bash
# rt-utils writes contours to other places where pixels are not square.
#
# Pixel Spacing (PS3.3, 10.7.1.3) names the distance between rows first, that between columns second. rt-utils multiplies
# the column index by the first and the row index by the second. Its own reading makes the same exchange, so that a mask
# comes back as it was and no round trip shows it; every other program sees the structure moved and stretched, and
# structures of other programs are read from the wrong pixels. (Images of unequal sides are another matter.)
#
# Guess before the run: the contour's coordinates are those that DICOM's equation (PS3.3, C.7.6.2.1.1) gives for the pixels.
# Seen with rt-utils 1.2.7 and pydicom 3.0.2: pixels of 1.5 mm (rows) by 0.75 mm (columns), a mask of rows 20 to 30 and
# columns 40 to 50: x is 10 to 25 mm instead of -20 to -12.5, y -25 to -17.5 instead of -10 to 5. Square pixels are exact.
# Consulted: the two sections, and issue 92 of rt-utils (open), whose reporters met it on images of their own.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install pydicom==3.0.2 opencv-python-headless==5.0.0.93 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-deps rt-utils==1.2.7
cat > "$work/contours.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from rt_utils import RTStructBuilder

EMPTY = ("PatientID PatientBirthDate PatientSex PatientAge PatientSize PatientWeight PatientName StudyDate StudyTime "
         "StudyID StudyDescription SeriesDescription AccessionNumber ReferringPhysicianName")  # fmt: skip


def series(folder, spacing):
    folder.mkdir()
    study, uid, frame = generate_uid(), generate_uid(), generate_uid()
    for index in range(4):
        image = Dataset()
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        for name in EMPTY.split():
            setattr(image, name, "")
        image.SOPClassUID, image.SOPInstanceUID, image.Modality = CTImageStorage, generate_uid(), "CT"
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, uid, frame
        image.ImagePositionPatient, image.ImageOrientationPatient = [-50, -40, 3 * index], [1, 0, 0, 0, 1, 0]
        image.PixelSpacing, image.SliceThickness, image.InstanceNumber = spacing, 3, index + 1
        image.Rows = image.Columns = 64
        image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 0
        image.BitsAllocated = image.BitsStored = 16
        image.HighBit, image.PixelData = 15, bytes(2 * 64 * 64)
        image.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    return str(folder)


seen = {}
print(f"rt-utils {version('rt-utils')}, pydicom {version('pydicom')}: a mask of rows 20 to 30, columns 40 to 50")
for spacing in ([1.0, 1.0], [1.5, 0.75]):
    structures = RTStructBuilder.create_new(series(Path(sys.argv[1]) / str(spacing), spacing))
    mask = np.zeros((64, 64, 4), bool)
    mask[20:31, 40:51, 1:3] = True
    structures.add_roi(mask=mask, name="organ")
    contour = structures.ds.ROIContourSequence[0].ContourSequence[0]
    points = np.array(contour.ContourData, float).reshape(-1, 3)
    true = [-50 + 40 * spacing[1], -50 + 50 * spacing[1], -40 + 20 * spacing[0], -40 + 30 * spacing[0]]
    written = [float(end) for axis in (0, 1) for end in (points[:, axis].min(), points[:, axis].max())]
    back = bool((structures.get_roi_mask_by_name("organ") == mask).all())
    print(f"spacing {spacing}: x and y from, to: written {written}, by the equation {true}; own round trip exact: {back}")
    seen[tuple(spacing)] = written == true, back
sys.exit(0 if seen == {(1.0, 1.0): (True, True), (1.5, 0.75): (False, True)} else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/contours.py" "$work"
