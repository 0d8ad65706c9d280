#!/usr/bin/env bash
# dosemetrics places the planes of an RT Dose by its Slice Thickness, and always upwards.
#
# In DICOM the planes of a dose lie where the Grid Frame Offset Vector says (PS3.3, C.8.8.3.2), and its offsets may fall.
# Slice Thickness is another element, often the thickness of the CT slices. dosemetrics takes it for the distance of the planes
# wherever it is filled, else the absolute difference of the first two offsets. Without a CT series in the folder the contours
# are drawn on this grid: they come to lie on other planes of the dose, or, where offsets fall, on none.
#
# Guess before the run: the mean dose of a structure depends neither on the Slice Thickness nor on the order of the planes.
# Seen with dosemetrics 0.4.1: planes of 10 to 19 Gy, 3 mm apart, contours on those of 14, 15 and 16 Gy: mean 15 Gy. With a
# Slice Thickness of 6 mm it is 12.5 Gy; with the same planes stored from the top down 0 Gy; no error in either case.
# Consulted: the standard's section, the docstring of read_dicom_rtdose (spacing "in mm"), and SimpleITK as a second reader:
# 15 Gy at the middle of the contours in all three.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install numpy==1.26.4 scipy==1.15.3 pandas==2.3.3 numba==0.62.1 \
  SimpleITK==2.5.7 pydicom==3.0.2 scikit-image==0.25.2 matplotlib==3.8.4 pillow==10.4.0 pyyaml
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-deps dosemetrics==0.4.1
cat > "$work/planes.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from dosemetrics import Dose, load_structure_set
from dosemetrics.metrics.dvh import compute_dose_statistics
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

PLANES = 10


def item(**elements):
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def write(dataset, path):
    dataset.SOPInstanceUID, dataset.PatientID = generate_uid(), "1"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path.parent.mkdir(parents=True)
    dataset.save_as(path, enforce_file_format=True)


def doses(folder, thickness, from_the_top=False):
    values = np.zeros((PLANES, 20, 20), "<u4") + 10 + np.arange(PLANES, dtype="<u4")[:, None, None]
    offsets = 3.0 * np.arange(PLANES)
    write(item(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.481.2", Modality="RTDOSE", DoseUnits="GY", DoseType="PHYSICAL",
        DoseSummationType="PLAN", ImagePositionPatient=[-19, -19, 27 if from_the_top else 0], PixelSpacing=[2, 2],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0], GridFrameOffsetVector=list(-offsets if from_the_top else offsets),
        FrameIncrementPointer=0x3004000C, SliceThickness=thickness, Rows=20, Columns=20, NumberOfFrames=PLANES,
        SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2", BitsAllocated=32, BitsStored=32, HighBit=31,
        PixelRepresentation=0, DoseGridScaling=1, PixelData=(values[::-1] if from_the_top else values).tobytes(),
    ), folder / "RTDOSE" / "dose.dcm")  # fmt: skip
    corners = [(-8, -8), (8, -8), (8, 8), (-8, 8)]
    contours = [
        item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=4,
             ContourData=[float(value) for x, y in corners for value in (x, y, 3 * plane)])
        for plane in (4, 5, 6)
    ]  # fmt: skip
    write(item(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", Modality="RTSTRUCT",
        StructureSetROISequence=[item(ROINumber=1, ROIName="cord")],
        ROIContourSequence=[item(ReferencedROINumber=1, ContourSequence=contours)],
    ), folder / "RTSTRUCT" / "structures.dcm")  # fmt: skip
    dose = Dose.from_dicom(folder / "RTDOSE" / "dose.dcm")
    mean = compute_dose_statistics(dose, load_structure_set(folder).get_structure("cord"))["mean_dose"]
    image = sitk.ReadImage(str(folder / "RTDOSE" / "dose.dcm"))
    return mean, image.GetPixel(image.TransformPhysicalPointToIndex((0, 0, 15)))


print(f"dosemetrics {version('dosemetrics')}, SimpleITK {version('SimpleITK')}: planes of 14, 15 and 16 Gy")
seen = []
for name, given in {"no thickness": (None,), "thickness of 6 mm": (6,), "from the top down": (None, True)}.items():
    mean, middle = doses(Path(sys.argv[1]) / name, *given)
    print(f"{name}: mean dose {mean:.1f} Gy; SimpleITK reads {middle} Gy in the middle")
    seen.append((round(mean, 1), middle))
sys.exit(0 if seen == [(15, 15), (12.5, 15), (0, 15)] else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/planes.py" "$work"
