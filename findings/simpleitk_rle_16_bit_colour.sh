#!/usr/bin/env bash
# SimpleITK 2.5.7 mixes the bytes of RGB DICOM images of 16 bits that are packed as RLE.
#
# RLE Lossless (PS3.5, Annex G) keeps each byte of each colour as a segment of its own, the upper byte first: six
# segments for RGB of 16 bits. A pure red pixel, (65535, 0, 0), comes back as (0, 65280, 255): neither the colour nor its
# brightness is kept, and nothing is said. 8 bits are right.
#
# Guess before the run: the same values as pydicom's, as for every other packing of these test images.
# Seen with SimpleITK 2.5.7 and pydicom 3.0.2 on pydicom's own test file SC_rgb_rle_16bit.dcm; the same pixels
# uncompressed SimpleITK reads right.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install SimpleITK==2.5.7 pydicom==3.0.2 "numpy<3"
cat > "$work/read.py" <<'PYTHON'
import sys

import pydicom
import SimpleITK
from pydicom.data import get_testdata_file

packed = get_testdata_file("SC_rgb_rle_16bit.dcm", download=False)
plain = sys.argv[1] + "/plain.dcm"
pydicom.dcmread(packed).save_as(plain)
unpacked = pydicom.dcmread(plain)
unpacked.decompress()
unpacked.save_as(plain)
seen = {}
for name, path in (("RLE", packed), ("uncompressed", plain)):
    theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)).reshape(-1, 3)[0]
    ours = pydicom.dcmread(path).pixel_array.reshape(-1, 3)[0]
    seen[name] = tuple(map(int, theirs)), tuple(map(int, ours))
    print(f"{name}: first pixel by SimpleITK {seen[name][0]}, by pydicom {seen[name][1]}")
expected = {"RLE": ((0, 65280, 255), (65535, 0, 0)), "uncompressed": ((65535, 0, 0), (65535, 0, 0))}
sys.exit(0 if seen == expected else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/read.py" "$work"
