"""ONNX of a model of cases: one graph from images to vectors, and one from a case's vectors to its answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedvfm.inference import delivery, graph
from fedvfm.model import adapted_model
from fedvfm.storage import storage
from fedvfm.tasks import case_heads

ENCODER, HEAD = "encoder.onnx", "head.onnx"
NAMES = ("vectors", "places", "table")
"""Inputs of the head's graph; the last one where the recipe takes a table beside the images."""
CHECKED = (1, 5, 40)
"""Images of the cases that the graph of the head is checked with."""


class Encoder(nn.Module):
    """Prepared images to vectors; the contract's mean and standard deviation are part of it.

    Shapes: image (N, 3, h, w) in [0, 1] -> (N, D).
    """

    def __init__(self, model: adapted_model.AdaptedModel) -> None:
        super().__init__()
        self.plain = delivery.Deliverable(model)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        model, pixels = self.plain.model, (image - self.plain.mean) / self.plain.std
        return model.features(pixels).pooled


class Head(nn.Module):
    """One case's vectors and places to its logits, and how much these rest on each image.

    Shapes: vectors (S, D), places (S,) of int64, row of the table (C,), where images may be missing
        (C + 1,), where the recipe takes one -> (K,), (S,).
    """

    def __init__(self, head: case_heads.CaseHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, vectors: Tensor, places: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        case = case_heads.Bags(vectors[None], torch.ones_like(places, dtype=torch.bool)[None], places[None])
        return self.head(case, *(row[None] for row in table))[0], self.head.weights(case)[0]


def write_any(model: adapted_model.AdaptedModel, adapter: Path, folder: Path) -> dict[str, Any]:
    """ONNX of any model: of cases two graphs, else the one of :mod:`fedvfm.inference.graph`.

    Raises:
        MissingExtra, ConfigError, CheckpointError: see :func:`write` and :func:`fedvfm.inference.graph.write`.
    """
    if not model.task.bags:
        return graph.write(model, adapter, folder)
    graph.require_packages()
    return write(model, folder)


def write(model: adapted_model.AdaptedModel, folder: Path) -> dict[str, Any]:
    """``encoder.onnx`` and ``head.onnx``, each checked against the model before it counts as written.

    Raises:
        ConfigError: if the exporter cannot express the model.
        CheckpointError: if a graph computes something else.
    """
    whole = delivery.exact(delivery.folded(model))
    encoder, head = Encoder(whole).eval(), Head(whole.head).eval()
    free = torch.export.Dim.DYNAMIC
    images, vectors, places = delivery.example(model, 2), _vectors(model, 3), torch.arange(3)
    graph.save(encoder, (images,), ["image"], ["vectors"], ({0: free},), folder / ENCODER, model)
    rows = _rows(model, 3)
    names = [*NAMES[: 2 + len(rows)]], ["logits", "weights"]
    # A module that takes any number of rows takes them as one argument, by the exporter's account.
    dimensions = ({0: free}, {0: free}, *(((None,) * len(rows),) if rows else ()))
    graph.save(head, (vectors, places, *rows), *names, dimensions, folder / HEAD, model)
    off = max(_check_encoder(folder / ENCODER, encoder, model), _check_head(folder / HEAD, head, model))
    storage.write_text(folder / "README.md", _card(model, off))
    return {"opset": graph.OPSET, "graphs": [ENCODER, HEAD], "difference": off}


def _rows(model: adapted_model.AdaptedModel, number: int) -> tuple[Tensor, ...]:
    """The row of one case. Shapes: (C,)."""
    return tuple(rows[number % len(rows)] for rows in delivery.example_rows(model, max(CHECKED) + 1))


def _vectors(model: adapted_model.AdaptedModel, images: int) -> Tensor:
    """Drawn vectors, the same every time. Shapes: (images, D)."""
    rng = np.random.default_rng(images)
    return torch.from_numpy(rng.standard_normal((images, model.backbone.width)).astype(np.float32))


@torch.no_grad()
def _check_encoder(path: Path, encoder: Encoder, model: adapted_model.AdaptedModel) -> float:
    off = 0.0
    for images in (1, 3):
        image = delivery.example(model, images)
        (vectors,) = graph.outputs(path, {"image": image})
        off = max(off, delivery.require_same("the ONNX graph of the encoder", vectors, encoder(image)))
    return off


@torch.no_grad()
def _check_head(path: Path, head: Head, model: adapted_model.AdaptedModel) -> float:
    off = 0.0
    for images in CHECKED:
        vectors, places = _vectors(model, images), torch.arange(images)
        given = (vectors, places, *_rows(model, images))
        computed = graph.outputs(path, dict(zip(NAMES, given, strict=False)))
        for numbers, expected in zip(computed, head(*given), strict=True):
            off = max(off, delivery.require_same("the ONNX graph of the head", numbers, expected))
    return off


def _card(model: adapted_model.AdaptedModel, off: float) -> str:
    height, width = model.recipe.data.input_size
    size, classes = model.backbone.width, model.task.width
    rounded = ".astype(np.float16).astype(np.float32)" if model.frozen_whole else ""
    columns = model.recipe.inputs.numbers_a_row
    table = ', "table": table' if columns else ""
    usage = [
        "import numpy as np",
        "import onnxruntime",
        f'encoder, head = (onnxruntime.InferenceSession(name) for name in ("{ENCODER}", "{HEAD}"))',
        f'vectors = np.concatenate([encoder.run(None, {{"image": image[None]}})[0] for image in images]){rounded}',
        f'logits, weights = head.run(None, {{"vectors": vectors, "places": np.arange(len(vectors)){table}}})',
    ]
    facts = [
        f"- `image`: float32 (N, 3, {height}, {width}), prepared as below; the graph itself normalises",
        f"- `vectors`: float32 (S, {size}), those of all images of one case in their order"
        + "; one of zeros where the image is missing" * model.recipe.inputs.images_missing,
        "- `places`: int64 (S,), the place of each image in the case, from 0",
        *([f"- `table`: float32 ({columns},), NaN where a value is missing"] if columns else []),
        *delivery.table_lines(model),
        f"- `logits`: float32 ({classes},){delivery.what_comes_out(model)}",
        "- `weights`: float32 (S,), how much they rest on each image",
        f"- checked: off by {off:.1g} of the largest number",
    ]
    return graph.card(model, usage, facts)
