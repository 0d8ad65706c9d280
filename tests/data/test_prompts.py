"""Prompts drawn from the truth: where they lie, how far they move, and that the same seed draws the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors, seeding
from fedvfm.config import schema
from fedvfm.data import prompts


def task(prompt: str, **more: Any) -> schema.TaskConfig:
    return schema.TaskConfig(prompt=prompt, **more)  # type: ignore[arg-type]


def mask_of(*boxes: tuple[int, int, int, int, int], size: tuple[int, int] = (40, 60)) -> np.ndarray:
    """Rows and columns of each class's box, ends included, over the earlier ones."""
    mask = np.zeros(size, dtype=np.int64)
    for number, top, left, bottom, right in boxes:
        mask[top : bottom + 1, left : right + 1] = number
    return mask


MASK = mask_of((1, 3, 5, 10, 25), (1, 20, 30, 30, 45), (3, 33, 50, 36, 58))


def test_a_box_without_jitter_is_the_bounding_box_of_all_objects_of_a_class() -> None:
    found = prompts.draw(MASK, 4, task("box", prompt_jitter=0.0), seeding.stream(0))
    assert found.present.tolist() == [True, False, True]
    assert found.boxes is not None
    assert found.boxes.dtype == np.float32
    assert found.boxes.tolist() == [[5, 3, 45, 30], [0, 0, 0, 0], [50, 33, 58, 36]]
    assert found.points is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    jitter=st.floats(0.0, 0.5),
    box=st.tuples(st.integers(0, 39), st.integers(0, 59), st.integers(0, 39), st.integers(0, 59)),
)
def test_jitter_moves_a_side_by_no_more_than_its_share_and_never_out_of_the_image(
    seed: int, jitter: float, box: tuple[int, int, int, int]
) -> None:
    top, bottom = sorted(box[::2])
    left, right = sorted(box[1::2])
    mask = mask_of((1, top, left, bottom, right))
    found = prompts.draw(mask, 2, task("box", prompt_jitter=jitter), seeding.stream(seed))
    assert found.boxes is not None
    (moved,) = found.boxes.astype(np.float64)
    most = jitter * np.array([right - left, bottom - top] * 2)
    assert (np.abs(moved - [left, top, right, bottom]) <= most + 1e-4).all()
    assert (moved >= 0).all()
    assert (moved <= [59, 39, 59, 39]).all()
    assert moved[0] <= moved[2] + 1e-4
    assert moved[1] <= moved[3] + 1e-4


def test_jitter_is_used_up_in_both_directions() -> None:
    mask = mask_of((1, 10, 10, 29, 49))
    boxes = [prompts.draw(mask, 2, task("box", prompt_jitter=0.25), seeding.stream(n)).boxes for n in range(400)]
    moves = np.stack([box[0] for box in boxes if box is not None]) - [10, 10, 49, 29]
    shares = moves / np.array([39, 19, 39, 19])
    assert np.abs(shares.mean(axis=0)).max() < 0.03
    assert (shares.max(axis=0) > 0.23).all()
    assert (shares.min(axis=0) < -0.23).all()
    np.testing.assert_allclose(shares.std(axis=0), 0.5 / np.sqrt(12), rtol=0.1)


def test_points_lie_on_their_class_and_reach_all_of_it() -> None:
    found = prompts.draw(MASK, 4, task("points", prompt_points=64), seeding.stream(1))
    assert found.points is not None
    assert found.points.shape == (3, 64, 2)
    for number, row in ((1, found.points[0]), (3, found.points[2])):
        assert (MASK[row[:, 1].astype(int), row[:, 0].astype(int)] == number).all()
    assert not found.points[1].any(), "class 2 is not there"
    assert {bool(x < 28) for x in found.points[0, :, 0]} == {True, False}, "both objects of class 1"
    drawn = np.concatenate(
        [
            found.points[0]
            for n in range(40)
            if (found := prompts.draw(mask_of((1, 5, 5, 6, 6)), 2, task("points", prompt_points=64), seeding.stream(n)))
            and found.points is not None
        ]
    )
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 4
    np.testing.assert_allclose(counts / counts.sum(), 0.25, atol=0.03)


@pytest.mark.parametrize("prompt", ["box", "points"])
def test_the_same_stream_draws_the_same_and_another_others(prompt: str) -> None:
    first, again, other = (prompts.draw(MASK, 4, task(prompt), seeding.stream(n)) for n in (5, 5, 6))
    for name in ("boxes", "points", "present"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    told = "boxes" if prompt == "box" else "points"
    assert not np.array_equal(getattr(first, told), getattr(other, told))


def test_without_a_mask_there_is_nothing_to_draw_from() -> None:
    with pytest.raises(errors.DataError, match=r"prompt = 'box' draws prompts from the mask.*give every image a mask"):
        prompts.draw(None, 2, task("box"), seeding.stream(0))


def test_what_is_said_of_prompts() -> None:
    assert prompts.describe(task("none")) == "" == task("none").oracle
    assert "(oracle prompt)" in prompts.describe(task("box"))
    assert "moved by up to 0.25 of the box's width or height" in prompts.describe(task("box", prompt_jitter=0.25))
    assert "told 3 points for each class" in prompts.describe(task("points", prompt_points=3))
    assert "told one point for each class" in prompts.describe(task("points"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "boxes"}, "prompt = 'boxes'"),
        ({"prompt": "box", "prompt_jitter": 0.6}, "prompt_jitter = 0.6"),
        ({"prompt": "points", "prompt_points": 0}, "prompt_points = 0"),
    ],
)
def test_form(change: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.ConfigError) as found:
        schema.parse(schema.TaskConfig, change, "task")
    assert said in str(found.value)
