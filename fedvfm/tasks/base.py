"""What a task provides: a head, a loss and a metric set."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.data import transforms
from fedvfm.tasks import metrics

UNSURE = -1
"""A pseudo-label that none is."""


class Task:
    """Base of all tasks.

    Args:
        recipe: the resolved recipe.

    Attributes:
        primary: name of the metric that ranks models of this task.
        grids: how many of the backbone's grids the head takes.
        masks: whether the head takes the masks of a mask decoder.
        bags: whether a sample is a case of many images (:mod:`fedvfm.data.bags`); such a task is a
            :class:`fedvfm.tasks.case_classification.CaseClassification`.
        tabular: whether its heads take a row of the hospital's table (``recipe.inputs``).
        partial_labels: whether loss and scores take which classes are labelled (:mod:`fedvfm.data.partial_labels`).
        pseudo_labels: whether it trains on its own answers, of sites without labels: :meth:`pseudo_label`,
            :meth:`consistency`.
        known_options: keys of ``recipe.task.options`` that the task reads; others are refused.
        neighbours: share of each neighbouring slice in the answer for a slice (:mod:`fedvfm.tasks.across_slices`).
    """

    known_options: ClassVar[tuple[str, ...]] = ()
    neighbours: float = 0.0
    primary: str
    grids: int = 1
    masks: bool = False
    bags: ClassVar[bool] = False
    tabular: ClassVar[bool] = False
    partial_labels: ClassVar[bool] = False
    pseudo_labels: ClassVar[bool] = False

    def __init__(self, recipe: schema.Recipe) -> None:
        self.recipe = recipe
        self.class_names = recipe.data.class_names

    @classmethod
    def head_for(cls, backbone: backbones.Backbone) -> str | None:
        """The head where the recipe names none and the backbone decides; None leaves it to the task."""
        return None

    @classmethod
    def takes_masks(cls, head: str | None) -> bool:
        """Whether a head takes the masks of a mask decoder."""
        return False

    def faults(self) -> list[str]:
        """What is wrong with the recipe for this task, one sentence a fault."""
        raise NotImplementedError

    def head(self, backbone: backbones.Backbone) -> nn.Module:
        """A new head: ``forward(Features) -> logits``."""
        raise NotImplementedError

    def target(self, prepared: transforms.Prepared, truth: samples.Truth) -> Any:
        """What the loss compares a sample with: an int64 mask (h, w), a class number or the values of columns."""
        raise NotImplementedError

    def drawn_truth(self, number: int) -> dict[str, Any]:
        """The truth of a drawn sample of no site, by the field of :class:`fedvfm.data.sample.Sample`."""
        return heaviest(self.recipe, number)

    def present(self, truth: transforms.Mask) -> list[int]:
        """The classes that the scores of an image with this mask rest on, by number; of a few patients none leaves."""
        return [int(number) for number in np.unique(truth)]

    @property
    def width(self) -> int:
        """How many numbers the task gives of an image, a pixel or a case."""
        return len(self.class_names)

    def answers(self, logits: Tensor) -> Tensor:
        """What is told of a sample that is no mask: probabilities, or values; of a volume the mean of its slices'.

        Shapes: (K,) -> (K,), float64.
        """
        return logits.double().softmax(dim=0)

    def row(self, answers: Tensor) -> dict[str, Any]:
        """The same as a prediction's row holds it."""
        names = self.recipe.data.class_names
        chances = {name: round(float(chance), 6) for name, chance in zip(names, answers, strict=True)}
        return {"class": names[int(answers.argmax())], "probabilities": chances}

    def order(self, labels: Sequence[int | None], rng: np.random.Generator) -> NDArray[np.int64]:
        """In which order an epoch takes a site's training samples, by number: each once, unless the task balances them.

        As many as there are samples: the number of steps is not the task's to choose.

        Args:
            labels: of the samples; None where they have none.
            rng: of the draw.
        """
        return rng.permutation(len(labels))

    def loss(self, logits: Tensor, target: Tensor, labelled: Tensor | None = None) -> Tensor:
        """A scalar, mean over the batch.

        Args:
            logits: of the batch.
            target: what they are compared with.
            labelled: (B, K), which classes are labelled in each sample; None where all are.
        """
        raise NotImplementedError

    def losses(self, logits: Tensor, target: Tensor, labelled: Tensor | None = None) -> Tensor:
        """One loss each, of that sample alone: what weighs samples is no mean over those that are beside it.

        Shapes: (B,).
        """
        parts = [slice(at, at + 1) for at in range(len(target))]
        if labelled is None:
            return torch.stack([self.loss(logits[part], target[part]) for part in parts])
        return torch.stack([self.loss(logits[part], target[part], labelled[part]) for part in parts])

    def pseudo_label(self, logits: Tensor, threshold: float) -> NDArray[np.int64]:
        """What a sample's logits are sure of: the likeliest class, :data:`UNSURE` where its probability is lower.

        Shapes: (K, h, w) -> (h, w) in segmentation, (K,) -> () in classification.
        """
        sure, answer = logits.double().softmax(dim=0).max(dim=0)
        result: NDArray[np.int64] = torch.where(sure >= threshold, answer, UNSURE).cpu().numpy()
        return result

    def consistency(self, logits: Tensor, target: Tensor) -> Tensor:
        """One loss each, of that sample alone, against pseudo-labels; what is :data:`UNSURE` has no part in it.

        Args:
            logits: of the batch.
            target: of :meth:`pseudo_label`.

        Shapes: (B,).
        Source: Sohn et al., "FixMatch", NeurIPS 2020, eq. (4): the mean is over all pixels, the unsure ones included.
        """
        raise NotImplementedError

    def unlabelled_faults(self) -> list[str]:
        """Why sites without labels cannot take part, one sentence a fault; none where the recipe does not ask for it.

        A task of a third party may inherit ``pseudo_labels`` and have a loss of its own, which would not train then.
        """
        if self.recipe.unlabelled is None:
            return []
        mro = type(self).__mro__
        places = [next(at for at, kind in enumerate(mro) if name in vars(kind)) for name in ("loss", "consistency")]
        if self.pseudo_labels and places[0] >= places[1]:
            return []
        return [
            f"recipe.unlabelled: task '{self.recipe.task.kind}' has no loss for images without labels; leave it out"
        ]

    def partial_faults(self) -> list[str]:
        """Why sites may not label some classes only, one sentence a fault; none where the recipe does not ask for it.

        A task of a third party may inherit ``partial_labels`` and have a loss or a score of its own without them.
        """
        if not self.recipe.task.partial_labels:
            return []
        name = self.recipe.task.kind
        if not self.partial_labels:
            return [f"recipe.task.partial_labels: task '{name}' does not take them; leave it out"]
        without = [
            each.__name__
            for each in (self.loss, self.losses, self.score)
            if "labelled" not in inspect.signature(each).parameters
        ]
        if not without:
            return []
        return [
            f"recipe.task.partial_labels: {' and '.join(without)} of task '{name}' does not take which classes are "
            "labelled; give it the argument 'labelled', or leave partial_labels out"
        ]

    def private_faults(self) -> list[str]:
        """Why units cannot be clipped one by one, one sentence a fault; called where a mechanism does so.

        There :meth:`losses` is what trains. A task of a third party that inherits one which does not call its own
        :meth:`loss` would train with another loss than it says.
        """
        owners = [
            next(place for place, kind in enumerate(type(self).__mro__) if name in vars(kind))
            for name in ("loss", "losses")
        ]
        if owners[0] >= owners[1] or type(self).__mro__[owners[1]] is Task:
            return []
        mechanism, name = self.recipe.privacy.mechanism, self.recipe.task.kind
        return [
            f"recipe.privacy.mechanism = '{mechanism}': task '{name}' has a loss of "
            "its own and inherits 'losses', one loss a sample, which does not call it, so that another loss would "
            "train; give the task its own 'losses', or use no mechanism that clips at the site"
        ]

    def scores(self, *, surface: bool) -> metrics.MetricSet:
        """An empty metric set."""
        raise NotImplementedError

    def score(
        self,
        into: Any,
        sample_id: str,
        logits: Tensor,
        prepared: transforms.Prepared,
        truth: samples.Truth,
        labelled: Sequence[int] = (),
    ) -> None:
        """Add one sample's logits (K, h, w) or (K,) to the metric set; only ``labelled`` classes, unless all are."""
        raise NotImplementedError


def heaviest(recipe: schema.Recipe, number: int) -> dict[str, Any]:
    """A label: the heaviest classes first, since of one without weight nothing is learned."""
    classes = len(recipe.data.class_names)
    labels = np.argsort([-weight for weight in recipe.task.class_weights] or np.zeros(classes), kind="stable")
    return {"label": int(labels[number % classes])}


def class_weight_faults(recipe: schema.Recipe) -> list[str]:
    """Faults of ``class_weights``."""
    weights, names = recipe.task.class_weights, recipe.data.class_names
    if weights and len(weights) != len(names):
        return [f"recipe.task.class_weights: {len(weights)} given for {len(names)} classes"]
    if weights and not any(weights):
        return ["recipe.task.class_weights: all are 0; nothing would be learned. Leave class_weights out"]
    return []
