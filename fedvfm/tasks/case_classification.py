"""Classification of cases of many images: the slices of a volume, the tiles of a slide, the views of a study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.data import defect, transforms
from fedvfm.data import sample as samples
from fedvfm.tasks import case_heads, classification, fusion

DEFAULT_HEAD = "attention-mil"
DEFAULT_PARTS, MOST_PARTS = 64, 4096
DEFAULT_LAYERS, MOST_LAYERS = 1, 8


class CaseClassification(classification.Classification):
    """One class a case, or grades, labels or numbers (:mod:`fedvfm.tasks.targets`).

    The backbone sees every image by itself; a head (:mod:`fedvfm.tasks.case_heads`) makes one answer of their vectors.
    In training a step takes at most ``task.options.parts`` images of a case, drawn anew each time, which bounds its
    memory; validation, test and prediction take all. Where few images of a case decide, ``parts`` below the number of
    its images leaves them out of many steps.

    Shapes: logits (B, K), target (B,) of class numbers.
    """

    known_options = ("layers", "parts", "sampling")
    bags = True

    def __init__(self, recipe: schema.Recipe) -> None:
        super().__init__(recipe)
        self._head = recipe.task.head or DEFAULT_HEAD
        self._parts = recipe.task.options.get("parts", DEFAULT_PARTS)
        self._layers = recipe.task.options.get("layers", DEFAULT_LAYERS)

    @classmethod
    def head_for(cls, backbone: backbones.Backbone) -> str | None:
        """See base."""
        return DEFAULT_HEAD

    @property
    def parts(self) -> int:
        """Images of a case that a training step takes at most."""
        return cast(int, self._parts)

    def _head_faults(self) -> list[str]:
        if self._head not in case_heads.TABLE:
            return [f"recipe.task.head: {case_heads.TABLE.fault(self._head)}"]
        faults = []
        layered = case_heads.TABLE.get(self._head).layered
        if "layers" in self.recipe.task.options and not layered:
            faults.append(f"recipe.task.options.layers: head '{self._head}' has none; use 'mst', or leave layers out")
        for key, value, most in (("parts", self._parts, MOST_PARTS), ("layers", self._layers, MOST_LAYERS)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                faults.append(f"recipe.task.options.{key} = {value!r}: a whole number from 1 to {most} is needed")
        if self.recipe.data.fit != "resize":
            faults.append(
                f"recipe.data.fit = '{self.recipe.data.fit}': the images of a case are not cut into windows; use "
                "'resize'"
            )
        return faults

    def drawn(self, images: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Places of the images of a case that a training step takes, ascending: all, or ``parts`` drawn evenly.

        Args:
            images: of the case.
            rng: of the draw.
        """
        if images <= self.parts:
            return tuple(range(images))
        return tuple(sorted(int(at) for at in rng.choice(images, self.parts, replace=False)))

    def head(self, backbone: backbones.Backbone) -> nn.Module:
        """See base."""
        joined, chosen = fusion.argument(backbone.width, self.recipe.inputs), case_heads.TABLE.get(self._head)
        return self.answer.head(chosen(backbone.width, self.answer.outputs, self._layers, **joined))

    def score(
        self,
        into: Any,
        sample_id: str,
        logits: Tensor,
        prepared: transforms.Prepared,
        truth: samples.Truth,
        labelled: Sequence[int] = (),
    ) -> None:
        """See base. The case is scored as one, whatever of it ``prepared`` shows."""
        self.answer.add(into, sample_id, classification.of_labelled(logits, labelled), truth, None)


def frozen(vectors: Tensor) -> Tensor:
    """What is kept of an image where the whole backbone is frozen: its vector, rounded to half precision.

    So kept or computed, the numbers are the same. Shapes: (N, D), the result as float32.

    Raises:
        DataError: where a vector is beyond half precision.
    """
    rounded = vectors.to(torch.float16)
    if rounded.device.type != "meta" and not bool(torch.isfinite(rounded).all()):
        raise defect.NOT_FINITE.error("what the backbone makes of an image is no finite number in half precision")
    return rounded.float()
