#!/usr/bin/env bash
# transformers' SwinModel computes another answer for an image once it has seen a smaller one.
#
# Every block of a Swin has a window and a shift. SwinLayer.forward lowers both to what fits where a grid is no larger
# than the window, and writes that into the block itself; they are never set back. A later, larger image of the same
# model is then computed without shifted windows in the stages that were small once, with no error and no warning.
#
# Guess before the run: a model in evaluation mode is a function of its input.
# Seen with transformers 5.23.0: a random Swin (window 7, patches of 4, four stages) gives for the same image of 448
# pixels other features after one image of 224 pixels (they differ by 23 %); a fresh copy gives the first one.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install transformers==5.23.0
cat > "$work/compare.py" <<'PYTHON'
import copy
import sys

import torch
import transformers

torch.manual_seed(0)
model = transformers.SwinModel(transformers.SwinConfig(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))).eval()
for name, parameter in model.named_parameters():
    torch.nn.init.normal_(parameter, std=0.3)
    if "norm" in name and name.endswith("weight"):
        parameter.data += 1.0
fresh = copy.deepcopy(model)
large, small = torch.randn(1, 3, 448, 448), torch.randn(1, 3, 224, 224)


def shifts(of):
    return [block.shift_size for block in of.encoder.layers[-1].blocks]


with torch.no_grad():
    before = model(large).last_hidden_state
    again = model(large).last_hidden_state
    started = shifts(model)
    model(small)
    after, other = model(large).last_hidden_state, fresh(large).last_hidden_state
off = float((after - before).norm() / before.norm())
print(f"transformers {transformers.__version__}: shifts of the last stage {started}, after a small image {shifts(model)}")
print(f"the large image: equal when asked twice: {torch.equal(before, again)}; a fresh copy: {torch.equal(before, other)}")
print(f"relative difference after a small image: {off:.1e}")
same = torch.equal(before, again) and torch.allclose(before, other)
sys.exit(0 if same and off > 1e-3 and started != shifts(model) else 1)
PYTHON
"$work/env/bin/python" "$work/compare.py"
