#!/usr/bin/env bash
# torchsurv's AUC of risks that change with time takes the risks of other times where no times are named.
#
# Auc takes a table of risks: row i, column j is the risk of patient i at the time of patient j. Without new_time it
# scores the times of events, and picks the columns that belong to them by their number among the patients with events.
# As soon as one patient is censored these are other columns: the AUC at 18 months is one of the risks at 6 months.
# With the same times given as new_time, and their columns, the docstring's formula comes out.
#
# Guess before the run: the same values whether the times of events are left out or written down.
# Seen with torchsurv 0.2.0: of six patients, the first two censored, whose risks tell everyone apart at every time of an
# event, the AUC at 18 months is 0.33 without new_time and 1.00 with it. Of 200 patients, half of them censored, whose
# risks turn round after a year, it is 0.12 at 22 months in place of 0.88. Nothing is said.
#
# Source: docstring of torchsurv.metrics.auc.Auc (estimate of shape (n_samples, n_samples)); formula computed here.
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0
"$work/env/bin/pip" --quiet --disable-pip-version-check install torchsurv==0.2.0 "numpy<3" "pandas<3"
cat > "$work/auc.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import torch
from torchsurv.metrics.auc import Auc


def scored(risk, event, time, at=None):
    """AUC by torchsurv; with times, of the columns that belong to them."""
    tensors = torch.tensor(risk if at is None else risk[:, at]), torch.tensor(event), torch.tensor(time)
    return Auc()(*tensors, new_time=None if at is None else torch.tensor(time[at])).numpy()


def formula(risk, event, time, at):
    values = []
    for column in at:
        case, control = event & (time <= time[column]), time > time[column]
        q = risk[:, column]
        pairs = (q[case][:, None] > q[control][None]) + 0.5 * (q[case][:, None] == q[control][None])
        values.append(pairs.mean())
    return np.array(values)


def compare(title, risk, event, time):
    at = np.flatnonzero(event & (time < time.max()))
    at = at[np.argsort(time[at])]
    plain, named, right = scored(risk, event, time), scored(risk, event, time, at), formula(risk, event, time, at)
    worst = int(abs(plain - right).argmax())
    values = ", ".join(f"{name} {each[worst]:.2f}" for name, each in (("with new_time", named), ("formula", right)))
    print(f"{title}, {time[at[worst]]:.0f} months: without new_time {plain[worst]:.2f}, {values}")
    return abs(named - right).max() < 1e-5 and abs(plain - right).max() > 0.2


print(f"torchsurv {version('torchsurv')}, torch {version('torch')}: AUC where it is furthest off")
time = np.array([6.0, 12.0, 18.0, 24.0, 30.0, 36.0], np.float32)
event = np.array([False, False, True, True, True, True])
# Whoever has the event sooner has the higher risk, but not at the first two times, where nobody can be told apart.
risk = np.tile(-time[:, None], (1, 6)).astype(np.float32)
risk[:, :2] = np.float32([[2], [5], [1], [4], [0], [3]])
six = compare("six patients", risk, event, time)

random = np.random.default_rng(0)
time = np.sort(random.uniform(1, 60, 200)).astype(np.float32)
event = random.random(200) < 0.5
frailty = random.normal(size=(200, 1)) - 0.05 * time[:, None]
risk = np.where(time[None] > 12, frailty, -frailty).astype(np.float32)
many = compare("200 patients", risk, event, time)
sys.exit(0 if six and many else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/auc.py"
