#!/usr/bin/env bash
# MONAI's sliding window divides by the first window's weights where process_fn gives each window its own.
#
# sliding_window_inference takes a process_fn that may "adjust the importance map per window": what is predicted in each
# window is multiplied by the map that was returned for it. The sum of the weights, by which the total is divided at the
# end, is made once, at the first windows, of the map returned for them. Where later maps differ, overlapping
# predictions are no weighted mean: they come out too large or too small, without an error.
#
# Guess before the run: a model that answers 1 everywhere gives 1 everywhere, whatever the (positive) weights are.
# Seen with monai 1.6.1: with a weight of 1 for the first window and 3 for all others 1 to 3; without process_fn 1.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install monai==1.6.1
cat > "$work/weights.py" <<'PYTHON'
import sys

import monai
import torch
from monai.inferers import sliding_window_inference


class Heavier:
    """Weighs the first window once and all others three times."""

    def __init__(self):
        self.windows = 0

    def __call__(self, outputs, window, importance):
        self.windows += 1
        return outputs, importance * (1.0 if self.windows == 1 else 3.0)


def ones(window):
    return torch.ones_like(window)


image = torch.rand(1, 1, 32, 32)
seen = {}
for mode in ("constant", "gaussian"):
    for name, process in (("none", None), ("a weight per window", Heavier())):
        answer = sliding_window_inference(image, (16, 16), 1, ones, overlap=0.5, mode=mode, process_fn=process)
        seen[mode, name] = float(answer.min()), float(answer.max())
print(f"monai {monai.__version__}: a model that answers 1 everywhere, windows of 16 that overlap by half")
for (mode, name), (least, most) in seen.items():
    print(f"{mode}, process_fn {name}: from {least:.3f} to {most:.3f}")
plain = all(abs(value - 1) < 1e-5 for (_, name), pair in seen.items() if name == "none" for value in pair)
sys.exit(0 if plain and all(pair[1] > 2 for (_, name), pair in seen.items() if name != "none") else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/weights.py"
