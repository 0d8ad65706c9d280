"""Shared noise alone: what a site's part takes to draw, and what is on the mean of all against noise of each one's own.

    python benchmarks/shared_noise.py [--sites 3 6 20] [--numbers 1000000] [--colluders 1] [--json]

The noise multiplier is the same for both: what hides one unit from whoever sees the sum, and what hides it from whoever
sees that site's own update. Time is that of one processor.
"""

from __future__ import annotations

import argparse
import json
import math
import secrets
import time
from typing import Any

import numpy as np

from fedvfm.config import privacy
from fedvfm.config import secure_aggregation as secure_config
from fedvfm.privacy import randomness
from fedvfm.secure_aggregation import discrete_gaussian, fixed_point, shared_noise
from fedvfm.state import state

CLIP, MULTIPLIER = 1.0, 1.0


def measure(sites: int, size: int, colluders: int) -> dict[str, Any]:
    """One round of so many sites whose updates are zero, so that the mean is noise."""
    secure = secure_config.SecureAggregation(colluders=colluders)
    honest = shared_noise.honest(sites, secure)
    noise = shared_noise.SharedNoise(MULTIPLIER, honest, CLIP, CLIP, rounded=False)
    point, start = fixed_point.FixedPoint(CLIP, 1, noise), state.AdapterState({"w": np.zeros(size, np.float32)})
    plain, total, taken = point.encode(start, start, ["w"], 1, None), np.zeros(size + fixed_point.TAIL, np.uint64), []
    for _ in range(sites):
        key, began = secrets.token_bytes(discrete_gaussian.KEY_SIZE), time.process_time()
        total += point.noised(plain, start, ["w"], key)
        taken.append(time.process_time() - began)
    shared = float(np.std(point.decode(total, start, ["w"], sites).state["w"]))
    system = randomness.System()
    alone = float(np.std(sum(MULTIPLIER * CLIP * system.normal(size) for _ in range(sites)) / sites))
    return {
        "sites": sites,
        "honest": honest,
        "numbers": size,
        "seconds_a_site": round(float(np.median(taken)), 2),
        "on_mean_shared": round(shared, 4),
        "on_mean_alone": round(alone, 4),
        "times_less": round(alone / shared, 3),
        "sqrt_honest": round(math.sqrt(honest), 3),
        "mechanism": privacy.SITE_LEVEL_SHARED,
    }


def main() -> None:
    """Print a line for each number of sites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 6, 20])
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--colluders", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    for number in asked.sites:
        row = measure(number, asked.numbers, asked.colluders)
        print(json.dumps(row) if asked.json else "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
