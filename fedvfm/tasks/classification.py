"""Classification of whole images with cross entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.data import defect, transforms
from fedvfm.tasks import base, heads, metrics


class Classification(base.Task):
    """One class an image.

    Shapes: logits (B, K), target (B,) of class numbers.
    """

    primary = "balanced_accuracy"

    def __init__(self, recipe: schema.Recipe) -> None:
        super().__init__(recipe)
        self._head = recipe.task.head or "linear"

    def faults(self) -> list[str]:
        """See base."""
        found = base.class_weight_faults(self.recipe)
        if self._head not in heads.TABLE:
            found.append(f"recipe.task.head: {heads.TABLE.fault(self._head)}")
        elif self._head != "linear":
            found.append(f"recipe.task.head = '{self._head}': is for segmentation; use 'linear'")
        return found

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
