#!/usr/bin/env bash
# transformers' SamModel adds 1e-6, not the authors' 1e-5, in the layer norms of SAM's mask decoder.
#
# The authors' decoder (segment-anything 1.0, modeling/transformer.py) takes torch's default of nn.LayerNorm, 1e-5. The
# port of transformers takes SamMaskDecoderConfig.layer_norm_eps, 1e-6, for the same nine norms. So the same weights
# give slightly other masks, and a decoder that was fine-tuned in one is not the same function in the other.
#
# Guess before the run: equal to the last few bits of float32 (relative 1e-6), as the image encoders are.
# Seen with transformers 5.23.0: the epsilons differ by a factor of ten, and one two-way block on the same weights and
# small tokens differs by 1.4e-4 of its largest value; with 1e-5 in both it is equal to the last bit.
#
# Needs Python 3.11 and a network for pip. Exits 1 if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 "numpy<3"
"$work/env/bin/pip" --quiet --disable-pip-version-check install transformers==5.23.0
"$work/env/bin/pip" --quiet --disable-pip-version-check download --no-deps --dest "$work" segment-anything==1.0
(cd "$work" && "$work/env/bin/python" -m zipfile -e segment_anything-1.0-py3-none-any.whl authors)
cat > "$work/compare.py" <<'PYTHON'
import sys

import torch
import transformers

# Only the folder of the model, as a package of its own: the rest of the authors' package wants torchvision.
sys.path.insert(0, sys.argv[1] + "/authors/segment_anything")
from modeling.transformer import TwoWayAttentionBlock
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig
from transformers.models.sam.modeling_sam import SamTwoWayAttentionBlock

config = SamMaskDecoderConfig()
config._attn_implementation = "eager"
theirs = SamTwoWayAttentionBlock(config, skip_first_layer_pe=True).eval()
torch.manual_seed(0)
authors = TwoWayAttentionBlock(256, 8, 2048, skip_first_layer_pe=True).eval()
pairs = [(f"norm{n}", f"layer_norm{n}") for n in (1, 2, 3, 4)] + [
    ("self_attn", "self_attn"),
    ("cross_attn_token_to_image", "cross_attn_token_to_image"),
    ("cross_attn_image_to_token", "cross_attn_image_to_token"),
    ("mlp.lin1", "mlp.lin1"),
    ("mlp.lin2", "mlp.lin2"),
]
for ours, other in pairs:
    theirs.get_submodule(other).load_state_dict(authors.get_submodule(ours).state_dict())

epsilons = authors.norm1.eps, theirs.layer_norm1.eps
tokens, image = 0.01 * torch.randn(1, 7, 256), 0.01 * torch.randn(1, 64, 256)
places = 0.01 * torch.randn(1, 64, 256)


def run(block_eps):
    for norm in (theirs.layer_norm1, theirs.layer_norm2, theirs.layer_norm3, theirs.layer_norm4):
        norm.eps = block_eps
    with torch.no_grad():
        one = authors(queries=tokens, keys=image, query_pe=tokens, key_pe=places)[1]
        two = theirs(tokens[None], image[None], tokens[None], places[None], None)[1][0]
    return float((one - two).abs().max() / one.abs().max())


as_is, same = run(epsilons[1]), run(epsilons[0])
print(f"transformers {transformers.__version__}: epsilon {epsilons[1]:g}, authors {epsilons[0]:g}")
print(f"one block, largest difference of the image tokens: {as_is:.1e} as it is, {same:.1e} with 1e-5 in both")
sys.exit(0 if epsilons == (1e-5, 1e-6) and as_is > 1e-5 and same < 1e-6 else 1)
PYTHON
"$work/env/bin/python" "$work/compare.py" "$work"
