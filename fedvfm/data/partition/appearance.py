"""Appearance: what one hospital's scanner does to an image, as a handful of numbers.

The traits (contrast, resolution, bias field, noise level) belong to the scanner; the noise itself belongs to the
image and is drawn from the stream the caller passes, so that the same image always looks the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import legendre
from numpy.random import Generator
from numpy.typing import NDArray

from fedvfm import errors

BIAS_DEGREE = 2


@dataclass(frozen=True, slots=True)
class Appearance:
    """One scanner. The defaults leave an image as it is.

    Attributes:
        inversion: share of contrast inversion, 0 (none) to 1 (``x -> 1 - x``, as T2 is to T1).
        air: intensity below which a pixel is air and stays dark under inversion; 0 inverts everything.
        gamma: exponent of the intensities; above 1 darkens the middle.
        resolution: size of a row and a column of the scan relative to the image, 0 (exclusive) to 1.
        bias: half width of the uniform draw of the bias field's Legendre coefficients (log scale).
        bias_seed: which bias field; the same for all images of the scanner.
        noise: standard deviation of additive Gaussian noise.
    """

    inversion: float = 0.0
    air: float = 0.0
    gamma: float = 1.0
    resolution: float = 1.0
    bias: float = 0.0
    bias_seed: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: listing every number out of its range.
        """
        faults = [
            f"{name} = {value}: give a number {range_}"
            for name, value, good, range_ in (
                ("inversion", self.inversion, 0 <= self.inversion <= 1, "from 0 to 1"),
                ("air", self.air, 0 <= self.air < 1, "from 0 to below 1"),
                ("gamma", self.gamma, 0 < self.gamma < math.inf, "above 0"),
                ("resolution", self.resolution, 0 < self.resolution <= 1, "above 0, at most 1"),
                ("bias", self.bias, 0 <= self.bias < math.inf, "not below 0"),
                ("bias_seed", self.bias_seed, 0 <= self.bias_seed < 2**32, "from 0 to 2**32 - 1"),
                ("noise", self.noise, 0 <= self.noise < math.inf, "not below 0"),
            )
            if not good
        ]
        if faults:
            raise errors.ConfigError("appearance", faults)

    @classmethod
    def draw(cls, rng: Generator, strength: float = 1.0) -> Appearance:
        """Draw a hospital's scanner.

        Args:
            rng: the hospital's stream.
            strength: 0 leaves images as they are, 1 is a strong shift; more is possible. A scanner inverts the contrast
                with probability ``strength / 4`` (at most 1/2).

        Raises:
            ConfigError: if ``strength`` is negative or not finite.
        """
        if not 0 <= strength < math.inf:
            raise errors.ConfigError("appearance", [f"strength = {strength}: give a finite number not below 0"])
        bias, log_gamma, blur, noise, invert = rng.uniform([0.2, -0.7, 0.0, 0.01, 0.0], [0.5, 0.7, 1.5, 0.06, 1.0])
        return cls(
            inversion=1.0 if invert < min(strength / 4, 0.5) else 0.0,
            gamma=math.exp(strength * log_gamma),
            resolution=1 / (1 + strength * blur),
            bias=strength * bias,
            bias_seed=int(rng.integers(2**32)),
            noise=strength * noise,
        )

    def apply(self, image: NDArray[np.float32], rng: Generator) -> NDArray[np.float32]:
        """The image as this scanner would have taken it.

        Contrast first, then resolution, then coil sensitivity, then receiver noise, as in a scanner; the bias field is
        rescaled so that the brightest pixel does not saturate.

        Args:
            image: float32 (C, H, W) in [0, 1]; not changed.
            rng: the image's own stream (site, sample, purpose).

        Returns:
            float32 (C, H, W) in [0, 1].
        """
        image = _biased(_coarse(_contrast(image, self), self.resolution), self.bias, self.bias_seed)
        image = _noisy(image, self.noise, int(rng.integers(2**32)))
        return np.clip(image, 0.0, 1.0).astype(np.float32)


def _contrast(image: NDArray[np.float32], appearance: Appearance) -> NDArray[np.float32]:
    """Inversion that keeps air dark, then gamma on the range [0, 1] (MONAI's works on the image's own range)."""
    if appearance.inversion:
        tissue = np.clip(image / appearance.air, 0.0, 1.0) if appearance.air else 1.0
        image = image + appearance.inversion * ((1.0 - image) * tissue - image)
    if appearance.gamma != 1.0:
        image = np.power(np.clip(image, 0.0, 1.0), appearance.gamma)
    return np.asarray(image, dtype=np.float32)


def _coarse(image: NDArray[np.float32], resolution: float) -> NDArray[np.float32]:
    """Area-averaged down and bilinearly up again."""
    if resolution == 1.0:
        return image
    from torch import from_numpy
    from torch.nn import functional

    own = image.shape[1:]
    low = [max(1, round(side * resolution)) for side in own]
    coarse = functional.interpolate(from_numpy(np.ascontiguousarray(image))[None], size=low, mode="area")
    fine = functional.interpolate(coarse, size=own, mode="bilinear", align_corners=False)[0]
    return np.asarray(fine, dtype=np.float32)


def _biased(image: NDArray[np.float32], bias: float, seed: int) -> NDArray[np.float32]:
    """A smooth multiplicative field, the exponential of Legendre polynomials, one for all channels.

    Source: Van Leemput et al., "Automated model-based tissue classification of MR images of the brain", IEEE TMI 1999;
        the draws are those of MONAI's ``RandBiasField``.
    """
    if bias == 0.0:
        return image
    coefficients = np.zeros((BIAS_DEGREE + 1, BIAS_DEGREE + 1))
    low = np.tril_indices(BIAS_DEGREE + 1)
    coefficients[low] = _stream(seed).uniform(-bias, bias, len(low[0]))
    rows, columns = (np.linspace(-1.0, 1.0, side, dtype=np.float32) for side in image.shape[1:])
    field = np.exp(legendre.leggrid2d(rows, columns, coefficients))
    biased = np.asarray(image * field, dtype=np.float32)
    peak = float(biased.max())
    return biased / peak * float(image.max()) if peak > 0 else biased


def _noisy(image: NDArray[np.float32], noise: float, seed: int) -> NDArray[np.float32]:
    if noise == 0.0:
        return image
    return image + _stream(seed).normal(0.0, noise, size=image.shape).astype(np.float32)


def _stream(seed: int) -> np.random.RandomState:
    """The stream of a MONAI transform with that seed: its first number decides whether the transform is applied."""
    stream = np.random.RandomState(seed)
    stream.rand()
    return stream
