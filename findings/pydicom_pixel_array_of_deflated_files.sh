#!/usr/bin/env bash
# pydicom 3.0.2 says of a deflated DICOM file that it has no pixel data, where it is asked for pixels by path.
#
# pydicom.pixels.pixel_array(path) reads a file's pixels without its whole data set, so that one frame of many costs one
# frame's memory. Deflated Explicit VR Little Endian (PS3.5, A.5) packs the data set itself; dcmread unpacks it, this
# reader looks at the packed bytes, warns of an unexpected VR, and ends with an AttributeError that there is no Pixel
# Data element. The same pixels without deflating are read right.
#
# Guess before the run: the same values as dcmread(path).pixel_array, as for every other transfer syntax of native pixels.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install pydicom==3.0.2 "numpy<3"
cat > "$work/read.py" <<'PYTHON'
import sys

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pixel_array
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    generate_uid,
)

FRAMES = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)


def write(path, syntax):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MultiFrameGrayscaleByteSecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = generate_uid(), syntax
    item = Dataset()
    item.file_meta = meta
    item.SOPClassUID, item.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    item.PatientID, item.PatientName, item.Modality = "", "", "OT"
    item.StudyInstanceUID, item.SeriesInstanceUID = generate_uid(), generate_uid()
    item.NumberOfFrames, item.Rows, item.Columns = FRAMES.shape
    item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
    item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 8, 8, 7, 0
    item.PixelData = FRAMES.tobytes()
    item.save_as(path, enforce_file_format=True)


seen = {}
for name, syntax in (("native", ExplicitVRLittleEndian), ("deflated", DeflatedExplicitVRLittleEndian)):
    path = f"{sys.argv[1]}/{name}.dcm"
    write(path, syntax)
    whole = np.array_equal(pydicom.dcmread(path).pixel_array, FRAMES)
    try:
        by_path = "equal" if np.array_equal(pixel_array(path, index=1), FRAMES[1]) else "other values"
    except AttributeError as error:
        by_path = "no pixel data" if "no 'Pixel Data'" in str(error) else str(error)
    seen[name] = whole, by_path
    print(f"{name}: dcmread is right: {whole}; pixel_array(path, index=1): {by_path}")
sys.exit(0 if seen == {"native": (True, "equal"), "deflated": (True, "no pixel data")} else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/read.py" "$work"
