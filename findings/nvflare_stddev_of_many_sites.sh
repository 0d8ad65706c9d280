#!/usr/bin/env bash
# nvflare rounds variances, not standard deviations: with many hospitals, or of small values, the global one is 0.
#
# `precision` is "number of precision digits", 4 unless set, and FedStatsRecipe has no way to set it. Each hospital
# rounds its part of the global variance to that many decimals, the server rounds the sum, and only then is the root
# taken. The root of 0.0001 is 0.01: what is below 0.007 is 0, and the more hospitals, the smaller the parts that are
# rounded. The hospitals' own deviations are rounded as such, and are right in the same report.
#
# Guess before the run: the standard deviation of all patients, to 4 decimals, however they are spread over hospitals.
# Seen with nvflare 2.9.0: 1,200 ejection fractions as shares (0.60 with a deviation of 0.03) over 1, 6, 12, 24 and 40
# hospitals: 0.0300, 0.0300, 0.0332, 0.0141 and 0. Diffusion coefficients in mm2/s over 3 hospitals: each has 0.0002 to
# 0.0003, all together 0.0. Who normalises by mean and deviation of the federation divides by it.
#
# Source: docstring of StatisticsController. The reference is NumPy's. FedStatsRecipe in the simulator gives 0.0 too.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-compile nvflare==2.9.0 pandas==2.3.3 "numpy<3"
cat > "$work/deviations.py" <<'PYTHON'
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

ASKED = {"count": {}, "sum": {}, "mean": {}, "stddev": {}}
numpy_decomposers.register()


class Hospital(DFStatisticsCore):
    def __init__(self, values):
        super().__init__()
        self.data = {"patients": pd.DataFrame({"value": values})}


def federation(hospitals, asked):
    """The server's two rounds of questions and each hospital's answers, as in a run, without the network."""
    server = StatisticsController(asked, "writer")
    for task in (Names.STATS_1st_STATISTICS, Names.STATS_2nd_STATISTICS):
        question = server._prepare_inputs(task)
        for name, values in hospitals.items():
            site = StatisticsTaskHandler("statistics")
            site.stats_generator = Hospital(values)
            answer = site.execute_task(Names.FED_STATS_TASK, question, FLContext(), None)
            for statistic, value in fobs.loads(answer[task]).items():
                server.client_statistics.setdefault(statistic, {})[name] = value
        known = server.global_statistics, server.client_statistics, task
        server.global_statistics = get_global_stats(*known, asked)
    return server._combine_all_statistics()


random = np.random.default_rng(0)
fractions, diffusion = random.normal(0.6, 0.03, 1200), random.normal(0.001, 0.00025, 300)
print(f"nvflare {version('nvflare')}: standard deviations, precision of 4 decimals")
seen = {}
for name, values, numbers in (("ejection fraction", fractions, (1, 6, 12, 24, 40)), ("diffusion", diffusion, (3,))):
    for number in numbers:
        split = {f"hospital {i}": each for i, each in enumerate(np.array_split(values, number), 1)}
        reported = federation(split, ASKED)["value"]["stddev"]
        together = reported.pop("Global")["patients"]
        alone = [each["patients"] for each in reported.values()]
        seen[name, number] = together, min(alone)
        own = f"hospitals' own {min(alone):.4f} to {max(alone):.4f}"
        print(f"{name}, {number} hospitals: global {together:.4f}, true {values.std(ddof=1):.4f}; {own}")
gone = seen["ejection fraction", 40], seen["diffusion", 3]
near = abs(seen["ejection fraction", 1][0] - 0.03) < 0.001
sys.exit(0 if near and all(together == 0 < alone for together, alone in gone) else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/deviations.py"
