"""Classification of whole images with cross entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedvfm.backbones import base as backbones
from fedvfm.config import privacy, schema
from fedvfm.data import defect, transforms
from fedvfm.tasks import base, heads, metrics

SAMPLING = ("uniform", "balanced")
"""How an epoch draws: every sample once, or every class that the site has equally often."""


class Classification(base.Task):
    """One class an image.

    With unequal classes plain cross entropy may end in one answer for all. Against it stand ``task.class_weights``,
    which are public and of the recipe, and ``task.options.sampling = "balanced"``, for which no count leaves a site.

    Shapes: logits (B, K), target (B,) of class numbers.
    """

    known_options: ClassVar[tuple[str, ...]] = ("sampling",)
    primary = "balanced_accuracy"

    def __init__(self, recipe: schema.Recipe) -> None:
        super().__init__(recipe)
        self._head = recipe.task.head or "linear"
        self._sampling = recipe.task.options.get("sampling", SAMPLING[0])

    def faults(self) -> list[str]:
        """See base."""
        return base.class_weight_faults(self.recipe) + self._sampling_faults() + self._head_faults()

    def _head_faults(self) -> list[str]:
        if self._head not in heads.TABLE:
            return [f"recipe.task.head: {heads.TABLE.fault(self._head)}"]
        if self._head != "linear":
            return [f"recipe.task.head = '{self._head}': is for segmentation; use 'linear'"]
        return []

    def _sampling_faults(self) -> list[str]:
        where = f"recipe.task.options.sampling = {self._sampling!r}"
        if self._sampling not in SAMPLING:
            return [f"{where}: known: {', '.join(SAMPLING)}"]
        mechanism = self.recipe.privacy.mechanism
        if self._sampling == "balanced" and privacy.UNITS.get(mechanism, "site") != "site":
            return [
                f"{where}: under mechanism '{mechanism}' every image must be drawn with one public chance, and not by "
                "how many share its class. Use recipe.task.class_weights with public weights"
            ]
        return []

    def order(self, labels: Sequence[int | None], rng: np.random.Generator) -> NDArray[np.int64]:
        """See base. Balanced: every class present fills an equal share of the epoch, going round its own samples."""
        if self._sampling != "balanced":
            return super().order(labels, rng)
        return balanced(np.array([-1 if label is None else label for label in labels]), rng)

    def head(self, backbone: backbones.Backbone) -> nn.Module:
        """See base."""
        made: nn.Module = heads.TABLE.get(self._head)(backbone.width, len(self.class_names))
        return made

    def target(self, prepared: transforms.Prepared, label: int | None) -> Any:
        """See base."""
        if label is None:
            raise defect.LABEL_MISSING.error(
                "a sample without a label in a classification task; give every image a class"
            )
        return label

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """See base."""
        return nn.functional.cross_entropy(logits.float(), target, weight=self._weights(logits.device))

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """See base. Of one sample alone a weighted mean knows no weight, so that of its class stands beside the mean's.

        The mean is over the classes, not over the samples, which would tie one to another.
        """
        weight = self._weights(logits.device)
        found = nn.functional.cross_entropy(logits.float(), target, weight=weight, reduction="none")
        return found if weight is None else found / weight.mean()

    def _weights(self, device: torch.device) -> Tensor | None:
        weights = self.recipe.task.class_weights
        return torch.tensor(weights, device=device) if weights else None

    def scores(self, *, surface: bool) -> metrics.ClassificationScores:
        """See base."""
        return metrics.ClassificationScores(self.class_names)

    def score(
        self, into: Any, sample_id: str, logits: Tensor, prepared: transforms.Prepared, label: int | None
    ) -> None:
        """See base."""
        if label is None:
            raise defect.LABEL_MISSING.error(f"sample '{sample_id}' has no label to score against")
        into.add(sample_id, logits.float().softmax(dim=0).cpu().double().numpy(), label, prepared.part)


def balanced(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of samples, as many as there are, every class as often as the others to within one.

    A class goes round all of its samples before one comes again; which class gets one more is drawn.

    Shapes: labels (N,); the result (N,).
    """
    classes = rng.permutation(np.unique(labels))
    parts = []
    for place, label in enumerate(classes):
        members = np.flatnonzero(labels == label)
        share = len(labels) // len(classes) + (place < len(labels) % len(classes))
        rounds = [rng.permutation(members) for _ in range(-(-share // len(members)))]
        parts.append(np.concatenate(rounds)[:share] if rounds else members[:0])
    return rng.permutation(np.concatenate(parts))
