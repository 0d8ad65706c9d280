"""An ONNX export of an adapter, computed by onnxruntime on the CPU in place of torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedvfm import errors
from fedvfm.model import adapted_model, sliding_window

FILE = "model.onnx"


def opened(path: Path) -> Any:
    """A session of onnxruntime with as many threads as torch has.

    Raises:
        CheckpointError: if the file is no graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each way a file can be wrong
        raise errors.CheckpointError(
            f"{path} cannot be opened by onnxruntime ({type(error).__name__}); export the adapter again"
        ) from error


class Session:
    """The graph of one adapter.

    Args:
        folder: what ``export --format onnx`` or ``onnx-int8`` wrote.
        model: the adapter that it must be an export of.

    Attributes:
        name: what computes.
        precision: "float32", or "int8" where the weights are in 8 bits.

    Raises:
        MissingExtra: without onnxruntime.
        CheckpointError: if it is no export, or of another adapter.
    """

    def __init__(self, folder: Path, model: adapted_model.AdaptedModel) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise errors.MissingExtra("--graph needs onnxruntime. Run: pip install 'fedvfm[onnx]'")
        import onnxruntime

        path = folder / FILE
        if not path.is_file():
            raise errors.CheckpointError(
                f"{folder} holds no {FILE}. Make one: fedvfm export ADAPTER -o {folder} --format onnx"
            )
        self._session = opened(path)
        facts = self._session.get_modelmeta().custom_metadata_map
        mine = {"adapter_fingerprint": model.read().fingerprint, "backbone_sha256": model.backbone.sha256}
        wrong = [key for key, value in mine.items() if facts.get(f"fedvfm.{key}") != value]
        if wrong:
            raise errors.CheckpointError(
                f"{path} is no export of this adapter: its {' and '.join(wrong)} differ. Export the adapter again"
            )
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self.precision = facts.get("fedvfm.weights", "float32")
        shape = self._session.get_inputs()[0].shape
        self._most = shape[0] if isinstance(shape[0], int) else None
        self._size = tuple(shape[2:])

    def run(
        self,
        parts: Sequence[sliding_window.Window],
        table: Tensor | None = None,
        boxes: Sequence[sliding_window.Boxes] | None = None,
    ) -> Tensor:
        """See :class:`fedvfm.model.sliding_window.WithRows`.

        Raises:
            DataError: if the windows are not of the graph's size.
        """
        if boxes is not None:
            raise ValueError("a graph takes no boxes")
        images = np.stack([part.image for part in parts])
        if images.shape[2:] != self._size:
            have, takes = (" x ".join(map(str, size)) for size in (images.shape[2:], self._size))
            raise errors.DataError(f"an image of {have} pixels, and the graph takes {takes}; leave --graph out")
        most = self._most or len(images)
        feed = {"image": images}
        if table is not None:
            feed["table"] = table[[part.number for part in parts]].cpu().numpy()
        found = [
            self._session.run(["logits"], {name: given[at : at + most] for name, given in feed.items()})[0]
            for at in range(0, len(images), most)
        ]
        return torch.from_numpy(np.concatenate(found))
