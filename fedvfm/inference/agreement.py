"""How much two models' answers for the same images are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fedvfm import errors
from fedvfm.inference import delivery
from fedvfm.model import adapted_model
from fedvfm.tasks import metrics


@dataclass(frozen=True)
class Agreement:
    """What is compared, and how much of it is the same.

    Attributes:
        name: "dice" of masks; "same_class", the share of images with the same class; "same_side" of labels on the same
            side of 0.5; "" where answers are no classes.
        share: 1 for all the same; of masks the mean over images and the foreground classes that either mask has.
        classes: of each class that is there: mean Dice over the images where either mask has it; share of the images
            that the other model calls it and this one too; of labels the F1 score of the sides over 0.5.
        images: how many images each of these rests on.
    """

    name: str
    share: float
    classes: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)


def measure(
    model: adapted_model.AdaptedModel, given: Sequence[Tensor], expected: Sequence[Tensor], option: str
) -> Agreement:
    """How much of two models' answers is the same.

    Args:
        model: whose task and classes they are of.
        given: logits of each image.
        expected: the same of the other model.
        option: where the images come from, for messages.

    Raises:
        DataError: if ``expected`` has no mask to compare.
    """
    if delivery.dense(model):
        if not any(bool((other.argmax(dim=0) > 0).any()) for other in expected):
            raise errors.DataError(
                f"{option}: the adapter finds none of its classes in these images, so nothing can be compared; give "
                "images of what it was trained on"
            )
        scores = {name: own for name, own in _dice(model, given, expected).items() if own}
        whole = float(np.mean([score for own in scores.values() for score in own]))
        classes = {name: float(np.mean(own)) for name, own in scores.items()}
        return Agreement("dice", whole, classes, {name: len(own) for name, own in scores.items()})
    pairs = zip(given, expected, strict=True)
    answers = [(model.task.answers(own), model.task.answers(other)) for own, other in pairs]
    kind = model.recipe.target.kind
    if kind in ("class", "ordinal"):
        same: dict[str, list[bool]] = {}
        for own, other in answers:
            name = model.recipe.data.class_names[int(other.argmax())]
            same.setdefault(name, []).append(int(own.argmax()) == int(other.argmax()))
        shares = {name: float(np.mean(row)) for name, row in sorted(same.items())}
        whole = float(np.mean([equal for row in same.values() for equal in row]))
        return Agreement("same_class", whole, shares, {name: len(row) for name, row in same.items()})
    if kind == "multi-label":
        over = np.stack([[(own > 0.5).numpy(), (other > 0.5).numpy()] for own, other in answers])
        both, either = over.all(axis=1).sum(axis=0), over.sum(axis=(0, 1))
        there = [(name, at) for at, name in enumerate(model.recipe.data.class_names) if either[at]]
        scores_of = {name: float(2 * both[at] / either[at]) for name, at in there}
        counts = {name: int(over[:, 1, at].sum()) for name, at in there}
        return Agreement("same_side", float((over[:, 0] == over[:, 1]).mean()), scores_of, counts)
    return Agreement("", 1.0)


def _dice(
    model: adapted_model.AdaptedModel, given: Sequence[Tensor], expected: Sequence[Tensor]
) -> dict[str, list[float]]:
    names = model.recipe.data.class_names
    scores: dict[str, list[float]] = {name: [] for name in names[1:]}
    for own, other in zip(given, expected, strict=True):
        masks = [logits.argmax(dim=0).numpy() for logits in (own, other)]
        dice = metrics.overlap(masks[0], masks[1], len(names))[0]
        for number, name in enumerate(names[1:], 1):
            if any((mask == number).any() for mask in masks):
                scores[name].append(float(dice[number]))
    return scores


def apart(model: adapted_model.AdaptedModel, given: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """How far answers that are no classes lie apart in the mean, 0 for the same.

    Units: the recipe's scales in regression; a logarithm of the hazard ratio for Cox; else of probabilities.
    """
    target = model.recipe.target
    off = []
    for own, other in zip(given, expected, strict=True):
        if target.kind in ("cox", "regression"):
            off.append(((own - other).abs() / own.new_tensor(target.scales or (1.0,))).double().mean())
        else:
            off.append((own.double().softmax(dim=0) - other.double().softmax(dim=0)).abs().mean())
    return float(np.mean([float(value) for value in off]))
