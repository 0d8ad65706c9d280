"""Classification of whole images: one class each, or what else the recipe's target says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedvfm.backbones import base as backbones
from fedvfm.config import privacy, schema
from fedvfm.data import sample as samples
from fedvfm.data import transforms
from fedvfm.tasks import base, fusion, heads, metrics, targets, words

SAMPLING = ("uniform", "balanced")
"""How an epoch draws: every sample once, or every class that the site has equally often."""


class Classification(base.Task):
    """One class an image, or grades, labels or numbers (:mod:`fedvfm.tasks.targets`).

    With unequal classes plain cross entropy may end in one answer for all. Against it stand ``task.class_weights``,
    which are public and of the recipe, and ``task.options.sampling = "balanced"``, for which no count leaves a site.

    Where a site labels some classes only, the softmax is over these: the logits of the others get no gradient from it,
    and its scores compare these classes alone.

    Shapes: logits (B, K), target (B,) of class numbers; of other targets as they say.
    Source of the softmax over a site's classes: Li and Zhan, "FedRS: Federated Learning with Restricted Softmax for
        Label Distribution Non-IID Data", KDD 2021, with their alpha = 0.
    """

    known_options: ClassVar[tuple[str, ...]] = ("sampling",)
    tabular: ClassVar[bool] = True
    partial_labels: ClassVar[bool] = True
    pseudo_labels: ClassVar[bool] = True

    def __init__(self, recipe: schema.Recipe) -> None:
        super().__init__(recipe)
        self._head = recipe.task.head or "linear"
        self._sampling = recipe.task.options.get("sampling", SAMPLING[0])
        self.answer: targets.Target = targets.TABLE.get(recipe.target.kind)(recipe)

    @property
    def primary(self) -> str:  # type: ignore[override]
        """See base."""
        kind = self.recipe.target.kind  # a task of a third party has another name, and answers as this one does
        return metrics.primary(self.recipe.task.kind, kind) or metrics.primary("classification", kind) or ""

    def faults(self) -> list[str]:
        """See base."""
        return self.answer.faults() + self._sampling_faults() + self._head_faults() + self._label_faults()

    def _label_faults(self) -> list[str]:
        kind = self.recipe.target.kind
        if not self.recipe.task.partial_labels or kind == "class":
            return []
        instead = "; leave the values of a column empty that a site does not have" if kind != "ordinal" else ""
        return [f"recipe.task.partial_labels: target '{kind}' has no classes that a site may leave out{instead}"]

    def _head_faults(self) -> list[str]:
        if self.recipe.words is not None:
            return []  # told with the words
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
        if self.recipe.words is not None:
            return words.Words(self.recipe, backbone.words)
        joined = fusion.argument(backbone.width, self.recipe.inputs)
        return self.answer.head(heads.TABLE.get(self._head)(backbone.width, self.answer.outputs, **joined))

    def target(self, prepared: transforms.Prepared, truth: samples.Truth) -> Any:
        """See base."""
        return self.answer.target(truth)

    def drawn_truth(self, number: int) -> dict[str, Any]:
        """See base."""
        return self.answer.drawn(number)

    @property
    def width(self) -> int:
        """See base."""
        return self.answer.width

    def answers(self, logits: Tensor) -> Tensor:
        """See base."""
        return self.answer.answers(logits)

    def row(self, answers: Tensor) -> dict[str, Any]:
        """See base."""
        return self.answer.row(answers)

    def loss(self, logits: Tensor, target: Tensor, labelled: Tensor | None = None) -> Tensor:
        """See base."""
        return self.answer.loss(_masked(logits, labelled), target)

    def losses(self, logits: Tensor, target: Tensor, labelled: Tensor | None = None) -> Tensor:
        """See base."""
        return self.answer.losses(_masked(logits, labelled), target)

    def consistency(self, logits: Tensor, target: Tensor) -> Tensor:
        """See base."""
        sure = target != base.UNSURE
        return self.answer.losses(logits, target.clamp(min=0)) * sure

    def private_faults(self) -> list[str]:
        """See base."""
        return [*super().private_faults(), *self.answer.private_faults()]

    def unlabelled_faults(self) -> list[str]:
        """See base."""
        kind = self.recipe.target.kind
        if self.recipe.unlabelled is None or kind == "class":
            return super().unlabelled_faults()
        return [f"recipe.unlabelled: target '{kind}' has no answer to be sure of; use target 'class', or leave it out"]

    def scores(self, *, surface: bool) -> metrics.MetricSet:
        """See base."""
        return self.answer.scores()

    def score(
        self,
        into: Any,
        sample_id: str,
        logits: Tensor,
        prepared: transforms.Prepared,
        truth: samples.Truth,
        labelled: Sequence[int] = (),
    ) -> None:
        """See base."""
        self.answer.add(into, sample_id, of_labelled(logits, labelled), truth, prepared.part)


def of_labelled(logits: Tensor, labelled: Sequence[int]) -> Tensor:
    """One sample's logits, minus infinity for classes that are not labelled, where some are named: probability 0.

    Shapes: (K,) -> (K,).
    """
    if not labelled:
        return logits
    rows = torch.zeros(1, len(logits), dtype=torch.bool, device=logits.device)
    rows[0, list(labelled)] = True
    return _masked(logits.unsqueeze(0), rows)[0]


def _masked(logits: Tensor, labelled: Tensor | None) -> Tensor:
    """Logits, of a class that is not labelled minus infinity: it has no part in loss and gradient."""
    return logits if labelled is None else logits.float().masked_fill(~labelled, -torch.inf)


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
