#!/usr/bin/env bash
# TorchIO's GridAggregator leaves zeros between the patches of a model whose output is smaller than its input.
#
# With downsampling_factor the aggregator puts together what a model makes of overlapping patches where its output is
# smaller by that factor, as the grid of features of a vision transformer is. In the default mode "crop" half of the
# overlap is cut off each patch, so that patches meet. The places are divided by the factor, the overlap is not: too much
# is cut off, and what lies between the patches stays 0, without an error. With a padded volume the border that is taken
# off at the end is too wide by the same factor. (The modes "average" and "hann" end in an error.)
#
# Guess before the run: patches of a pooling by 2 put together are the whole image pooled by 2.
# Seen with torchio 1.2.1 on 32 x 32 x 32 voxels of 1 and more: without overlap equal; patches of 16 that overlap by 4
# leave 33 % zeros, by 8 they leave 88 %; padded, an overlap of 4 gives 14 x 14 x 14 voxels in place of 16 x 16 x 16.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torchio==1.2.1
cat > "$work/aggregate.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
import torchio


def pooled(volume):
    return torch.nn.functional.avg_pool3d(volume, 2)


torch.manual_seed(0)
voxels = torch.rand(1, 32, 32, 32) + 1
subject = torchio.Subject(image=torchio.ScalarImage(tensor=voxels))
expected = pooled(voxels[None])[0]


def aggregated(overlap, padding_mode=None):
    sampler = torchio.GridSampler(subject, 16, overlap, padding_mode=padding_mode)
    aggregator = torchio.GridAggregator(sampler, downsampling_factor=2)
    for batch in torchio.SubjectsLoader(sampler, batch_size=4):
        aggregator.add_batch(pooled(batch["image"][torchio.DATA]), batch[torchio.LOCATION])
    return aggregator.get_output_tensor()


print(f"torchio {version('torchio')}: pooled by 2 in patches of 16, all voxels at least {float(expected.min()):.2f}")
zeros = {}
for overlap in (0, 4, 8):
    volume = aggregated(overlap)
    zeros[overlap] = float((volume == 0).float().mean())
    print(f"overlap {overlap}: equal to the pooled image {torch.equal(volume, expected)}, zeros {zeros[overlap]:.1%}")
padded = aggregated(4, "edge")
print(f"overlap 4, padded: shape {tuple(padded.shape)}, of the pooled image {tuple(expected.shape)}")
sys.exit(0 if zeros[0] == 0 and zeros[4] > 0.2 and zeros[8] > 0.8 and padded.shape != expected.shape else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/aggregate.py"
