#!/usr/bin/env bash
# dicompyler-core takes every Grid Frame Offset Vector of an RT Dose as relative.
#
# DICOM (PS3.3, C.8.8.3.2) allows two forms of it on a transverse grid: offsets from the first plane, the first one 0, which
# is recommended, or the planes' own patient z, the first one equal to that of Image Position (Patient). dicompyler-core adds
# Image Position to either. In the second form it places each plane of dose too high or too low by that z. Where the contours
# still meet the displaced grid, the dose-volume histogram is that of other planes, and nothing is said; where some do not, a
# note says that the dose grid does not encompass every contour.
#
# Guess before the run: the same grid written in the two forms gives the same histogram.
# Seen with dicompyler-core 0.5.6 (with pydicom 2.4.5: it cannot be imported beside pydicom 3): the dose is 10 Gy in the
# lowest of ten planes and 1 Gy more in each next one, the structure lies in the fifth to seventh plane (14, 15, 16 Gy).
# Relative: mean 15 Gy. Absolute, the first plane at 9 mm: mean 12 Gy, no note.
# Consulted: the standard's section, the docstring of get_dvh, which names no form, and issue 284 of dicompyler-core (2022,
# open), whose reporter read it from the code and had met no such file.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install dicompyler-core==0.5.6 pydicom==2.4.5 "numpy<3"
cat > "$work/histogram.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from dicompylercore import dvhcalc
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

FIRST, STEP, PLANES = 9.0, 3.0, 10


def with_meta(**elements):
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    return dataset


def dose(offsets):
    values = np.zeros((PLANES, 20, 20), "<u4") + 10 + np.arange(PLANES, dtype="<u4")[:, None, None]
    return with_meta(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2", Modality="RTDOSE", DoseUnits="GY", DoseType="PHYSICAL",
        DoseSummationType="PLAN", ImagePositionPatient=[-19, -19, FIRST], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[2, 2], GridFrameOffsetVector=list(offsets), FrameIncrementPointer=0x3004000C, Rows=20, Columns=20,
        NumberOfFrames=PLANES, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=32, BitsStored=32,
        HighBit=31, PixelRepresentation=0, DoseGridScaling=1, PixelData=values.tobytes(),
    )  # fmt: skip


def item(**elements):
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


contours = []
for plane in (4, 5, 6):
    corners = [(-7.5, -7.5), (7.5, -7.5), (7.5, 7.5), (-7.5, 7.5)]
    points = [value for x, y in corners for value in (x, y, FIRST + STEP * plane)]
    contours.append(item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=4, ContourData=points))
structures = with_meta(
    SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", Modality="RTSTRUCT",
    StructureSetROISequence=[item(ROINumber=1, ROIName="structure", ROIGenerationAlgorithm="MANUAL")],
    RTROIObservationsSequence=[item(ObservationNumber=1, ReferencedROINumber=1, RTROIInterpretedType="ORGAN")],
    ROIContourSequence=[item(ReferencedROINumber=1, ROIDisplayColor=[255, 0, 0], ContourSequence=contours)],
)  # fmt: skip
relative = np.arange(PLANES) * STEP
seen = {}
print(f"dicompyler-core {version('dicompyler-core')}, pydicom {version('pydicom')}: planes of 14, 15 and 16 Gy")
for name, offsets in (("relative", relative), ("absolute", relative + FIRST)):
    result = dvhcalc.get_dvh(structures, dose(offsets), 1)
    seen[name] = round(float(result.mean)), result.notes
    print(f"{name} offsets {offsets[0]:g}, {offsets[1]:g}, ...: mean dose {result.mean:.2f} Gy, notes: {result.notes}")
sys.exit(0 if seen == {"relative": (15, None), "absolute": (12, None)} else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/histogram.py"
