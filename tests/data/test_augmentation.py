"""Augmentations on the device give what NumPy gives from the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import augmentation, transforms


def contract(*names: str, fit: str = "resize", size: tuple[int, int] = (24, 24)) -> schema.DataContract:
    values = {"class_names": ["a", "b"], "input_size": list(size), "fit": fit, "augment": list(names)}
    return schema.parse(schema.DataContract, values, "contract")


def prepared(height: int = 24, width: int = 24, mask: bool = True) -> transforms.Prepared:
    rng = np.random.default_rng(3)
    image = rng.random((3, height, width), dtype=np.float32)
    return transforms.Prepared(image, rng.integers(0, 2, (height, width)) if mask else None, None, None)


def both(base: transforms.Prepared, asked: schema.DataContract, seed: int) -> tuple[Any, Any, list[float]]:
    streams = [np.random.default_rng(seed) for _ in range(2)]
    numpy = transforms.training_view(base, asked, streams[0])
    there = augmentation.training_view(base, asked, streams[1], "cpu")
    return numpy, there, [stream.random() for stream in streams]


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("mirror",),
        ("flip",),
        ("rot90",),
        ("intensity",),
        ("invert",),
        ("affine",),
        ("flip", "rot90", "intensity", "invert"),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(("fit", "height", "width"), [("resize", 24, 24), ("native", 50, 31), ("native", 10, 40)])
def test_the_same_draws_give_the_same_view(
    names: tuple[str, ...], mask: bool, fit: str, height: int, width: int
) -> None:
    base, before = prepared(height, width, mask), prepared(height, width, mask)
    for seed in range(12):
        numpy, there, left = both(base, contract(*names, fit=fit), seed)
        assert left[0] == left[1]  # as many draws were taken
        np.testing.assert_allclose(there.image.numpy(), numpy.image, rtol=1e-5, atol=1e-6)
        assert (there.mask is None) == (numpy.mask is None) == (not mask)
        if mask:
            assert there.mask.dtype == torch.int64
            np.testing.assert_array_equal(there.mask.numpy(), numpy.mask)
        np.testing.assert_array_equal(base.image, before.image)


def test_channel_dropout_takes_one_of_three_channels_in_half_of_the_views() -> None:
    base, names = prepared(), ("T1w", "T2w", "FLAIR")
    asked = schema.DataContract(
        class_names=("a", "b"), channels=names, augment=("channel-dropout",), input_size=(24, 24)
    )
    black = []
    for seed in range(60):
        numpy, there, left = both(base, asked, seed)
        assert left[0] == left[1]
        np.testing.assert_array_equal(there.image.numpy(), numpy.image)
        gone = [channel for channel in range(3) if not numpy.image[channel].any()]
        kept = [channel for channel in range(3) if channel not in gone]
        np.testing.assert_array_equal(numpy.image[kept], base.image[kept])
        black.append(tuple(gone))
    assert set(black) == {(), (0,), (1,), (2,)}
    assert 15 < black.count(()) < 45


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"augment": ["channel-dropout"]}, "three names in channels are needed"),
        (
            {"augment": ["channel-dropout", "noise"], "channels": ["T1w", "T2w", "FLAIR"]},
            "channel-dropout must be last",
        ),
    ],
)
def test_channel_dropout_is_for_three_named_channels_and_comes_last(values: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.ConfigError, match=said):
        schema.parse(schema.DataContract, {"class_names": ["a", "b"], **values}, "data")


def test_noise_has_its_level_and_its_seed() -> None:
    base = transforms.Prepared(np.full((3, 200, 200), 0.5, dtype=np.float32), None, None, None)
    levels = []
    for seed in range(6):
        level = np.random.default_rng(seed).uniform(0.0, transforms.MOST_NOISE)
        found = [augmentation.training_view(base, contract("noise"), np.random.default_rng(seed), "cpu") for _ in "ab"]
        assert torch.equal(found[0].image, found[1].image)
        assert float(found[0].image.std()) == pytest.approx(level, rel=0.02)
        assert float(found[0].image.mean()) == pytest.approx(0.5, abs=1e-3)
        levels.append(level)
    assert len(set(levels)) == 6


def test_all_of_ours_are_known_and_no_other() -> None:
    assert augmentation.known(sorted(transforms.AUGMENTATIONS))
    assert not augmentation.known(["flip", "elastic"])


def test_a_turn_needs_a_square() -> None:
    for make in (transforms.training_view, lambda *words: augmentation.training_view(*words, "cpu")):
        with pytest.raises(errors.DataError, match="needs a square input size, not 24 x 30"):
            make(prepared(24, 30), contract("rot90", size=(24, 30)), np.random.default_rng(0))


def test_normalised_as_by_numpy() -> None:
    asked, images = contract(), np.random.default_rng(0).random((2, 3, 9, 7), dtype=np.float32)
    found = augmentation.normalise(torch.from_numpy(images), asked)
    np.testing.assert_allclose(found.numpy(), transforms.normalise(images, asked), rtol=1e-6, atol=1e-6)
