#!/usr/bin/env bash
# med-imagetools gives the contours of an RT Structure Set to the names by their place in the file, not by their number.
#
# In DICOM (PS3.3, C.8.8.6) an item of the ROI Contour Sequence says by its Referenced ROI Number which item of the Structure
# Set ROI Sequence it belongs to; no order is prescribed. med-imagetools takes the n-th contours for the n-th name and does
# not read the number. Where a planning system or an editor wrote the two sequences in different orders, the mask of one
# organ is stored under the name of another, without an error.
#
# Guess before the run: the same structures, listed in another order, give the same masks.
# Seen with med-imagetools 2.16.0 and pydicom 3.0.2: ROI 1 "lung" of 81 voxels and ROI 2 "cord" of 9. With their contours in
# the order 1, 2 the masks have 81 and 9 voxels; in the order 2, 1 the lung has 9 and the cord 81.
# Consulted: the standard's section; the docstring of RTStructureSet.from_dicom, which names no order (that of a private
# method says that equal orders are assumed). The reference is the number itself, read with pydicom.
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
cat > "$work/names.py" <<'PYTHON'
import sys
from importlib.metadata import version
from io import BytesIO

import numpy as np
import SimpleITK as sitk
from imgtools.coretypes import MedImage
from imgtools.coretypes.masktypes.roi_matching import ROIMatcher
from imgtools.coretypes.masktypes.structureset import RTStructureSet
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

NAMES = {1: "lung", 2: "cord"}


def item(**elements):
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def square(first, side):
    corners = [(first, 2), (first + side, 2), (first + side, 2 + side), (first, 2 + side)]
    points = [float(value) for x, y in corners for value in (x, y, 1)]
    return item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=4, ContourData=points)


def structure_set(order):
    contours = {1: [square(2, 8)], 2: [square(20, 2)]}
    structures = item(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", SOPInstanceUID=generate_uid(), Modality="RTSTRUCT", PatientID="1",
        StructureSetROISequence=[item(ROINumber=number, ROIName=name) for number, name in NAMES.items()],
        ROIContourSequence=[item(ReferencedROINumber=n, ContourSequence=contours[n]) for n in order],
    )  # fmt: skip
    structures.file_meta = FileMetaDataset()
    structures.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    written = BytesIO()
    structures.save_as(written, enforce_file_format=True)
    written.seek(0)
    return dcmread(written)


image = MedImage(sitk.GetImageFromArray(np.zeros((3, 32, 32), np.int16)))
match = ROIMatcher(match_map={name: [name] for name in NAMES.values()})
print(f"med-imagetools {version('med-imagetools')}, pydicom {version('pydicom')}")
seen = {}
for order in ((1, 2), (2, 1)):
    structures = structure_set(order)
    masks = RTStructureSet.from_dicom(structures).get_vector_mask(image, match)
    channels = {index: roi.roi_key for index, roi in masks.roi_mapping.items() if index}
    found = {name: int(sitk.GetArrayFromImage(masks.extract_mask(index)).sum()) for index, name in channels.items()}
    widths = {}
    for roi in structures.ROIContourSequence:
        points = np.reshape(roi.ContourSequence[0].ContourData, (-1, 3))
        widths[NAMES[roi.ReferencedROINumber]] = float(np.ptp(points[:, 0]))
    print(f"contours in the order {order}: voxels by med-imagetools {found}, width of the contour by number {widths} mm")
    seen[order] = found["lung"], found["cord"]
sys.exit(0 if seen == {(1, 2): (81, 9), (2, 1): (9, 81)} else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/names.py"
