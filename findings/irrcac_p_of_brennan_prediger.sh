#!/usr/bin/env bash
# The p value of Brennan and Prediger's coefficient is one-sided in irrCAC, those of its neighbours are two-sided.
#
# Of ratings, `CAC.bp` gives half the p value of the test that gwet, fleiss, conger and krippendorff report for theirs,
# beside the same two-sided interval: agreement is "significant" while the interval contains 0. Of the same ratings as a
# table, `bp` is two-sided; but there every coefficient except Cohen's takes a negative value as 0 in its p value, so
# that two readers who contradict each other far more often than by chance have p = 1.
#
# Guess before the run: one rule, p below 0.05 where the 95 % interval leaves 0 out.
# Seen with irrCAC 0.4.4, 60 patients, two readers, two classes. They agree on 37: bp is 0.2333 (-0.02 to 0.49) with
# p = 0.035 of the ratings, 0.068 of the table; gwet has 0.070 and 0.068. They agree on 15: bp of the table is -0.50
# (-0.72 to -0.28) with p = 1.000, where 0.00004 is right; gwet has 1.000 too, cohen 0.00004.
#
# The reference is Student's t of the coefficient over its standard error; gwet of ratings and cohen of tables, in the
# same package, follow it on both sides.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-compile irrCAC==0.4.4
cat > "$work/readers.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd
from irrCAC.raw import CAC as Ratings
from irrCAC.table import CAC as Table
from scipy import stats

PATIENTS = 60
first = np.arange(PATIENTS) % 2
print(f"irrCAC {version('irrCAC')}: {PATIENTS} patients, two readers, two classes")
seen = {}
for agreed in (37, 15):
    second = np.where(np.arange(PATIENTS) < agreed, first, 1 - first)
    ratings = pd.DataFrame({"first": first, "second": second})
    table = pd.crosstab(ratings["first"], ratings["second"])
    answers = {"ratings bp": Ratings(ratings).bp(), "ratings gwet": Ratings(ratings).gwet()}
    answers |= {"table bp": Table(table).bp(), "table gwet": Table(table).gwet(), "table cohen": Table(table).cohen()}
    for method, answer in answers.items():
        value, error, p = (float(answer["est"][key]) for key in ("coefficient_value", "se", "p_value"))
        low, high = (float(each) for each in answer["est"]["confidence_interval"])
        right = 2 * stats.t.sf(abs(value / error), PATIENTS - 1)
        seen[agreed, method] = low < 0 < high, p, right
        print(f"{agreed} agreed, {method}: {value:.4f} ({low:.2f} to {high:.2f}), p {p:.5f}, two-sided {right:.5f}")
crosses, p, right = seen[37, "ratings bp"]
as_stated = crosses and p < 0.05 and abs(p / right - 0.5) < 0.01
usual = [seen[37, method][1:] for method in ("ratings gwet", "table bp", "table gwet", "table cohen")]
as_stated &= all(abs(p / right - 1) < 0.02 for p, right in usual)
as_stated &= all(seen[15, method][1] == 1 and seen[15, method][2] < 0.001 for method in ("table bp", "table gwet"))
sys.exit(0 if as_stated and seen[15, "table cohen"][1] < 0.001 else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/readers.py"
