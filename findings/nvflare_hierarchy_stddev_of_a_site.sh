#!/usr/bin/env bash
# The standard deviations of nvflare's hierarchical statistics are right for the whole federation alone.
#
# Each hospital answers with the sum of squares about the mean of all hospitals, divided by the number of all patients
# less one: its part of the global variance. The hierarchical controller files that part as the hospital's own `var` and
# its root as its `stddev`, and sums parts to a region's. A hospital with a quarter of the patients seems to vary half
# as much; one that lies far from the others is measured about a mean that is not its own. The counts, sums and means
# beside it are the hospital's and the region's.
#
# Guess before the run: `Local` has the standard deviation of the hospital, a region's `Global` that of its patients.
# Seen with nvflare 2.9.0, four hospitals of 100 patients, means of 50 and 55, deviations of 9.3 to 11.2: reported are
# 4.8 to 5.6, half of them, and of the two regions 7.0 and 7.4 in place of 9.6 and 10.3. The 10.15 of all patients is
# right. Who sets windows, outlier bounds or a hospital's normalisation by these has them half as wide.
#
# Source: docstring of HierarchicalStatisticsController ("global statistics in given hierarchical order") and of
# get_hierarchical_stddevs ("stddevs at each hierarchical level"). The reference is NumPy's, with one degree of freedom.
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
from nvflare.app_common.statistics.hierarchical_numeric_stats import get_global_stats
from nvflare.app_common.workflows.hierarchical_statistics_controller import HierarchicalStatisticsController
from nvflare.app_opt.statistics.df.df_core_statistics import DFStatisticsCore
from nvflare.fuel.utils import fobs

PATIENTS = {"A": (50, 100), "B": (50, 100), "C": (55, 100), "D": (55, 100)}
REGIONS = {"Regions": [{"Name": "North", "Hospitals": ["A", "B"]}, {"Name": "South", "Hospitals": ["C", "D"]}]}
ASKED = {"count": {}, "sum": {}, "mean": {}, "stddev": {}}
numpy_decomposers.register()


class Hospital(DFStatisticsCore):
    def __init__(self, values):
        super().__init__()
        self.data = {"patients": pd.DataFrame({"value": values})}


def federation(hospitals, asked, regions):
    """The server's two rounds of questions and each hospital's answers, as in a run, without the network."""
    server = HierarchicalStatisticsController(asked, "writer")
    for task in (Names.STATS_1st_STATISTICS, Names.STATS_2nd_STATISTICS):
        question = server._prepare_inputs(task)
        for name, values in hospitals.items():
            site = StatisticsTaskHandler("statistics")
            site.stats_generator = Hospital(values)
            answer = site.execute_task(Names.FED_STATS_TASK, question, FLContext(), None)
            for statistic, value in fobs.loads(answer[task]).items():
                server.client_statistics.setdefault(statistic, {})[name] = value
        known = server.global_statistics, server.client_statistics, task
        server.global_statistics = get_global_stats(*known, regions)
    return server._combine_all_statistics()


def same(reported, values):
    shown = reported["stddev"]["patients"]["value"]
    assert abs(reported["mean"]["patients"]["value"] - values.mean()) < 1e-3
    print(f"  mean {values.mean():.1f}, stddev reported {shown:.2f}, true {values.std(ddof=1):.2f}")
    return abs(shown / values.std(ddof=1) - 1) < 0.01


random = np.random.default_rng(0)
hospitals = {name: random.normal(mean, 10, count) for name, (mean, count) in PATIENTS.items()}
result = federation(hospitals, ASKED, REGIONS)
print(f"nvflare {version('nvflare')}: all patients")
right, wrong = [same(result["Global"], np.concatenate(list(hospitals.values())))], []
for region in result["Regions"]:
    print(f"region {region['Name']}")
    members = [each["Name"] for each in region["Hospitals"]]
    wrong.append(same(region["Global"], np.concatenate([hospitals[name] for name in members])))
    for each in region["Hospitals"]:
        print(f"hospital {each['Name']}, {len(hospitals[each['Name']])} patients")
        wrong.append(same(each["Local"], hospitals[each["Name"]]))
sys.exit(0 if all(right) and not any(wrong) else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/deviations.py"
