#!/usr/bin/env bash
# nifti-mrs reads the dwell time in the header's unit of time, and writes and checks it as seconds.
#
# The standard allows seconds, milliseconds and microseconds. `dwelltime` is in seconds: its getter turns a pixdim[4] in
# ms or us into seconds, its setter ("Units = seconds") puts the seconds into pixdim[4] and leaves the unit. In a file
# in milliseconds a corrected dwell time is 1000 times too short, even `spectra.dwelltime = spectra.dwelltime`; spectral
# width, time axis and frequencies go with it, and the saved file keeps it. The validator takes the number for seconds
# as well, so that a file in microseconds opens and cannot be saved.
#
# Guess before the run: what was set is what is read, and a valid file can be saved again.
# Seen with nifti-mrs 1.4.1, a spectrum with 0.5 ms between its points: set to 0.0005 s it has 0.0005 s where the
# header's unit is the second, and 5e-07 s where it is the millisecond: a spectral width of 2,000,000 Hz for 2,000 Hz,
# also after saving and loading. In microseconds, saving it as it was opened: "Dwell time (500.0) is unrealistic".
#
# Sources: docstrings of NIFTI_MRS.dwelltime; NIfTI-MRS specification, section 2.1 (units of the dwell time).
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-compile nifti-mrs==1.4.1 "numpy<3"
cat > "$work/dwell.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import nibabel
import numpy as np
from nifti_mrs.create_nmrs import gen_nifti_mrs
from nifti_mrs.nifti_mrs import NIFTI_MRS

DWELL, FILE = 0.0005, str(Path(sys.argv[0]).parent / "spectrum.nii.gz")
signal = np.exp(-20 * DWELL * np.arange(512)).reshape(1, 1, 1, 512).astype(complex)
print(f"nifti-mrs {version('nifti-mrs')}: {DWELL} s between the points")
seen, refused = {}, ""
for unit, parts in (("sec", 1), ("msec", 1e3), ("usec", 1e6)):
    gen_nifti_mrs(signal, DWELL, 123.2).save(FILE)
    image = nibabel.load(FILE)
    image.header.set_xyzt_units(xyz="mm", t=unit)
    image.header["pixdim"][4] = DWELL * parts
    nibabel.save(nibabel.Nifti2Image(np.asarray(image.dataobj), None, image.header), FILE)
    loaded = NIFTI_MRS(FILE)
    try:
        loaded.save(FILE)
    except Exception as problem:
        refused = f"{unit}: opened, not saved unchanged: {problem}"
        print(refused)
        continue
    before = float(loaded.dwelltime)
    loaded.dwelltime = DWELL
    after = float(loaded.dwelltime)
    loaded.save(FILE)
    again = NIFTI_MRS(FILE)
    assert again.header.get_xyzt_units()[1] == unit
    seen[unit] = np.array([before, after * parts, float(again.dwelltime) * parts]) / DWELL  # 1 as stated
    print(f"{unit}: read {before:g} s, after setting it {after:g} s, ", end="")
    print(f"loaded again {float(again.dwelltime):g} s, spectral width {float(again.spectralwidth):,.0f} Hz")
as_stated = list(seen) == ["sec", "msec"] and all(np.allclose(each, 1, rtol=1e-5) for each in seen.values())
sys.exit(0 if as_stated and refused.startswith("usec") and "unrealistic" in refused else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/dwell.py"
