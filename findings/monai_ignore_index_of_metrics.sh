#!/usr/bin/env bash
# MONAI's ignore_index leaves voxels out in some of its metrics and not in others.
#
# "Voxels with this label are excluded from the score" is said of ignore_index by DiceMetric, MeanIoU and, in other words,
# by ConfusionMatrixMetric. Where the index is one of the classes of a one-hot label, DiceMetric and GeneralizedDiceScore
# leave its voxels out; MeanIoU and ConfusionMatrixMetric only empty the channel of that class, and what is predicted
# there counts as wrong for the other classes. DiceMetric with per_component=True does not look at the option at all.
#
# Guess before the run: without the voxels of class 3, IoU = Dice / (2 - Dice) and F1 = Dice of each class left, as
# without the option; and voxels of no label, which ignore_index=255 leaves out, are left out by per_component too.
# Seen with monai 1.6.1: Dice is that of the voxels left (0.807 for class 0), IoU and F1 are as if nothing was ignored
# (0.643 where 0.676 is right, 0.783 where 0.807 is right); per component Dice is 0.667 with the option and without it,
# where 1 is right.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install monai==1.6.1 scipy==1.17.1
cat > "$work/metrics.py" <<'PYTHON'
import sys

import monai
import torch
from monai.metrics import ConfusionMatrixMetric, DiceMetric, MeanIoU
from monai.networks.utils import one_hot

CLASSES, IGNORED = 4, 3
generator = torch.Generator().manual_seed(0)
label = torch.randint(0, CLASSES, (1, 1, 24, 24), generator=generator)
other = torch.randint(0, CLASSES, label.shape, generator=generator)
predicted = torch.where(torch.rand(label.shape, generator=generator) < 0.7, label, other)
kept = label != IGNORED


def by_hand(number):
    """Dice and IoU of one class over the voxels that are not ignored."""
    truth, answer = (label == number) & kept, (predicted == number) & kept
    both = (truth & answer).sum()
    return float(2 * both / (truth.sum() + answer.sum())), float(both / (truth | answer).sum())


def scores(**options):
    """Dice, IoU and F1 by MONAI of the classes that are not ignored."""
    f1 = ConfusionMatrixMetric(metric_name="f1 score", compute_sample=True, reduction="none", **options)
    rows = []
    for metric in (DiceMetric(reduction="none", **options), MeanIoU(reduction="none", **options), f1):
        metric(one_hot(predicted, CLASSES), one_hot(label, CLASSES))
        values = metric.aggregate()
        rows.append((values[0] if isinstance(values, list) else values)[0, :IGNORED])
    return rows


right = torch.tensor([by_hand(number) for number in range(IGNORED)])
plain, ignoring = scores(), scores(ignore_index=IGNORED)
print(f"monai {monai.__version__}: classes 0 to 2, voxels of class {IGNORED} ignored")
for name, whole, left, truth in zip(("Dice", "IoU", "F1"), plain, ignoring, (right[:, 0], right[:, 1], right[:, 0])):
    shown = [values.numpy().round(3) for values in (left, truth, whole)]
    print(f"{name}: with ignore_index {shown[0]}, right {shown[1]}, of all voxels {shown[2]}")

truth = torch.zeros(1, 2, 16, 16)
truth[:, 1, 2:6, 2:6] = 1
truth[:, 0] = 1 - truth[:, 1]
answer = truth.clone()
answer[:, 1, 10:14, 10:14] = 1
answer[:, 0] = 1 - answer[:, 1]
truth[:, :, 8:, 8:] = 0  # this quarter has no label, and the only wrong voxels
part = {}
for per_component in (False, True):
    for index in (None, 255):
        metric = DiceMetric(include_background=False, per_component=per_component, ignore_index=index)
        metric(answer, truth)
        part[per_component, index] = float(metric.aggregate())
        dice = part[per_component, index]
        print(f"a quarter without label, per_component {per_component}, ignore_index {index}: Dice {dice:.3f}")
as_seen = (
    torch.allclose(ignoring[0], right[:, 0])
    and torch.equal(ignoring[1], plain[1])
    and torch.equal(ignoring[2], plain[2])
    and part[False, 255] == 1
    and part[True, 255] == part[True, None]
)
sys.exit(0 if as_seen and part[True, None] < 0.9 else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/metrics.py"
