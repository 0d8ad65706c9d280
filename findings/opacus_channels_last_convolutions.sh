#!/usr/bin/env bash
# Opacus computes wrong gradients of a Conv2d whose input lies in memory with the channels last.
#
# The order in which a tensor lies in memory changes no result of torch. Opacus's hook for Conv2d cuts the layer's input
# into windows by as_strided, with strides worked out as if a row were contiguous; for an input with its channels last it
# reads other pixels. Such an input comes of memory_format=torch.channels_last, of a batch of pictures turned by
# permute(0, 3, 1, 2), and of the tokens of a vision transformer turned into a grid: the necks of SAM do the latter.
#
# Guess before the run: the same numbers in another order of memory have the same gradient, as in torch.
# Seen with opacus 1.6.0 and torch 2.13.0: channels first equal to 1e-6; channels last and permuted, 1 x 1, patches and
# padded, off by as much as they are long, without an error. Conv3d is right.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install opacus==1.6.0
cat > "$work/compare.py" <<'PYTHON'
import copy
import sys
from importlib.metadata import version

import torch
from opacus import GradSampleModule

torch.manual_seed(0)
first = torch.randn(4, 3, 8, 8)
orders = {
    "channels first": first,
    "channels last": first.to(memory_format=torch.channels_last),
    "permuted": first.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
}
layers = {
    "3 x 3, padded": torch.nn.Conv2d(3, 5, 3, padding=1),
    "patches of 4": torch.nn.Conv2d(3, 5, 4, stride=4),
    "1 x 1": torch.nn.Conv2d(3, 5, 1),
}
off = {}
for kind, layer in layers.items():
    for order, images in orders.items():
        assert torch.equal(images, first)
        plain, private = copy.deepcopy(layer), GradSampleModule(copy.deepcopy(layer), loss_reduction="sum")
        plain(images).square().sum().backward()
        private(images).square().sum().backward()
        expected = plain.weight.grad
        seen = private._module.weight.grad_sample.sum(0)
        off[kind, order] = float((seen - expected).norm() / expected.norm())
print(f"opacus {version('opacus')}: the sum of the per-sample gradients against autograd's, relative difference")
for (kind, order), value in off.items():
    print(f"{kind}, {order}: {value:.1e}")
sys.exit(0 if all((value < 1e-5) == (order == "channels first") for (_, order), value in off.items()) else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/compare.py"
