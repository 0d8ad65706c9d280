#!/usr/bin/env bash
# intensity-normalization: its classes take the names of tissues and modalities as text, and do not heed them.
#
# The README gives FCMNormalizer(tissue_type="wm"). The class compares with members of an enumeration, which no text equals: "gm"
# and "csf" are white matter too, without an error, and so is any other word. A modality given as text to KDENormalizer is
# treated as T1. The function normalize_image turns text into members first and is right.
#
# Guess before the run: FCMNormalizer(tissue_type="gm") puts the mean of grey matter at 1, as normalize_image does.
# Seen with intensity-normalization 3.0.1: an image of cerebrospinal fluid, grey and white matter at 300, 600 and 1000.
# FCMNormalizer with "gm" puts grey matter at .60 and white at 1.00; normalize_image puts grey at 1.00.
# Consulted: the package's README, section of the object-oriented API.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install \
  intensity-normalization==3.0.1 scipy==1.17.1 nibabel==5.4.2 scikit-fuzzy==0.5.0 "numpy<3"
cat > "$work/tissues.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from intensity_normalization import FCMNormalizer, TissueType, create_image, normalize_image

rng = np.random.default_rng(1)
tissue = rng.choice(3, size=(20, 20, 20), p=[0.15, 0.45, 0.4])
image = np.array([300.0, 600.0, 1000.0])[tissue] + rng.normal(0, 20, tissue.shape)


def means(normalised):
    data = normalised.get_data() if hasattr(normalised, "get_data") else np.asarray(normalised)
    return [round(float(data[tissue == index].mean()), 1) for index in range(3)]


print(f"intensity-normalization {version('intensity-normalization')}: means of fluid, grey and white matter")
seen = []
for name in ("csf", "gm", "wm"):
    by_text = means(FCMNormalizer(tissue_type=name).fit_transform(create_image(image)))
    by_member = means(FCMNormalizer(tissue_type=TissueType(name)).fit_transform(create_image(image)))
    by_function = means(normalize_image(image, method="fcm", tissue_type=name))
    print(f"{name}: class with text {by_text}, with a member {by_member}; function with text {by_function}")
    seen.append((by_text, by_member[len(seen)], by_function[len(seen)]))
sys.exit(0 if seen == [([0.3, 0.6, 1.0], 1.0, 1.0)] * 3 else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/tissues.py"
