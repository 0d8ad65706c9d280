"""A scanner's appearance: each number does what it says, and nothing but the given stream decides."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from fedvfm import errors, seeding
from fedvfm.data.partition import appearance

STRONG = appearance.Appearance(inversion=0.8, air=0.1, gamma=0.7, resolution=0.5, bias=0.3, bias_seed=5, noise=0.05)


def picture(channels: int = 1, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = 0.5 + 0.4 * np.sin(rows / 3) * np.cos(columns / 5)
    return np.stack([image * (1 - 0.2 * channel) for channel in range(channels)]).astype(np.float32)


def test_the_defaults_leave_an_image_as_it_is() -> None:
    image = picture(3)
    np.testing.assert_array_equal(appearance.Appearance().apply(image, seeding.stream(0)), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_stream_gives_the_same_bits_and_another_stream_other_noise(channels: int) -> None:
    image = picture(channels)
    before = image.copy()
    first = STRONG.apply(image, seeding.stream(0, "a"))
    np.testing.assert_array_equal(first, STRONG.apply(image, seeding.stream(0, "a")))
    assert np.abs(first - STRONG.apply(image, seeding.stream(0, "b"))).mean() > 0.01
    np.testing.assert_array_equal(image, before)
    assert first.dtype == np.float32
    assert first.shape == image.shape
    assert first.min() >= 0
    assert first.max() <= 1


def test_global_random_states_neither_matter_nor_move() -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index,union-attr]
    first = STRONG.apply(picture(), seeding.stream(0))
    np.testing.assert_array_equal(np.random.get_state()[1], states[0])  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[1])
    np.random.seed(2)
    torch.manual_seed(2)
    np.testing.assert_array_equal(STRONG.apply(picture(), seeding.stream(0)), first)


def test_inversion_and_gamma_by_hand() -> None:
    image = np.array([[[0.0, 0.05, 0.1, 0.5, 1.0]]], dtype=np.float32)
    apply = lambda **traits: appearance.Appearance(**traits).apply(image, seeding.stream(0))[0, 0]  # noqa: E731
    np.testing.assert_allclose(apply(inversion=1.0), [1, 0.95, 0.9, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(apply(inversion=0.5), 0.5, atol=1e-6)
    np.testing.assert_allclose(apply(inversion=1.0, air=0.1), [0, 0.475, 0.9, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(apply(gamma=2.0), [0, 0.0025, 0.01, 0.25, 1], atol=1e-6)


def test_noise_has_the_stated_deviation() -> None:
    grey = np.full((1, 200, 200), 0.5, dtype=np.float32)
    noisy = appearance.Appearance(noise=0.05).apply(grey, seeding.stream(0))
    assert noisy.std() == pytest.approx(0.05, rel=0.02)
    assert noisy.mean() == pytest.approx(0.5, abs=0.002)


def test_resolution_takes_detail_and_keeps_the_mean() -> None:
    image = np.indices((64, 64)).sum(axis=0)[None].astype(np.float32) % 2
    coarse = appearance.Appearance(resolution=0.5).apply(image, seeding.stream(0))
    np.testing.assert_allclose(coarse, 0.5, atol=1e-6)
    assert appearance.Appearance(resolution=0.01).apply(picture(1, (3, 1)), seeding.stream(0)).shape == (1, 3, 1)


def test_the_bias_field_is_smooth_one_for_all_images_and_channels_and_does_not_saturate() -> None:
    scanner = appearance.Appearance(bias=0.4, bias_seed=3)
    flat = np.stack([np.full((40, 56), level, dtype=np.float32) for level in (0.9, 0.6, 0.3)])
    field = scanner.apply(flat, seeding.stream(0)) / flat
    np.testing.assert_allclose(field[0], field[2], rtol=1e-5)
    np.testing.assert_allclose(scanner.apply(flat, seeding.stream(1)) / flat, field, rtol=1e-6)
    assert field.max() == pytest.approx(1.0)
    assert 0 < field.min() < 0.7
    assert max(np.abs(np.diff(np.log(field[0]), axis=axis)).max() for axis in (0, 1)) < 0.2
    other = appearance.Appearance(bias=0.4, bias_seed=4).apply(flat, seeding.stream(0)) / flat
    assert np.abs(other - field).mean() > 0.02
    black = np.zeros((1, 8, 8), dtype=np.float32)
    np.testing.assert_array_equal(scanner.apply(black, seeding.stream(0)), black)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(40, 56), (33, 21), (1, 7)])
def test_resolution_bias_field_and_noise_are_those_of_monai_s_transforms(channels: int, size: tuple[int, int]) -> None:
    """To the last bit, with the same seeds: what was drawn before this release is drawn again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn of optional packages
        from monai.transforms.intensity import array as intensities
        from monai.transforms.spatial import array as spatial
    image = picture(channels, size)
    for seed in (0, 7, 2**32 - 1):
        for resolution in (0.3, 0.5, 0.75):
            zoom = (resolution, resolution)
            reference = spatial.RandSimulateLowResolution(
                1.0, downsample_mode="area", upsample_mode="bilinear", zoom_range=zoom
            )
            np.testing.assert_array_equal(appearance._coarse(image, resolution), by_monai(reference, image, seed))
        biased = by_monai(intensities.RandBiasField(appearance.BIAS_DEGREE, (-0.4, 0.4), prob=1.0), image, seed)
        scaled = biased / float(biased.max()) * float(image.max())
        np.testing.assert_array_equal(appearance._biased(image, 0.4, seed), scaled)
        noise = intensities.RandGaussianNoise(1.0, std=0.05, sample_std=False)
        np.testing.assert_array_equal(appearance._noisy(image, 0.05, seed), by_monai(noise, image, seed))


def by_monai(transform: Any, image: np.ndarray, seed: int) -> np.ndarray:
    transform.set_random_state(state=np.random.RandomState(seed))
    return np.asarray(transform(torch.from_numpy(image.copy())), dtype=np.float32)


def test_draw_is_seeded_and_grows_with_the_strength() -> None:
    assert appearance.Appearance.draw(seeding.stream(0, "a")) == appearance.Appearance.draw(seeding.stream(0, "a"))
    assert appearance.Appearance.draw(seeding.stream(0, "a")) != appearance.Appearance.draw(seeding.stream(0, "b"))
    image = picture()
    weakest = appearance.Appearance.draw(seeding.stream(0, "a"), 0.0)
    np.testing.assert_array_equal(weakest.apply(image, seeding.stream(0)), image)
    changes = [
        np.mean(
            [
                np.abs(
                    appearance.Appearance.draw(seeding.stream(0, k), s).apply(image, seeding.stream(0)) - image
                ).mean()
                for k in range(8)
            ]
        )
        for s in (0.2, 0.6, 1.0)
    ]
    assert changes[0] < changes[1] < changes[2]


def test_all_bad_numbers_are_named_at_once() -> None:
    with pytest.raises(errors.ConfigError) as caught:
        appearance.Appearance(inversion=1.5, air=1.0, gamma=0.0, resolution=0.0, bias=-1.0, noise=float("nan"))
    assert [fault.split(" ")[0] for fault in caught.value.faults] == [
        "inversion",
        "air",
        "gamma",
        "resolution",
        "bias",
        "noise",
    ]
    with pytest.raises(errors.ConfigError, match="strength = -1"):
        appearance.Appearance.draw(seeding.stream(0), -1)
    with pytest.raises(errors.ConfigError, match="strength = nan"):
        appearance.Appearance.draw(seeding.stream(0), float("nan"))
