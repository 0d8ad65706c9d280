#!/usr/bin/env bash
# Krippendorff's alpha of ratings in unsigned integers is wrong in krippendorff: 0.36 where it is 0.79.
#
# The interval metric, the default, takes the difference of two values in the type they come in and only then makes it a
# float. In uint8, the type of masks and of labels read from images, 1 - 2 is 255: every pair of unequal ratings counts
# twice, once as it is and once as nearly 256 apart. The ratio metric does the same, and adds up in bytes as well. The
# nominal and ordinal alphas are right, so that the figure looks like readers who agree on the order alone. Unsigned
# integers are accepted by name; `dtype`, "computation data-type", does not reach the difference.
#
# Guess before the run: alpha depends on the values, not on the type they are stored in.
# Seen with krippendorff 0.9.0, 40 lesions, three readers who miss a grade of five by one at most: interval alpha 0.7883
# from int64 and floats, 0.3604 from uint8 and 0.3645 from uint16, the nominal alpha; ratio alpha 0.7294 and 0.1792. Of
# percentages in steps of five, interval 0.9892 from int64 and 0.2643 from uint8, ratio 0.9190 and -1.0719.
#
# The reference is the definition: mean squared difference within lesions over that of all pairs, from NumPy floats.
# Source: docstring of alpha (reliability_data, level_of_measurement, dtype).
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-compile krippendorff==0.9.0 "numpy<3"
cat > "$work/bytes.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from krippendorff import alpha

READERS, LESIONS = 3, 40


def defined(ratings):
    """Interval alpha of complete ratings: squared differences of pairs within a lesion over those of all pairs."""
    values = ratings.astype(float)
    within = sum(((values[a] - values[b]) ** 2).mean() for a in range(READERS) for b in range(READERS) if a != b)
    pooled = values.ravel()
    number = pooled.size
    overall = ((pooled[:, None] - pooled[None]) ** 2).sum() / (number * (number - 1))
    return 1 - within / (READERS * (READERS - 1)) / overall


random = np.random.default_rng(0)
grades = np.clip(random.integers(1, 6, LESIONS) + random.integers(-1, 2, (READERS, LESIONS)), 1, 5)
shares = np.clip(random.integers(0, 11, LESIONS) * 10 + random.integers(-1, 2, (READERS, LESIONS)) * 5, 0, 100)
print(f"krippendorff {version('krippendorff')}, numpy {np.__version__}: {LESIONS} lesions, {READERS} readers")
seen = {}
for name, ratings in (("grades", grades), ("percentages", shares)):
    print(f"{name}: interval alpha by definition {defined(ratings):.4f}")
    for kind in (float, np.int64, np.uint16, np.uint8):
        levels = {level: alpha(ratings.astype(kind), level_of_measurement=level) for level in ("nominal", "ordinal")}
        levels |= {level: alpha(ratings.astype(kind), level_of_measurement=level) for level in ("interval", "ratio")}
        seen[name, kind] = levels
        print(f"  {kind.__name__}: " + ", ".join(f"{level} {value:.4f}" for level, value in levels.items()))
    assert np.isclose(seen[name, float]["interval"], defined(ratings))
asked = alpha(grades.astype(np.uint8), level_of_measurement="interval", dtype=np.float64)
apart = all(
    seen[name, float]["interval"] - seen[name, np.uint8]["interval"] > 0.3
    and seen[name, float]["ratio"] - seen[name, np.uint8]["ratio"] > 0.3
    for name in ("grades", "percentages")
)
same = np.isclose(seen["grades", np.uint8]["ordinal"], seen["grades", float]["ordinal"])
same &= np.isclose(seen["grades", np.int64]["interval"], seen["grades", float]["interval"])
sys.exit(0 if apart and same and asked == seen["grades", np.uint8]["interval"] else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/bytes.py"
