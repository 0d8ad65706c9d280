#!/usr/bin/env bash
# intensity-normalization: what the KDE method finds depends on the unit of the image that it is to free of its unit.
#
# The method looks for the peak of white matter in a smooth histogram and divides the image by it. The width of the smoothing is
# given as the largest intensity over 80; SciPy multiplies that number by the standard deviation of the data. An image with
# intensities up to 1 is smoothed by a hundredth of its deviation, the same image with intensities up to 100, as scanners write
# them, by more than its deviation: the peaks of the tissues melt into one, which lies near the mean of the brain.
#
# Guess before the run: an image and the same image times 100 become the same image, with white matter at 1.
# Seen with intensity-normalization 3.0.1: white matter at 1.00 for intensities about 1, at 1.43 for the same times 100. A kernel
# of the width of max / 80 intensities, by SciPy, gives 1.00 for both.
# Consulted: the package's README ("normalizing MR image intensities"), SciPy's documentation of gaussian_kde (a scalar is a
# factor, not a width), and pull request 88 of the package (2025), which brought the number in and does not speak of this.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install \
  intensity-normalization==3.0.1 scipy==1.17.1 nibabel==5.4.2 scikit-fuzzy==0.5.0 "numpy<3"
cat > "$work/units.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from intensity_normalization import normalize_image
from scipy.signal import argrelmax
from scipy.stats import gaussian_kde

rng = np.random.default_rng(1)
tissue = rng.choice(3, size=(20, 20, 20), p=[0.15, 0.45, 0.4])
image = np.array([0.3, 0.6, 1.0])[tissue] + rng.normal(0, 0.04, tissue.shape)


def last_peak(values):
    """The same search with a kernel whose standard deviation is the largest intensity / 80."""
    values = values[values <= np.percentile(values, 96)]
    grid = np.linspace(values.min(), values.max(), 80)
    density = gaussian_kde(values, values.max() / 80 / values.std(ddof=1))(grid)
    return grid[argrelmax(density)[0][-1]]


print(f"intensity-normalization {version('intensity-normalization')}, scipy {version('scipy')}")
seen = {}
for unit in (1, 100):
    given = (image * unit).astype(np.float32)
    normalised = normalize_image(given, method="kde", modality="t1")
    data = normalised.get_data() if hasattr(normalised, "get_data") else np.asarray(normalised)
    seen[unit] = round(float(data[tissue == 2].mean()), 1)
    expected = given[tissue == 2].mean() / last_peak(given.ravel().astype(float))
    print(f"intensities x {unit}: white matter at {data[tissue == 2].mean():.2f}, with a kernel of that width {expected:.2f}")
sys.exit(0 if seen == {1: 1.0, 100: 1.4} else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/units.py"
