#!/usr/bin/env bash
# TorchIO's Resize keeps the size of the first image where it is asked to keep each image's own.
#
# "The size of dimensions set to -1 will be kept": Resize((32, 32, -1)) changes the slices' sides and keeps their number.
# The first image's number is written into the transform itself in place of the -1. Every later image of another number
# of slices is resampled to that one, with its mask, without an error; which number, depends on the order of the images.
#
# Guess before the run: an image of 40 slices has 40 afterwards, whatever came before.
# Seen with torchio 1.2.1: images of 20, 40 and 11 slices all have 20 after one Resize((32, 32, -1)).
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torchio==1.2.1
cat > "$work/resize.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
import torchio

shared = torchio.Resize((32, 32, -1))
kept = {}
for slices in (20, 40, 11):
    image = torchio.ScalarImage(tensor=torch.rand(1, 16, 16, slices))
    kept[slices] = shared(image).shape[-1], torchio.Resize((32, 32, -1))(image).shape[-1]
print(f"torchio {version('torchio')}: Resize((32, 32, -1)) of images of 16 x 16 pixels")
for slices, (together, alone) in kept.items():
    print(f"{slices} slices: {together} after the one transform of all three, {alone} after one of its own")
own = all(alone == slices for slices, (_, alone) in kept.items())
sys.exit(0 if own and {together for together, _ in kept.values()} == {20} else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/resize.py"
