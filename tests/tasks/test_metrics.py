"""Metric sets against MONAI, scikit-learn and hand arithmetic; combining parts against the whole."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.tasks import metrics

BINARY = ("background", "nucleus")
TISSUES = ("background", "grey", "white")
GRADES = ("low", "middle", "high")

MONAI_WARNS_OF_ITSELF = pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")


def random_masks(seed: int, classes: int, shape: tuple[int, int] = (40, 52)) -> tuple[metrics.Ints, metrics.Ints]:
    """A blocky truth with every class in it, and a prediction that differs from it in places."""
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.integers(0, classes, (shape[0] // 4, shape[1] // 4)), np.ones((4, 4), dtype=np.int64))
    truth[0, :classes] = np.arange(classes)
    predicted = np.where(rng.random(shape) < 0.1, rng.integers(0, classes, shape), np.roll(truth, 1, axis=1))
    return predicted, truth


def random_probabilities(seed: int, samples: int, classes: int) -> tuple[metrics.Floats, metrics.Ints]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    logits = rng.standard_normal((samples, classes)) + np.eye(classes)[labels]
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True), labels


def classified(probabilities: metrics.Floats, labels: metrics.Ints) -> metrics.ClassificationScores:
    scores = metrics.ClassificationScores([f"class {k}" for k in range(probabilities.shape[1])])
    for at, (row, label) in enumerate(zip(probabilities, labels, strict=True)):
        scores.add(f"image-{at:03d}", row, int(label))
    return scores


def square(top: int, left: int, size: int, shape: tuple[int, int] = (20, 30)) -> metrics.Ints:
    mask = np.zeros(shape, dtype=np.int64)
    mask[top : top + size, left : left + size] = 1
    return mask


# Segmentation


@MONAI_WARNS_OF_ITSELF
@pytest.mark.parametrize("names", [BINARY, TISSUES])
@pytest.mark.parametrize("spacing", [None, (1.7, 0.6)])
def test_segmentation_equals_monai_on_whole_images(names: tuple[str, ...], spacing: tuple[float, float] | None) -> None:
    import torch
    from monai import metrics as monai_metrics

    reference: Any = monai_metrics
    for seed in range(3):
        masks = random_masks(seed, len(names))
        scores = metrics.SegmentationScores(names, nsd_tolerance=1.0)
        scores.add("a", *masks, spacing)
        one_hot = [torch.nn.functional.one_hot(torch.from_numpy(mask), len(names)) for mask in masks]
        pair = [mask.permute(2, 0, 1)[None] for mask in one_hot]
        dice = reference.compute_dice(*pair, include_background=False)
        expected = {
            "dice": dice.mean(),
            "iou": reference.compute_iou(*pair, include_background=False).mean(),
            "hd95": reference.compute_hausdorff_distance(*pair, percentile=95, spacing=spacing).mean(),
            "assd": reference.compute_average_surface_distance(*pair, symmetric=True, spacing=spacing).mean(),
            "nsd": reference.compute_surface_dice(*pair, [1.0] * (len(names) - 1), spacing=spacing).mean(),
        }
        if len(names) > 2:
            expected |= {f"dice_{name}": dice[0, at] for at, name in enumerate(names[1:])}
        assert scores.value() == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-5)


def test_distances_by_hand_in_millimetres_and_pixels() -> None:
    """One pixel against one pixel, 3 rows and 4 columns away."""
    pixels, millimetres = metrics.SegmentationScores(BINARY, nsd_tolerance=5.0), metrics.SegmentationScores(BINARY)
    pixels.add("a", square(5, 5, 1), square(8, 9, 1))
    millimetres.add("a", square(5, 5, 1), square(8, 9, 1), (2.0, 0.5))
    assert pixels.value() == pytest.approx({"dice": 0.0, "iou": 0.0, "hd95": 5.0, "assd": 5.0, "nsd": 1.0})
    assert millimetres.value()["hd95"] == pytest.approx(math.hypot(6, 2), abs=1e-5)
    assert millimetres.value()["nsd"] == 0.0


def test_overlap_by_hand() -> None:
    dice, iou = metrics.overlap(np.array([[0, 1, 1, 0]]), np.array([[0, 0, 1, 1]]), 3)
    assert dice.tolist() == [0.5, 0.5, 1.0]
    assert iou.tolist() == pytest.approx([1 / 3, 1 / 3, 1.0])


EMPTY = np.zeros((20, 30), dtype=np.int64)


@pytest.mark.parametrize(
    ("predicted", "truth", "spacing", "expected"),
    [
        (EMPTY, EMPTY, None, {"dice": 1.0, "iou": 1.0, "hd95": 0.0, "assd": 0.0, "nsd": 1.0}),
        (
            square(2, 3, 4),
            EMPTY,
            None,
            {"dice": 0.0, "iou": 0.0, "hd95": math.hypot(20, 30), "assd": math.hypot(20, 30), "nsd": 0.0},
        ),
        (
            EMPTY,
            square(2, 3, 4),
            (0.5, 2.0),
            {"dice": 0.0, "iou": 0.0, "hd95": math.hypot(10, 60), "assd": math.hypot(10, 60), "nsd": 0.0},
        ),
        (square(2, 3, 4), square(2, 3, 4), None, {"dice": 1.0, "iou": 1.0, "hd95": 0.0, "assd": 0.0, "nsd": 1.0}),
    ],
)
def test_the_rule_for_empty_masks(
    predicted: metrics.Ints, truth: metrics.Ints, spacing: tuple[float, float] | None, expected: dict[str, float]
) -> None:
    scores = metrics.SegmentationScores(BINARY)
    scores.add("a", predicted, truth, spacing)
    assert scores.value() == pytest.approx(expected)


def test_the_rule_for_empty_masks_is_applied_class_by_class() -> None:
    """Grey is found exactly, white is in neither mask: both count as 1."""
    scores = metrics.SegmentationScores(TISSUES, surface=False)
    scores.add("a", square(2, 3, 4), square(2, 3, 4))
    scores.add("b", 2 * square(2, 3, 4), square(2, 3, 4))
    assert scores.value() == {"dice": 0.5, "iou": 0.5, "dice_grey": 0.5, "dice_white": 0.5}
    assert scores.per_sample()["dice_white"] == [1.0, 0.0]


def test_without_surface_only_overlap_is_computed_and_equal() -> None:
    whole, fast = metrics.SegmentationScores(TISSUES), metrics.SegmentationScores(TISSUES, surface=False)
    for scores in (whole, fast):
        scores.add("a", *random_masks(0, 3))
    assert fast.value().keys() == whole.value().keys() - {"hd95", "assd", "nsd"}
    assert fast.value().items() <= whole.value().items()


def test_per_sample_rows_follow_sorted_ids() -> None:
    scores = metrics.SegmentationScores(BINARY, surface=False)
    scores.add("b", EMPTY, square(2, 3, 4))
    scores.add("a", EMPTY, EMPTY)
    assert scores.ids == ["a", "b"]
    table = scores.per_sample()
    assert table["foreground"] == [0.0, 0.0]
    assert table["true_foreground"] == [0.0, 16 / EMPTY.size], "what describes a sample is no metric"
    assert {name: table[name] for name in scores.value()} == {"dice": [1.0, 0.0], "iou": [1.0, 0.0]}
    assert len(scores) == 2


@settings(deadline=None, max_examples=40)
@given(data=st.data(), number=st.integers(1, 12))
def test_segmentation_parts_combine_to_the_whole_in_any_order(data: st.DataObject, number: int) -> None:
    order = data.draw(st.permutations(range(number)))
    owners = data.draw(st.lists(st.integers(0, 2), min_size=number, max_size=number))
    whole = metrics.SegmentationScores(TISSUES, surface=False)
    parts = [metrics.SegmentationScores(TISSUES, surface=False) for _ in range(3)]
    for at in range(number):
        whole.add(f"image-{at}", *random_masks(at, 3, (8, 8)))
    for at in order:
        parts[owners[at]].add(f"image-{at}", *random_masks(at, 3, (8, 8)))
    a, b, c = parts
    for joined in (a.combine(b).combine(c), c.combine(a.combine(b)), b.combine(c).combine(a)):
        assert joined.value() == whole.value()
        assert joined.per_sample() == whole.per_sample()
    assert [len(part) for part in parts] == [owners.count(at) for at in range(3)]


@pytest.mark.parametrize(
    ("predicted", "truth", "spacing", "message"),
    [
        (EMPTY, EMPTY[:, :5], None, r"\(20, 30\) and truth \(20, 5\)"),
        (EMPTY[None, None], EMPTY[None, None], None, r"one \(\[D,\] H, W\) shape"),
        (EMPTY, EMPTY + 2, None, "truth holds int64 values 2 to 2; class indices are integers 0 to 1"),
        (EMPTY - 1, EMPTY, None, "prediction holds int64 values -1 to -1"),
        (EMPTY.astype(np.float32), EMPTY, None, "prediction holds float32"),
        (EMPTY, EMPTY, (0.0, 1.0), r"spacing \(0.0, 1.0\) mm"),
        (EMPTY, EMPTY, (2.0, 1.0, 1.0), r"spacing \(2.0, 1.0, 1.0\) mm for 2 axes"),
    ],
)
def test_masks_that_cannot_be_scored_are_refused(
    predicted: metrics.Ints, truth: metrics.Ints, spacing: tuple[float, float] | None, message: str
) -> None:
    scores = metrics.SegmentationScores(BINARY)
    with pytest.raises(errors.DataError, match=f"sample 'a': .*{message}"):
        scores.add("a", predicted, truth, spacing)
    assert len(scores) == 0


@pytest.mark.parametrize("tolerance", [-1.0, math.nan])
def test_a_tolerance_that_is_no_distance_is_refused(tolerance: float) -> None:
    with pytest.raises(errors.DataError, match="nsd_tolerance"):
        metrics.SegmentationScores(BINARY, nsd_tolerance=tolerance)


# Classification


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classification_equals_scikit_learn(classes: int) -> None:
    from sklearn import metrics as reference

    for seed in range(3):
        probabilities, labels = random_probabilities(seed, 60, classes)
        predicted, truth = probabilities.argmax(axis=1), np.eye(classes)[labels]
        ranked: tuple[metrics.Ints | metrics.Floats, metrics.Floats] = (truth, probabilities)
        if classes == 2:
            ranked = (labels, probabilities[:, 1])
        value = classified(probabilities, labels).value()
        assert value.pop("ece") >= 0
        assert value == pytest.approx(
            {
                "balanced_accuracy": reference.balanced_accuracy_score(labels, predicted),
                "macro_f1": reference.f1_score(labels, predicted, average="macro"),
                "auroc": reference.roc_auc_score(*ranked, average="macro"),
                "auprc": reference.average_precision_score(*ranked, average="macro"),
                "brier": reference.brier_score_loss(labels, probabilities, scale_by_half=False),
            }
        )


@settings(deadline=None, max_examples=100)
@given(data=st.data(), number=st.integers(2, 40))
def test_ranking_equals_scikit_learn_with_ties_too(data: st.DataObject, number: int) -> None:
    from sklearn import metrics as reference

    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))
    scores, positive = rng.integers(0, levels, number) / levels, rng.random(number) < 0.4
    positive[:2] = True, False
    assert metrics.roc_area(positive, scores) == pytest.approx(reference.roc_auc_score(positive, scores), abs=1e-12)
    expected = reference.average_precision_score(positive, scores)
    assert metrics.average_precision(positive, scores) == pytest.approx(expected, abs=1e-12)


def test_a_class_without_samples_is_left_out() -> None:
    """Class 2 is predicted once but is in no truth: recall counts classes 0 and 1, F1 all three."""
    probabilities = np.array([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.2, 0.3, 0.5], [0.8, 0.1, 0.1]])
    value = classified(probabilities, np.array([0, 1, 1, 0])).value()
    assert value["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert value["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert value["auroc"] == value["auprc"] == 1.0


def test_one_class_leaves_out_the_ranking_metrics_and_nothing_is_nan() -> None:
    value = classified(np.array([[0.9, 0.1], [0.4, 0.6]]), np.array([0, 0])).value()
    assert value.keys() == {"balanced_accuracy", "macro_f1", "ece", "brier"}
    assert all(math.isfinite(number) for number in value.values())
    assert value["balanced_accuracy"] == 0.5
    assert value["brier"] == pytest.approx((0.02 + 0.72) / 2)


def test_calibration_error_by_hand() -> None:
    """Bins of 1/15: 0.95 and 1.0 share the last one, 0.61 is alone."""
    confidence, correct = np.array([0.95, 1.0, 0.61]), np.array([True, False, True])
    assert metrics.calibration_error(confidence, correct) == pytest.approx((abs(1 - 1.95) + 0.39) / 3)
    edge = np.array([3 / 15, 3 / 15 + 1e-9])
    assert metrics.calibration_error(edge, np.array([True, False])) == pytest.approx((0.8 + 0.2) / 2)


def test_calibration_error_equals_a_loop_over_bins() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 300)
    correct = rng.random(300) < confidence**2
    total = 0.0
    for low, high in zip(np.arange(15) / 15, (np.arange(15) + 1) / 15, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert metrics.calibration_error(confidence, correct) == pytest.approx(total)


def test_the_columns_of_classification() -> None:
    scores = metrics.ClassificationScores(["benign", "malignant"])
    scores.add("b", np.array([0.25, 0.75], dtype=np.float32), 1)
    scores.add("a", np.array([0.5, 0.5], dtype=np.float16), 0)
    assert scores.ids == ["a", "b"]
    assert scores.per_sample() == {"label": [0.0, 1.0], "probability_0": [0.5, 0.25], "probability_1": [0.5, 0.75]}


@settings(deadline=None, max_examples=25)
@given(data=st.data(), number=st.integers(1, 20))
def test_classification_parts_combine_to_the_whole_in_any_order(data: st.DataObject, number: int) -> None:
    probabilities, labels = random_probabilities(number, number, 3)
    order = data.draw(st.permutations(range(number)))
    cut = data.draw(st.integers(0, number))
    parts = [metrics.ClassificationScores(GRADES) for _ in range(2)]
    for place, at in enumerate(order):
        parts[int(place >= cut)].add(f"image-{at}", probabilities[at], int(labels[at]))
    whole = metrics.ClassificationScores(GRADES)
    for at in range(number):
        whole.add(f"image-{at}", probabilities[at], int(labels[at]))
    assert parts[0].combine(parts[1]).value() == parts[1].combine(parts[0]).value() == whole.value()


@pytest.mark.parametrize(
    ("row", "label", "message"),
    [
        ([0.5, 0.5], 0, r"shape \(2,\); 3 classes expect \(3,\)"),
        ([2.0, -1.0, 0.0], 0, "no probabilities; pass the softmax output"),
        ([0.5, 0.4, 0.3], 0, "no probabilities"),
        ([math.nan, 0.5, 0.5], 0, "no probabilities"),
        ([0.2, 0.3, 0.5], 3, "label 3 is no class; labels are 0 to 2"),
        ([0.2, 0.3, 0.5], -1, "label -1"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(row: list[float], label: int, message: str) -> None:
    with pytest.raises(errors.DataError, match=f"sample 'a': .*{message}"):
        metrics.ClassificationScores(GRADES).add("a", np.array(row), label)


# Both, and the summary over sites


def test_a_sample_is_scored_once() -> None:
    scores, other = (metrics.SegmentationScores(BINARY, surface=False) for _ in range(2))
    for part in (scores, other):
        part.add("a", EMPTY, EMPTY)
    with pytest.raises(errors.DataError, match="sample 'a' was already scored"):
        scores.add("a", EMPTY, EMPTY)
    with pytest.raises(errors.DataError, match="sample 'a' is in both parts"):
        scores.combine(other)


@pytest.mark.parametrize(
    "other",
    [
        metrics.SegmentationScores(TISSUES),
        metrics.SegmentationScores(BINARY, surface=False),
        metrics.SegmentationScores(BINARY, nsd_tolerance=1.0),
        metrics.ClassificationScores(BINARY),
    ],
    ids=repr,
)
def test_parts_that_differ_do_not_combine(other: metrics.MetricSet) -> None:
    left: metrics.MetricSet = metrics.SegmentationScores(BINARY)
    with pytest.raises(errors.DataError, match=r"cannot combine .* they differ"):
        left.combine(other)


def test_no_sample_has_no_value() -> None:
    with pytest.raises(errors.DataError, match="no sample was scored"):
        metrics.ClassificationScores(GRADES).value()
    with pytest.raises(errors.DataError, match="no sample was scored"):
        metrics.SegmentationScores(BINARY).per_sample()


@pytest.mark.parametrize("names", [[], ["only"], ["twice", "twice"]])
def test_class_names_must_be_two_and_different(names: list[str]) -> None:
    with pytest.raises(errors.DataError, match="at least two different names"):
        metrics.ClassificationScores(names)


def test_the_table_holds_every_task_and_its_primary_metric_is_a_value() -> None:
    assert metrics.TABLE.names() == ["case-classification", "classification", "detection", "segmentation"]
    segmentation, classification = (
        metrics.TABLE.get("segmentation")(BINARY),
        metrics.TABLE.get("classification")(BINARY),
    )
    segmentation.add("a", EMPTY, EMPTY)
    classification.add("a", np.array([1.0, 0.0]), 0)
    assert segmentation.value()[segmentation.PRIMARY] == classification.value()[classification.PRIMARY] == 1.0


def test_summary_over_sites_by_hand() -> None:
    sites = {"south": {"dice": 0.5, "iou": 0.1}, "north": {"dice": 0.9}, "east": {"dice": 0.7}}
    summary = metrics.summarise(sites, {"north": 1, "south": 2, "east": 1}, "dice")
    assert summary["macro"] == pytest.approx(0.7)
    assert summary["weighted"] == pytest.approx(0.65)
    assert summary["worst"] == {"site": "south", "value": 0.5}
    assert summary["gap"] == pytest.approx(0.4)


def test_equal_worst_sites_are_named_by_alphabet() -> None:
    summary = metrics.summarise({"b": {"dice": 0.5}, "a": {"dice": 0.5}}, {"a": 1, "b": 1}, "dice")
    assert summary["worst"]["site"] == "a"
    assert summary["gap"] == 0.0


@pytest.mark.parametrize(
    ("sites", "counts", "message"),
    [
        ({}, {}, "no site reported 'dice'"),
        ({"a": {"iou": 0.5}}, {"a": 3}, "site 'a' has no finite 'dice'"),
        ({"a": {"dice": math.nan}}, {"a": 3}, "site 'a' has no finite 'dice'"),
        ({"a": {"dice": 0.5}}, {}, "site 'a' has a value but 0 samples"),
    ],
)
def test_a_summary_without_values_is_refused(
    sites: dict[str, dict[str, float]], counts: dict[str, int], message: str
) -> None:
    with pytest.raises(errors.DataError, match=message):
        metrics.summarise(sites, counts, "dice")


def test_import_is_cheap_and_overlap_needs_no_torch() -> None:
    script = (
        "import sys, numpy as np\n"
        "from fedvfm.tasks import metrics\n"
        "scores = metrics.SegmentationScores(['background', 'nucleus'], surface=False)\n"
        "scores.add('a', np.zeros((2, 2), int), np.ones((2, 2), int))\n"
        "print(scores.value()['dice'], {'torch', 'monai', 'sklearn', 'scipy'} & sys.modules.keys())"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0.0 set()", done.stderr


# --- volumes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    volume: str
    index: int
    of: int
    step: float


def ball(shape: tuple[int, int, int], centre: tuple[int, int, int], radius: int) -> metrics.Ints:
    grid = np.indices(shape)
    return (sum((axis - at) ** 2 for axis, at in zip(grid, centre, strict=True)) <= radius**2).astype(np.int64)


@MONAI_WARNS_OF_ITSELF
def test_slices_of_a_volume_are_scored_in_three_dimensions_and_millimetres() -> None:
    """In whatever order its slices come, and as MONAI scores the whole volume with its three spacings."""
    import torch
    from monai import metrics as monai_metrics

    reference: Any = monai_metrics
    predicted, truth = ball((8, 20, 24), (3, 9, 11), 3), ball((8, 20, 24), (4, 10, 13), 3)
    scores = metrics.SegmentationScores(BINARY)
    for index in (5, 0, 7, 2, 1, 6, 4, 3):
        scores.add(f"v-z{index}", predicted[index], truth[index], (0.7, 0.5), Slice("v", index, 8, 5.0))
    pair = [torch.from_numpy(mask)[None, None] for mask in (predicted, truth)]
    options = {"include_background": True, "spacing": (5.0, 0.7, 0.5)}
    both = np.count_nonzero(predicted & truth)
    assert scores.ids == ["v"]
    assert scores.value() == pytest.approx(
        {
            "dice": 2 * both / (predicted.sum() + truth.sum()),
            "iou": both / np.count_nonzero(predicted | truth),
            "hd95": float(reference.compute_hausdorff_distance(*pair, percentile=95, **options)),
            "assd": float(reference.compute_average_surface_distance(*pair, symmetric=True, **options)),
            "nsd": float(reference.compute_surface_dice(*pair, [2.0], **options)),
        },
        abs=1e-5,
    )


def test_distance_between_slices_counts_in_millimetres() -> None:
    """One voxel against one voxel two slices of 5 mm and three columns of 0.5 mm away."""
    scores = metrics.SegmentationScores(BINARY)
    for index in range(4):
        predicted, truth = EMPTY.copy(), EMPTY.copy()
        predicted[4, 4], truth[4, 7] = index == 1, index == 3
        scores.add(str(index), predicted, truth, (0.7, 0.5), Slice("v", index, 4, 5.0))
    assert scores.value()["hd95"] == pytest.approx(math.hypot(10.0, 1.5), abs=1e-5)
    assert scores.value()["dice"] == 0.0  # per slice, two of four empty pairs would have counted as found


def test_a_volume_of_one_slice_is_scored_as_an_image() -> None:
    """In three dimensions every pixel of a single slice is an edge: these discs would have NSD .93 and ASSD .33."""
    rows, columns = np.indices((64, 64))
    discs = [((rows - 32) ** 2 + (columns - 32) ** 2 <= radius**2).astype(np.int64) for radius in (17, 20)]
    scores = metrics.SegmentationScores(BINARY)
    scores.add("image", *discs, (0.7, 0.5))
    scores.add("whole", discs[0][None], discs[1][None], (5.0, 0.7, 0.5))
    scores.add("v-z0", *discs, (0.7, 0.5), Slice("slice", 0, 1, 5.0))
    scores.add("missed", 0 * discs[0][None], discs[1][None], (5.0, 0.7, 0.5))
    found = scores.per_sample()
    for column in ("dice", "hd95", "assd", "nsd"):
        by_id = dict(zip(scores.ids, found[column], strict=True))
        assert by_id["whole"] == by_id["slice"] == by_id["image"], column
    assert by_id["image"] < 0.9
    assert dict(zip(scores.ids, found["hd95"], strict=True))["missed"] == pytest.approx(math.hypot(64 * 0.7, 64 * 0.5))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 1, 1), (1, 1, 7), (3, 1, 7), (3, 1, 1)])
def test_arrays_with_axes_of_length_one_are_scored(shape: tuple[int, ...]) -> None:
    mask = np.ones(shape, dtype=np.int64)
    scores = metrics.SegmentationScores(BINARY)
    scores.add("a", mask, mask, (0.5,) * len(shape))
    assert scores.value() == {"dice": 1.0, "iou": 1.0, "hd95": 0.0, "assd": 0.0, "nsd": 1.0}


def test_the_rule_for_empty_masks_of_a_volume() -> None:
    scores = metrics.SegmentationScores(BINARY)
    for index in range(4):
        truth = EMPTY.copy()
        truth[2, 2] = index == 0
        scores.add(f"a{index}", EMPTY, truth, (0.5, 2.0), Slice("missed", index, 4, 3.0))
        scores.add(f"b{index}", EMPTY, EMPTY, (0.5, 2.0), Slice("rightly empty", index, 4, 3.0))
    found = scores.per_sample()
    assert scores.ids == ["missed", "rightly empty"]
    assert found["dice"] == [0.0, 1.0]
    assert found["hd95"] == pytest.approx([math.hypot(4 * 3.0, 20 * 0.5, 30 * 2.0), 0.0])


def test_a_volume_that_is_not_whole_has_no_score_until_its_other_part_comes() -> None:
    parts = [metrics.SegmentationScores(BINARY, surface=False) for _ in range(2)]
    for index in range(4):
        parts[index % 2].add(str(index), square(2, 3, 4), square(2, 3, 4), None, Slice("v", index, 4, 1.0))
    with pytest.raises(errors.DataError, match="volume 'v': 2 of 4 slices were scored; score all of them"):
        parts[0].value()
    joined = parts[0].combine(parts[1])
    assert len(joined) == 1
    assert joined.value()["dice"] == 1.0
    with pytest.raises(errors.DataError, match="slice 0 of 'v' was already scored"):
        joined.add("0", EMPTY, EMPTY, None, Slice("v", 0, 4, 1.0))
    with pytest.raises(errors.DataError, match="slice 0 of 'v' was already scored"):
        parts[0].combine(parts[0])


def test_a_study_is_classified_by_the_mean_of_its_slices() -> None:
    scores = metrics.ClassificationScores(["well", "ill"])
    for index, probability in enumerate((0.9, 0.1, 0.8)):
        scores.add(str(index), np.array([1 - probability, probability]), 1, Slice("study", index, 3, 5.0))
    assert scores.ids == ["study"]
    assert scores.per_sample()["probability_1"] == pytest.approx([0.6])
    scores.add("b0", np.array([0.5, 0.5]), 0, Slice("b", 0, 2, 5.0))
    with pytest.raises(errors.DataError, match="'b': its slices have different labels"):
        scores.add("b1", np.array([0.5, 0.5]), 1, Slice("b", 1, 2, 5.0))
