#!/usr/bin/env bash
# nifti-mrs: reshaping spectra leaves a header that gives them other echo times.
#
# A header of NIfTI-MRS describes each higher dimension by a list of values or, in the short form, by a start and an increment
# (dim_5_header). reshape() keeps the header as it was. A list of the old length is then refused. Start and increment fit any
# length: they now count the first new dimension, whose steps are several old ones apart, and the second one has none.
#
# Guess before the run: the values are recomputed or refused, in the short form as in the list form.
# Seen with nifti-mrs 1.4.1: six spectra of 30, 40, ..., 80 ms reshaped to 2 x 3. List: an error. Short form: no error, and the
# file says 30 ms for the first three spectra (30, 40, 50) and 40 ms for the others (60, 70, 80).
# Consulted: the docstring of reshape, and the NIfTI-MRS standard (Clarke et al. 2022, doi 10.1002/mrm.29418) for the two
# forms.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install nifti-mrs==1.4.1 nibabel==5.4.2 "numpy<3"
cat > "$work/echoes.py" <<'PYTHON'
import json
import sys
from importlib.metadata import version

import nibabel as nib
import numpy as np
from nifti_mrs.create_nmrs import gen_nifti_mrs
from nifti_mrs.tools import reshape
from nifti_mrs.validator import headerExtensionError

TIMES = np.array([0.03, 0.04, 0.05, 0.06, 0.07, 0.08])


def reshaped(echo_times):
    """Each spectrum holds its echo time in its first point."""
    spectra = np.zeros((1, 1, 1, 16, TIMES.size), np.complex64)
    spectra[0, 0, 0, 0] = TIMES
    given = gen_nifti_mrs(spectra, 1 / 2000, 123.2, dim_tags=["DIM_DYN", None, None])
    given.set_dim_tag("DIM_DYN", "DIM_DYN", header={"EchoTime": echo_times})
    reshape(given, (2, 3), d6="DIM_EDIT").save(sys.argv[1])
    image = nib.load(sys.argv[1])
    header = json.loads(image.header.extensions[0].get_content())
    description = header["dim_5_header"]["EchoTime"]
    return [
        (round(description["start"] + index * description["increment"], 3), block.real.astype(float).round(3).tolist())
        for index, block in enumerate(np.asarray(image.dataobj)[0, 0, 0, 0])
    ]


print(f"nifti-mrs {version('nifti-mrs')}, nibabel {version('nibabel')}: echo times {TIMES.tolist()}, 6 to 2 x 3")
try:
    refused = not reshaped(TIMES.tolist())
except headerExtensionError as error:
    refused = True
    print("list:", error)
seen = reshaped({"start": 0.03, "increment": 0.01})
for named, held in seen:
    print(f"start and increment: the header says {named} s of the spectra of {held} s")
sys.exit(0 if refused and seen == [(0.03, [0.03, 0.04, 0.05]), (0.04, [0.06, 0.07, 0.08])] else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/echoes.py" "$work/reshaped.nii.gz"
