#!/usr/bin/env bash
# nvflare's hierarchical statistics take a minimum of 0 for a hospital that has not answered yet.
#
# The server fills its tree with zeros and replaces a value that is 0, in place of comparing, by the next hospital's. A
# hospital whose smallest value is 0, as with lesion volumes, calcium scores or pack years, is forgotten as soon as the
# next one answers; so is a largest value of 0. That minimum is then the low end of the histogram's range, and the
# patients below it are in no bin, not even in that of their own hospital. The count says nothing of it.
#
# Guess before the run: the smallest value of all hospitals, in any order, and a histogram with every patient in it.
# Seen with nvflare 2.9.0, three hospitals with 100 patients each and the smallest values 0, 2 and 3: asked for in this
# order, the global minimum is 2 and the histogram has 245 of the 300 patients; in the order 2, 3, 0 it is 0 and all are
# there. In a run the order is that in which answers arrive. The package's flat controller compares, and has 0.
#
# Source: docstring of get_hierarchical_mins_or_maxs ("min or max at each hierarchical level").
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install --no-compile nvflare==2.9.0 pandas==2.3.3 "numpy<3"
cat > "$work/minimum.py" <<'PYTHON'
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

REGIONS = {"Regions": [{"Name": "North", "Hospitals": ["A", "B"]}, {"Name": "South", "Hospitals": ["C"]}]}
ASKED = {"count": {}, "histogram": {"*": {"bins": 5}}}
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


random = np.random.default_rng(0)
volumes = {
    "A": np.r_[np.zeros(50), random.uniform(0, 40, 50)],
    "B": np.r_[2, random.uniform(2, 40, 99)],
    "C": np.r_[3, random.uniform(3, 40, 99)],
}
seen = {}
print(f"nvflare {version('nvflare')}: smallest values", {name: float(each.min()) for name, each in volumes.items()})
for order in ("ABC", "BCA"):
    result = federation({name: volumes[name] for name in order}, ASKED, REGIONS)["Global"]
    low, bins, count = (result[name]["patients"]["value"] for name in ("min", "histogram", "count"))
    seen[order] = float(low), int(sum(each.sample_count for each in bins))
    print(f"answers in the order {order}: minimum {low:g}; {seen[order][1]} of {count} patients in the histogram")
sys.exit(0 if seen["ABC"][0] == 2 and seen["ABC"][1] < 260 and seen["BCA"] == (0, 300) else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/minimum.py"
