"""Detection: a box and a score for every object, learned from masks.

Data are those of segmentation. The objects of an image are the connected parts of each class in its mask, found after
the augmentation, and of the test on the image's own pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedvfm import registry
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.data import defect, transforms
from fedvfm.data import sample as samples
from fedvfm.tasks import base, boxes, detection_metrics, heads

HEADS = registry.Table("detection head", {"boxes": "fedvfm.tasks.heads:Boxes"})
OPTIONS = {"threshold": 0.3, "most": 100, "overlap": 0.5, "least_pixels": 0}
"""Options of the task and their defaults."""
BOUNDS = {
    "threshold": (detection_metrics.LEAST_SCORE, 1.0),
    "most": (1, 1000),
    "overlap": (0.0, 1.0),
    "least_pixels": (0, 1_000_000),
}
HARDER, NEARER = 2.0, 4.0
"""Exponents of the focal loss, alpha and beta of Zhou et al."""
SPREAD = 0.54 / 6
"""Standard deviation of an object's heat, as a share of its side (Liu et al., TTFNet)."""
BOX_WEIGHT = 2.0
"""Of the loss of the sides beside that of the heat."""
LEAST_HEAT = 0.01
"""Pixels of less heat do not learn an object's sides: as far as three standard deviations."""
PEAKS = 2
"""So many times as many peaks are looked at as boxes are given."""
OF_MASKS = ("ce_weight", "dice_weight", "dice", "class_weights")
"""Keys of ``recipe.task`` that this task does not read."""


class Detection(base.Task):
    """Boxes of objects.

    Loss of an image: (focal loss of all heat maps) / (pixels with heat 1) + :data:`BOX_WEIGHT` x (mean over objects of
    the mean over their pixels, weighed by their heat, of 1 - GIoU). An image is by itself, so that each has a gradient
    of its own.

    * Heat is 1 in the cell of the head around an object's middle and falls off from there as a Gaussian of its sides.
    * Focal loss: -(1 - p)^2 log p where the heat is 1, else -(1 - heat)^4 p^2 log(1 - p).
    * Where objects overlap, a pixel learns the sides of the smallest.

    Shapes: logits (B, K - 1 + 4, h, w) of :class:`fedvfm.tasks.heads.Boxes`, target (B, h, w) of class numbers.
    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; Zhou et al., "Objects as Points", 2019,
        eq. (1); Tian et al., "FCOS", ICCV 2019, section 3.1 (sides, the smallest object); Rezatofighi et al.,
        "Generalized Intersection over Union", CVPR 2019; Liu et al., "Training-Time-Friendly Network for Real-Time
        Object Detection", AAAI 2020, section 3 (the Gaussian's sides, its weight in the loss of the sides).
    """

    primary = detection_metrics.DetectionScores.PRIMARY
    known_options: ClassVar[tuple[str, ...]] = tuple(OPTIONS)

    def __init__(self, recipe: schema.Recipe) -> None:
        super().__init__(recipe)
        self._head = recipe.task.head or "boxes"
        given = {key: value for key, value in recipe.task.options.items() if not _option_fault(key, value)}
        self.threshold, self.overlap = (float(str(given.get(key, OPTIONS[key]))) for key in ("threshold", "overlap"))
        self.most, self.least_pixels = (int(str(given.get(key, OPTIONS[key]))) for key in ("most", "least_pixels"))

    def faults(self) -> list[str]:
        """See base."""
        settings, fields = self.recipe.task, schema.TaskConfig.model_fields
        wrong = [f"recipe.task.head: {HEADS.fault(self._head)}"] if self._head not in HEADS else []
        wrong += [
            f"recipe.task.{key}: task 'detection' does not read it; leave it out"
            for key in OF_MASKS
            if getattr(settings, key) != fields[key].default
        ]
        if self.recipe.target.kind != "class":
            wrong.append(
                f"recipe.target.kind = '{self.recipe.target.kind}': is for classification and case-classification; "
                "leave [recipe.target] out"
            )
        wrong += [fault for key, value in settings.options.items() if (fault := _option_fault(key, value))]
        return wrong

    def head(self, backbone: backbones.Backbone) -> nn.Module:
        """See base."""
        result: nn.Module = HEADS.get(self._head)(backbone.width, len(self.class_names))
        return result

    @property
    def width(self) -> int:
        """See base: heat of the classes but the background, and four distances."""
        return len(self.class_names) + 3

    def target(self, prepared: transforms.Prepared, truth: samples.Truth) -> Any:
        """See base."""
        if prepared.mask is None:
            raise defect.MASK_MISSING.error("a sample without a mask in a detection task; give every image a mask")
        return prepared.mask

    def loss(self, logits: Tensor, target: Tensor, labelled: Tensor | None = None) -> Tensor:
        """See base."""
        return self.losses(logits, target).mean()

    def losses(self, logits: Tensor, target: Tensor, labelled: Tensor | None = None) -> Tensor:
        """See base."""
        return torch.stack([self._loss(*pair) for pair in zip(logits.float(), target, strict=True)])

    def _loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Of one image. Shapes: (K - 1 + 4, h, w), (h, w)."""
        objects = boxes.of_mask(mask.cpu().numpy(), self.least_pixels)
        drawn = Drawn.of(objects, len(self.class_names) - 1, mask.shape)
        heat, weights, sides = (
            torch.from_numpy(each).to(logits.device) for each in (drawn.heat, drawn.weights, drawn.sides)
        )
        scores, distances = logits.tensor_split([len(logits) - 4])
        focal = focal_loss(scores, heat) / max(1.0, float((drawn.heat == 1).sum()))
        apart = (weights * (1 - giou(distances, sides))).sum() / max(1, drawn.count)
        return focal + BOX_WEIGHT * apart

    def boxes_at(self, logits: Tensor, size: Sequence[int]) -> boxes.Boxes:
        """Boxes of one image on its own pixels, by falling score, from :data:`detection_metrics.LEAST_SCORE` on.

        Args:
            logits: of the image as it was prepared.
            size: height and width of the image itself.

        Shapes: (K - 1 + 4, h, w).
        """
        peaks = decoded(logits, self.most, self.overlap)
        return peaks.scaled(logits.shape[1:], size)

    def delivered(self, logits: Tensor, size: Sequence[int]) -> boxes.Boxes:
        """Those of :meth:`boxes_at` from the recipe's threshold on: what is shown and written."""
        answered = self.boxes_at(logits, size)
        return answered[answered.scores >= self.threshold]

    def objects(self, truth: NDArray[np.int64]) -> boxes.Boxes:
        """The objects of a mask on the image's own pixels. Shapes: (H, W)."""
        return boxes.of_mask(truth, self.least_pixels)

    def present(self, truth: transforms.Mask) -> list[int]:
        """See base: specks that are no object are none of a class, either."""
        return [0, *(int(number) for number in np.unique(self.objects(truth).classes))]

    def scores(self, *, surface: bool) -> detection_metrics.DetectionScores:
        """See base."""
        return detection_metrics.DetectionScores(self.class_names, self.threshold)

    def score(
        self,
        into: Any,
        sample_id: str,
        logits: Tensor,
        prepared: transforms.Prepared,
        truth: samples.Truth,
        labelled: Sequence[int] = (),
    ) -> None:
        """See base. Boxes are brought to the image's own pixels before they are compared."""
        mask = prepared.truth
        if mask is None:
            raise defect.MASK_MISSING.error(f"sample '{sample_id}' has no mask to score against")
        into.add(sample_id, self.boxes_at(logits, mask.shape), self.objects(mask), prepared.part)


def _option_fault(key: str, value: schema.Option) -> str:
    """What is wrong with an option of the task; empty where nothing is, or it is another's."""
    if key not in BOUNDS:
        return ""
    low, high = BOUNDS[key]
    whole = isinstance(high, int)
    if (type(value) is int or (type(value) is float and not whole)) and low <= float(str(value)) <= high:
        return ""
    kind = "whole number" if whole else "number"
    return f"recipe.task.options.{key} = {value!r}: give a {kind} from {low:g} to {high:g}"


class Drawn:
    """What an image's objects ask of every pixel.

    Attributes:
        heat: of each class, 0 to 1. Shapes: (K - 1, h, w).
        weights: of a pixel in the loss of the sides; they add up to 1 for each object that has one. Shapes: (h, w).
        sides: distances to the sides of the object that the pixel learns, 1 where it learns none. Shapes: (4, h, w).
        count: of the objects that a pixel learns the sides of.
    """

    def __init__(self, classes: int, size: Sequence[int]) -> None:
        height, width = size
        self.heat = np.zeros((classes, height, width), dtype=np.float32)
        self.weights = np.zeros((height, width), dtype=np.float32)
        self.sides = np.ones((4, height, width), dtype=np.float32)
        self.count = 0

    @classmethod
    def of(cls, objects: boxes.Boxes, classes: int, size: Sequence[int]) -> Drawn:
        """The objects of one image.

        Args:
            objects: boxes on whole pixels.
            classes: how many but the background.
            size: height and width.
        """
        drawn = cls(classes, size)
        owner = np.full(size, -1, dtype=np.int64)
        areas = (objects.edges[:, 2:] - objects.edges[:, :2]).prod(axis=1)
        for at in np.argsort(-areas, kind="stable"):  # the smallest last
            left, top, right, bottom = objects.edges[at].astype(np.int64)
            rows, columns = (np.arange(*each) + 0.5 for each in ((top, bottom), (left, right)))
            where = (slice(top, bottom), slice(left, right))
            bump = np.outer(_bell(rows, top, bottom), _bell(columns, left, right)).astype(np.float32)
            heat = drawn.heat[objects.classes[at] - 1][where]
            np.maximum(heat, bump, out=heat)
            near = bump > LEAST_HEAT
            owner[where][near] = at
            drawn.weights[where][near] = bump[near]
            distances = np.broadcast_arrays(
                columns[None] - left, rows[:, None] - top, right - columns[None], bottom - rows[:, None]
            )
            drawn.sides[:, *where][:, near] = np.stack(distances)[:, near]
        owned = owner >= 0
        sums = np.bincount(owner[owned], weights=drawn.weights[owned], minlength=len(objects))
        drawn.weights[owned] /= sums[owner[owned]].astype(np.float32)
        drawn.count = int((sums > 0).sum())
        return drawn


def _bell(places: NDArray[np.float64], low: int, high: int) -> NDArray[np.float64]:
    """Heat along one side of an object, 1 within half a cell of its middle. Shapes: (n,)."""
    away = np.clip(np.abs(places - (low + high) / 2) - heads.CELL / 2, 0.0, None)
    result: NDArray[np.float64] = np.exp(-np.square(away / max(SPREAD * (high - low), 0.5)) / 2)
    return result


def focal_loss(logits: Tensor, heat: Tensor) -> Tensor:
    """The sum over all pixels and classes, see :class:`Detection`. Shapes: both (K - 1, h, w); a scalar."""
    chance, middle = logits.sigmoid(), heat == 1
    there = (1 - chance) ** HARDER * nn.functional.logsigmoid(logits)
    elsewhere = (1 - heat) ** NEARER * chance**HARDER * nn.functional.logsigmoid(-logits)
    return -torch.where(middle, there, elsewhere).sum()


def giou(predicted: Tensor, truth: Tensor) -> Tensor:
    """Generalised intersection over union of two boxes around one pixel, each by its four distances from there.

    Shapes: both (4, h, w), positive; (h, w), from -1 to 1.
    Source: Rezatofighi et al., CVPR 2019, algorithm 1.
    """
    shared, whole = torch.minimum(predicted, truth), torch.maximum(predicted, truth)
    both, around, *areas = ((each[0] + each[2]) * (each[1] + each[3]) for each in (shared, whole, predicted, truth))
    either = areas[0] + areas[1] - both
    return both / either - (around - either) / around


def decoded(logits: Tensor, most: int, overlap: float) -> boxes.Boxes:
    """Boxes at the peaks of the heat, thinned out class by class, by falling score.

    Shapes: (K - 1 + 4, h, w).
    Source: Zhou et al., "Objects as Points", 2019, section 3 (peaks: no less than all around).
    """
    values = logits.detach().float().cpu()
    scores, distances = values.tensor_split([len(values) - 4])
    # Peaks of logits: the sigmoid of a sure object is 1 on all of its middle.
    highest = nn.functional.max_pool2d(scores, 2 * heads.CELL + 1, 1, heads.CELL)
    peaks = (scores == highest) & (scores.double().sigmoid() >= detection_metrics.LEAST_SCORE)
    classes, rows, columns = (each.numpy() for each in peaks.nonzero(as_tuple=True))
    own = scores[peaks].double().sigmoid().numpy()
    chosen = np.argsort(-own, kind="stable")[: PEAKS * most]
    classes, rows, columns, own = (each[chosen] for each in (classes, rows, columns, own))
    sides = distances[:, rows, columns].double().numpy()
    x, y = columns + 0.5, rows + 0.5
    edges = np.stack([x - sides[0], y - sides[1], x + sides[2], y + sides[3]], axis=1)
    height, width = values.shape[1:]
    edges = np.clip(edges, 0, [width, height, width, height])
    return boxes.suppressed(boxes.Boxes(edges, classes.astype(np.int64) + 1, own), overlap)[:most]
