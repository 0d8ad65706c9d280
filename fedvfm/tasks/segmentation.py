"""Semantic segmentation: 0.2 cross entropy + 0.8 soft Dice by default, scored at each image's own resolution."""

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
from fedvfm.data import sample as samples
from fedvfm.tasks import across_slices, base, heads, metrics, proposals

SMOOTH = 1e-5
"""(pixels) Added to the numerator and the denominator of Dice, as by MONAI: a class in neither mask has loss 0."""
LEAST_SMOOTH, MOST_SMOOTH = 1e-12, 1000
"""What ``recipe.task.options.smooth`` may be: with far less float32 has no slope but NaN."""
OF_ANY_HEAD = ("neighbours", "smooth")
"""Options that are of the answer and of the loss, whatever model learns it."""


class Segmentation(base.Task):
    """One class a pixel.

    Shapes: logits (B, K, h, w), target (B, h, w) of class numbers; of volumes (B, K, d, h, w) and (B, d, h, w).
    Source of the loss and its weights: Zhang and Liu, "Customized Segment Anything Model for Medical Image
        Segmentation" (SAMed), 2023, section 3.4; Dice as in MONAI's ``DiceCELoss``.
    Source of the loss where some classes are not labelled: Shi et al., "Marginal loss and exclusion loss for partially
        supervised multi-organ segmentation", Medical Image Analysis 70, 2021, marginal cross entropy and marginal Dice;
        their exclusion loss is not there.
    """

    primary = "dice"
    known_options: ClassVar[tuple[str, ...]] = (*OF_ANY_HEAD, "passes")
    partial_labels: ClassVar[bool] = True
    pseudo_labels: ClassVar[bool] = True

    def __init__(self, recipe: schema.Recipe) -> None:
        super().__init__(recipe)
        self._head = recipe.task.head or ("patch" if recipe.backbone.name == "unet" else "pyramid")
        self.grids = heads.TABLE.get(self._head).grids if self._head in heads.TABLE else 1
        self.masks = self.takes_masks(self._head)
        self._weights = torch.tensor(recipe.task.class_weights) if recipe.task.class_weights else None
        share = recipe.task.options.get("neighbours", 0.0)
        self.neighbours = share if isinstance(share, float) else 0.0
        smooth = recipe.task.options.get("smooth", SMOOTH)
        self._smooth = float(smooth) if isinstance(smooth, int | float) else 0.0

    @classmethod
    def head_for(cls, backbone: backbones.Backbone) -> str | None:
        """See base."""
        return "sam-masks" if backbone.mask_tokens else backbone.default_head

    @classmethod
    def takes_masks(cls, head: str | None) -> bool:
        """See base."""
        return head is not None and head in heads.TABLE and getattr(heads.TABLE.get(head), "masks", False)

    def faults(self) -> list[str]:
        """See base."""
        settings = self.recipe.task
        found = base.class_weight_faults(self.recipe)
        if self._head not in heads.TABLE:
            found.append(f"recipe.task.head: {heads.TABLE.fault(self._head)}")
        elif self._head == "linear":
            found.append("recipe.task.head = 'linear': is for classification; use 'pyramid' or 'patch'")
        elif self._head in ("pyramid", "unet", "unet-deep") and self.recipe.backbone.name == "unet":
            found.append(f"recipe.task.head = '{self._head}': backbone 'unet' is a U-Net already; use 'patch'")
        if settings.ce_weight + settings.dice_weight == 0:
            found.append("recipe.task: ce_weight and dice_weight are both 0; nothing would be learned")
        if settings.dice == "batch" and privacy.UNITS.get(self.recipe.privacy.mechanism, "site") != "site":
            found.append(
                f"recipe.task.dice = 'batch': under mechanism '{self.recipe.privacy.mechanism}' every image must have "
                "a gradient of its own. Use dice = 'image'"
            )
        if self.recipe.target.kind != "class":
            found.append(
                f"recipe.target.kind = '{self.recipe.target.kind}': is for classification and case-classification; "
                "leave [recipe.target] out"
            )
        if settings.partial_labels and settings.oracle:
            found.append(
                f"recipe.task.partial_labels: with prompt = '{settings.prompt}' a class that is not labelled would be "
                "said to be absent. Use prompt = 'none' or 'auto'"
            )
        passes = settings.options.get("passes", proposals.PASSES)
        if type(passes) is not int or not 1 <= passes <= proposals.MOST_PASSES:
            found.append(
                f"recipe.task.options.passes = {passes!r}: give a whole number from 1 to {proposals.MOST_PASSES}"
            )
        elif "passes" in settings.options and settings.prompt != "auto":
            found.append("recipe.task.options.passes: only prompt = 'auto' reads it; leave it out")
        smooth = settings.options.get("smooth", SMOOTH)
        if isinstance(smooth, bool) or not LEAST_SMOOTH <= self._smooth <= MOST_SMOOTH:
            most = f"from {LEAST_SMOOTH:g} to {MOST_SMOOTH}"
            found.append(f"recipe.task.options.smooth = {smooth!r}: give a number of pixels {most}")
        share = settings.options.get("neighbours", 0.0)
        if isinstance(share, bool) or share != self.neighbours or not 0 <= self.neighbours <= across_slices.MOST:
            wanted = "give the share of each neighbouring slice, from 0 to a third"
            found.append(f"recipe.task.options.neighbours = {share!r}: {wanted}")
        elif share and (settings.oracle or self.recipe.data.depth):
            reason = "data.depth sees whole volumes" if self.recipe.data.depth else "boxes and points are of one slice"
            found.append(f"recipe.task.options.neighbours = {share!r}: {reason}; leave it out")
        return found

    def head(self, backbone: backbones.Backbone) -> nn.Module:
        """See base."""
        settings = self.recipe.task
        if settings.prompt == "auto":
            passes = int(str(settings.options.get("passes", proposals.PASSES)))
            return proposals.AutomaticMasks(backbone.prompt_width, len(self.class_names), passes)
        made: nn.Module = heads.TABLE.get(self._head)(backbone.width, len(self.class_names))
        return made

    def target(self, prepared: transforms.Prepared, truth: samples.Truth) -> Any:
        """See base."""
        if prepared.mask is None:
            raise defect.MASK_MISSING.error("a sample without a mask in a segmentation task; give every image a mask")
        return prepared.mask

    def loss(self, logits: Tensor, target: Tensor, labelled: Tensor | None = None) -> Tensor:
        """See base. Of automatic prompts the last pass counts whole, each stage before it by ``STAGE_WEIGHT``."""
        last, *before = torch.split(logits, len(self.class_names), dim=1)
        total = self._loss(last, target, labelled)
        for stage in before:
            total = total + proposals.STAGE_WEIGHT * self._loss(stage, target, labelled)
        return total

    def pseudo_label(self, logits: Tensor, threshold: float) -> NDArray[np.int64]:
        """See base. Of automatic prompts the last pass answers."""
        return super().pseudo_label(logits[-len(self.class_names) :], threshold)

    def consistency(self, logits: Tensor, target: Tensor) -> Tensor:
        """See base. Cross entropy and Dice with the recipe's weights; Dice is over the sure pixels."""
        last, *before = torch.split(logits, len(self.class_names), dim=1)
        total = self._consistency(last, target)
        for stage in before:
            total = total + proposals.STAGE_WEIGHT * self._consistency(stage, target)
        return total

    def _consistency(self, logits: Tensor, target: Tensor) -> Tensor:
        settings, logits = self.recipe.task, logits.float()
        if self._weights is not None:
            self._weights = self._weights.to(logits.device)
        entropy = nn.functional.cross_entropy(
            logits, target, weight=self._weights, ignore_index=base.UNSURE, reduction="none"
        ).mean(dim=(1, 2))
        # As a weighted mean over pixels has it, but with the classes' mean in place of the image's own.
        entropy = entropy if self._weights is None else entropy / self._weights.mean()
        sure = target != base.UNSURE
        dice = [
            dice_loss(
                logits[at : at + 1], target[at : at + 1], self._weights, sure=sure[at : at + 1], smooth=self._smooth
            )
            for at in range(len(target))
        ]
        return settings.ce_weight * entropy + settings.dice_weight * torch.stack(dice)

    def _loss(self, logits: Tensor, target: Tensor, labelled: Tensor | None) -> Tensor:
        settings = self.recipe.task
        if self._weights is not None:
            self._weights = self._weights.to(logits.device)
        logits = logits.float() if labelled is None else marginal(logits.float(), labelled)
        together = settings.dice == "batch"
        dice = dice_loss(logits, target, self._weights, labelled, batch=together, smooth=self._smooth)
        entropy = nn.functional.cross_entropy(logits, target, weight=self._weights)
        return settings.dice_weight * dice + settings.ce_weight * entropy

    def scores(self, *, surface: bool) -> metrics.SegmentationScores:
        """See base."""
        return metrics.SegmentationScores(
            self.class_names, surface=surface, nsd_tolerance=self.recipe.evaluation.nsd_tolerance
        )

    def score(
        self,
        into: Any,
        sample_id: str,
        logits: Tensor,
        prepared: transforms.Prepared,
        truth: samples.Truth,
        labelled: Sequence[int] = (),
    ) -> None:
        """See base. Logits are resized to the image's own resolution before the class is chosen."""
        mask = prepared.truth
        if mask is None:
            raise defect.MASK_MISSING.error(f"sample '{sample_id}' has no mask to score against")
        classes = classes_at(logits, mask.shape)
        into.add(sample_id, classes, mask, prepared.spacing, prepared.part, labelled=labelled)


def marginal(logits: Tensor, labelled: Tensor) -> Tensor:
    """Logits in which class 0 stands for the background and every class that is not labelled, and the latter for none.

    Their softmax is the softmax of ``logits`` with these probabilities added up in class 0.

    Shapes: logits (B, K, h, w), labelled (B, K) with class 0 among them; (B, K, h, w).
    Source: Shi et al., Medical Image Analysis 70, 2021 (see :class:`Segmentation`).
    """
    rest = _over_pixels(~labelled, logits)
    merged = torch.cat([torch.ones_like(rest[:, :1]), rest[:, 1:]], dim=1)
    background = logits.masked_fill(~merged, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([background, logits.masked_fill(rest, -torch.inf)[:, 1:]], dim=1)


def _over_pixels(classes: Tensor, logits: Tensor) -> Tensor:
    """Shapes: (B, K) -> (B, K, 1, 1), or (B, K, 1, 1, 1) of volumes."""
    return classes.reshape(*classes.shape, *[1] * (logits.ndim - 2))


def dice_loss(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    labelled: Tensor | None = None,
    *,
    batch: bool = False,
    sure: Tensor | None = None,
    smooth: float = SMOOTH,
) -> Tensor:
    """1 - Dice of the softmax, the mean over images and all classes but the background.

    Where some are not labelled, the mean over images of the mean over the labelled classes of each. With ``batch`` the
    images of a batch count as one, class by class, over those that have the class labelled: a slice without a class
    then teaches that the class is not there, which its own Dice hardly does. Pixels that are not ``sure`` are in none.

    ``smooth`` is added to the numerator and the denominator. Of a class in no mask the loss is 1, almost without a
    slope, until no more than ``smooth`` is predicted of it. Long training comes to 1e-5, suddenly, and predicts less of
    the classes that are there from then on; with one pixel it does from the start. With 1e-12 it stays without a slope.

    Shapes: logits (B, K, h, w), target (B, h, w) of class numbers, weights (K,), labelled (B, K), sure (B, h, w); a
        scalar. Volumes have a further side. Units: ``smooth`` in pixels.
    Source: Milletari et al., "V-Net", 3DV 2016, in the form of MONAI's ``DiceCELoss`` (without squares, and weights
        multiplied class by class), whose ``batch`` it is too.
    """
    probabilities = logits.softmax(dim=1)
    known = target if sure is None else target.clamp(min=0)
    truth = torch.zeros_like(probabilities).scatter_(1, known.unsqueeze(1), 1.0)
    probabilities, truth = probabilities[:, 1:], truth[:, 1:]
    if sure is not None:
        probabilities, truth = (part * sure.unsqueeze(1) for part in (probabilities, truth))
    if batch and labelled is not None:
        probabilities, truth = (part * _over_pixels(labelled[:, 1:], part) for part in (probabilities, truth))
        labelled = labelled.any(dim=0, keepdim=True)
    sides = tuple(range(2, logits.ndim))
    over = (0, *sides) if batch else sides
    both, predicted, true = (
        part.sum(dim=over).reshape(-1, part.shape[1]) for part in (probabilities * truth, probabilities, truth)
    )
    # In MONAI's order, so that the last bits of the gradient are its own.
    extra, missed = 0.5 * (predicted - both), 0.5 * (true - both)
    loss = 1 - (2 * both + smooth) / (2 * (both + extra + missed) + smooth)
    if weights is not None and loss.shape[1] > 1:
        loss = loss * weights[1:]
    if labelled is not None:
        counted = labelled[:, 1:].to(loss.dtype)
        return ((loss * counted).sum(dim=1) / counted.sum(dim=1)).mean()
    return loss.mean()


def classes_at(logits: Tensor, size: Sequence[int]) -> NDArray[np.int64]:
    """The likeliest class of every pixel at the image's own size: what is scored, shown and delivered.

    Logits are resized before the class is chosen. Shapes: (K, h, w) -> (H, W); of volumes (K, d, h, w) -> (D, H, W).
    """
    return resized(logits, size).argmax(dim=0).cpu().numpy().astype(np.int64)


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits at another size, in float32; as they are where it is theirs. Shapes: as :func:`classes_at` takes them."""
    own = logits.float()
    return own if tuple(own.shape[1:]) == tuple(size) else backbones.resize(own.unsqueeze(0), size)[0]
