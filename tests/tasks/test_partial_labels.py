"""Losses and scores where a site labels some classes only: by hand, and what an unlabelled class is never taken for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm.config import schema
from fedvfm.model import adapted_model
from fedvfm.tasks import base, classification, metrics, segmentation
from fedvfm.tasks import table as task_table
from tests.tasks.test_tasks import cross_entropy_by_hand, dice_by_hand, make

TISSUES = ("background", "grey", "white")
ONLY_GREY = torch.tensor([[True, True, False]] * 2)


def batch(labelled: torch.Tensor = ONLY_GREY) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (2, 3, 6, 5), and masks that hold labelled classes alone."""
    generator = torch.Generator().manual_seed(3)
    logits, target = torch.randn(2, 3, 6, 5, generator=generator), torch.randint(0, 3, (2, 6, 5), generator=generator)
    kept = labelled[torch.arange(2)[:, None, None], target]
    return logits.requires_grad_(), torch.where(kept, target, 0)


def merged(logits: torch.Tensor) -> torch.Tensor:
    """Logits of two classes: grey, and all the rest together."""
    shares = logits.softmax(dim=1)
    return torch.stack([shares[:, 0] + shares[:, 2], shares[:, 1]], dim=1).log()


@pytest.mark.parametrize("task", [{}, {"ce_weight": 1.0, "dice_weight": 0.0}, {"ce_weight": 0.0, "dice_weight": 1.0}])
def test_what_is_not_labelled_is_one_class_with_the_background(task: dict[str, Any]) -> None:
    """Marginal loss: that of two classes whose probabilities are added up, pixel by pixel."""
    logits, target = batch()
    two = merged(logits.detach())
    entropy = cross_entropy_by_hand(two, target, (1.0, 1.0))
    shares, terms = two.softmax(dim=1)[:, 1], []
    for image in range(2):
        true = (target[image] == 1).float()
        both, whole = (shares[image] * true).sum(), shares[image].sum() + true.sum()
        terms.append(float(1 - (2 * both + 1e-5) / (whole + 1e-5)))
    expected = task.get("ce_weight", 0.2) * entropy + task.get("dice_weight", 0.8) * sum(terms) / 2
    assert float(make(**task).loss(logits.detach(), target, ONLY_GREY)) == pytest.approx(expected, rel=1e-5)


def test_an_unlabelled_class_is_no_error_in_the_background() -> None:
    """Plain cross entropy pushes white down wherever nobody drew it; the marginal one lets it be."""
    logits, target = batch()
    background = target == 0
    plain = torch.autograd.grad(make(ce_weight=1.0, dice_weight=0.0).loss(logits, target), logits)[0]
    masked = torch.autograd.grad(make(ce_weight=1.0, dice_weight=0.0).loss(logits, target, ONLY_GREY), logits)[0]
    assert (plain[:, 2][background] > 0).all()
    assert (masked[:, 2][background] < 0).all()
    assert (masked[:, 2][~background] > 0).all(), "where grey was drawn it is not white"
    assert torch.isfinite(masked).all()


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_all_labelled_is_the_plain_loss(kind: str) -> None:
    logits, target = batch(torch.ones(2, 3, dtype=torch.bool))
    if kind == "classification":
        logits, target = logits[:, :, 0, 0], target[:, 0, 0]
    logits, task, whole = logits.detach(), make(kind=kind), torch.ones(2, 3, dtype=torch.bool)
    assert float(task.loss(logits, target, whole)) == pytest.approx(float(task.loss(logits, target)), rel=1e-6)


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_each_sample_has_a_loss_of_its_own(kind: str) -> None:
    """For DP-SGD: who else is in the batch, and what is labelled there, changes no bit of it."""
    labelled = torch.tensor([[True, True, False], [True, False, True]])
    logits, target = batch(labelled)
    if kind == "classification":
        logits, target = logits[:, :, 0, 0], torch.tensor([1, 2])
    task = make(kind=kind)
    own = task.losses(logits, target, labelled)
    assert own.shape == (2,)
    assert float(own.mean()) == pytest.approx(float(task.loss(logits, target, labelled)), rel=1e-5)
    alone = task.losses(logits[1:], target[1:], labelled[1:])
    assert torch.equal(alone, own[1:])


def test_classification_compares_the_labelled_classes_alone() -> None:
    labelled = torch.tensor([[True, True, False]])
    logits = torch.tensor([[0.3, -0.2, 9.0]], requires_grad=True)
    loss = make(kind="classification").loss(logits, torch.tensor([0]), labelled)
    assert float(loss) == pytest.approx(cross_entropy_by_hand(logits[:, :2], torch.tensor([0]), (1.0, 1.0)), rel=1e-6)
    assert float(torch.autograd.grad(loss, logits)[0][0, 2]) == 0.0
    shares = classification.of_labelled(logits.detach()[0], (0, 1)).softmax(dim=0)
    assert shares[2] == 0.0
    assert shares.argmax() == 0
    assert shares.sum() == pytest.approx(1.0, abs=1e-6)


def test_dice_is_the_mean_over_the_labelled_classes_of_each_image() -> None:
    both = torch.tensor([[True, True, False], [True, True, True]])
    logits, target = batch(both)
    first = float(segmentation.dice_loss(logits[:1], target[:1], labelled=both[:1]))
    second = dice_by_hand(logits[1:].detach().repeat(2, 1, 1, 1), target[1:].repeat(2, 1, 1))
    assert float(segmentation.dice_loss(logits, target, labelled=both)) == pytest.approx((first + second) / 2, rel=1e-5)


def test_dice_of_a_batch_is_over_the_images_that_have_the_class_labelled() -> None:
    some = torch.tensor([[True, True, False], [True, True, True]])
    logits, target = batch(some)
    losses = []
    for number, images in ((1, slice(0, 2)), (2, slice(1, 2))):
        shares, truth = logits[images].softmax(dim=1)[:, number], (target[images] == number).float()
        losses.append(1 - 2 * float((shares * truth).sum()) / float((shares + truth).sum()))
    loss = segmentation.dice_loss(logits, target, labelled=some, batch=True)
    assert float(loss) == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_scores_are_of_the_labelled_classes_alone() -> None:
    """White is drawn where nobody labelled it: neither a false white nor a Dice of 1 for an empty white."""
    truth = np.zeros((8, 8), dtype=np.int64)
    truth[2:6, 2:6] = 1
    drawn = truth.copy()
    drawn[0] = 2
    scores = metrics.SegmentationScores(TISSUES)
    scores.add("a", drawn, truth, labelled=(0, 1))
    assert scores.value() == {"dice": 1.0, "iou": 1.0, "hd95": 0.0, "assd": 0.0, "nsd": 1.0, "dice_grey": 1.0}
    assert set(scores.per_sample()) == {*scores.value(), "foreground", "true_foreground"}
    assert scores.per_sample()["foreground"] == [0.25]
    scores.add("b", truth, truth)
    assert scores.value()["dice_white"] == 1.0, "over the images in which it is labelled"
    assert "dice_white" not in scores.per_sample()


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        ({"prompt": "box"}, "said to be absent"),
        ({"prompt": "auto"}, ""),
    ],
)
def test_prompts_from_the_truth_need_all_classes(task: dict[str, Any], fault: str) -> None:
    wrong = "; ".join(make(partial_labels=True, **task).faults())
    assert fault in wrong
    assert ("partial_labels" in wrong) == bool(fault)


class Smoothed(classification.Classification):
    """A task of a third party, whose loss was written before a site could label some classes only."""

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)


@pytest.mark.parametrize("partial", [False, True])
def test_a_task_whose_own_loss_takes_no_labelled_classes_is_refused_before_it_trains(partial: bool) -> None:
    recipe = make("classification", partial_labels=partial).recipe
    assert make("classification", partial_labels=partial).partial_faults() == []
    faults = Smoothed(recipe).partial_faults()
    assert [("loss of task" in fault, "argument 'labelled'" in fault) for fault in faults] == [(True, True)] * partial
    assert len(base.Task(recipe).partial_faults()) == partial


class OneByOne(Smoothed):
    """The same with the losses of single samples."""

    def losses(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")


@pytest.mark.parametrize(("kind", "refused"), [(classification.Classification, 0), (Smoothed, 1), (OneByOne, 0)])
def test_a_loss_that_a_private_step_would_not_call_is_refused(
    tiny_dino: Path, monkeypatch: pytest.MonkeyPatch, kind: type[base.Task], refused: int
) -> None:
    """A private step takes the losses of single samples; those that are inherited would be another loss."""
    monkeypatch.setitem(task_table.TABLE._entries, "own", kind)
    values = {"backbone": {"name": str(tiny_dino)}, "data": {"class_names": ["a", "b"], "input_size": [28, 28]}}
    values |= {"task": {"kind": "own"}, "aggregation": {"weighting": "uniform"}}
    private = {"mechanism": "record-level", "clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    model, faults = adapted_model.examine(schema.parse(schema.Recipe, values, "recipe"))
    assert model is not None, faults
    _, faults = adapted_model.examine(schema.parse(schema.Recipe, {**values, "privacy": private}, "recipe"))
    assert [fault for fault in faults if "inherits 'losses'" in fault] == faults
    assert len(faults) == refused
