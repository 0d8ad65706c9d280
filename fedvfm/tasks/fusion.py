"""Late fusion: a row of the hospital's table joins the vector of an image or a case before the head's last layer.

A missing value becomes the column's centre, and an indicator says that it is missing; a row that is not there is one
of which every value is missing. An image that is missing is a vector of noughts, with an indicator beside the row: no
gradient of such a sample reaches the backbone. Rows never mix: one sample's result depends on its own row alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedvfm import registry
from fedvfm.config import inputs

TABLE = registry.Table(
    "fusion",
    {"concat": "fedvfm.tasks.fusion:Concat", "film": "fedvfm.tasks.fusion:Film"},
)

INNER = 32
"""Width of the layer that sees the row alone."""


def answer(last: nn.Module, vectors: Tensor) -> Tensor:
    """What a head's last layer makes of vectors, in float32 also where the model computes in bfloat16.

    Three digits of bfloat16 are few for what orders cases: risks and probabilities would tie, and numbers go in steps.

    Shapes: (B, D) -> (B, K).
    """
    if vectors.is_meta or not torch.is_autocast_enabled(vectors.device.type):
        whole: Tensor = last(vectors)
        return whole
    with torch.autocast(vectors.device.type, enabled=False):
        result: Tensor = last(vectors.float())
    return result


def encoded(rows: Tensor, chosen: inputs.InputsConfig) -> Tensor:
    """Rows as a layer takes them: numbers in units of their scales, words one-hot, each with its indicator.

    Shapes: rows (B, C) in the columns' own units, words by their number, NaN where missing; where images may be missing
        (B, C + 1), the last 1 for a sample without one, else 0 -> (B, :func:`width`).
    """
    rows, imageless = rows.float().tensor_split([len(chosen.columns)], dim=1)
    missing = torch.isnan(rows)
    count = len(chosen.numbers)
    numbers = (rows[:, :count] - rows.new_tensor(chosen.centres)) / rows.new_tensor(chosen.scales)
    parts = [torch.where(missing[:, :count], torch.zeros_like(numbers), numbers)] if count else []
    for at, name in enumerate(sorted(chosen.categories), count):
        words = torch.arange(len(chosen.categories[name]), device=rows.device)
        parts.append((rows[:, at, None] == words).to(rows.dtype))
    return torch.cat([*parts, missing.to(rows.dtype), imageless], dim=1)


def width(chosen: inputs.InputsConfig) -> int:
    """How many numbers :func:`encoded` gives of a row."""
    return chosen.numbers_a_row + len(chosen.numbers) + sum(len(words) for words in chosen.categories.values())


def stacked(
    rows: Sequence[Sequence[float | None]], chosen: inputs.InputsConfig, imageless: Sequence[bool]
) -> Tensor | None:
    """Rows as a :class:`Fusion` takes them, an empty one as one of which all is missing; None without columns.

    Args:
        rows: of samples.
        chosen: the recipe's columns.
        imageless: of each sample, whether it has no image.

    Shapes: (B, C), where images may be missing (B, C + 1); float32.

    Raises:
        ValueError: for a sample without an image, where the recipe does not take any.
    """
    if any(imageless) and not chosen.images_missing:
        raise ValueError("a sample without an image, and recipe.inputs.images_missing is false")
    if not chosen.columns:
        return None
    missing = (None,) * len(chosen.columns)
    numbers = [[math.nan if value is None else value for value in row or missing] for row in rows]
    if chosen.images_missing:
        numbers = [[*row, float(absent)] for row, absent in zip(numbers, imageless, strict=True)]
    return torch.tensor(numbers, dtype=torch.float32)


class Fusion(nn.Module):
    """Base of all fusions.

    Args:
        vector: width D of the head's vector.
        chosen: the recipe's columns.

    Attributes:
        width: of what comes out.
    """

    def __init__(self, vector: int, chosen: inputs.InputsConfig) -> None:
        super().__init__()
        self.chosen, self.width = chosen, vector

    def forward(self, vectors: Tensor, rows: Tensor | None) -> Tensor:
        """What the last layer takes. Shapes: vectors (B, D), rows as :func:`encoded` takes them -> (B, width).

        Raises:
            ValueError: without rows: a table that was forgotten is no table that is missing.
        """
        if rows is None:
            raise ValueError("recipe.inputs names columns, and no rows were given")
        vectors = vectors if self.chosen.images else torch.zeros_like(vectors)
        if self.chosen.images_missing:
            vectors = torch.where(rows[:, -1:] > 0, torch.zeros_like(vectors), vectors)
        return self._joined(vectors, encoded(rows, self.chosen))

    def _joined(self, vectors: Tensor, rows: Tensor) -> Tensor:
        raise NotImplementedError


class Concat(Fusion):
    """The row, and what a small layer makes of it, beside the vector.

    The row is scaled so that it is about as long as the vector, whose channels are many and normalised: else steps of
    one size for all numbers would move the image's part of the answer much more.

    Shapes: vectors (B, D), rows (B, F) -> (B, D + F + INNER).
    Source: "Concat-1FC" and "Concat-2FC" of Wolf et al., "DAFT: A universal module to interweave tabular data and 3D
        images in CNNs", NeuroImage 260, 2022.
    """

    def __init__(self, vector: int, chosen: inputs.InputsConfig) -> None:
        super().__init__(vector, chosen)
        self.inner = nn.Linear(width(chosen), INNER)
        self.width = vector + width(chosen) + INNER
        self._scale = math.sqrt(vector / (width(chosen) + INNER))

    def _joined(self, vectors: Tensor, rows: Tensor) -> Tensor:
        beside = torch.cat([rows, nn.functional.gelu(self.inner(rows))], dim=1)
        return torch.cat([vectors, self._scale * beside.to(vectors.dtype)], dim=1)


class Film(Fusion):
    """The row scales and shifts every channel of the vector; at the start it changes nothing.

    Shapes: vectors (B, D), rows (B, F) -> (B, D).
    Source: Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018, eq. (2), with 1 + gamma
        in place of gamma (section 7.2 there).
    """

    def __init__(self, vector: int, chosen: inputs.InputsConfig) -> None:
        super().__init__(vector, chosen)
        self.inner, self.outer = nn.Linear(width(chosen), INNER), nn.Linear(INNER, 2 * vector)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def _joined(self, vectors: Tensor, rows: Tensor) -> Tensor:
        scale, shift = self.outer(nn.functional.gelu(self.inner(rows))).chunk(2, dim=1)
        result: Tensor = vectors * (1 + scale) + shift
        return result


def argument(vector: int, chosen: inputs.InputsConfig) -> dict[str, Fusion]:
    """``fusion`` of a head whose vectors are ``vector`` wide; nothing where no table is an input."""
    return {"fusion": TABLE.get(chosen.fusion)(vector, chosen)} if chosen.columns else {}
