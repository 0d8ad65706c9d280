#!/usr/bin/env bash
# med-imagetools: a mask asked for by its name is that of the next structure.
#
# A VectorMask holds one channel per structure and gives single masks by number, with 0 for the background, or by name. For a
# name it looks up the place in the list of names, in which the background comes first, and takes the channel of that place,
# where the background has none: extract_mask("lung") is the mask of the structure after the lung, and its metadata name the
# lung. By number it is right. (The last name has no next one and is not asked for here.)
#
# Guess before the run: a mask by name is that by number, as in the docstring's example, where both give the "Lung".
# Seen with med-imagetools 2.16.0: lung, heart and cord of 100, 20 and 5 voxels: by number 100, 20 and 5; by name the lung
# has 20 and the heart 5, labelled lung and heart.
# Consulted: the docstring of VectorMask.extract_mask.
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
cat > "$work/next.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import SimpleITK as sitk
from imgtools.coretypes.base_masks import ROIMaskMapping, VectorMask

SIZES = {"lung": 100, "heart": 20, "cord": 5}
channels = []
for start, size in zip((0, 200, 300), SIZES.values(), strict=True):
    voxels = np.zeros(1000, np.uint8)
    voxels[start : start + size] = 1
    channels.append(sitk.GetImageFromArray(voxels.reshape(10, 10, 10)))
names = {index: ROIMaskMapping(name, [name], name) for index, name in enumerate(SIZES)}
masks = VectorMask(sitk.Compose(channels), names, metadata={})
print(f"med-imagetools {version('med-imagetools')}, SimpleITK {version('SimpleITK')}: {SIZES}, keys {masks.roi_keys}")
seen = {}
for key in (1, 2, 3, "lung", "heart"):
    mask = masks.extract_mask(key)
    seen[key] = int(sitk.GetArrayFromImage(mask).sum()), mask.metadata["ROINames"]
    print(f"extract_mask({key!r}): {seen[key][0]} voxels, named {seen[key][1]!r}")
expected = {1: (100, "lung"), 2: (20, "heart"), 3: (5, "cord"), "lung": (20, "lung"), "heart": (5, "heart")}
sys.exit(0 if seen == expected else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/next.py"
