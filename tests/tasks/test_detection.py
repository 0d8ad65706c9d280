"""Detection: boxes of masks, losses and scores by hand, and what a head of boxes learns and gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm import errors
from fedvfm.backbones import base as backbones
from fedvfm.config import schema
from fedvfm.data import sample as samples
from fedvfm.data import transforms
from fedvfm.model import adapted_model
from fedvfm.tasks import boxes, detection, detection_metrics, heads
from tests.tasks.test_tasks import four_samples, make, recipe


def some(*rows: tuple[float, ...]) -> boxes.Boxes:
    """Boxes from (left, top, right, bottom, class, score); class 1 and score 1 where they are left out."""
    table = np.array([(*row, 1, 1.0)[:6] if len(row) == 4 else row for row in rows], dtype=np.float64).reshape(-1, 6)
    return boxes.Boxes(table[:, :4], table[:, 4].astype(np.int64), table[:, 5])


# -- boxes -----------------------------------------------------------------------------------------------------------


def test_every_connected_part_of_a_class_is_an_object() -> None:
    mask = np.zeros((6, 8), np.int64)
    mask[0, 0] = mask[1, 1] = 1  # they touch at a corner
    mask[3:5, 2:5] = 1
    mask[3:5, 5:8] = 2  # beside it, of another class
    found = boxes.of_mask(mask)
    assert found.edges.tolist() == [[0, 0, 2, 2], [2, 3, 5, 5], [5, 3, 8, 5]]
    assert found.classes.tolist() == [1, 1, 2]
    assert len(boxes.of_mask(mask, least=3)) == 2
    assert len(boxes.of_mask(np.zeros((3, 3), np.int64))) == 0


def test_specks_make_nobody_a_patient_of_a_class() -> None:
    """What may leave a hospital is counted by patients whose objects are scored."""
    mask = np.zeros((8, 8), np.int64)
    mask[0, 0], mask[4:8, 4:8] = 1, 2
    for least, expected in ((0, [0, 1, 2]), (2, [0, 2]), (99, [0])):
        assert make(kind="detection", options={"least_pixels": least}).present(mask) == expected


def test_overlap_and_suppression_by_hand() -> None:
    found = boxes.overlaps(some((0, 0, 4, 4)).edges, some((0, 0, 4, 4), (2, 0, 6, 4), (4, 0, 8, 4), (1, 1, 1, 3)).edges)
    assert found == pytest.approx(np.array([[1, 8 / 24, 0, 0]]))
    given = some((0, 0, 4, 4, 1, 0.5), (0, 1, 4, 5, 1, 0.9), (0, 0, 4, 4, 2, 0.4), (4, 4, 8, 8, 1, 0.1))
    kept = boxes.suppressed(given, 0.5)
    assert kept.scores.tolist() == [0.9, 0.4, 0.1]
    assert boxes.suppressed(given, 0.7).scores.tolist() == [0.9, 0.5, 0.4, 0.1]


def test_an_object_is_met_once_and_a_taken_one_leaves_the_next() -> None:
    truth = some((0, 0, 10, 10), (0, 2, 10, 12))
    predicted = some((0, 0, 10, 10, 1, 0.9), (0, 1, 10, 11, 1, 0.8), (0, 1, 10, 11, 1, 0.7), (0, 0, 10, 10, 2, 0.6))
    assert boxes.matched(predicted, truth, 0.5).tolist() == [True, True, False, False]
    assert boxes.matched(predicted, some(), 0.5).tolist() == [False] * 4


def test_frames_are_drawn_and_stay_inside() -> None:
    mask = boxes.framed(some((1, 1, 4, 5), (6.4, 6.4, 99, 99, 2, 1)), (8, 8))
    assert mask[1:5, 1:4].tolist() == [[1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 1, 1]]
    assert (mask == 2).sum() == 4


# -- scores ----------------------------------------------------------------------------------------------------------


def test_average_precision_by_hand() -> None:
    """Hit, false alarm, hit of four objects: precision 1 up to recall 1/4 and 2/3 up to 1/2, then 0."""
    found = detection_metrics.average_precision(np.array([0.7, 0.9, 0.8]), np.array([1.0, 1.0, 0.0]), 4)
    assert found == pytest.approx((26 * 1 + 25 * 2 / 3) / 101)
    assert detection_metrics.average_precision(np.empty(0), np.empty(0), 4) == 0


def test_froc_by_hand() -> None:
    """Four images: a hit, a false alarm, a hit and a false alarm of one score, a hit; five objects."""
    scores, met = np.array([0.9, 0.8, 0.7, 0.7, 0.6]), np.array([1.0, 0, 1, 0, 1])
    assert detection_metrics.froc(scores, met, 5, 4) == [0.2, 0.2, 0.6, 0.6, 0.6, 0.6, 0.6]


@pytest.fixture
def drawn() -> list[tuple[boxes.Boxes, boxes.Boxes]]:
    """Twelve images with objects of two classes, and predictions that are near, off, or of nothing."""
    rng, images = np.random.default_rng(3), []
    for _ in range(12):
        count = int(rng.integers(0, 5))
        corner, side = rng.integers(0, 60, (count, 2)), rng.integers(8, 30, (count, 2))
        truth = np.concatenate([corner, corner + side, rng.integers(1, 3, (count, 1)), np.ones((count, 1))], axis=1)
        near = truth[rng.random(count) < 0.8].copy()
        near[:, :4] += rng.normal(0, 3, near[:, :4].shape)
        near[:, 5] = rng.random(len(near)) ** 0.5
        corner, side = rng.integers(0, 60, (2, 2)), rng.integers(8, 30, (2, 2))
        alarms = np.concatenate([corner, corner + side, rng.integers(1, 3, (2, 1)), rng.random((2, 1))], axis=1)
        images.append((some(*np.concatenate([near, alarms]).tolist()), some(*truth.tolist())))
    return images


def scored(images: list[tuple[boxes.Boxes, boxes.Boxes]], first: int = 0) -> detection_metrics.DetectionScores:
    scores = detection_metrics.DetectionScores(["rest", "a", "b"], 0.3)
    for number, (predicted, truth) in enumerate(images, start=first):
        scores.add(f"{number:02d}", predicted, truth)
    return scores


def test_average_precision_is_that_of_coco(drawn: list[tuple[boxes.Boxes, boxes.Boxes]]) -> None:
    """Numbers of pycocotools 2.0.11 on the same boxes: COCOeval, area "all", 100 boxes an image."""
    values = scored(drawn).value()
    assert values["map50"] == pytest.approx(COCO["map50"], abs=1e-9)
    assert values["map10"] == pytest.approx(COCO["map10"], abs=1e-9)
    assert values["ap50_a"] == pytest.approx(COCO["ap50_a"], abs=1e-9)
    assert set(values) == set(detection_metrics.names(["rest", "a", "b"]))


COCO = {"map50": 0.454359958697, "map10": 0.733641137393, "ap50_a": 0.561654853745}


def test_parts_of_a_site_combine_to_the_whole_in_any_order(drawn: list[tuple[boxes.Boxes, boxes.Boxes]]) -> None:
    parts = scored(drawn[:5]), scored(drawn[5:], 5)
    assert parts[1].combine(parts[0]).value() == parts[0].combine(parts[1]).value() == scored(drawn).value()
    assert parts[0].per_sample().keys() == {"f1", "objects", "hits", "false_alarms"}


def test_a_volume_is_one_row_of_its_slices_and_each_slice_an_image(
    drawn: list[tuple[boxes.Boxes, boxes.Boxes]],
) -> None:
    volume, flat = detection_metrics.DetectionScores(["rest", "a", "b"], 0.3), scored(drawn)
    for number in reversed(range(12)):
        volume.add(f"v/{number}", *drawn[number], samples.Part("v", number, 12, 1.0))
    assert volume.ids == ["v"]
    row, rows = volume.per_sample(), flat.per_sample()
    assert [row[name] for name in volume.DESCRIBING] == [[sum(rows[name])] for name in volume.DESCRIBING]
    objects, hits, alarms = (row[name][0] for name in volume.DESCRIBING)
    assert row["f1"] == [2 * hits / (objects + hits + alarms)]
    whole = {name: value for name, value in volume.value().items() if name != "f1"}
    assert whole == pytest.approx({name: value for name, value in flat.value().items() if name != "f1"})


def test_an_image_without_an_object_and_a_site_without_any() -> None:
    scores = detection_metrics.DetectionScores(["rest", "a"], 0.3)
    scores.add("empty", some(), some())
    scores.add("unsure", some((0, 0, 4, 4, 1, 0.2)), some())
    scores.add("alarm", some((0, 0, 4, 4, 1, 0.4)), some())
    assert scores.value() == {"f1": pytest.approx(2 / 3)}
    scores.add("missed", some(), some((0, 0, 4, 4)))
    values = scores.value()
    assert (values["f1"], values["map50"], values["cpm"]) == (0.5, 0.0, 0.0)
    with pytest.raises(errors.DataError, match="a box of no class, place or score"):
        scores.add("wrong", some((0, 0, 4, 4, 2, 0.5)), some())


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_of_an_image_by_hand() -> None:
    """One object of one class: every pixel's focal loss, and 1 - GIoU weighed by the heat, in plain Python."""
    task = make(kind="detection", classes=2)
    mask = torch.zeros(1, 12, 10, dtype=torch.int64)
    mask[0, 2:8, 1:9] = 1
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 12, 10, generator=generator)
    logits[:, 1:] = 1 + 6 * torch.rand(1, 4, 12, 10, generator=generator)
    focal, middles, apart, weight = 0.0, 0, 0.0, 0.0
    for y in range(12):
        for x in range(10):
            away = [max(0.0, abs(at + 0.5 - middle) - 2) for at, middle in ((x, 5.0), (y, 5.0))]
            inside = 1 <= x < 9 and 2 <= y < 8
            bells = [
                math.exp(-((far / max(0.09 * side, 0.5)) ** 2) / 2) for far, side in zip(away, (8, 6), strict=True)
            ]
            heat = bells[0] * bells[1] if inside else 0.0
            p = 1 / (1 + math.exp(-float(logits[0, 0, y, x])))
            middles += heat == 1
            focal -= (1 - p) ** 2 * math.log(p) if heat == 1 else (1 - heat) ** 4 * p**2 * math.log(1 - p)
            if heat > 0.01:
                ours = [float(v) for v in logits[0, 1:, y, x]]
                truth = [x + 0.5 - 1, y + 0.5 - 2, 9 - x - 0.5, 8 - y - 0.5]
                low, high = ([f(*pair) for pair in zip(ours, truth, strict=True)] for f in (min, max))
                both, around, one, other = ((s[0] + s[2]) * (s[1] + s[3]) for s in (low, high, ours, truth))
                either = one + other - both
                apart += heat * (1 - (both / either - (around - either) / around))
                weight += heat
    assert middles == 16
    expected = focal / middles + detection.BOX_WEIGHT * apart / weight
    assert float(task.loss(logits, mask)) == pytest.approx(expected, rel=1e-4)


def test_where_objects_overlap_a_pixel_learns_the_smallest() -> None:
    drawn = detection.Drawn.of(some((0, 0, 20, 20), (8, 8, 12, 12)), 1, (20, 20))
    assert drawn.sides[:, 9, 9].tolist() == [1.5, 1.5, 2.5, 2.5]
    assert drawn.sides[:, 9, 7].tolist() == [7.5, 9.5, 12.5, 10.5]
    assert drawn.count == 2
    assert float(drawn.weights[8:12, 8:12].sum()) == pytest.approx(1.0, rel=1e-5)
    assert float(drawn.weights.sum()) == pytest.approx(2.0, rel=1e-5)
    assert drawn.heat.max() == 1


def test_losses_are_each_images_own_and_an_empty_one_teaches_that_nothing_is_there() -> None:
    task = make(kind="detection")
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 6, 28, 28, generator=generator).exp().requires_grad_()
    target = torch.zeros(3, 28, 28, dtype=torch.int64)
    target[0, 4:12, 4:12], target[1, 10:20, 3:9] = 1, 2
    losses = task.losses(logits, target)
    alone = torch.stack([task.loss(logits[at : at + 1], target[at : at + 1]) for at in range(3)])
    assert torch.equal(losses, alone)
    assert task.loss(logits, target).item() == pytest.approx(losses.mean().item())
    losses[2].backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert not logits.grad[:2].any()
    assert (logits.grad[2, :2] > 0).all()
    assert not logits.grad[2, 2:].any()


# -- head and decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(56, 56), (57, 61), (14, 29)])
def test_the_head_answers_at_the_size_of_the_image_and_mixes_no_samples(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    head = heads.Boxes(8, 3).train()
    assert not list(head.buffers())
    features = backbones.Features(torch.randn(2, 3, *size), (torch.randn(2, 8, 4, 4),), torch.randn(2, 8))
    alone = backbones.Features(features.image[1:], (features.grids[0][1:],), features.pooled[1:])
    whole = head(features)
    assert whole.shape == (2, 6, *size)
    assert (whole[:, 2:] > 0).all()
    torch.testing.assert_close(head(alone)[0], whole[1], rtol=1e-4, atol=1e-5)


def test_boxes_of_perfect_maps_are_the_objects_themselves() -> None:
    """What the loss asks for, decoded at another size of the image."""
    mask = np.zeros((60, 80), np.int64)
    mask[5:25, 10:30], mask[30:50, 40:76] = 1, 2
    task: Any = make(kind="detection")
    drawn = detection.Drawn.of(boxes.of_mask(mask), 2, mask.shape)
    logits = torch.cat([torch.logit(torch.from_numpy(drawn.heat) * 0.9, eps=1e-4), torch.from_numpy(drawn.sides)])
    found = task.delivered(logits, (120, 160))
    order = np.argsort(found.classes)
    assert found.edges[order] == pytest.approx(2.0 * boxes.of_mask(mask).edges)
    assert found.scores == pytest.approx([0.9, 0.9], abs=1e-3)
    assert len(task.boxes_at(torch.full((6, 60, 80), -9.0), (60, 80))) == 0


def test_a_very_sure_object_has_one_box_at_its_middle_and_leaves_room_for_others() -> None:
    """The sigmoid of float32 is 1 on all of its middle, more pixels than peaks are looked at."""
    logits = torch.full((6, 64, 96), -9.0)
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
    logits[0] = 60.0 - torch.maximum((rows - 31).abs(), (columns - 40).abs()) - 9.0 * (columns > 70)
    logits[0, :, 80:], logits[2:] = -9.0, 5.0
    logits[1, 20, 90] = 1.0
    task: Any = make(kind="detection", options={"most": 10})
    found = task.delivered(logits, (64, 96))
    assert found.edges.tolist() == [[35.5, 26.5, 45.5, 36.5], [85.5, 15.5, 95.5, 25.5]]
    assert found.classes.tolist() == [1, 2]


def test_faults_of_keys_that_it_does_not_read() -> None:
    assert make(kind="detection").faults() == []
    (fault,) = make(kind="detection", dice="batch").faults()
    assert fault == "recipe.task.dice: task 'detection' does not read it; leave it out"
    options = {"threshold": 0.01, "most": 0, "overlap": True, "least_pixels": 1.5}
    assert len(make(kind="detection", options=options).faults()) == 4
    assert "nearest" in make(kind="detection", head="boxs").faults()[0]
    for values, word in (
        ({"task": {"prompt": "box"}}, "takes no prompts"),
        ({"task": {"partial_labels": True}}, "does not take them"),
        ({"task": {"options": {"passes": 2}}}, "unknown option"),
        ({"unlabelled": {}}, "no loss for images without labels"),
        ({"data": {"depth": 8, "fit": "native"}}, "takes slices; leave depth out"),
        ({"target": {"kind": "ordinal"}}, "is for classification"),
    ):
        chosen = recipe(kind="detection").model_dump(mode="json")
        for table, keys in values.items():
            chosen[table] = {**(chosen.get(table) or {}), **keys}
        faults = adapted_model.examine(schema.parse(schema.Recipe, chosen, "recipe"))[1]
        assert any(word in each for each in faults), (values, faults)


@pytest.mark.parametrize("name", ["sam", "tinyvit"])
def test_every_family_of_backbones_has_grids_to_find_boxes_on(sam_folders: dict[str, Path], name: str) -> None:
    chosen = recipe(sam_folders[name], "detection").model_dump(mode="json")
    chosen["data"]["input_size"], chosen["adapter"]["targets"] = [64, 64], ["q"]
    model = adapted_model.AdaptedModel(schema.parse(schema.Recipe, chosen, "recipe"))
    model.write(model.initial())
    assert model.recipe.adapter.parts == ()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 6, 64, 64)


@pytest.mark.parametrize(("backbone", "adapter", "rate"), [("dino", "lora", 0.01), ("unet", "full", 0.02)])
def test_four_images_are_learned_by_heart(tiny_dino: Path, backbone: str, adapter: str, rate: float) -> None:
    model = adapted_model.AdaptedModel(
        recipe(tiny_dino if backbone == "dino" else "unet", "detection", adapter=adapter)
    )
    model.write(model.initial())
    images, masks, _ = four_samples()
    optimiser = torch.optim.AdamW([p for group in model.trainable().values() for p in group], lr=rate)
    losses = []
    for step in range(60):
        optimiser.zero_grad()
        loss = model.task.loss(model(images), masks)
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 1:  # the first step moves what begins at 0
            still = [name for name, p in model.head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            assert still == []
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0]
    scores = model.task.scores(surface=False)
    with torch.no_grad():
        logits = model(images)
    for number, mask in enumerate(masks.numpy()):
        prepared = transforms.Prepared(images[number].numpy(), mask, mask, None)
        model.task.score(scores, str(number), logits[number], prepared, None)
    assert scores.value()["map50"] > 0.85
