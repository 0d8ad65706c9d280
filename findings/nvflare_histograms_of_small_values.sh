#!/usr/bin/env bash
# nvflare's global histogram of small values counts more patients than there are, whatever precision is asked for.
#
# `precision` of StatisticsController is "number of precision digits"; get_global_stats hands it to every statistic but
# the histogram, which is added up by the edges of its bins, rounded to 4 decimals. Bins narrower than that have the
# same edges, and each of them gets a sum over all that share them. So it goes for concentrations in mol/l, diffusion
# coefficients in mm2/s and shares of rare findings. The hospitals' own histograms in the same report are right.
#
# Guess before the run: with precision=8 the global histogram is the sum of the hospitals' ones, bin for bin.
# Seen with nvflare 2.9.0, creatinine of 300 patients of 3 hospitals in 20 bins from 0 to 0.0002 mol/l: the global
# histogram has 1,537 patients, and 18 of its bins have no width; "count" is 300. In umol/l the histogram has 300 too.
#
# Source: docstring of StatisticsController (precision). The reference is NumPy's histogram of all patients.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-compile nvflare==2.9.0 pandas==2.3.3 "numpy<3"
cat > "$work/histograms.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import StatisticsConstants as Names
from nvflare.app_common.decomposers import numpy_decomposers
from nvflare.app_common.executors.statistics.statistics_task_handler import StatisticsTaskHandler
from nvflare.app_common.statistics.numeric_stats import get_global_stats
from nvflare.app_common.workflows.statistics_controller import StatisticsController
from nvflare.app_opt.statistics.df.df_core_statistics import DFStatisticsCore
from nvflare.fuel.utils import fobs

BINS, PRECISION = 20, 8
numpy_decomposers.register()


class Hospital(DFStatisticsCore):
    def __init__(self, values):
        super().__init__()
        self.data = {"patients": pd.DataFrame({"value": values})}


def federation(hospitals, asked):
    """The server's two rounds of questions and each hospital's answers, as in a run, without the network."""
    server = StatisticsController(asked, "writer", precision=PRECISION)
    for task in (Names.STATS_1st_STATISTICS, Names.STATS_2nd_STATISTICS):
        question = server._prepare_inputs(task)
        for name, values in hospitals.items():
            site = StatisticsTaskHandler("statistics")
            site.stats_generator = Hospital(values)
            answer = site.execute_task(Names.FED_STATS_TASK, question, FLContext(), None)
            for statistic, value in fobs.loads(answer[task]).items():
                server.client_statistics.setdefault(statistic, {})[name] = value
        known = server.global_statistics, server.client_statistics, task, asked
        server.global_statistics = get_global_stats(*known, precision=server.precision)
    return server._combine_all_statistics()["value"]


random = np.random.default_rng(0)
creatinine = np.clip(random.normal(80, 20, 300), 0, 200)
print(f"nvflare {version('nvflare')}: precision={PRECISION}, creatinine of {len(creatinine)} patients, {BINS} bins")
seen = {}
for unit, factor in (("umol/l", 1), ("mol/l", 1e-6)):
    values, ends = creatinine * factor, [0, 200 * factor]
    split = dict(zip("ABC", np.array_split(values, 3), strict=True))
    asked = {"count": {}, "histogram": {"*": {"bins": BINS, "range": ends}}}
    report = federation(split, asked)
    true, _ = np.histogram(values, bins=BINS, range=ends)
    counts = {name: [row[2] for row in each["patients"]] for name, each in report["histogram"].items()}
    own = np.sum([counts[name] for name in "ABC"], axis=0)
    flat = sum(row[0] == row[1] for row in report["histogram"]["Global"]["patients"])
    seen[unit] = list(own) == list(true), list(counts["Global"]) == list(true), sum(counts["Global"])
    number = report["count"]["Global"]["patients"]
    print(f"{unit}: count {number}, NumPy's histogram {true.sum()}, hospitals' together {own.sum()}, ", end="")
    print(f"global {seen[unit][2]}; {flat} of its bins have no width")
sys.exit(0 if seen["umol/l"] == (True, True, 300) and seen["mol/l"][0] and seen["mol/l"][2] > 400 else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/histograms.py"
