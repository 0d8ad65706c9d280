#!/usr/bin/env bash
# MONAI's RemoveSmallObjects connects objects through the channels that it says to keep independent.
#
# With independent_channels=True, the default, each channel of a segmentation is to be looked at by itself. A binary
# segmentation of several channels is given to scikit-image as one array, in which the channels are one more axis of space:
# what lies at the same pixel in two neighbouring channels is one object. Where channels overlap, as in the nested regions
# of a brain tumour (whole, core, enhancing), a speck of one that lies inside the other is kept, and the result depends on
# the order of the channels. (Labels in one channel, and channels that exclude each other, are not affected.)
#
# Guess before the run: a speck of 2 pixels is removed at min_size=10, as it is from its channel alone.
# Seen with monai 1.6.1 and scikit-image 0.26.0: it is kept beside a channel whose large object covers it, and removed
# where an empty channel lies between the two.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install monai==1.6.1 scikit-image==0.26.0
cat > "$work/specks.py" <<'PYTHON'
import sys

import monai
import skimage
import torch
from monai.transforms import RemoveSmallObjects

whole, core = torch.zeros(16, 16), torch.zeros(16, 16)
whole[2:10, 2:10] = 1
core[4, 4:6] = 1  # a speck inside the whole
core[13, 13:15] = 1  # and one elsewhere
remove = RemoveSmallObjects(min_size=10, independent_channels=True)
kept = {
    "alone": remove(core[None])[0],
    "next to the whole": remove(torch.stack([whole, core]))[1],
    "apart from the whole": remove(torch.stack([whole, torch.zeros_like(core), core]))[2],
}
print(f"monai {monai.__version__}, scikit-image {skimage.__version__}: two specks of 2 pixels, min_size 10")
for name, channel in kept.items():
    print(f"the channel {name}: {int(channel.sum())} pixels are kept")
sys.exit(0 if [int(channel.sum()) for channel in kept.values()] == [0, 2, 0] else 1)
PYTHON
"$work/env/bin/python" -W ignore "$work/specks.py"
