"""Findings: what makes a figure mean less than it seems, each by its code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from fedvfm.report import answers, result_findings
from fedvfm.report.result_findings import Finding
from fedvfm.tasks import boxes, detection_metrics, metrics

NAMES = ("normal", "pneumonia", "effusion")


def table(labels: list[int], answered: list[int], names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """Columns of a metric set that was given one-hot answers."""
    scores = metrics.ClassificationScores(names)
    for at, (label, answer) in enumerate(zip(labels, answered, strict=True)):
        scores.add(f"{at:04d}", np.eye(len(names))[answer], label)
    return {"id": scores.ids, **scores.per_sample()}


def masks(pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """Columns of a metric set: for every pair how many of four pixels are foreground in prediction and in truth."""
    scores = metrics.SegmentationScores(("background", "lesion"), surface=False)
    for at, (predicted, truth) in enumerate(pairs):
        rows = [np.array([[int(pixel < count) for pixel in range(4)]]) for count in (predicted, truth)]
        scores.add(f"{at:04d}", *rows)
    return {"id": scores.ids, **scores.per_sample()}


def found_boxes(rows: list[tuple[int, bool]]) -> dict[str, Any]:
    """Columns of a metric set: for every image how many objects it has, and whether all are found or none."""
    scores = detection_metrics.DetectionScores(("background", "lesion"), 0.3)
    for at, (objects, sure) in enumerate(rows):
        mask = np.zeros((4, 4 * objects + 1), np.int64)
        mask[1:3, 1::4] = 1
        truth = boxes.of_mask(mask if objects else mask * 0)
        scores.add(f"{at:04d}", truth if sure else truth[:0], truth)
    return {"id": scores.ids, **scores.per_sample()}


def of(tables: dict[str, dict[str, Any]], arm: str = "federated", names: tuple[str, ...] = NAMES) -> dict[str, Finding]:
    units = {site: rows["id"] for site, rows in tables.items()}
    return {finding.code: finding for finding in result_findings.of_samples(arm, tables, names, units)}


def test_one_class_for_all_130_images_is_a_headline() -> None:
    labels = [0] * 40 + [1] * 60 + [2] * 30
    found = of({"north": table(labels, [1] * 130), "south": table(labels, labels)})
    constant = found["constant-answer"]
    assert constant.headline
    assert constant.sites == ("north",)
    assert "north: 'pneumonia' for all 130" in constant.text
    assert set(found) == {"constant-answer"}
    other = of({"north": table(labels, [1] * 130)}, arm="pooled")
    assert not other["constant-answer"].headline


def test_no_box_at_all_is_a_headline_and_images_without_an_object_are_told() -> None:
    found = of({"north": found_boxes([(2, False)] * 12), "south": found_boxes([(1, True)] * 11 + [(0, False)])})
    assert found["constant-answer"].headline
    assert found["constant-answer"].sites == ("north",)
    assert found["empty-truths"].text.endswith("no box scores F1 1: south 1 of 12, F1 1.000 without them")
    assert "constant-answer" not in of({"north": found_boxes([(0, False)] * 12)})


def test_a_site_that_tests_one_class_is_a_headline_and_no_constant_answer() -> None:
    found = of({"north": table([1] * 20, [1] * 20)})
    assert found["one-class-tested"].headline
    assert "constant-answer" not in found
    assert found["class-untested"].text.endswith("(north: normal, effusion)")
    assert not found["class-untested"].headline


def test_classes_that_are_never_answered_or_hardly_tested() -> None:
    found = of({"north": table([0] * 20 + [1] * 20 + [2] * 4, [0] * 20 + [1] * 20 + [0] * 4)})
    assert found["class-never-answered"].text.endswith("north: effusion")
    assert found["few-of-a-class"].text.endswith("(north: effusion)")
    assert "few-units" not in found


def test_ten_images_of_three_patients_are_three_units() -> None:
    rows = table([0, 1] * 5, [0, 1] * 5)
    (few,) = (
        finding
        for finding in result_findings.of_samples("federated", {"n": rows}, NAMES, {"n": list("aaabbbccca")})
        if finding.code == "few-units"
    )
    assert "n (3)" in few.text


def test_empty_and_full_masks_for_all_images_are_constant_answers() -> None:
    found = of({"a": masks([(0, 2)] * 12), "b": masks([(4, 1)] * 12), "c": masks([(2, 1)] * 12)})
    assert found["constant-answer"].headline
    texts = [
        finding.text
        for finding in result_findings.of_samples(
            "federated", {"a": masks([(0, 2)] * 12), "b": masks([(4, 1)] * 12)}, NAMES, {"a": "x", "b": "y"}
        )
        if finding.code == "constant-answer"
    ]
    assert ["empty" in texts[0], "full" in texts[1]] == [True, True]
    assert "constant-answer" not in of({"a": masks([(0, 0)] * 12)}), "all empty, and rightly"


def test_dice_of_images_without_foreground_is_told_apart() -> None:
    found = of({"a": masks([(0, 0)] * 6 + [(0, 2)] * 6)})
    assert "a 6 of 12, Dice 0.000 without them" in found["empty-truths"].text
    assert found["constant-answer"].sites == ("a",)


def test_a_mean_that_is_not_above_chance() -> None:
    labels = [0] * 10 + [1] * 10
    own = answers.by_site({"a": table(labels, [0] * 9 + [1] + [0] * 9 + [1])}, NAMES)
    (found,) = result_findings.of_macro("federated", own, 0.5, None)
    assert found.code == "not-above-chance"
    assert found.headline
    assert "lower bound 0.450" in result_findings.of_macro("federated", own, 0.6, 0.45)[0].text
    assert result_findings.of_macro("federated", own, 0.6, 0.55) == []
    constant = answers.by_site({"a": table(labels, [0] * 20)}, NAMES)
    assert result_findings.of_macro("federated", constant, 0.5, None) == [], "said once, as a constant answer"


def test_a_simple_baseline_that_does_as_well_is_a_headline() -> None:
    (found,) = result_findings.of_references({"federated": 0.7, "classical": 0.72, "pooled": 0.9, "majority": 0.5})
    assert found.code == "baseline-ahead"
    assert found.headline
    assert "'classical' reaches 0.720, the federated adapter 0.700" in found.text
    assert result_findings.of_references({"federated": 0.7, "classical": 0.6}) == []
    assert result_findings.of_references({"classical": 0.6}) == []


def test_values_of_real_sites_at_exactly_chance_level_and_absent_metrics() -> None:
    sites = {
        "a": {"num_examples": 130.0, "balanced_accuracy": 1 / 3, "auroc": 0.5},
        "b": {"num_examples": 4.0, "balanced_accuracy": 0.8},
    }
    found = {finding.code: finding for finding in result_findings.of_values("federated", sites, NAMES)}
    assert found["at-chance"].sites == ("a",)
    assert found["at-chance"].headline
    assert found["metric-missing"].sites == ("b",)
    assert "b (4)" in found["few-units"].text
    empty = result_findings.of_values("federated", {"a": {"num_examples": 50.0, "dice": 0.0}}, ("background", "x"))
    assert [finding.code for finding in empty] == ["at-chance"]


def test_many_sites_are_counted_and_not_all_named() -> None:
    found = of({f"site-{at:03d}": table([0, 1] * 10, [0] * 20) for at in range(300)})
    assert "all 300 sites" in found["constant-answer"].text
    assert "and 295 more" in found["constant-answer"].text
    assert len(found["constant-answer"].text) < 400


@pytest.mark.filterwarnings("ignore:.*single label|y_pred contains:UserWarning")
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40))
def test_the_confusion_matrix_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    labels, answered = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = answers.Answers.of(table(labels, answered), NAMES)
    assert found.confusion.tolist() == sklearn.confusion_matrix(labels, answered, labels=[0, 1, 2]).tolist()
    recalls = [value for value in found.recall.values() if value is not None]
    assert np.mean(recalls) == pytest.approx(sklearn.balanced_accuracy_score(labels, answered))
    assert found.chance == pytest.approx(1 / len(set(labels)))
    assert found.constant == (len(set(answered)) == 1 and len(pairs) > 1)
    assert (found + found).recall == found.recall


def test_scores_over_unlike_classes_are_a_headline() -> None:
    (found,) = result_findings.of_labels("federated", {"a": ("liver",), "b": ("liver", "spleen"), "c": ()})
    assert (found.code, found.sites, found.headline) == ("unlike-classes", ("a", "b"), True)
    assert "(a: liver; b: liver, spleen)" in found.text
    for alike in ({}, {"a": (), "b": ()}, {"a": ("liver", "spleen"), "b": ("spleen", "liver")}):
        assert result_findings.of_labels("federated", alike) == []
