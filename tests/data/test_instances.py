"""Masks that number their objects: those that touch are drawn apart, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import instances
from fedvfm.data.sources import table
from fedvfm.tasks import boxes


def test_touching_objects_lose_the_pixels_where_they_touch() -> None:
    numbers = np.zeros((6, 10), np.int64)
    numbers[1:5, 1:5], numbers[1:5, 5:9] = 7, 300
    expected = np.zeros((6, 10), np.int64)
    expected[1:5, 1:4] = expected[1:5, 6:9] = 1
    assert (instances.apart(numbers) == expected).all()
    corner = np.array([[3, 0, 0], [3, 0, 0], [0, 4, 4]])
    assert instances.apart(corner).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_an_object_of_which_nothing_is_left_stays_and_touches_none() -> None:
    numbers = np.full((5, 5), 1)
    numbers[2, 2] = 2
    mask = instances.apart(numbers)
    assert mask[2, 2] == 1
    assert mask.sum() == 17
    assert len(boxes.of_mask(mask)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_as_many_boxes_as_discs(seed: int) -> None:
    """Discs that are drawn over each other: no two are one object, whichever way they touch."""
    rng, numbers = np.random.default_rng(seed), np.zeros((64, 64), np.int64)
    rows, columns = np.mgrid[:64, :64]
    for number in range(1, 13):
        y, x = rng.integers(6, 58, 2)
        numbers[(rows - y) ** 2 + (columns - x) ** 2 < 40] = number
    whole = sum(len(boxes.of_mask((numbers == number).astype(np.int64))) for number in range(1, 13))
    assert len(boxes.of_mask(instances.apart(numbers))) == whole


def test_an_object_that_would_fall_into_pieces_keeps_the_largest() -> None:
    numbers = np.zeros((7, 9), np.int64)
    numbers[2:5, :9], numbers[2, 3:5], numbers[4, 3:5] = 5, 8, 9  # a waist of one row between two others
    mask = instances.apart(numbers)
    of_five = (mask == 1) & (numbers == 5)
    assert of_five.nonzero()[1].min() == 6
    assert len(boxes.of_mask(of_five.astype(np.int64))) == 1


def source(folder: Path, **options: Any) -> Any:
    values = {"source": "folder", "path": str(folder), "options": options}
    return table.make(schema.parse(schema.SourceConfig, values, "data"))


def test_a_folder_of_instances(tmp_path: Path) -> None:
    numbers = np.zeros((8, 12), np.uint16)
    numbers[2:6, 1:6], numbers[2:6, 6:11] = 1, 1000
    for part, pixels in (("images", np.full((8, 12), 90, np.uint8)), ("masks", numbers)):
        (tmp_path / part).mkdir()
        Image.fromarray(pixels).save(tmp_path / part / "a.png")
    opened = source(tmp_path, instances=True)
    mask = opened.read(opened.samples()[0]).mask
    assert boxes.of_mask(mask).edges.tolist() == [[1, 2, 5, 6], [7, 2, 11, 6]]
    plain = source(tmp_path)
    with pytest.raises(errors.DataError, match="value 1000"):
        plain.read(plain.samples()[0])
    for options, word in (
        ({"instances": 1}, "true or false"),
        ({"instances": True, "mask_values": [0, 1]}, "without mask_values"),
        ({"instances": True, "class_names": ["rest", "a", "b"]}, "one class beside the background, not of rest, a, b"),
    ):
        with pytest.raises(errors.ConfigError, match=word):
            source(tmp_path, **options)
