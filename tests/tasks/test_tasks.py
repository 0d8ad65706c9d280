"""Tasks: the losses by hand, heads without BatchNorm, and four samples that every task can learn by heart."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedvfm import errors
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.data import transforms
from fedvfm.model import adapted_model
from fedvfm.tasks import base as tasks
from fedvfm.tasks import heads, segmentation, table


def recipe(
    backbone: str | Path = "unet", kind: str = "segmentation", classes: int = 3, adapter: str = "lora", **task: Any
) -> schema.Recipe:
    values = {
        "backbone": {"name": str(backbone), "options": {"channels": [8, 16]} if backbone == "unet" else {}},
        "adapter": {"kind": "full" if backbone == "unet" else adapter, "rank": 4},
        "task": {"kind": kind, **task},
        "data": {"class_names": [f"class {n}" for n in range(classes)], "input_size": [56, 56]},
    }
    return schema.parse(schema.Recipe, values, "recipe")


def make(*arguments: Any, **task: Any) -> tasks.Task:
    chosen = recipe(*arguments, **task)
    found: tasks.Task = table.TABLE.get(chosen.task.kind)(chosen)
    return found


# -- losses by hand --------------------------------------------------------------------------------------------------


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 3, 6, 5, generator=generator), torch.randint(0, 3, (2, 6, 5), generator=generator)


def dice_by_hand(logits: torch.Tensor, target: torch.Tensor, weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> float:
    """1 - (2 sum p t + s) / (sum p + sum t + s) for every image and class but the background, s = 1e-5."""
    probabilities, terms = logits.softmax(dim=1), []
    for image in range(len(logits)):
        for number in (1, 2):
            p, t = probabilities[image, number], (target[image] == number).float()
            terms.append(weights[number] * float(1 - (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)))
    return sum(terms) / len(terms)


def cross_entropy_by_hand(
    logits: torch.Tensor, target: torch.Tensor, weights: tuple[float, ...] = (1.0, 1.0, 1.0)
) -> float:
    logs = logits.log_softmax(dim=1).movedim(1, -1).reshape(-1, logits.shape[1])
    chosen = target.flatten()
    weight = torch.tensor(weights)[chosen]
    return float(-(weight * logs[torch.arange(len(chosen)), chosen]).sum() / weight.sum())


def test_the_default_is_a_fifth_cross_entropy_and_four_fifths_dice() -> None:
    logits, target = batch()
    expected = 0.2 * cross_entropy_by_hand(logits, target) + 0.8 * dice_by_hand(logits, target)
    assert float(make().loss(logits, target)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("ce", "dice"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_weights_of_the_two_losses(ce: float, dice: float) -> None:
    logits, target = batch()
    expected = ce * cross_entropy_by_hand(logits, target) + dice * dice_by_hand(logits, target)
    assert float(make(ce_weight=ce, dice_weight=dice).loss(logits, target)) == pytest.approx(expected, rel=1e-5)


def test_class_weights_in_segmentation() -> None:
    logits, target = batch()
    weights = (0.5, 1.0, 3.0)
    expected = 0.2 * cross_entropy_by_hand(logits, target, weights) + 0.8 * dice_by_hand(logits, target, weights)
    assert float(make(class_weights=list(weights)).loss(logits, target)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dice", ["image", "batch"])
@pytest.mark.parametrize("smooth", [1e-5, 1.0])
def test_the_loss_and_its_gradient_are_those_of_monai_to_the_last_bit(
    classes: int, weighted: bool, dice: str, smooth: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn of optional packages
        from monai.losses import DiceCELoss
    weights = [0.5 + 0.25 * k for k in range(classes)] if weighted else []
    reference: Any = DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        lambda_ce=0.2,
        lambda_dice=0.8,
        weight=torch.tensor(weights) if weighted else None,
        batch=dice == "batch",
        smooth_nr=smooth,
        smooth_dr=smooth,
    )
    options = {} if smooth == segmentation.SMOOTH else {"smooth": smooth}
    task = make(classes=classes, class_weights=weights, dice=dice, options=options)
    generator = torch.Generator().manual_seed(classes)
    for size in ((6, 5), (64, 48)):
        target = torch.randint(0, classes, (3, *size), generator=generator)
        target[1] = 0  # an image of background alone
        values, gradients = [], []
        for loss in (task.loss, lambda logits, target: reference(logits, target.unsqueeze(1))):
            logits = torch.randn(3, classes, *size, generator=torch.Generator().manual_seed(1)).requires_grad_()
            value = loss(logits, target)
            value.backward()
            values.append(value.detach())
            gradients.append(logits.grad)
        assert torch.equal(*values)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("dice", ["image", "batch"])
def test_smoothing_decides_what_a_class_in_no_mask_teaches(dice: str) -> None:
    """With next to nothing only the classes that are there have a slope; with pixels the absent one is pushed down."""
    slopes = {}
    for smooth in (1e-12, 1.0):
        task = make(classes=3, ce_weight=0.0, dice_weight=1.0, dice=dice, options={"smooth": smooth})
        logits = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        target = torch.randint(0, 2, (2, 6, 5), generator=torch.Generator().manual_seed(2))
        task.loss(logits, target).backward()  # type: ignore[no-untyped-call]
        slopes[smooth] = logits.grad
        again = logits.detach().requires_grad_()
        inside, there = again.softmax(dim=1)[:, 1], (target == 1).float()
        over = (0, 1, 2) if dice == "batch" else (1, 2)
        loss = 1 - 2 * (inside * there).sum(dim=over) / (inside + there).sum(dim=over)
        (0.5 * loss.mean()).backward()
        slopes[f"there {smooth}"] = again.grad
    torch.testing.assert_close(slopes[1e-12], slopes["there 1e-12"], rtol=1e-5, atol=1e-8)
    pushed: Any = slopes[1.0] - slopes["there 1.0"]
    assert float(pushed[:, 2].min()) > 0


def test_class_weights_in_classification() -> None:
    generator = torch.Generator().manual_seed(4)
    logits, target = torch.randn(7, 3, generator=generator), torch.randint(0, 3, (7,), generator=generator)
    for weights in ((1.0, 1.0, 1.0), (0.5, 1.0, 3.0)):
        task = make(kind="classification", class_weights=list(weights))
        assert float(task.loss(logits, target)) == pytest.approx(
            cross_entropy_by_hand(logits, target, weights), rel=1e-5
        )
    plain = make(kind="classification")
    assert float(plain.loss(logits, target)) == pytest.approx(cross_entropy_by_hand(logits, target), rel=1e-5)


def test_a_bfloat16_model_has_a_float32_loss() -> None:
    logits, target = batch()
    assert make().loss(logits.bfloat16(), target).dtype == torch.float32
    assert (
        make(kind="classification").loss(torch.randn(4, 3).bfloat16(), torch.zeros(4, dtype=torch.int64)).dtype
        == torch.float32
    )


@pytest.mark.parametrize("kind", ["segmentation", "classification"])
def test_faults(kind: str) -> None:
    assert make(kind=kind).faults() == []
    assert make(kind=kind, class_weights=[1.0]).faults() == ["recipe.task.class_weights: 1 given for 3 classes"]
    (fault,) = make(kind=kind, head="pyramidd").faults()
    assert "nearest: 'pyramid'" in fault


def test_faults_of_one_task() -> None:
    assert "nothing would be learned" in make(ce_weight=0.0, dice_weight=0.0).faults()[0]
    assert "use 'pyramid' or 'patch'" in make(head="linear").faults()[0]
    assert "use 'linear'" in make(kind="classification", head="patch").faults()[0]
    assert "is a U-Net already; use 'patch'" in make(head="pyramid").faults()[0]


@pytest.mark.parametrize(("mechanism", "faults"), [("record-level", 1), ("site-level", 0)])
def test_dice_of_a_batch_gives_no_image_a_gradient_of_its_own(mechanism: str, faults: int) -> None:
    chosen = recipe(dice="batch")
    private = chosen.privacy.model_copy(update={"mechanism": mechanism})
    task = table.TABLE.get("segmentation")(chosen.model_copy(update={"privacy": private}))
    assert [fault.rpartition(". ")[2] for fault in task.faults()] == ["Use dice = 'image'"] * faults


def test_a_sample_without_what_the_task_needs() -> None:
    image = np.zeros((3, 4, 4), np.float32)
    bare = transforms.Prepared(image, None, None, None)
    for kind, match in (("segmentation", "without a mask"), ("classification", "without a label")):
        with pytest.raises(errors.DataError, match=match):
            make(kind=kind).target(bare, None)
        task = make(kind=kind)
        with pytest.raises(errors.DataError, match="sample 'x' has no"):
            task.score(task.scores(surface=False), "x", torch.zeros(3, 4, 4), bare, None)


# -- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", heads.TABLE.names())
def test_heads_mix_no_samples(name: str) -> None:
    """No BatchNorm: what a head says of one image does not depend on the others of the batch."""
    torch.manual_seed(0)
    head = heads.TABLE.get(name)(16, 3).train()
    assert not [module for module in head.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert not list(head.buffers())
    sides = (40, 50) if name != "voxel" else (4, 6, 5)
    grids = tuple(torch.randn(3, 16, *(sides if name == "voxel" else (4, 5))) for _ in range(head.grids))
    masks = torch.randn(3, 4, 8, 10)
    features = backbones.Features(torch.randn(3, 3, *sides), grids, torch.randn(3, 16), masks)
    alone = backbones.Features(
        features.image[1:2], tuple(grid[1:2] for grid in grids), features.pooled[1:2], masks[1:2]
    )
    whole = head(features)
    assert whole.shape == ((3, 3) if name == "linear" else (3, 3, *sides))
    torch.testing.assert_close(head(alone)[0], whole[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(56, 56), (57, 61), (14, 29)])
@pytest.mark.parametrize("kind", [heads.Pyramid, heads.UNet, heads.DeepUNet])
def test_dense_heads_answer_at_the_size_of_the_image(kind: Any, size: tuple[int, int]) -> None:
    head = kind(8, 2)
    grids = (torch.randn(1, 8, 4, 4),) * head.grids
    assert head(backbones.Features(torch.randn(1, 3, *size), grids, torch.randn(1, 8))).shape == (1, 2, *size)


def test_every_number_of_a_head_learns(tiny_dino: Path) -> None:
    """A parameter without a gradient would travel for nothing."""
    for kind, head in (
        *(("segmentation", name) for name in ("pyramid", "unet", "unet-deep", "patch")),
        ("classification", "linear"),
    ):
        model = adapted_model.AdaptedModel(recipe(tiny_dino, kind, head=head))
        model.write(model.initial())
        target = torch.randint(0, 3, (2, 56, 56)) if kind == "segmentation" else torch.tensor([0, 2])
        model.task.loss(model(torch.randn(2, 3, 56, 56)), target).backward()  # type: ignore[no-untyped-call]
        still = [name for name, p in model.head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert still == [], (kind, head)


# -- four samples ----------------------------------------------------------------------------------------------------


def four_samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with one bright and one dark disc; masks of three classes; a class of the whole."""
    rows, columns = torch.meshgrid(torch.arange(56), torch.arange(56), indexing="ij")
    images, masks = torch.zeros(4, 3, 56, 56), torch.zeros(4, 56, 56, dtype=torch.int64)
    for number, (bright, dark) in enumerate(
        [((15, 15), (40, 40)), ((40, 15), (15, 40)), ((28, 12), (28, 44)), ((14, 30), (42, 28))]
    ):
        for value, label, centre in ((1.5, 1, bright), (-1.5, 2, dark)):
            disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 80
            images[number, :, disc] = value
            masks[number][disc] = label
    images += 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return images, masks, torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("kind", "backbone", "adapter", "rate", "steps"),
    [
        ("segmentation", "dino", "lora", 0.01, 60),
        ("segmentation", "dino", "head-only", 0.02, 60),
        ("segmentation", "unet", "full", 0.02, 60),
        ("classification", "dino", "lora", 0.02, 40),
        ("classification", "dino", "norm", 0.02, 40),
    ],
)
def test_four_samples_are_learned_by_heart(
    tiny_dino: Path, kind: str, backbone: str, adapter: str, rate: float, steps: int
) -> None:
    model = adapted_model.AdaptedModel(recipe(tiny_dino if backbone == "dino" else "unet", kind, adapter=adapter))
    model.write(model.initial())
    images, masks, labels = four_samples()
    target = masks if kind == "segmentation" else labels
    optimiser = torch.optim.AdamW([p for group in model.trainable().values() for p in group], lr=rate)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model.task.loss(model(images), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0]
    scores = model.task.scores(surface=False)
    with torch.no_grad():
        logits = model(images)
    for number in range(4):
        prepared = transforms.Prepared(images[number].numpy(), masks[number].numpy(), masks[number].numpy(), None)
        model.task.score(scores, str(number), logits[number], prepared, int(labels[number]))
    assert scores.value()[model.task.primary] > 0.85


def test_scores_are_taken_at_the_images_own_size() -> None:
    task = make()
    truth = np.zeros((20, 30), np.int64)
    truth[5:15, 10:20] = 1
    logits = torch.zeros(3, 10, 15)
    logits[0] = 1
    logits[1, 2:8, 5:10] = 5
    scores = task.scores(surface=False)
    task.score(scores, "x", logits, transforms.Prepared(np.zeros((3, 10, 15), np.float32), None, truth, None), None)
    assert 0.7 < scores.value()["dice"] <= 1.0
