#!/usr/bin/env bash
# MONAI's FocalLoss is as many times larger as there are channels once ignore_index is given.
#
# With reduction "mean" (the default) the loss is the mean over voxels and channels. With ignore_index the sum over voxels
# and channels is divided by the number of voxels kept alone. The option multiplies the loss, and every gradient, by the
# number of channels, even where no voxel has that label: a weight beside another loss or a learning rate that was
# found without it no longer holds. DiceLoss, TverskyLoss and FocalLoss with reduction "sum" do not change.
#
# Guess before the run: an ignore_index that no voxel has changes no loss.
# Seen with monai 1.6.1: FocalLoss is 2, 4 and 8 times as large with 2, 4 and 8 classes, with softmax and with sigmoid.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install monai==1.6.1
cat > "$work/loss.py" <<'PYTHON'
import sys

import monai
import torch
from monai.losses import DiceLoss, FocalLoss, TverskyLoss

torch.manual_seed(0)
print(f"monai {monai.__version__}: the loss with ignore_index=255, which no voxel has, over the loss without")
ratios = {}
for classes in (2, 4, 8):
    logits, label = torch.randn(2, classes, 16, 16), torch.randint(0, classes, (2, 1, 16, 16))
    for name, loss, options in (
        ("FocalLoss, softmax", FocalLoss, {"use_softmax": True}),
        ("FocalLoss, sigmoid", FocalLoss, {}),
        ("FocalLoss, sum", FocalLoss, {"reduction": "sum"}),
        ("DiceLoss", DiceLoss, {"softmax": True}),
        ("TverskyLoss", TverskyLoss, {"softmax": True}),
    ):
        plain, ignoring = loss(to_onehot_y=True, **options), loss(to_onehot_y=True, ignore_index=255, **options)
        ratios[name, classes] = float(ignoring(logits, label) / plain(logits, label))
for name in dict.fromkeys(name for name, _ in ratios):
    print(f"{name}: " + ", ".join(f"{ratios[name, classes]:.3f} of {classes} classes" for classes in (2, 4, 8)))
as_seen = all(
    abs(ratio - (classes if name in ("FocalLoss, softmax", "FocalLoss, sigmoid") else 1)) < 1e-4
    for (name, classes), ratio in ratios.items()
)
sys.exit(0 if as_seen else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/loss.py"
