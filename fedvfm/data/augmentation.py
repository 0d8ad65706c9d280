"""Augmentations as operations of torch, on the device where the model computes.

The draws are those of :mod:`fedvfm.data.transforms`, from the same stream in the same order; values then agree to the
rounding of float32. Only the field of ``noise`` is another one: it is drawn on the device, from a seed of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedvfm.config import schema
from fedvfm.data import transforms


@dataclass(frozen=True)
class View:
    """An augmented image on the device.

    Attributes:
        image: in [0, 1], not normalised. Shapes: (3, h, w).
        mask: class numbers, or None. Shapes: (h, w).
    """

    image: Tensor
    mask: Tensor | None


Augmentation = Callable[[View, np.random.Generator], View]


def known(names: Sequence[str]) -> bool:
    """Whether all these augmentations can be computed here; others, of third parties perhaps, are NumPy's."""
    return all(name in _KNOWN for name in names)


def training_view(
    base: transforms.Prepared, contract: schema.DataContract, rng: np.random.Generator, device: str
) -> View:
    """As :func:`fedvfm.data.transforms.training_view`, on ``device``."""
    image, mask = transforms.cropped(base, contract, rng)
    view = View(_moved(image, device), None if mask is None else _moved(mask, device))
    for name in transforms.before_dropout(contract, base.absent):
        view = _KNOWN[name](view, rng)
    return _dark(view, transforms.dropped_beside(contract, base.absent, rng)) if base.absent else view


def normalise(batch: Tensor, contract: schema.DataContract) -> Tensor:
    """Subtract the contract's mean and divide by its standard deviation. Shapes: (B, 3, h, w)."""
    mean, std = (batch.new_tensor(values).reshape(1, 3, 1, 1) for values in (contract.mean, contract.std))
    return (batch - mean) / std


def _moved(array: np.ndarray, device: str) -> Tensor:
    found = torch.from_numpy(np.ascontiguousarray(array))
    # From pinned memory the copy goes on beside what the device computes.
    return found.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else found.to(device)


def _turned(view: View, turn: Callable[[Tensor], Tensor]) -> View:
    return View(turn(view.image), None if view.mask is None else turn(view.mask))


def _mirror(view: View, rng: np.random.Generator) -> View:
    return _turned(view, lambda one: one.flip(-1)) if rng.random() < 0.5 else view


def _flip(view: View, rng: np.random.Generator) -> View:
    view = _mirror(view, rng)
    return _turned(view, lambda one: one.flip(-2)) if rng.random() < 0.5 else view


def _rot90(view: View, rng: np.random.Generator) -> View:
    transforms.require_square(view.image.shape[-2:])
    turns = int(rng.integers(4))
    return _turned(view, lambda one: one.rot90(turns, (-2, -1)))


def _affine(view: View, rng: np.random.Generator) -> View:
    return View(*transforms.moved(view.image, view.mask, transforms.drawn_affine(view.image.shape[-2:], rng)))


def _intensity(view: View, rng: np.random.Generator) -> View:
    gamma, contrast, shift = transforms.drawn_intensity(rng)
    curved = view.image.pow(gamma)
    mean = curved.mean()
    return View(((curved - mean) * contrast + mean + shift).clamp(0.0, 1.0), view.mask)


def _invert(view: View, rng: np.random.Generator) -> View:
    return View(1.0 - view.image, view.mask) if rng.random() < 0.5 else view


def _noise(view: View, rng: np.random.Generator) -> View:
    level, seed = rng.uniform(0.0, transforms.MOST_NOISE), int(rng.integers(2**63))
    generator = torch.Generator(view.image.device).manual_seed(seed)
    field = torch.randn(view.image.shape, generator=generator, device=view.image.device)
    return View((view.image + level * field).clamp(0.0, 1.0), view.mask)


def _channel_dropout(view: View, rng: np.random.Generator) -> View:
    channel = transforms.dropped_channel(rng)
    if channel is None:
        return view
    return _dark(view, (channel,))


def _dark(view: View, channels: Sequence[int]) -> View:
    kept = torch.ones(3, 1, 1, device=view.image.device)
    kept[list(channels)] = 0.0
    return View(view.image * kept, view.mask)


_KNOWN: Mapping[str, Augmentation] = {
    "affine": _affine,
    "channel-dropout": _channel_dropout,
    "flip": _flip,
    "intensity": _intensity,
    "invert": _invert,
    "mirror": _mirror,
    "noise": _noise,
    "rot90": _rot90,
}
