"""Boxes followed from slice to slice: where they go, where they end, and what prediction makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

import fedvfm
from fedvfm import errors
from fedvfm.data.volumes import slices
from fedvfm.inference import boxes, inputs, predict, propagation
from tests.inference import test_predict_boxes as box_tests

Saver = Callable[..., Path]
NONE = np.zeros((0, 4))


@pytest.fixture(scope="session")
def adapter(saved: Saver, sam_folders: dict[str, Path]) -> Path:
    return saved(box_tests.TASK, backbone=sam_folders["sam"], input_size=[64, 64])


class Truth:
    """A model that draws, in each box, just what is there, and remembers what it was asked."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels, self.asked = labels, list[list[int]]()

    def __call__(self, told: Mapping[int, Any]) -> dict[int, Any]:
        self.asked.append(sorted(told))
        masks = {}
        for at, own in told.items():
            masks[at] = np.zeros(self.labels.shape[1:], dtype=np.uint8)
            for number, listed in enumerate(own):
                for box in listed:
                    part = propagation.inside(self.labels[at] == number + 1, box)
                    masks[at][part] = number + 1
        return masks


def cones() -> np.ndarray:
    """(D, H, W) = (21, 40, 60): two objects of class 1 that drift apart, one of class 2 that ends at slice 14."""
    labels = np.zeros((21, 40, 60), dtype=np.uint8)
    rows, columns = np.mgrid[:40, :60]
    for at in range(3, 18):
        radius = 6 - 0.5 * abs(at - 10)
        for middle in (14 - 0.5 * (at - 10), 40 + 0.5 * (at - 10)):
            labels[at][(rows - 12) ** 2 + (columns - middle) ** 2 <= radius**2] = 1
    labels[6:15, 26:34, 20:35] = 2
    return labels


def box_of(labels: np.ndarray, at: int, number: int, side: slice = slice(None)) -> list[float]:
    rows, columns = np.nonzero(labels[at][:, side] == number)
    left = side.start or 0
    return [columns.min() + left, rows.min(), columns.max() + left, rows.max()]


def test_objects_are_followed_to_both_ends_each_by_itself() -> None:
    labels = cones()
    both = np.array([box_of(labels, 10, 1, slice(0, 30)), box_of(labels, 10, 1, slice(30, 60))], dtype=np.float64)
    draw = Truth(labels)
    found, masks = propagation.follow({10: (both, NONE)}, 21, 20, draw)
    expected = np.where(labels == 1, 1, 0)
    for at in range(21):
        large = (expected[at] > 0).sum() >= 2 * propagation.LEAST
        if large:
            np.testing.assert_array_equal(masks[at], expected[at])
            assert [len(listed) for listed in found[at]] == [2, 0]
    assert draw.asked[:3] == [[10], [9, 11], [8, 12]], "the nearest slices first"
    assert set(masks) <= set(range(2, 19)), "and none behind the ends"
    assert not masks[max(masks)].any() or (expected[max(masks)] > 0).any()


def test_a_box_of_the_file_stands_and_classes_share_a_slice() -> None:
    """Class 2 comes from another slice than class 1; where both are, they are drawn together."""
    labels = cones()
    wanted = np.array([box_of(labels, 8, 2)], dtype=np.float64)
    other = np.array([box_of(labels, 14, 2)], dtype=np.float64)
    first = np.array([box_of(labels, 10, 1, slice(0, 30))], dtype=np.float64)
    found, masks = propagation.follow({8: (NONE, wanted), 10: (first, NONE), 14: (NONE, other)}, 21, 20, Truth(labels))
    np.testing.assert_array_equal(found[14][1], other)
    for at in range(6, 15):
        assert (masks[at] == 2).sum() == (labels[at] == 2).sum(), at
        assert (masks[at] == 1).sum() == (labels[at][:, :28] == 1).sum(), at
    assert not any((masks[at] == 2).any() for at in masks if not 6 <= at <= 14)


def test_a_mask_that_jumps_or_is_too_small_ends_it_and_is_left_out() -> None:
    labels = np.zeros((6, 30, 30), dtype=np.uint8)
    labels[:3, 5:15, 5:15] = 1
    labels[3, 15:16, 5:15] = 1  # beside the mask of the slice before, in its box's margin
    labels[4, 5:15, 5:15] = 1
    given = {1: (np.array([[5.0, 5, 14, 14]]),)}
    _, masks = propagation.follow(given, 6, 5, Truth(labels))
    assert sorted(masks) == [0, 1, 2, 3]
    assert not masks[3].any()
    labels[3] = 0
    labels[3, 5, 5 : 4 + propagation.LEAST] = 1
    _, masks = propagation.follow(given, 6, 5, Truth(labels))
    assert not masks[3].any()
    assert 4 not in masks


def test_a_mask_of_quite_another_size_ends_it_and_is_left_out() -> None:
    labels = np.zeros((5, 40, 40), dtype=np.uint8)
    labels[:2, 10:30, 10:30] = 1
    labels[2:, 10:22, 10:22] = 1  # 144 of 400 pixels: followed; a pixel a side less would be under a third
    given = {0: (np.array([[10.0, 10, 29, 29]]),)}
    _, masks = propagation.follow(given, 5, 4, Truth(labels))
    assert [bool(masks[at].any()) for at in sorted(masks)] == [True] * 5
    labels[2:, 21, :] = labels[2:, :, 21] = 0
    _, masks = propagation.follow(given, 5, 4, Truth(labels))
    assert [bool(masks[at].any()) for at in sorted(masks)] == [True, True, False]


def test_a_box_lies_evenly_between_two_slices_that_show_one_object() -> None:
    first, last = np.array([[10.0, 10, 20, 20]]), np.array([[14.0, 10, 24, 30]])
    found = propagation.between({2: (first, NONE), 6: (last, NONE)}, 4)
    assert list(found) == [2, 3, 4, 5, 6]
    np.testing.assert_array_equal(found[3][0], [[11, 10, 21, 22.5]])
    assert all(not len(own[1]) for own in found.values())
    far, both = np.array([[40.0, 40, 50, 50]]), np.concatenate([last, last + 20])
    for other, steps in ((far, 4), (both, 4), (last, 1)):
        given = {2: (first, NONE), 6: (other, NONE)}
        assert list(propagation.between(given, steps)) == [2, 6], "another object, several, or too far"
    stands = propagation.between({2: (first, NONE), 4: (NONE, far), 6: (last, NONE)}, 4)
    np.testing.assert_array_equal(stands[4][1], far)
    np.testing.assert_array_equal(stands[4][0], [[12, 10, 22, 25]])


def test_what_ended_does_not_come_back_with_another_class() -> None:
    """Class 1 ends at slice 4, which class 2 reaches later: it is drawn again, without the end."""
    labels = np.zeros((12, 40, 40), dtype=np.uint8)
    labels[:4, 5:15, 5:15] = 1
    labels[4, 5, 5 : 4 + propagation.LEAST] = 1
    labels[3:, 25:35, 25:35] = 2
    given = {2: (np.array([[5.0, 5, 14, 14]]), NONE), 8: (NONE, np.array([[25.0, 25, 34, 34]]))}
    found, masks = propagation.follow(given, 12, 11, Truth(labels))
    assert not (masks[4] == 1).any()
    np.testing.assert_array_equal(masks[4] == 2, labels[4] == 2)
    assert [len(listed) for listed in found[4]] == [0, 1]
    assert 2 in masks, "of class 2 there is nothing, and its box ends"
    assert [len(listed) for listed in found[2]] == [1, 0]
    np.testing.assert_array_equal(masks[2], labels[2])


def test_what_ended_leaves_no_hole_in_another_class() -> None:
    """A lesion of one slice in an organ: in its boxes beside that slice the model draws a stain, on the organ."""
    organ, lesion = (slice(5, 55), slice(5, 55)), (slice(20, 32), slice(20, 32))

    def draw(told: Mapping[int, Any]) -> dict[int, Any]:
        masks = {}
        for at, (of_lesion, of_organ) in told.items():
            masks[at] = np.zeros((60, 60), dtype=np.uint8)
            masks[at][organ] = 2 * bool(len(of_organ))
            for left, top, *_ in np.asarray(of_lesion, dtype=int):
                masks[at][lesion if at == 2 else (slice(top, top + 4), slice(left, left + 3))] = 1
        return masks

    found, masks = propagation.follow({2: (np.array([[20.0, 20, 31, 31]]), np.array([[5.0, 5, 54, 54]]))}, 6, 2, draw)
    for at in (0, 1, 3, 4):
        assert [len(listed) for listed in found[at]] == [0, 1]
        assert (masks[at][organ] == 2).all(), at
    assert (masks[2] == 1).sum() == 12 * 12


def test_steps_bound_every_box_by_itself() -> None:
    labels = np.ones((30, 12, 12), dtype=np.uint8)
    given = {5: (np.array([[2.0, 2, 8, 8]]), NONE), 20: (NONE, np.array([[2.0, 2, 8, 8]]))}
    found, _ = propagation.follow(given, 30, 3, Truth(labels))
    assert sorted(found) == [2, 3, 4, 5, 6, 7, 8, 20], "no mask of class 2, so nothing leads on"
    assert propagation.follow(given, 30, 0, Truth(labels))[0].keys() == {5, 20}


def test_prediction_follows_a_box_as_far_as_it_is_told(adapter: Path, tmp_path: Path) -> None:
    """On the file's own grid; 7 mm are two slices of 3 mm, and the slice of the box is as without following."""
    box_tests.volume(tmp_path / "in" / "v.nii.gz", box_tests.AFFINES["RAS"], (40, 44, 9))
    given = box_tests.write(tmp_path / "b.json", {"v/z004": {"cell": [[5, 5, 34, 38]]}})
    plain = fedvfm.predict(adapter, tmp_path / "in", tmp_path / "plain", boxes=given)
    made = fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=given, propagate=7.0, overlays=True)
    (row,) = made["inputs"]
    assert "propagated" not in plain["inputs"][0]
    assert row["prompts"] == {"from": "file", "boxes": {"cell": 1, "wall": 0}}
    reached = row["propagated"]
    assert (reached["mm"], reached["slices_given"]) == (7.0, 1)
    assert 1 <= reached["slices_reached"] <= 4
    assert made["notes"][propagation.NOTE] == made["notes"][boxes.NOTE] == ["v"]
    one, other = (np.asarray(nibabel.load(tmp_path / name / "v.nii.gz").dataobj) for name in ("plain", "out"))
    np.testing.assert_array_equal(one[..., 4], other[..., 4])
    assert one[..., 4].any(), "the box leads to a mask, or this shows nothing"
    assert not other[..., [0, 1, 7, 8]].any()
    assert np.count_nonzero(other) > np.count_nonzero(one)


@pytest.mark.parametrize(("count", "followed"), [(1, False), (2, True)])
def test_one_slice_is_no_volume_and_nobody_says_that_its_box_was_followed(
    tmp_path: Path, count: int, followed: bool
) -> None:
    box_tests.volume(tmp_path / "v.nii.gz", box_tests.AFFINES["RAS"], (12, 10, count))
    given = box_tests.write(tmp_path / "b.json", {"v/z000": {"cell": [[1, 1, 5, 5]]}})
    (item,) = inputs.find(tmp_path)
    predictor = predict.Predictor.__new__(predict.Predictor)  # of a model nothing is asked
    predictor.view, predictor._propagate = slices.View(), 7.0
    predictor._prompts = boxes.read(given, tmp_path, [item], box_tests.CLASSES)
    assert (propagation.NOTE in predictor._noted(item, "nifti")) == followed


@pytest.mark.parametrize(
    ("propagate", "given", "words"),
    [(5.0, False, "give --boxes"), (-1.0, True, "give millimetres"), (float("nan"), True, "give millimetres")],
)
def test_a_reach_that_means_nothing_is_refused(
    adapter: Path, tmp_path: Path, propagate: float, given: bool, words: str
) -> None:
    box_tests.picture(tmp_path / "in" / "a.png")
    path = box_tests.write(tmp_path / "b.json", {"a": {"cell": [[0, 0, 9, 9]]}}) if given else None
    with pytest.raises(errors.ConfigError, match=words):
        fedvfm.predict(adapter, tmp_path / "in", tmp_path / "out", boxes=path, propagate=propagate)
