#!/usr/bin/env bash
# Differentially private means of integer columns are cut off to whole numbers by diffprivlib: a share of 30 % is 0.
#
# With `axis` (or `keepdims`), mean, var, std and their NaN forms put the results into an array of the data's own type.
# Of integers (ages in years, 0/1 columns, counts) each noisy result loses its decimals, towards 0. All shares of 0/1
# columns become 0, so do their variances, and the budget is spent. Without `axis` the answer is right, as it is for the
# same numbers as floats; NumPy, which the docstring says it follows, gives decimals.
#
# Guess before the run: means as of NumPy with a little noise; the docstring says of `dtype` "for integer inputs, the
# default is float64".
# Seen with diffprivlib 0.6.6, 2,000 patients, epsilon 10: the columns diabetic, smoker, age have the means 0.302, 0.155
# and 64.805. Of integers diffprivlib gives 0, 0 and 64, of floats 0.302, 0.155 and 64.824; the variances of the first
# two are 0 in place of 0.21 and 0.13. `dtype=float` does not help.
#
# Source: docstrings of mean and var. scikit-learn is held at 1.7.2: with 1.9 the package does not import.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-compile diffprivlib==0.6.6 scikit-learn==1.7.2 \
    "numpy<3"
cat > "$work/means.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from diffprivlib import tools

random = np.random.default_rng(0)
patients = np.column_stack((random.random(2000) < 0.3, random.random(2000) < 0.15, random.integers(40, 90, 2000)))
assert np.issubdtype(patients.dtype, np.integer)
known = {"bounds": ([0, 0, 0], [1, 1, 120]), "epsilon": 10, "axis": 0, "random_state": 0}


def shown(values):
    return np.array2string(np.asarray(values, float), precision=3, suppress_small=True)


print(f"diffprivlib {version('diffprivlib')}, numpy {np.__version__}: diabetic, smoker and age of {len(patients)}")
right, cut = True, True
for name, theirs, plain in (("mean", tools.mean, np.mean), ("variance", tools.var, np.var)):
    true, whole = plain(patients, axis=0), theirs(patients, **known)
    asked, floats = theirs(patients, dtype=float, **known), theirs(patients.astype(float), **known)
    print(f"{name}: true {shown(true)}, of integers {shown(whole)} and {shown(asked)}, of floats {shown(floats)}")
    right &= np.allclose(floats, true, rtol=0.1)
    cut &= np.array_equal(whole, np.trunc(floats)) and np.array_equal(asked, whole) and list(whole[:2]) == [0, 0]
alone = tools.mean(patients[:, 0], bounds=(0, 1), epsilon=10, random_state=0)
print(f"mean of the first column by itself: {alone:.3f}")
sys.exit(0 if right and cut and abs(alone - patients[:, 0].mean()) < 0.01 else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/means.py"
