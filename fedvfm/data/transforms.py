"""Pixels to what a backbone takes: prepared by the data contract, augmented in training, normalised in the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedvfm import registry
from fedvfm.config import schema
from fedvfm.data import defect
from fedvfm.data import sample as data

LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
PERCENTILES = (0.5, 99.5)
LEAST_CONTRAST = 1e-4
MOST_NOISE = 0.05
MOST_TURN = 15.0
MOST_ZOOM = 1.2
MOST_SHIFT = 0.05
FOREGROUND = 1 / 3
"""Of the pieces of a volume: those that have a voxel of a class in the middle."""

LARGEST_VOLUME = 2**29
"""Voxels of a resampled volume, 2 GiB in each channel: a recipe's spacing must not fill a site's memory."""

DROPOUT = "channel-dropout"

Image = NDArray[np.float32]
Mask = NDArray[np.int64]
Augmentation = Callable[[Image, Mask | None, np.random.Generator], tuple[Image, Mask | None]]

AUGMENTATIONS = registry.Table(
    "augmentation",
    {
        "affine": "fedvfm.data.transforms:affine",
        "channel-dropout": "fedvfm.data.transforms:channel_dropout",
        "flip": "fedvfm.data.transforms:flip",
        "intensity": "fedvfm.data.transforms:intensity",
        "invert": "fedvfm.data.transforms:invert",
        "mirror": "fedvfm.data.transforms:mirror",
        "noise": "fedvfm.data.transforms:noise",
        "rot90": "fedvfm.data.transforms:rot90",
    },
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image as the contract asks for it, or one whole volume, with an axis of slices before height and width.

    Attributes:
        image: float32 (3, h, w) in [0, 1] at the contract's input size, not yet normalised.
        mask: int64 (h, w) at the input size (nearest), or None.
        truth: int64 (H, W) as read; metrics are computed on this grid. None in classification.
        spacing: (row, column) millimetres of a pixel of ``truth``, or None.
        part: the slice it is of a volume, else None.
        absent: numbers of the channels that the site lacks; they are 0 everywhere, and stay so in every view.
    """

    image: Image
    mask: Mask | None
    truth: Mask | None
    spacing: tuple[float, ...] | None
    part: data.Part | None = None
    absent: tuple[int, ...] = ()


def blank(contract: schema.DataContract) -> Prepared:
    """What stands for an image that is not there, at the contract's input size: black, without truth."""
    return Prepared(np.zeros((3, *contract.patch_size), dtype=np.float32), None, None, None)


def prepare(pixels: data.Pixels, contract: schema.DataContract, num_classes: int, multiple: int = 1) -> Prepared:
    """Bring one image into the contract: grey, three channels, intensity, size.

    Shapes: ``pixels.image`` (C, H, W) with C 1 or 3 becomes (3, h, w): ``contract.input_size`` with
    ``fit = "resize"``, the image's own sides rounded to ``multiple`` with ``fit = "native"``; a volume
    (C, D, H, W) becomes (3, d, h, w), with ``contract.spacing`` of voxels of that size.

    Raises:
        DataError: for other channel counts, values that are not finite, a mask outside the classes or of another size,
            or as :func:`size_of`.
    """
    _check(pixels, num_classes)
    image = to_grey(pixels.image) if contract.grey else pixels.image
    _check_channels(image, contract)
    if pixels.absent:  # intensities are those of what is there
        image = np.delete(image, pixels.absent, axis=0)
    if contract.limits is not None:
        image = windowed(pixels, image, contract.limits)
    elif contract.intensity != "none":
        image = stretch(image, pixels.padded)
    if contract.intensity == "polarity" and float(np.median(_tissue(image, pixels.padded))) > 0.5:
        image = np.asarray(1.0 - image, dtype=np.float32)
        if pixels.padded is not None:
            image[:, pixels.padded] = 0.0
    image = resize(image, size := size_of(image.shape[1:], pixels.spacing, contract, multiple))
    if pixels.absent:
        image = refilled(image, pixels.absent)
    if image.shape[0] == 1:
        image = in_three(image)
    mask = None if pixels.mask is None else resize_mask(pixels.mask, size)
    return Prepared(image, mask, pixels.mask, pixels.spacing, pixels.part, pixels.absent)


def size_of(
    shape: Sequence[int], spacing: Sequence[float] | None, contract: schema.DataContract, multiple: int = 1
) -> tuple[int, ...]:
    """Sides of a prepared image.

    Args:
        shape: its own: (height, width), of a volume slices before them.
        spacing: of them, where it is known.
        contract: of the recipe.
        multiple: that the sides are rounded to.

    Raises:
        DataError: for a volume that must be resampled and does not say its spacing, or would have too many voxels.
    """
    if contract.fit == "resize":
        return contract.input_size
    if not contract.spacing:
        return rounded(shape, multiple)
    wanted = " x ".join(f"{size:g}" for size in contract.spacing)
    if spacing is None:
        raise defect.PIXEL_SIZE.error(
            f"a volume that does not say how large its voxels are, but recipe.data.spacing brings all to {wanted} mm; "
            "bring files that say it, or leave spacing out of the recipe"
        )
    size = rounded(
        [side * own / want for side, own, want in zip(shape, spacing, contract.spacing, strict=True)], multiple
    )
    if math.prod(size) > LARGEST_VOLUME:
        raise defect.TOO_LARGE.error(
            f"a volume of {' x '.join(map(str, size))} voxels of recipe.data.spacing = {wanted} mm; at most "
            f"{LARGEST_VOLUME:,} voxels are computed. Ask for a coarser spacing"
        )
    return size


def in_three(image: Image) -> Image:
    """One channel as three; of a volume without copies, since what is computed is cut from it.

    Shapes: (1, H, W) or (1, D, H, W).
    """
    # A copy in the usual order: another memory layout would choose other kernels and so other last bits.
    return np.repeat(image, 3, axis=0) if image.ndim == 3 else np.broadcast_to(image, (3, *image.shape[1:]))


def refilled(image: Image, absent: Sequence[int]) -> Image:
    """The channels that are there, and black ones at the places of those that are absent.

    Shapes: (C - number of absent ones, H, W) to (C, H, W).
    """
    whole = np.zeros((len(image) + len(absent), *image.shape[1:]), dtype=np.float32)
    whole[[at for at in range(len(whole)) if at not in absent]] = image
    return whole


def rounded(size: Sequence[float], multiple: int) -> tuple[int, ...]:
    """All sides at the nearest positive multiple."""
    return tuple(max(1, round(side / multiple)) * multiple for side in size)


def training_view(base: Prepared, contract: schema.DataContract, rng: np.random.Generator) -> Prepared:
    """One augmented view of a prepared image; with ``fit = "native"`` of a random crop of ``contract.patch_size``.

    An image smaller than the crop is mirrored at its borders. The truth is left out: views are not scored.
    """
    image, mask = cropped(base, contract, rng)
    image, mask = augment(image, mask, before_dropout(contract, base.absent), rng)
    if base.absent:
        image = image.copy()
        image[list(dropped_beside(contract, base.absent, rng))] = 0.0
    return Prepared(image, mask, None, base.spacing, absent=base.absent)


def before_dropout(contract: schema.DataContract, absent: Sequence[int]) -> tuple[str, ...]:
    """The augmentations that see all channels alike; of a site that lacks some, dropout is drawn beside those."""
    return tuple(name for name in contract.augment if name != DROPOUT) if absent else contract.augment


def dropped_beside(contract: schema.DataContract, absent: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """The channels that are black in a view where some are absent: those, and what is drawn, if another one is left."""
    drawn = dropped_channel(rng) if DROPOUT in contract.augment else None
    dark = sorted({*absent, *(() if drawn is None else (drawn,))})
    return tuple(dark) if len(dark) < 3 else tuple(absent)


def cropped(base: Prepared, contract: schema.DataContract, rng: np.random.Generator) -> tuple[Image, Mask | None]:
    """Image and mask; with ``fit = "native"`` a random crop of them."""
    if contract.fit == "native":
        return _crop(base.image, base.mask, contract.patch_size, rng)
    return base.image, base.mask


def _crop(image: Image, mask: Mask | None, size: Sequence[int], rng: np.random.Generator) -> tuple[Image, Mask | None]:
    short = [max(0, want - have) for want, have in zip(size, image.shape[1:], strict=True)]
    border = [(missing // 2, missing - missing // 2) for missing in short]
    if any(short):
        image = np.pad(image, [(0, 0), *border], mode="symmetric")
        mask = None if mask is None else np.pad(mask, border, mode="symmetric")
    starts = [int(rng.integers(have - want + 1)) for have, want in zip(image.shape[1:], size, strict=True)]
    if len(size) == 3 and mask is not None and rng.random() < FOREGROUND:
        starts = _around_a_class(mask, size, rng) or starts
    where = tuple(slice(start, start + side) for start, side in zip(starts, size, strict=True))
    return np.ascontiguousarray(image[:, *where]), None if mask is None else np.ascontiguousarray(mask[where])


def _around_a_class(mask: Mask, size: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Where a piece begins that has a voxel of a drawn class in the middle, as far as the volume reaches; [] of none.

    Small structures fill little of a volume, and most pieces drawn anywhere would be of background alone.
    Source: Isensee et al., "nnU-Net", Nature Methods 2021, supplementary note 2.
    """
    present = np.flatnonzero(np.bincount(mask.ravel())[1:]) + 1
    if not len(present):
        return []
    places = np.flatnonzero(mask == present[rng.integers(len(present))])
    middle = np.unravel_index(places[rng.integers(len(places))], mask.shape)
    return [
        int(np.clip(at - side // 2, 0, have - side)) for at, side, have in zip(middle, size, mask.shape, strict=True)
    ]


def _check(pixels: data.Pixels, num_classes: int) -> None:
    shape = pixels.image.shape
    if len(shape) not in (3, 4) or shape[0] not in (1, 3):
        raise defect.CHANNELS.error(f"an image of shape {shape}; (1 or 3, height, width) is needed")
    if not np.isfinite(pixels.image).all():
        raise defect.NOT_FINITE.error("an image with values that are no finite numbers; repair or remove it")
    if pixels.mask is None:
        return
    if pixels.mask.shape != shape[1:]:
        raise defect.MASK_SIZE.error(
            f"a mask of {pixels.mask.shape} pixels for an image of {shape[1:]}; repair or remove the pair"
        )
    low, high = int(pixels.mask.min()), int(pixels.mask.max())
    if low < 0 or high >= num_classes:
        value = low if low < 0 else high
        raise defect.MASK_VALUE.error(
            f"a mask with value {value}, but the {num_classes} classes are 0 to {num_classes - 1}; repair the mask or "
            "list all classes in recipe.data.class_names",
            [value],
        )


def _check_channels(image: Image, contract: schema.DataContract) -> None:
    """Refuse an image with other channels than the recipe names; a stack has its slice's neighbours besides.

    Raises:
        DataError: with both numbers.
    """
    have, named = len(image) // contract.stack, contract.channels
    if named and have != len(named):
        raise defect.CHANNELS.error(
            f"an image of {have} {'channel' if have == 1 else 'channels'}, but recipe.data.channels names {len(named)} "
            f"({', '.join(named)}); bring those, or ask for a recipe that fits"
        )


def to_grey(image: Image) -> Image:
    """(3, H, W) to luminance (1, H, W); grey images stay as they are."""
    if image.shape[0] == 1:
        return image
    weights = np.asarray(LUMINANCE, dtype=np.float32)
    return np.asarray(np.tensordot(weights, image, axes=1)[None], dtype=np.float32)


def windowed(pixels: data.Pixels, image: Image, limits: tuple[float, float]) -> Image:
    """Map the limits of a window to 0 and 1 and cut what is outside.

    Units: ``limits`` in those of ``pixels.units``.

    Raises:
        DataError: if the image has no units.
    """
    if pixels.units is None:
        raise defect.VOLUME_NEEDED.error(
            "an image without units (a picture, or colour), but recipe.data.window is in Hounsfield or other units; "
            "bring DICOM or NIfTI, or leave the window out of the recipe"
        )
    (dark, bright), (low, high) = pixels.units, limits
    values = image.astype(np.float64) * (bright - dark) + dark
    return np.asarray(np.clip((values - low) / (high - low), 0.0, 1.0), dtype=np.float32)


def _tissue(image: Image, padded: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """The values that are no padding; all of them where there is nothing else."""
    return image if padded is None or padded.all() else image[:, ~padded]


def stretch(image: Image, padded: NDArray[np.bool_] | None = None) -> Image:
    """Map the 0.5th and 99.5th percentile of the whole image to 0 and 1 and cut what is outside.

    ``padded`` (H, W) says which pixels are no grey values and set no percentile.

    Where these percentiles agree (a few bright spots on black), smallest and largest value take their place; an image
    without contrast becomes zeros.
    """
    tissue = _tissue(image, padded)
    low, high = (float(value) for value in np.percentile(tissue, PERCENTILES))
    if high - low < LEAST_CONTRAST:
        low, high = float(tissue.min()), float(tissue.max())
    if high - low < LEAST_CONTRAST:
        return np.zeros_like(image, dtype=np.float32)
    return np.asarray(np.clip((image - low) / (high - low), 0.0, 1.0), dtype=np.float32)


def resize(image: Image, size: Sequence[int]) -> Image:
    """Bilinear resize of (C, H, W) to (C, h, w), antialiased where it shrinks; of volumes trilinear, without."""
    if image.shape[1:] == tuple(size):
        return np.ascontiguousarray(image, dtype=np.float32)
    batch = torch.from_numpy(np.ascontiguousarray(image[None], dtype=np.float32))
    flat = len(size) == 2
    mode = "bilinear" if flat else "trilinear"
    out = torch.nn.functional.interpolate(batch, size=tuple(size), mode=mode, align_corners=False, antialias=flat)
    return np.asarray(np.clip(out[0].numpy(), 0.0, 1.0), dtype=np.float32)


def resize_mask(mask: Mask, size: Sequence[int]) -> Mask:
    """Nearest resize of (H, W) to (h, w), pixel centres on pixel centres; volumes alike."""
    places = (
        np.minimum(((np.arange(new) + 0.5) * old / new).astype(np.int64), old - 1)
        for old, new in zip(mask.shape, size, strict=True)
    )
    return np.ascontiguousarray(mask[np.ix_(*places)], dtype=np.int64)


def kept_dice(mask: Mask, size: Sequence[int]) -> dict[int, float]:
    """What a model scores that answers this mask, as training shows it in a size, without a fault.

    Its answer is enlarged to the image's own size, as every answer is before it is scored: what is finer than a cell of
    ``size`` is lost.

    Args:
        mask: (H, W) class numbers; 0 is the background.
        size: (h, w) of the model's input.

    Returns: Dice by class number, of the classes in the mask.
    """
    numbers, small = np.unique(mask), resize_mask(mask, size)
    best, answer = torch.full(mask.shape, -1.0), np.full(mask.shape, -1, dtype=np.int64)
    for number in numbers:
        own = torch.from_numpy(small == number)[None, None].float()
        own = torch.nn.functional.interpolate(own, size=mask.shape, mode="bilinear", align_corners=False)[0, 0]
        answer[(own > best).numpy()] = number
        best = torch.maximum(best, own)
    return {
        int(number): float(2 * ((mask == number) & (answer == number)).sum())
        / float((mask == number).sum() + (answer == number).sum())
        for number in numbers
        if number
    }


def normalise(batch: NDArray[np.float32], contract: schema.DataContract) -> NDArray[np.float32]:
    """Subtract the contract's mean and divide by its standard deviation.

    Shapes: (B, 3, h, w), or (B, 3, d, h, w), in, the same out, float32.
    """
    shape = (1, 3, *[1] * (batch.ndim - 2))
    mean, std = (np.asarray(values, dtype=np.float32).reshape(shape) for values in (contract.mean, contract.std))
    return np.asarray((batch - mean) / std, dtype=np.float32)


def augment(
    image: Image, mask: Mask | None, names: Sequence[str], rng: np.random.Generator
) -> tuple[Image, Mask | None]:
    """Apply the named augmentations in the order given; the draws depend on ``rng`` alone.

    Shapes: image (3, h, w) in [0, 1], mask (h, w) or None; the same out. The inputs are not changed.

    Raises:
        UnknownName: for a name that is not in :data:`AUGMENTATIONS`.
    """
    for name in names:
        apply: Augmentation = AUGMENTATIONS.get(name)
        image, mask = apply(image, mask, rng)
    return np.ascontiguousarray(image, dtype=np.float32), None if mask is None else np.ascontiguousarray(mask)


def _flip(image: Image, mask: Mask | None, axis: int) -> tuple[Image, Mask | None]:
    return np.flip(image, axis), None if mask is None else np.flip(mask, axis)


def mirror(image: Image, mask: Mask | None, rng: np.random.Generator) -> tuple[Image, Mask | None]:
    """Left and right change places in half of the cases."""
    return _flip(image, mask, -1) if rng.random() < 0.5 else (image, mask)


def flip(image: Image, mask: Mask | None, rng: np.random.Generator) -> tuple[Image, Mask | None]:
    """Left and right, and top and bottom, each change places in half of the cases; so do a volume's first and last."""
    image, mask = mirror(image, mask, rng)
    image, mask = _flip(image, mask, -2) if rng.random() < 0.5 else (image, mask)
    return _flip(image, mask, -3) if image.ndim == 4 and rng.random() < 0.5 else (image, mask)


def rot90(image: Image, mask: Mask | None, rng: np.random.Generator) -> tuple[Image, Mask | None]:
    """Turn by 0, 90, 180 or 270 degrees; a volume within its slices.

    Raises:
        DataError: if the input size is not square.
    """
    require_square(image.shape[-2:])
    turns, axes = int(rng.integers(4)), (-2, -1)
    return np.rot90(image, turns, axes), None if mask is None else np.rot90(mask, turns, axes)


def require_square(size: Sequence[int]) -> None:
    """Refuse to turn what would then have another shape.

    Raises:
        DataError: if height and width differ.
    """
    if size[0] != size[1]:
        raise defect.OPTIONS.error(
            f"augmentation 'rot90' needs a square input size, not {size[0]} x {size[1]}; change recipe.data.input_size "
            "or take 'flip'"
        )


def drawn_affine(size: Sequence[int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Where a pixel of the view lies in the image, for :func:`fedvfm.data.transforms.affine`.

    Shapes: ``size`` (h, w) to (2, 3). Units: both are counted from -1 to 1 along width, then height.
    """
    height, width = size
    turn = np.deg2rad(rng.uniform(-MOST_TURN, MOST_TURN))
    zoom = np.exp(rng.uniform(-1.0, 1.0) * np.log(MOST_ZOOM))
    across, down = rng.uniform(-2.0, 2.0, 2) * MOST_SHIFT
    cosine, sine = np.cos(turn) / zoom, np.sin(turn) / zoom
    # Angles are those of pixels: along the two axes -1 to 1 is another number of them.
    rows = [[cosine, -sine * height / width, across], [sine * width / height, cosine, down]]
    return np.asarray(rows, dtype=np.float32)


def moved(
    image: torch.Tensor, mask: torch.Tensor | None, where: NDArray[np.float32]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both at other places, on the image's device: bilinear, the nearest class of a mask; borders are mirrors.

    Shapes: image (3, ..., h, w), mask (..., h, w), where as :func:`drawn_affine` gives it; the same out.
    """
    places = torch.from_numpy(where).to(image.device)[None]

    def resampled(values: torch.Tensor, mode: str) -> torch.Tensor:
        flat = values.float().reshape(1, -1, *values.shape[-2:])
        grid = torch.nn.functional.affine_grid(places, list(flat.shape), align_corners=False)
        out = torch.nn.functional.grid_sample(flat, grid, mode, padding_mode="reflection", align_corners=False)
        return out.reshape(values.shape)

    return resampled(image, "bilinear").clamp_(0.0, 1.0), None if mask is None else resampled(mask, "nearest").long()


def affine(image: Image, mask: Mask | None, rng: np.random.Generator) -> tuple[Image, Mask | None]:
    """Turn by up to 15 degrees, 1/1.2 to 1.2 times as large, moved by up to 5 % of each side; borders are mirrors.

    A volume within its slices, all alike. Masks take the nearest class.
    """
    where, classes = drawn_affine(image.shape[-2:], rng), None if mask is None else torch.from_numpy(mask.copy())
    view, labels = moved(torch.from_numpy(np.ascontiguousarray(image)), classes, where)
    return view.numpy(), None if labels is None else labels.numpy()


def drawn_intensity(rng: np.random.Generator) -> tuple[float, float, float]:
    """Gamma, contrast and shift of :func:`intensity`."""
    gamma = np.exp(rng.uniform(-1.0, 1.0) * np.log(1.5))
    contrast = np.exp(rng.uniform(-1.0, 1.0) * np.log(1.25))
    return gamma, contrast, rng.uniform(-0.1, 0.1)


def intensity(image: Image, mask: Mask | None, rng: np.random.Generator) -> tuple[Image, Mask | None]:
    """Gamma from 2/3 to 3/2, contrast from 0.8 to 1.25 around the mean, brightness by up to 0.1."""
    gamma, contrast, shift = drawn_intensity(rng)
    curved = np.power(image, np.float32(gamma))
    mean = curved.mean()
    return np.clip((curved - mean) * contrast + mean + shift, 0.0, 1.0).astype(np.float32), mask


def invert(image: Image, mask: Mask | None, rng: np.random.Generator) -> tuple[Image, Mask | None]:
    """Dark and bright change places in half of the cases."""
    return (np.float32(1.0) - image if rng.random() < 0.5 else image), mask


def noise(image: Image, mask: Mask | None, rng: np.random.Generator) -> tuple[Image, Mask | None]:
    """Add Gaussian noise of a standard deviation up to 0.05."""
    level = rng.uniform(0.0, MOST_NOISE)
    return np.clip(image + level * rng.standard_normal(image.shape), 0.0, 1.0).astype(np.float32), mask


def dropped_channel(rng: np.random.Generator) -> int | None:
    """Which of three channels :func:`channel_dropout` takes away; None in half of the cases."""
    channel, drops = int(rng.integers(3)), rng.random() < 0.5
    return channel if drops else None


def channel_dropout(image: Image, mask: Mask | None, rng: np.random.Generator) -> tuple[Image, Mask | None]:
    """One of the three channels, drawn, is black in half of the cases; for channels of a meaning each."""
    channel = dropped_channel(rng)
    if channel is None:
        return image, mask
    image = image.copy()
    image[channel] = 0.0
    return image, mask
