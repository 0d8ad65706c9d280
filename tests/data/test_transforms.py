"""Pixels to the contract: sizes, intensities, masks that follow, and augmentations that stay in bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvfm import errors
from fedvfm.config import schema
from fedvfm.data import sample as data
from fedvfm.data import transforms
from fedvfm.tasks import segmentation


def contract(**values: object) -> schema.DataContract:
    return schema.DataContract.model_validate(
        {"class_names": ("background", "thing"), "input_size": (32, 48), **values}
    )


def square(height: int = 64, width: int = 96, channels: int = 1) -> data.Pixels:
    """A bright rectangle on dark, exactly where the mask says."""
    mask = np.zeros((height, width), dtype=np.int64)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 1
    image = np.where(mask, 0.8, 0.2).astype(np.float32)
    return data.Pixels(np.repeat(image[None], channels, axis=0), mask, (1.0, 2.0))


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(2, 150),
    width=st.integers(2, 150),
    channels=st.sampled_from([1, 3]),
    grey=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_image_fits_the_contract(height: int, width: int, channels: int, grey: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = data.Pixels(rng.random((channels, height, width), dtype=np.float32), rng.integers(0, 2, (height, width)))
    out = transforms.prepare(pixels, contract(grey=grey), 2)
    assert (out.image.shape, out.image.dtype) == ((3, 32, 48), np.float32)
    assert 0.0 <= out.image.min() <= out.image.max() <= 1.0
    assert out.mask is not None
    assert (out.mask.shape, out.mask.dtype) == ((32, 48), np.int64)
    assert out.truth is pixels.mask


def test_mask_and_image_stay_aligned() -> None:
    out = transforms.prepare(square(), contract(), 2)
    np.testing.assert_array_equal(out.image[0] > 0.5, out.mask == 1)
    assert out.spacing == (1.0, 2.0)
    larger = transforms.prepare(square(16, 24), contract(), 2)
    np.testing.assert_array_equal(larger.image[0] > 0.5, larger.mask == 1)


def test_percentiles_are_robust() -> None:
    image = np.linspace(0.3, 0.5, 10_000, dtype=np.float32).reshape(1, 100, 100)
    hot = image.copy()
    hot[0, 0, 0] = 1.0
    difference = np.abs(transforms.stretch(image) - transforms.stretch(hot))
    assert np.delete(difference.ravel(), 0).max() < 2e-3
    assert transforms.stretch(image).max() == 1.0
    assert not transforms.stretch(np.full((1, 8, 8), 0.7, dtype=np.float32)).any()
    spots = np.zeros((1, 100, 100), dtype=np.float32)
    spots[0, 5, 5] = 0.25
    assert transforms.stretch(spots)[0, 5, 5] == 1.0
    untouched = transforms.prepare(square(32, 48), contract(intensity="none"), 2)
    np.testing.assert_array_equal(np.unique(untouched.image), np.array([0.2, 0.8], dtype=np.float32))


def test_colour_keeps_its_ratio_and_grey_loses_it() -> None:
    pixels = square(32, 48, channels=3)
    pixels.image[0] *= 0.5
    kept = transforms.prepare(pixels, contract(), 2).image
    assert not np.array_equal(kept[0], kept[1])
    grey = transforms.prepare(pixels, contract(grey=True), 2).image
    np.testing.assert_array_equal(grey[0], grey[2])
    np.testing.assert_allclose(transforms.to_grey(np.ones((3, 2, 2), dtype=np.float32)), 1.0, rtol=1e-6)


def test_shrinking_is_antialiased() -> None:
    stripes = np.tile(np.array([0.0, 1.0], dtype=np.float32), (1, 64, 48))
    assert np.abs(transforms.resize(stripes, (16, 24)) - 0.5).max() < 0.1


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (data.Pixels(np.zeros((2, 8, 8), dtype=np.float32)), r"shape \(2, 8, 8\)"),
        (data.Pixels(np.full((1, 8, 8), np.nan, dtype=np.float32)), "no finite numbers"),
        (
            data.Pixels(np.zeros((1, 8, 8), dtype=np.float32), np.zeros((8, 9), dtype=np.int64)),
            r"mask of \(8, 9\) pixels",
        ),
        (
            data.Pixels(np.zeros((1, 8, 8), dtype=np.float32), np.full((8, 8), 5)),
            "mask with value 5, but the 2 classes are 0 to 1",
        ),
        (data.Pixels(np.zeros((1, 8, 8), dtype=np.float32), np.full((8, 8), -1)), "mask with value -1"),
    ],
)
def test_pixels_that_cannot_be_used(pixels: data.Pixels, expected: str) -> None:
    with pytest.raises(errors.DataError, match=expected):
        transforms.prepare(pixels, contract(), 2)


def test_normalise() -> None:
    batch = np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)
    out = transforms.normalise(batch, contract(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[1, 2], (batch[1, 2] - 0.3) / 2.0, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(transforms.AUGMENTATIONS))
def test_augmentations_keep_bounds_shape_and_alignment(name: str) -> None:
    prepared = transforms.prepare(square(64, 64), contract(input_size=(40, 40)), 2)
    image, before = prepared.image, prepared.image.copy()
    assert prepared.mask is not None
    seen = set()
    for seed in range(20):
        new, mask = transforms.augment(image, prepared.mask, (name,), np.random.default_rng(seed))
        again, _ = transforms.augment(image, prepared.mask, (name,), np.random.default_rng(seed))
        np.testing.assert_array_equal(new, again)
        assert (new.shape, new.dtype) == ((3, 40, 40), np.float32)
        assert 0.0 <= new.min() <= new.max() <= 1.0
        assert new.flags.c_contiguous
        assert mask is not None
        assert name == "affine" or mask.sum() == prepared.mask.sum()
        shown = new.max(axis=0)  # a channel may have been dropped
        inside, outside = shown[mask == 1].mean(), shown[mask == 0].mean()
        assert abs(inside - outside) > 0.5, "the mask no longer follows the image"
        seen.add(new.tobytes())
    assert len(seen) > 1
    np.testing.assert_array_equal(image, before)


def test_affine_turns_rigidly_scales_alike_and_moves_little() -> None:
    height, width, turns, zooms = 60, 90, [], []
    for seed in range(40):
        where = transforms.drawn_affine((height, width), np.random.default_rng(seed)).astype(np.float64)
        assert np.abs(where[:, 2]).max() <= 2 * transforms.MOST_SHIFT
        pixels = np.diag([width, height]) @ where[:, :2] @ np.diag([1 / width, 1 / height])
        np.testing.assert_allclose(pixels @ pixels.T, np.eye(2) * np.linalg.det(pixels), atol=1e-5)
        zooms.append(1 / np.sqrt(np.linalg.det(pixels)))
        turns.append(np.rad2deg(np.arctan2(pixels[1, 0], pixels[0, 0])))
    assert max(map(abs, turns)) <= 15
    assert max(turns) > 10 > -10 > min(turns)
    assert 1 / 1.2 - 1e-6 < min(zooms) < 0.9 < 1.1 < max(zooms) < 1.2 + 1e-6


def test_affine_moves_all_slices_of_a_volume_alike() -> None:
    flat = square(48, 60, channels=3).image
    volume, mask = np.repeat(flat[:, None], 4, axis=1), np.repeat((flat[0] > 0.5).astype(np.int64)[None], 4, axis=0)
    new, labels = transforms.augment(volume, mask, ("affine",), np.random.default_rng(1))
    one_slice, its_mask = transforms.augment(flat, mask[0], ("affine",), np.random.default_rng(1))
    assert labels is not None
    assert its_mask is not None
    assert not np.array_equal(one_slice, flat)
    np.testing.assert_array_equal(new, np.repeat(one_slice[:, None], 4, axis=1))
    np.testing.assert_array_equal(labels, np.repeat(its_mask[None], 4, axis=0))


def test_augmentations_join_in_order_and_need_no_mask() -> None:
    image = square(48, 48, channels=3).image
    new, mask = transforms.augment(image, None, ("rot90", "flip", "intensity", "noise"), np.random.default_rng(0))
    assert mask is None
    assert new.shape == image.shape
    with pytest.raises(errors.UnknownName, match=r"unknown augmentation 'flipp'.*nearest: 'flip'"):
        transforms.augment(image, None, ("flipp",), np.random.default_rng(0))
    with pytest.raises(errors.DataError, match="'rot90' needs a square input size, not 48 x 60"):
        transforms.augment(square(48, 60).image, None, ("rot90",), np.random.default_rng(0))


def stripes(width: int, size: int = 240, every: int = 24) -> np.ndarray:
    """Vertical stripes of class 1, so many pixels wide, and one broad square of class 2."""
    mask = ((np.arange(size) % every) < width).astype(np.int64)[None].repeat(size, axis=0)
    mask[:80, :80] = 2
    return mask


@pytest.mark.parametrize(("width", "kept"), [(1, (0.0, 0.6)), (3, (0.6, 0.9)), (12, (0.9, 1.0))])
def test_what_is_finer_than_the_model_s_pixels_is_lost(width: int, kept: tuple[float, float]) -> None:
    dice = transforms.kept_dice(stripes(width), (96, 96))
    assert kept[0] <= dice[1] <= kept[1]
    assert dice[2] > 0.95
    assert dice.keys() == {1, 2}, "the background is no structure"


def test_what_is_kept_is_the_score_of_an_answer_that_equals_the_training_mask() -> None:
    truth = stripes(3)
    small = torch.from_numpy(transforms.resize_mask(truth, (96, 96)))
    answer = segmentation.classes_at(torch.nn.functional.one_hot(small, 3).movedim(-1, 0), truth.shape)
    scored = {
        at: 2 * ((answer == at) & (truth == at)).sum() / ((answer == at).sum() + (truth == at).sum()) for at in (1, 2)
    }
    assert transforms.kept_dice(truth, (96, 96)) == pytest.approx(scored)


@pytest.mark.parametrize("size", [(240, 240), (480, 480)])
def test_nothing_is_lost_where_nothing_becomes_smaller(size: tuple[int, int]) -> None:
    assert transforms.kept_dice(stripes(3), size) == pytest.approx({1: 1.0, 2: 1.0}, abs=0.02)
