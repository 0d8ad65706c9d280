#!/usr/bin/env bash
# med-imagetools gives activity in Bq/ml where it was asked for standardised uptake values, and makes negative voxels positive.
#
# PET.from_dicom promises the SUV, activity over injected dose per body weight. It takes the factor from a private element
# of one vendor (7053,1000). Of other vendors' images it logs that the factor is "calculated based on metadata", and takes 1:
# the voxels stay in Bq/ml, though weight, dose, half-life and times are there. Then it takes absolute values: voxels below
# zero, which corrected PET images hold where there is little activity, become activity.
#
# Guess before the run: 5000 Bq/ml in a patient of 70 kg with 350 MBq of F-18, one hour after the injection, is the SUV
# 5000 x 70000 / (350e6 x 2^(-3600/6586.2)) = 1.46; -300 Bq/ml stays below zero.
# Seen with med-imagetools 2.16.0: SUV 5000 and 300; the same for activity (PETImageType.ACT).
# Consulted: the method's docstring (formula; "backup calculation is done based on the formula"), PS3.3, C.8.9.1 and C.8.9.2,
# for the elements, and the QIBA pseudo-code that the docstring names.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install \
  pydicom==3.0.2 SimpleITK==2.5.7 scikit-image==0.26.0 highdicom==0.28.2 pandas==3.0.2 pydantic-settings structlog rich \
  tqdm pytz "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-deps med-imagetools==2.16.0
mkdir "$work/series"
cat > "$work/uptake.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import SimpleITK as sitk
from imgtools.coretypes.imagetypes.pet import PET, PETImageType
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

WEIGHT, DOSE, HALF_LIFE = 70, 350e6, 6586.2
folder, study, series, frame = sys.argv[1], generate_uid(), generate_uid(), generate_uid()
activity = np.full((8, 8), 5000, np.int16)
activity[0, 0] = -300
for index in range(3):
    drug = Dataset()
    drug.RadiopharmaceuticalStartTime, drug.RadionuclideTotalDose, drug.RadionuclideHalfLife = "100000", DOSE, HALF_LIFE
    slice_ = Dataset()
    for name, value in {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.128", "SOPInstanceUID": generate_uid(), "StudyInstanceUID": study,
        "SeriesInstanceUID": series, "FrameOfReferenceUID": frame, "Modality": "PT", "PatientID": "1", "Units": "BQML",
        "PatientWeight": WEIGHT, "DecayCorrection": "START", "CorrectedImage": ["ATTN", "DECY"], "SeriesDate": "20260102",
        "AcquisitionDate": "20260102", "SeriesTime": "110000", "AcquisitionTime": "110000", "SliceThickness": 3,
        "RadiopharmaceuticalInformationSequence": [drug], "ImagePositionPatient": [0, 0, 3 * index], "PixelSpacing": [4, 4],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "InstanceNumber": index + 1, "Rows": 8, "Columns": 8,
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16,
        "HighBit": 15, "PixelRepresentation": 1, "RescaleSlope": 1, "RescaleIntercept": 0, "PixelData": activity.tobytes(),
    }.items():  # fmt: skip
        setattr(slice_, name, value)
    slice_.file_meta = FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slice_.save_as(f"{folder}/{index}.dcm", enforce_file_format=True)

factor = 1000 * WEIGHT / (DOSE * 2 ** (-3600 / HALF_LIFE))
print(f"med-imagetools {version('med-imagetools')}: 5000 and -300 Bq/ml are {5000 * factor:.2f} and {-300 * factor:.2f} SUV")
seen = {}
for kind in (PETImageType.SUV, PETImageType.ACT):
    voxels = sitk.GetArrayFromImage(PET.from_dicom(folder, pet_image_type=kind))
    seen[kind.value] = float(voxels[1, 4, 4]), float(voxels[1, 0, 0])
    print(f"{kind.value}: {seen[kind.value]}")
sys.exit(0 if seen == {"SUV": (5000, 300), "ACT": (5000, 300)} else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/uptake.py" "$work/series"
