"""Losses against what the adapter itself is sure of: by hand, and of each sample alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from fedvfm.config import schema
from fedvfm.tasks import base, classification, segmentation

UNSURE = base.UNSURE


def recipe(kind: str = "segmentation", **task: Any) -> schema.Recipe:
    values = {"backbone": {"name": "unet"}, "data": {"class_names": ["none", "box", "bar"]}}
    return schema.parse(schema.Recipe, {**values, "task": {"kind": kind, **task}}, "recipe")


def drawn(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(7))


def test_a_pseudo_label_is_the_likeliest_class_where_its_probability_reaches_the_threshold() -> None:
    task = segmentation.Segmentation(recipe())
    logits = torch.log(torch.tensor([[[0.95, 0.5]], [[0.03, 0.3]], [[0.02, 0.2]]]))
    assert task.pseudo_label(logits, 0.9).tolist() == [[0, UNSURE]]
    assert task.pseudo_label(logits, 0.96).tolist() == [[UNSURE, UNSURE]]
    sorted_out = classification.Classification(recipe("classification"))
    assert int(sorted_out.pseudo_label(torch.log(torch.tensor([0.02, 0.95, 0.03])), 0.9)) == 1


def test_of_an_image_that_is_sure_everywhere_it_is_the_loss_with_labels() -> None:
    logits, target = drawn(2, 3, 6, 6), torch.randint(0, 3, (2, 6, 6), generator=torch.Generator().manual_seed(1))
    task = segmentation.Segmentation(recipe())
    torch.testing.assert_close(task.consistency(logits, target), task.losses(logits, target))
    sorted_out = classification.Classification(recipe("classification", class_weights=[1.0, 2.0, 3.0]))
    rows, labels = drawn(2, 3), torch.tensor([2, 0])
    torch.testing.assert_close(sorted_out.consistency(rows, labels), sorted_out.losses(rows, labels))


def test_unsure_pixels_have_no_gradient_and_the_mean_is_over_all() -> None:
    logits = drawn(1, 3, 4, 4).requires_grad_()
    target = torch.full((1, 4, 4), UNSURE)
    target[0, :2] = 1
    task = segmentation.Segmentation(recipe(dice_weight=0.0, ce_weight=1.0))
    (loss,) = task.consistency(logits, target)
    expected = functional.cross_entropy(logits[:, :, :2], target[:, :2], reduction="sum") / 16
    torch.testing.assert_close(loss, expected)
    both = segmentation.Segmentation(recipe())
    both.consistency(logits, target).sum().backward()
    assert logits.grad is not None
    assert not logits.grad[:, :, 2:].any()
    assert logits.grad[:, :, :2].any()


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_nothing_sure_is_nothing_learned(kind: str) -> None:
    made: Any = segmentation.Segmentation if kind == "segmentation" else classification.Classification
    shape = (2, 3, 4, 4) if kind == "segmentation" else (2, 3)
    logits = drawn(*shape).requires_grad_()
    target = torch.full((2, *shape[2:]), UNSURE)
    made(recipe(kind)).consistency(logits, target).sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("kind", "weights"), [("segmentation", []), ("segmentation", [1, 2, 5]), ("classification", [])]
)
def test_the_loss_of_a_sample_is_of_that_sample_alone(kind: str, weights: list[float]) -> None:
    made: Any = segmentation.Segmentation if kind == "segmentation" else classification.Classification
    shape = (3, 3, 4, 4) if kind == "segmentation" else (3, 3)
    logits = drawn(*shape)
    target = torch.randint(UNSURE, 3, (3, *shape[2:]), generator=torch.Generator().manual_seed(2))
    task = made(recipe(kind, class_weights=[float(weight) for weight in weights]))
    together = task.consistency(logits, target)
    alone = torch.cat([task.consistency(logits[at : at + 1], target[at : at + 1]) for at in range(3)])
    torch.testing.assert_close(together, alone, rtol=0.0, atol=0.0)
