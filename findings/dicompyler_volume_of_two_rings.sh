#!/usr/bin/env bash
# dicompyler-core's CalculateStructureVolume adds holes to a structure where it should take them away.
#
# In each plane it sorts the polygons, takes the first as the only parent, subtracts the polygons that lie inside that one
# and adds all others. Of a structure of two parts with a hole each, as two kidneys without their pelves or shells around two
# lesions, one hole is taken away and the other added. (The end planes count half, by whole square millimetres.) The holes
# are contours of their own, of the type CLOSED_PLANAR as their surroundings: a common way to write them, and the only one
# that the method looks for.
#
# Guess before the run: the volume of two equal rings is twice that of one, as in get_dvh of the same library, which
# combines the contours of a plane by exclusive or.
# Seen with dicompyler-core 0.5.6 and shapely 2.2.0: squares of 30 mm with holes of 20 mm in ten planes 3 mm apart, the
# ends half: one ring 13.5 cm3, which is right, two rings 48.6 instead of 27 cm3, and nothing is said.
# Consulted: the method's docstring (it promises the volume in cm3), its comment (a polygon inside the parent is subtracted)
# and arithmetic.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install dicompyler-core==0.5.6 pydicom==2.4.5 shapely==2.2.0 "numpy<3"
cat > "$work/volume.py" <<'PYTHON'
import sys
from importlib.metadata import version

from dicompylercore.dicomparser import DicomParser
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid


def item(**elements):
    dataset = Dataset()
    for name, value in elements.items():
        setattr(dataset, name, value)
    return dataset


def square(centre, half, z):
    corners = [(centre - half, -half), (centre + half, -half), (centre + half, half), (centre - half, half)]
    points = [float(value) for x, y in corners for value in (x, y, z)]
    return item(ContourGeometricType="CLOSED_PLANAR", NumberOfContourPoints=4, ContourData=points)


def volume(centres):
    contours = [square(centre, half, 3 * plane) for plane in range(10) for centre in centres for half in (15, 10)]
    structures = item(
        SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", Modality="RTSTRUCT",
        ROIContourSequence=[item(ReferencedROINumber=1, ContourSequence=contours)],
    )  # fmt: skip
    structures.file_meta = FileMetaDataset()
    structures.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    structures.SOPInstanceUID = structures.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    structures.file_meta.MediaStorageSOPClassUID = structures.SOPClassUID
    parser = DicomParser(structures)
    planes = parser.GetStructureCoordinates(1)
    return round(parser.CalculateStructureVolume(planes, parser.CalculatePlaneThickness(planes)), 3)


one, two = volume([0]), volume([-20, 20])
ring = (30 * 30 - 20 * 20) * 27 / 1000
print(f"dicompyler-core {version('dicompyler-core')}, shapely {version('shapely')}")
print(f"one ring: {one} cm3, by arithmetic {ring}")
print(f"two rings: {two} cm3, by arithmetic {2 * ring}")
sys.exit(0 if (one, two) == (13.5, 48.6) else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/volume.py"
